"""Gradients of the gate and of its two weights, for D = 256; of tensors (tokens, neurons) only dX and dY are written.

A program has 64 neurons and iterates over all tokens, 64 at a time. Its weights stay in shared memory and the sums of
their gradients in registers. Tiles are transposed, (neurons, tokens), so that the registers with Z^T and dY^T are the
operands of the next products.

    forward_tiles:  Y^T = Ev A^T, Z = X o relu(Y) with dropout; dDec^T += Z^T dy. It passes Y with dropout on to
    backward_tiles: dZ^T = Dec^T dy^T, dX = dZ o Y, dY = dZ o X where Y > 0; dEv += dY^T A.
    load_tiles:     one warp, which prefetches two tiles.

Slot t % 2 has tile t of A, dy, X and Y; dX and dY replace the last two there and are stored from there.
"""

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
    NAN,
    arrive,
    barriers,
    fetch,
    hash_of_neurons,
    hash_of_tokens,
    run,
    store_tile,
    sync_warps,
    tile_descriptor,
    to_int32,
)

TOKENS = 64  # of a tile
NEURONS = 64  # of a program
WIDTH = 256  # D


@gluon.jit
def load_tiles(descs, buffers, bars, n, tiles):
    A_desc, dy_desc, X_desc, Ev_desc, Dec_desc, _, _ = descs
    A, dy, X, _, Ev, Dec = buffers
    weights_full, A_full, dy_full, X_full, _, A_empty, dy_empty, XY_empty = bars
    TOKENS: gl.constexpr = A_desc.block_type.shape[0]
    fetch(Ev_desc, [n, 0], weights_full.index(0), Ev)
    fetch(Dec_desc, [n, 0], weights_full.index(1), Dec)
    for t in range(tiles):
        slot = t % 2
        before = ((t // 2) & 1) ^ 1
        mbarrier.wait(dy_empty.index(slot), before)
        fetch(dy_desc, [t * TOKENS, 0], dy_full.index(slot), dy.index(slot))
        mbarrier.wait(A_empty.index(slot), before)
        fetch(A_desc, [t * TOKENS, 0], A_full.index(slot), A.index(slot))
        mbarrier.wait(XY_empty.index(slot), before)
        fetch(X_desc, [t * TOKENS, n], X_full.index(slot), X.index(slot))


@gluon.jit
def forward_tiles(buffers, bars, dDec, n, tiles, key, first_kept, D: gl.constexpr, DROPOUT: gl.constexpr):
    A, dy, X, Y, Ev, _ = buffers
    weights_full, A_full, dy_full, X_full, Y_full, A_empty, dy_empty, XY_empty = bars
    NEURONS: gl.constexpr = Ev.type.shape[0]
    TOKENS: gl.constexpr = X.type.shape[1]
    TILE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUM, k_width=2)
    pair, factor = hash_of_neurons(n, NEURONS, gl.SliceLayout(1, TILE))  # (NEURONS)
    total = gl.zeros([NEURONS, D], gl.float32, layout=SUM)
    zeros = gl.zeros([NEURONS, TOKENS], gl.float32, layout=TILE)
    zeros_bfloat16 = gl.full([NEURONS, TOKENS], 0.0, gl.bfloat16, layout=TILE)
    mbarrier.wait(weights_full.index(0), 0)
    for t in range(tiles):
        slot = t % 2
        turn = (t // 2) & 1
        mbarrier.wait(A_full.index(slot), turn)
        product = warpgroup_mma(Ev, A.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        product = warpgroup_mma_wait(0, deps=(product,))  # (NEURONS, TOKENS)
        arrive(A_empty.index(slot))
        y = gl.maximum(product, 0.0, propagate_nan=NAN).to(gl.bfloat16)  # (NEURONS, TOKENS)
        if DROPOUT:
            token = hash_of_tokens(t * TOKENS, key, TOKENS, gl.SliceLayout(0, TILE))  # (TOKENS)
            bits = (gl.expand_dims(token, 0) ^ gl.expand_dims(pair, 1)) * gl.expand_dims(factor, 1)
            y = gl.where(bits >= first_kept.to(gl.uint32), y, zeros_bfloat16)  # (NEURONS, TOKENS)
        mbarrier.wait(X_full.index(slot), turn)
        x = X.index(slot).permute((1, 0)).load(TILE)  # (NEURONS, TOKENS)
        mbarrier.wait(XY_empty.index(slot), turn ^ 1)
        Y.index(slot).permute((1, 0)).store(y)
        fence_async_shared()
        arrive(Y_full.index(slot))
        z = (x.to(gl.float32) * y.to(gl.float32)).to(gl.bfloat16)  # (NEURONS, TOKENS)
        z = gl.convert_layout(z, LEFT)
        mbarrier.wait(dy_full.index(slot), turn)
        total = warpgroup_mma(z, dy.index(slot), total, is_async=True)  # (NEURONS, D)
        total, z = warpgroup_mma_wait(0, deps=(total, z))
        arrive(dy_empty.index(slot))
    store_rows(dDec, total, n, D, SUM)


@gluon.jit
def backward_tiles(descs, buffers, bars, dEv, n, tiles, D: gl.constexpr):
    _, _, _, _, _, dX_desc, dY_desc = descs
    A, dy, X, Y, _, Dec = buffers
    weights_full, A_full, dy_full, X_full, Y_full, A_empty, dy_empty, XY_empty = bars
    NEURONS: gl.constexpr = Dec.type.shape[0]
    TOKENS: gl.constexpr = X.type.shape[1]
    TILE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUM, k_width=2)
    total = gl.zeros([NEURONS, D], gl.float32, layout=SUM)
    zeros = gl.zeros([NEURONS, TOKENS], gl.float32, layout=TILE)
    mbarrier.wait(weights_full.index(1), 0)
    for t in range(tiles):
        slot = t % 2
        turn = (t // 2) & 1
        mbarrier.wait(dy_full.index(slot), turn)
        dz = warpgroup_mma(Dec, dy.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        dz = warpgroup_mma_wait(0, deps=(dz,))  # (NEURONS, TOKENS)
        arrive(dy_empty.index(slot))
        tma.store_wait(0)  # the stores of the previous tile are complete
        sync_warps()
        mbarrier.arrive(XY_empty.index(slot ^ 1), count=1, pred=t > 0)
        mbarrier.wait(X_full.index(slot), turn)
        x = X.index(slot).permute((1, 0)).load(TILE)  # (NEURONS, TOKENS)
        mbarrier.wait(Y_full.index(slot), turn)  # and X has been read there
        y = Y.index(slot).permute((1, 0)).load(TILE).to(gl.float32)  # (NEURONS, TOKENS)
        dx = (dz * y).to(gl.bfloat16)  # (NEURONS, TOKENS)
        dy_pre = gl.where(y > 0, dz * x.to(gl.float32), zeros).to(gl.bfloat16)  # (NEURONS, TOKENS)
        X.index(slot).permute((1, 0)).store(dx)
        Y.index(slot).permute((1, 0)).store(dy_pre)
        fence_async_shared()
        sync_warps()
        store_tile(dX_desc, [t * TOKENS, n], X.index(slot))
        store_tile(dY_desc, [t * TOKENS, n], Y.index(slot))
        left = gl.convert_layout(dy_pre, LEFT)
        mbarrier.wait(A_full.index(slot), turn)
        total = warpgroup_mma(left, A.index(slot), total, is_async=True)  # (NEURONS, D)
        total, left = warpgroup_mma_wait(0, deps=(total, left))
        arrive(A_empty.index(slot))
    tma.store_wait(0)
    store_rows(dEv, total, n, D, SUM)


@gluon.jit
def store_rows(out, total, n, D: gl.constexpr, SUM: gl.constexpr):
    """Store a program's rows of a matrix (N, D)."""
    r = n + gl.arange(0, total.type.shape[0], layout=gl.SliceLayout(1, SUM))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, SUM))
    gl.store(out + gl.expand_dims(r, 1) * D + gl.expand_dims(d, 0), total)


@gluon.jit(do_not_specialize=["key", "first_kept", "tiles"])
def hopper_gate_backward(
    A_desc,  # (M, D), normalised
    dy_desc,  # (M, D)
    X_desc,  # (M, N)
    Ev_desc,  # (N, D)
    Dec_desc,  # (N, D)
    dX_desc,  # (M, N), out
    dY_desc,  # (M, N), out
    dDec,  # (N, D) float32, out
    dEv,  # (N, D) float32, out
    key,
    first_kept,
    tiles,
    DROPOUT: gl.constexpr,
):
    TOKENS: gl.constexpr = A_desc.block_type.shape[0]
    D: gl.constexpr = A_desc.block_type.shape[1]
    NEURONS: gl.constexpr = Ev_desc.block_type.shape[0]
    n = gl.program_id(0) * NEURONS
    A = gl.allocate_shared_memory(gl.bfloat16, [2, TOKENS, D], A_desc.layout)
    dy = gl.allocate_shared_memory(gl.bfloat16, [2, TOKENS, D], dy_desc.layout)
    X = gl.allocate_shared_memory(gl.bfloat16, [2, TOKENS, NEURONS], X_desc.layout)
    Y = gl.allocate_shared_memory(gl.bfloat16, [2, TOKENS, NEURONS], X_desc.layout)
    Ev = gl.allocate_shared_memory(gl.bfloat16, [NEURONS, D], Ev_desc.layout)
    Dec = gl.allocate_shared_memory(gl.bfloat16, [NEURONS, D], Dec_desc.layout)
    full = (barriers(2, 1), barriers(2, 1), barriers(2, 1), barriers(2, 1), barriers(2, 1))  # weights, A, dy, X, Y
    empty = (barriers(2, 2), barriers(2, 2), barriers(2, 1))  # A and dy, which two partitions read; X and Y
    fence_async_shared()
    descs = (A_desc, dy_desc, X_desc, Ev_desc, Dec_desc, dX_desc, dY_desc)
    buffers = (A, dy, X, Y, Ev, Dec)
    gl.warp_specialize(
        [
            (forward_tiles, (buffers, full + empty, dDec, n, tiles, key, first_kept, D, DROPOUT)),
            (backward_tiles, (descs, buffers, full + empty, dEv, n, tiles, D)),
            (load_tiles, (descs, buffers, full + empty, n, tiles)),
        ],
        [4, 1],
        [240, 24],
    )


def fits(M: int, N: int, D: int) -> bool:
    return M % TOKENS == 0 and N % NEURONS == 0 and D == WIDTH


def gate_backward(
    dy: Tensor, Dec: Tensor, A: Tensor, Ev: Tensor, X: Tensor, key: int, dropped: int, dDec: Tensor, dEv: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute dY and dX (M, N), and the sums dDec = Z^T dy and dEv = dY^T A, (N, D) float32, filled.

    Args:
        dy: (M, D) bfloat16.
        Dec: (N, D) bfloat16.
        A: Normalised, (M, D) bfloat16.
        Ev: (N, D) bfloat16.
        X: (M, N) bfloat16.
        key: Of dropout, 32 bits, signed.
        dropped: How many of 2^16 random numbers drop.
        dDec: (N, D) float32, filled.
        dEv: (N, D) float32, filled.
    """
    (M, D), N = A.shape, len(Ev)
    dX, dY = torch.empty_like(X), torch.empty_like(X)  # (M, N)
    arguments = (
        *(tile_descriptor(tensor, TOKENS, D) for tensor in (A, dy)),
        tile_descriptor(X, TOKENS, NEURONS),
        *(tile_descriptor(weight, NEURONS, D) for weight in (Ev, Dec)),
        *(tile_descriptor(tensor, TOKENS, NEURONS) for tensor in (dX, dY)),
        dDec, dEv, key, to_int32(dropped << 16), M // TOKENS,
    )  # fmt: skip
    run(hopper_gate_backward, N // NEURONS, arguments, DROPOUT=dropped > 0)
    return dY, dX
