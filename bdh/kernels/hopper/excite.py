"""X = relu(x E^T) and R = rope(X), for D = 256.

A program keeps the weights of 256 neurons in shared memory and iterates over tiles of 64 tokens: over the positions of
a chunk, and at each position over chunks, so that the phases of a position stay in registers.

    load_tiles:   one warp, which prefetches x in blocks of columns.
    excite_tiles: two groups of four warps. Each multiplies 64 tokens by 128 neurons, rotates the pairs and stores both.

With D = 512 the weights do not fit into shared memory; `excite_512` keeps tokens instead.
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
    num_splits,
    run,
    store_tile,
    sync_warps,
    tile_descriptor,
    tile_position,
)
from bdh.kernels.triton.launch import cdiv

TOKENS = 64  # of a group
NEURONS = 128  # of a group
COLUMNS = 128  # of a block of x or E
STORED = 64  # neurons that are rotated and stored at a time
WIDTH = 256  # D

TILE = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, NEURONS, 16]))
HALF = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, STORED, 16]))
PAIRS = gl.constexpr(  # (TOKENS, STORED / 2): a pair is in the thread that has its two neurons in HALF
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0], [0, 4], [0, 8], [0, 16]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[TOKENS, STORED // 2],
    )
)


@gluon.jit
def load_tiles(x_desc, E_desc, buffers, bars, n, first, tiles, G, C, D: gl.constexpr):
    x, E = buffers
    x_full, x_empty, E_full = bars
    TOKENS: gl.constexpr = x_desc.block_type.shape[0]
    NEURONS: gl.constexpr = E_desc.block_type.shape[0]
    COLUMNS: gl.constexpr = x_desc.block_type.shape[1]
    BLOCKS: gl.constexpr = D // COLUMNS
    SLOTS: gl.constexpr = x.type.shape[0]
    for h in gl.static_range(2):
        for k in gl.static_range(BLOCKS):
            fetch(E_desc, [n + h * NEURONS, k * COLUMNS], E_full.index(0), E.index(h * BLOCKS + k))
    for t in range(tiles):
        m, _ = tile_position(first + t, G, C, TOKENS)
        for k in gl.static_range(BLOCKS):
            i = t * BLOCKS + k
            slot = i % SLOTS
            mbarrier.wait(x_empty.index(slot), ((i // SLOTS) & 1) ^ 1)
            fetch(x_desc, [m, k * COLUMNS], x_full.index(slot), x.index(slot))


@gluon.jit
def excite_tiles(
    X_desc, R_desc, phases, buffers, stored, bars, n, first, tiles, N, G, C, GROUP: gl.constexpr, D: gl.constexpr
):
    x, E = buffers
    _, _, E_full = bars
    TOKENS: gl.constexpr = X_desc.block_type.shape[0]
    STORED: gl.constexpr = X_desc.block_type.shape[1]
    NEURONS: gl.constexpr = E.type.shape[1]
    SLOTS: gl.constexpr = stored.type.shape[0]
    n += GROUP * NEURONS
    m, position = tile_position(first, G, C, TOKENS)
    left_phase, right_phase = load_phases(phases, position, n, N, TOKENS, NEURONS)  # 2 x (TOKENS, STORED / 2)
    mbarrier.wait(E_full.index(0), 0)
    for t in range(tiles):
        total = multiply(t, x, E, bars, GROUP, D)  # (TOKENS, NEURONS)
        left, right = total.reshape([TOKENS, 2, STORED]).permute((0, 2, 1)).split()  # 2 x (TOKENS, STORED)
        for h in gl.static_range(2):
            X, R = rotate(left if h == 0 else right, left_phase if h == 0 else right_phase)  # 2 x (TOKENS, STORED)
            i = 4 * t + 2 * h  # of the tiles that the group stores
            store_async(X_desc, [m, n + h * STORED], X, stored.index(i % SLOTS), SLOTS)
            store_async(R_desc, [m, n + h * STORED], R, stored.index((i + 1) % SLOTS), SLOTS)
        m, following = tile_position(first + gl.minimum(t + 1, tiles - 1), G, C, TOKENS)
        if following != position:
            left_phase, right_phase = load_phases(phases, following, n, N, TOKENS, NEURONS)
        position = following
    tma.store_wait(0)


@gluon.jit
def multiply(t, x, E, bars, GROUP: gl.constexpr, D: gl.constexpr):
    """Return x E^T of a group's tokens in tile t and its neurons, (TOKENS, NEURONS); release the blocks of x."""
    x_full, x_empty, _ = bars
    BLOCKS: gl.constexpr = D // E.type.shape[2]
    SLOTS: gl.constexpr = x.type.shape[0]
    TOKENS: gl.constexpr = x.type.shape[1]
    NEURONS: gl.constexpr = E.type.shape[1]
    total = gl.zeros([TOKENS, NEURONS], gl.float32, layout=TILE)
    for k in gl.static_range(BLOCKS):
        i = t * BLOCKS + k
        slot = i % SLOTS
        mbarrier.wait(x_full.index(slot), (i // SLOTS) & 1)
        weights = E.index(GROUP * BLOCKS + k).permute((1, 0))  # (COLUMNS, NEURONS)
        total = warpgroup_mma(x.index(slot), weights, total, use_acc=k > 0, is_async=True)
        if k > 0:
            total = warpgroup_mma_wait(1, deps=(total,))  # all but the last
            arrive(x_empty.index((i - 1) % SLOTS))
    total = warpgroup_mma_wait(0, deps=(total,))
    arrive(x_empty.index((t * BLOCKS + BLOCKS - 1) % SLOTS))
    return total


@gluon.jit
def load_phases(phases, position, n, N, TOKENS: gl.constexpr, NEURONS: gl.constexpr):
    """Load phases of tokens from a position, neurons from n, 2 x (TOKENS, NEURONS / 4): sine and cosine in 32 bits."""
    r = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, PAIRS))
    j = gl.arange(0, NEURONS // 4, layout=gl.SliceLayout(0, PAIRS))
    phases += position * (N // 2) + gl.minimum(n, N - NEURONS) // 2  # neurons past N, of any phases, are not stored
    places = phases + gl.expand_dims(r * (N // 2), 1) + gl.expand_dims(j, 0)  # (TOKENS, NEURONS / 4)
    return gl.load(places), gl.load(places + NEURONS // 4)


@gluon.jit
def rotate(y, phase):
    """Return relu(y), and that rotated by phases (TOKENS, STORED / 2), both (TOKENS, STORED) bfloat16."""
    y = gl.maximum(y, 0.0, propagate_nan=NAN)  # (TOKENS, STORED)
    even, odd = y.reshape([y.shape[0], y.shape[1] // 2, 2]).split()
    even = gl.convert_layout(even, PAIRS, assert_trivial=True)  # (TOKENS, STORED / 2)
    odd = gl.convert_layout(odd, PAIRS, assert_trivial=True)  # (TOKENS, STORED / 2)
    cos = (phase << 16).to(gl.float32, bitcast=True)  # (TOKENS, STORED / 2)
    sin = (phase & -65536).to(gl.float32, bitcast=True)  # (TOKENS, STORED / 2)
    rotated = gl.join(even * cos - odd * sin, odd * cos + even * sin).reshape(y.shape)  # (TOKENS, STORED)
    X = gl.convert_layout(y.to(gl.bfloat16), HALF, assert_trivial=True)  # (TOKENS, STORED)
    R = gl.convert_layout(rotated.to(gl.bfloat16), HALF, assert_trivial=True)  # (TOKENS, STORED)
    return X, R


@gluon.jit
def store_async(desc, coords, tile, slot, SLOTS: gl.constexpr):
    """Store a tile asynchronously from the next slot, after all but the last SLOTS - 1 stores have read theirs."""
    tma.store_wait(SLOTS - 1)
    sync_warps()
    slot.store(tile)
    fence_async_shared()
    sync_warps()
    store_tile(desc, coords, slot)


@gluon.jit(do_not_specialize=["N", "G", "C"])
def hopper_excite(
    x_desc,  # (M, D)
    E_desc,  # (N, D)
    X_desc,  # (M, N), out
    R_desc,  # (M, N), out
    phases,  # (C, N): cos and sin of each pair
    N,
    G,
    C,
    D: gl.constexpr,
):
    TOKENS: gl.constexpr = x_desc.block_type.shape[0]
    NEURONS: gl.constexpr = E_desc.block_type.shape[0]
    COLUMNS: gl.constexpr = x_desc.block_type.shape[1]
    STORED: gl.constexpr = X_desc.block_type.shape[1]
    SLOTS: gl.constexpr = 3  # for blocks of x, and for tiles that a group stores
    # Programs of one run are adjacent, so that they write long rows at a time.
    blocks = gl.cdiv(N, 2 * NEURONS)
    run, runs = gl.program_id(0) // blocks, gl.num_programs(0) // blocks
    n = gl.program_id(0) % blocks * 2 * NEURONS
    all_tiles = G * (C // TOKENS)
    first = run * all_tiles // runs
    tiles = (run + 1) * all_tiles // runs - first
    phases = phases.to(gl.pointer_type(gl.int32))
    E = gl.allocate_shared_memory(gl.bfloat16, [2 * (D // COLUMNS), NEURONS, COLUMNS], E_desc.layout)
    x = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, TOKENS, COLUMNS], x_desc.layout)
    stored = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, TOKENS, STORED], X_desc.layout)
    stored_second = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, TOKENS, STORED], X_desc.layout)
    x_full, x_empty = barriers(SLOTS, 1), barriers(SLOTS, 2)  # both groups read
    E_full = barriers(1, 2 * (D // COLUMNS))
    fence_async_shared()
    buffers, bars = (x, E), (x_full, x_empty, E_full)
    gl.warp_specialize(
        [
            (excite_tiles, (X_desc, R_desc, phases, buffers, stored, bars, n, first, tiles, N, G, C, 0, D)),
            (excite_tiles, (X_desc, R_desc, phases, buffers, stored_second, bars, n, first, tiles, N, G, C, 1, D)),
            (load_tiles, (x_desc, E_desc, buffers, bars, n, first, tiles, G, C, D)),
        ],
        [4, 1],
        [240, 24],
    )


def fits(C: int, N: int, D: int) -> bool:
    return D == WIDTH and N % NEURONS == 0 and C % TOKENS == 0


def excite(x: Tensor, E: Tensor, phases: Tensor, C: int, R: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """X = relu(x E^T) and R = rope(X), (G * C, N) bfloat16.

    Args:
        x: (G * C, D) bfloat16.
        E: (N, D) bfloat16.
        phases: cos and sin of each pair, (C, N) bfloat16.
        C: Tokens of a chunk.
        R: Where R is written, (G * C, N) bfloat16, contiguous; None allocates it.
    """
    (M, D), N = x.shape, len(E)
    blocks, tiles = cdiv(N, 2 * NEURONS), M // TOKENS
    X = torch.empty(M, N, dtype=x.dtype, device=x.device)  # (M, N)
    R = torch.empty_like(X) if R is None else R  # (M, N)
    arguments = (
        tile_descriptor(x, TOKENS, COLUMNS),
        tile_descriptor(E, NEURONS, COLUMNS),
        *(tile_descriptor(tensor, TOKENS, STORED) for tensor in (X, R)),
        phases, N, M // C, C,
    )  # fmt: skip
    run(hopper_excite, blocks * num_splits(blocks, tiles, 1, x.device), arguments, D=D)
    return X, R
