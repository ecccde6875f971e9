"""The gate and its gradients for D = 512, in three kernels; cuBLAS computes the other products.

    "gate":   A, Ev, X -> Z = X o relu(A Ev^T) with dropout.
    "back":   recomputes Z, and computes dX and dY from dZ, a product of cuBLAS.
    "ungate": dy, Dec, X, Z -> dX, dY, from the saved Z; dy and Dec take the roles of A and Ev below.

A program has 128 tokens and iterates over its part of the neurons, 128 a step. Its rows of A stay in registers, so that
Ev is read once for every 128 tokens, from the L2 cache. A Ev^T is not written to memory.

    multiply_tiles: two groups of four warps with 64 tokens each: compute A Ev^T, gate and store half of it at a time.
    load_ring, load_tiles: one warp for A and Ev, and one for each group's X and dZ.

A and Ev are loaded in pieces (128, 64) into one ring: first A, of which each group reads its half, then Ev, which both
read. The groups multiply in turns, so that the tensor cores compute for one group while the other gates. Each group has
slots for tiles (64, 64), two for each step. Results replace the inputs in their slots and are stored from there: "gate"
puts Z in place of X; "back" dY in place of X and dX in place of dZ, and has slots for Z; "ungate" dX in place of X and
dY in place of Z.
"""

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from bdh.kernels.hopper.device_functions import (
    arrive,
    barriers,
    fetch,
    hash_of_tokens,
    load_tile,
    num_splits,
    run,
    sync_warps,
    tile_descriptor,
    to_int32,
)
from bdh.kernels.hopper.gate_512_tiles import TILE, gate_tiles, narrow
from bdh.kernels.triton.launch import cdiv

TOKENS = 64  # of a tile: a group's
NEURONS = 64  # of a tile
PIECE = 128  # rows of A and Ev in a slot of the ring: a program's tokens, a step's neurons
COLUMNS = 64  # of a piece
WIDTH = 512  # D

PIECES = gl.constexpr(WIDTH // COLUMNS)  # of A, and of a step's Ev
RING = gl.constexpr(8)  # slots for pieces
SUM = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, PIECE, 16]))
LEFT = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=SUM.value, k_width=2))


@gluon.jit
def load_ring(descs, ring, bars, m, part, parts, count):
    A_desc, Ev_desc = descs[0], descs[1]
    ring_full, ring_empty, _, _, _ = bars
    PIECE: gl.constexpr = Ev_desc.block_type.shape[0]
    COLUMNS: gl.constexpr = Ev_desc.block_type.shape[1]
    for p in range(PIECES):  # the ring has a slot for each
        fetch(A_desc, [m, p * COLUMNS], ring_full.index(p), ring.index(p))
    p = PIECES
    for i in range(count):
        for k in range(PIECES):
            slot = p % RING
            mbarrier.wait(ring_empty.index(slot), ((p // RING) & 1) ^ 1)
            fetch(Ev_desc, [(part + i * parts) * PIECE, k * COLUMNS], ring_full.index(slot), ring.index(slot))
            p += 1


@gluon.jit
def load_tiles(descs, tiles, bars, m, part, parts, count, group: gl.constexpr, MODE: gl.constexpr):
    X_desc = descs[2]
    _, _, tiles_full, tiles_empty, _ = bars
    NEURONS: gl.constexpr = X_desc.block_type.shape[1]
    SLOTS: gl.constexpr = tiles[0].type.shape[0] // 2  # of the group
    for i in range(count):
        for h in range(2):
            t = 2 * i + h
            slot = group * SLOTS + t % SLOTS
            full = tiles_full.index(slot)
            n = (2 * (part + i * parts) + h) * NEURONS
            mbarrier.wait(tiles_empty.index(slot), ((t // SLOTS) & 1) ^ 1)
            mbarrier.expect(full, X_desc.block_type.nbytes * (1 if MODE == "gate" else 2))
            load_tile(X_desc, [m, n], full, tiles[0].index(slot))
            if MODE == "back":
                load_tile(descs[4], [m, n], full, tiles[2].index(slot))  # dZ
            if MODE == "ungate":
                load_tile(descs[3], [m, n], full, tiles[1].index(slot))  # Z


@gluon.jit
def multiply_tiles(
    descs, ring, tiles, bars, m, part, parts, count, key, first_kept,
    group: gl.constexpr, DROPOUT: gl.constexpr, MODE: gl.constexpr,
):  # fmt: skip
    """Compute tokens from m. Tokens from M on and neurons from N on are loaded as 0, and not stored."""
    ring_full, ring_empty, tiles_full, tiles_empty, turns = bars
    TOKENS: gl.constexpr = tiles[0].type.shape[1]
    NEURONS: gl.constexpr = tiles[0].type.shape[2]
    PIECE: gl.constexpr = ring.type.shape[1]
    SLOTS: gl.constexpr = tiles[0].type.shape[0] // 2  # of the group
    A = ()  # PIECES x (TOKENS, COLUMNS)
    for p in gl.static_range(PIECES):
        mbarrier.wait(ring_full.index(p), 0)
        A += (ring.index(p).slice(group * TOKENS, TOKENS, 0).load(LEFT),)  # (TOKENS, COLUMNS)
        arrive(ring_empty.index(p))
    token = hash_of_tokens(m, key, TOKENS, gl.SliceLayout(1, TILE))  # (TOKENS)
    zeros = gl.zeros([TOKENS, PIECE], gl.float32, layout=SUM)
    p = PIECES
    for i in range(count):
        if SLOTS == 2:  # first, because the step's tiles are loaded only then
            release(i, tiles_empty, group, SLOTS)
        # group 0 waits for the product that group 1 queued at i - 1, group 1 for that of group 0 at i
        mbarrier.wait(turns.index(group), (i & 1) ^ 1 ^ group)
        product = zeros
        for k in gl.static_range(PIECES):
            mbarrier.wait(ring_full.index(p % RING), (p // RING) & 1)
            weights = ring.index(p % RING).permute((1, 0))  # (COLUMNS, PIECE)
            product = warpgroup_mma(A[k], weights, product, use_acc=k > 0, is_async=True)
            if k == PIECES - 1:
                mbarrier.arrive(turns.index(1 - group), count=1)
            if k > 0:  # the previous piece has been read
                product = warpgroup_mma_wait(1, deps=(product,))
                arrive(ring_empty.index((p - 1) % RING))
            if SLOTS > 2 and k == 1:  # late enough for the stores before, early enough for the next tiles
                release(i, tiles_empty, group, SLOTS)
            p += 1
        product = warpgroup_mma_wait(0, deps=(product,))  # (TOKENS, PIECE)
        arrive(ring_empty.index((p - 1) % RING))
        left, right = product.reshape([TOKENS, 2, NEURONS]).permute((0, 2, 1)).split()  # 2 x (TOKENS, NEURONS)
        left = gl.convert_layout(left, TILE, assert_trivial=True)
        right = gl.convert_layout(right, TILE, assert_trivial=True)
        if MODE != "gate":
            left, right = narrow(left, MODE), narrow(right, MODE)
        n = (part + i * parts) * PIECE
        gate_tiles(left, 2 * i, m, n, token, first_kept, descs, tiles, tiles_full, group, DROPOUT, MODE)
        gate_tiles(right, 2 * i + 1, m, n + NEURONS, token, first_kept, descs, tiles, tiles_full, group, DROPOUT, MODE)
    tma.store_wait(0)


@gluon.jit
def release(i, tiles_empty, group: gl.constexpr, SLOTS: gl.constexpr):
    """Release the slots of the two tiles of the step before i, when their stores are complete."""
    tma.store_wait(0)
    sync_warps()
    for h in gl.static_range(2):
        mbarrier.arrive(tiles_empty.index(group * SLOTS + (2 * i - 2 + h + SLOTS) % SLOTS), count=1, pred=i > 0)


@gluon.jit
def program(descs, key, first_kept, steps, parts, SLOTS: gl.constexpr, DROPOUT: gl.constexpr, MODE: gl.constexpr):
    Ev_desc, X_desc = descs[1], descs[2]
    PIECE: gl.constexpr = Ev_desc.block_type.shape[0]
    COLUMNS: gl.constexpr = Ev_desc.block_type.shape[1]
    TOKENS: gl.constexpr = X_desc.block_type.shape[0]
    NEURONS: gl.constexpr = X_desc.block_type.shape[1]
    part = gl.program_id(0) % parts
    m = gl.program_id(0) // parts * PIECE
    count = (steps - part + parts - 1) // parts  # of steps part, part + parts, …
    ring = gl.allocate_shared_memory(gl.bfloat16, [RING, PIECE, COLUMNS], Ev_desc.layout)
    X = gl.allocate_shared_memory(gl.bfloat16, [2 * SLOTS, TOKENS, NEURONS], X_desc.layout)  # SLOTS of each group
    if MODE == "gate":
        tiles = (X, X)
    else:
        Z = gl.allocate_shared_memory(gl.bfloat16, [2 * SLOTS, TOKENS, NEURONS], X_desc.layout)
        tiles = (X, Z)
        if MODE == "back":
            dX = gl.allocate_shared_memory(gl.bfloat16, [2 * SLOTS, TOKENS, NEURONS], X_desc.layout)
            tiles = (X, Z, dX)
    ring_full, ring_empty = barriers(RING, 1), barriers(RING, 2)  # both groups read the ring
    tiles_full, tiles_empty = barriers(2 * SLOTS, 1), barriers(2 * SLOTS, 1)
    turns = barriers(2, 1)
    fence_async_shared()
    bars = (ring_full, ring_empty, tiles_full, tiles_empty, turns)
    other = m + TOKENS
    gl.warp_specialize(
        [
            (multiply_tiles, (descs, ring, tiles, bars, m, part, parts, count, key, first_kept, 0, DROPOUT, MODE)),
            (multiply_tiles, (descs, ring, tiles, bars, other, part, parts, count, key, first_kept, 1, DROPOUT, MODE)),
            (load_ring, (descs, ring, bars, m, part, parts, count)),
            (load_tiles, (descs, tiles, bars, m, part, parts, count, 0, MODE)),
            (load_tiles, (descs, tiles, bars, other, part, parts, count, 1, MODE)),
        ],
        [4, 1, 1, 1],
        [240, 24, 24, 24],
    )


@gluon.jit(do_not_specialize=["key", "first_kept", "steps", "parts"])
def hopper_gate_product(
    A_desc,  # (M, D), normalised
    Ev_desc,  # (N, D)
    X_desc,  # (M, N)
    Z_desc,  # (M, N), out
    key,
    first_kept,
    steps,
    parts,  # programs that share the neurons of a block
    DROPOUT: gl.constexpr,
):
    program((A_desc, Ev_desc, X_desc, Z_desc), key, first_kept, steps, parts, 4, DROPOUT, "gate")


@gluon.jit(do_not_specialize=["key", "first_kept", "steps", "parts"])
def hopper_gate_product_backward(
    A_desc,  # (M, D), normalised
    Ev_desc,  # (N, D)
    X_desc,  # (M, N)
    Z_desc,  # (M, N), out
    dX_desc,  # (M, N), in (dZ) and out
    dY_desc,  # (M, N), out
    key,
    first_kept,
    steps,
    parts,  # programs that share the neurons of a block
    DROPOUT: gl.constexpr,
):
    program((A_desc, Ev_desc, X_desc, Z_desc, dX_desc, dY_desc), key, first_kept, steps, parts, 2, DROPOUT, "back")


@gluon.jit(do_not_specialize=["key", "first_kept", "steps", "parts"])
def hopper_gate_product_backward_saved(
    dy_desc,  # (M, D)
    Dec_desc,  # (N, D)
    X_desc,  # (M, N)
    Z_desc,  # (M, N)
    dX_desc,  # (M, N), out
    dY_desc,  # (M, N), out
    key,  # not used
    first_kept,  # not used
    steps,
    parts,  # programs that share the neurons of a block
    DROPOUT: gl.constexpr,
):
    program((dy_desc, Dec_desc, X_desc, Z_desc, dX_desc, dY_desc), key, first_kept, steps, parts, 3, DROPOUT, "ungate")


def fits(M: int, N: int, D: int) -> bool:
    return M > 0 and N > 0 and N % 8 == 0 and D == WIDTH  # rows of X begin at multiples of 16 bytes


def launch_kernel(kernel: Any, A: Tensor, Ev: Tensor, tensors: tuple[Tensor, ...], key: int, dropped: int) -> None:
    """Launch a kernel, with its tensors (M, N) in order."""
    blocks, steps = cdiv(len(A), PIECE), cdiv(len(Ev), PIECE)
    parts = num_splits(blocks, steps, 4, A.device)
    arguments = (
        *(tile_descriptor(tensor, PIECE, COLUMNS) for tensor in (A, Ev)),
        *(tile_descriptor(tensor, TOKENS, NEURONS) for tensor in tensors),
        key, to_int32(dropped << 16), steps, parts,
    )  # fmt: skip
    run(kernel, blocks * parts, arguments, DROPOUT=dropped > 0)


def gate_product(A: Tensor, Ev: Tensor, X: Tensor, key: int, dropped: int) -> Tensor:
    """Compute Z = X o relu(A Ev^T) with dropout, (M, N).

    Args:
        A: Normalised, (M, D) bfloat16.
        Ev: (N, D) bfloat16.
        X: (M, N) bfloat16.
        key: Of dropout, 32 bits, signed.
        dropped: How many of 2^16 random numbers drop.
    """
    Z = torch.empty_like(X)  # (M, N)
    launch_kernel(hopper_gate_product, A, Ev, (X, Z), key, dropped)
    return Z


def gate_product_backward(
    A: Tensor, Ev: Tensor, X: Tensor, dX: Tensor, key: int, dropped: int
) -> tuple[Tensor, Tensor]:
    """Compute Z and dY, (M, N), and overwrite dZ with dX.

    Args:
        A: Normalised, (M, D) bfloat16.
        Ev: (N, D) bfloat16.
        X: (M, N) bfloat16.
        dX: dZ, (M, N) bfloat16, overwritten with dX.
        key: Of dropout, 32 bits, signed.
        dropped: How many of 2^16 random numbers drop.
    """
    Z, dY = torch.empty_like(X), torch.empty_like(X)  # (M, N)
    launch_kernel(hopper_gate_product_backward, A, Ev, (X, Z, dX, dY), key, dropped)
    return Z, dY


def gate_product_backward_saved(dy: Tensor, Dec: Tensor, X: Tensor, Z: Tensor) -> tuple[Tensor, Tensor]:
    """Compute dY and dX, (M, N), of dZ = dy Dec^T, which is not written to memory.

    Args:
        dy: (M, D) bfloat16.
        Dec: (N, D) bfloat16.
        X: (M, N) bfloat16.
        Z: As `gate_product` returns it, (M, N) bfloat16.
    """
    dX, dY = torch.empty_like(X), torch.empty_like(X)  # (M, N)
    launch_kernel(hopper_gate_product_backward_saved, dy, Dec, (X, Z, dX, dY), 0, 0)
    return dY, dX
