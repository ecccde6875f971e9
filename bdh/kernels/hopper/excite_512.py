"""X = relu(x E^T) and R = rope(X), for D = 512.

Each of a program's two groups keeps the rows of 64 tokens of x in registers; both read the weights of neurons, step by
step, from a ring of slots.

    load_tiles:   one warp, which loads x once and prefetches E, in blocks of columns.
    load_phases:  one warp, which prefetches phases, in tiles as they are rotated.
    excite_tiles: two groups of four warps; one multiplies while the other rotates pairs and stores.

Tiles of tokens are ordered by position in a chunk, then by chunk. A program has two consecutive tiles: for an even
number of chunks both have the same positions, and the groups SHARE phases.
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
    arrive,
    barriers,
    fetch,
    load_tile,
    num_splits,
    run,
    store_tile,
    sync_warps,
    tile_descriptor,
    tile_position,
)

TOKENS = 64  # of a group
NEURONS = 128  # of a step
COLUMNS = 64  # of a block of x or E
STORED = 64  # neurons that are rotated and stored at a time
WIDTH = 512  # D

BLOCKS = gl.constexpr(WIDTH // COLUMNS)
SLOTS = gl.constexpr(8)  # for blocks of E: at least BLOCKS, as both groups read a step's
PHASES = gl.constexpr(4)  # slots for tiles of phases, of both groups
STORES = gl.constexpr(4)  # slots for tiles that a group stores, an even number
TILE = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, NEURONS, 16]))
HALF = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, STORED, 16]))
ROWS = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=TILE.value, k_width=2))


@gluon.jit
def load_tiles(x_desc, E_desc, ring, full, empty, m, other, n, stride, steps):
    TOKENS: gl.constexpr = x_desc.block_type.shape[0]
    COLUMNS: gl.constexpr = x_desc.block_type.shape[1]
    for k in gl.static_range(BLOCKS):  # x uses the ring's first round, a group's tokens in each half of a slot
        mbarrier.expect(full.index(k), 2 * x_desc.block_type.nbytes)
        load_tile(x_desc, [m, k * COLUMNS], full.index(k), ring.index(k).slice(0, TOKENS, 0))
        load_tile(x_desc, [other, k * COLUMNS], full.index(k), ring.index(k).slice(TOKENS, TOKENS, 0))
    for u in range(steps):
        for k in gl.static_range(BLOCKS):
            i = (u + 1) * BLOCKS + k
            mbarrier.wait(empty.index(i % SLOTS), ((i // SLOTS) & 1) ^ 1)
            fetch(E_desc, [n + u * stride, k * COLUMNS], full.index(i % SLOTS), ring.index(i % SLOTS))


@gluon.jit
def load_phases(desc, phases, full, empty, position, other, n, stride, steps, SHARED: gl.constexpr):
    STORED: gl.constexpr = desc.block_type.shape[1]
    PARTS: gl.constexpr = 1 if SHARED else 2  # groups of a program's tokens with different phases
    for u in range(steps):
        for h in gl.static_range(2):
            for part in gl.static_range(PARTS):
                i = (2 * u + h) * PARTS + part
                mbarrier.wait(empty.index(i % PHASES), ((i // PHASES) & 1) ^ 1)
                row = position if part == 0 else other
                fetch(desc, [row, n + u * stride + h * STORED], full.index(i % PHASES), phases.index(i % PHASES))


@gluon.jit
def excite_tiles(
    X_desc, R_desc, ring, phases, stored, bars, m, n, stride, steps, GROUP: gl.constexpr, SHARED: gl.constexpr
):
    full, empty, phases_full, phases_empty = bars
    TOKENS: gl.constexpr = X_desc.block_type.shape[0]
    STORED: gl.constexpr = X_desc.block_type.shape[1]
    NEURONS: gl.constexpr = ring.type.shape[1]
    PARTS: gl.constexpr = 1 if SHARED else 2
    PART: gl.constexpr = 0 if SHARED else GROUP
    x = ()  # BLOCKS x (TOKENS, COLUMNS)
    for k in gl.static_range(BLOCKS):
        mbarrier.wait(full.index(k), 0)
        x += (ring.index(k).slice(GROUP * TOKENS, TOKENS, 0).load(ROWS),)
        arrive(empty.index(k))
    zeros = gl.zeros([TOKENS, NEURONS], gl.float32, layout=TILE)
    for u in range(steps):
        total = zeros  # x E^T, (TOKENS, NEURONS)
        for k in gl.static_range(BLOCKS):
            i = (u + 1) * BLOCKS + k
            mbarrier.wait(full.index(i % SLOTS), (i // SLOTS) & 1)
            weights = ring.index(i % SLOTS).permute((1, 0))  # (COLUMNS, NEURONS)
            total = warpgroup_mma(x[k], weights, total, use_acc=k > 0, is_async=True)
            if k > 0:
                total = warpgroup_mma_wait(1, deps=(total,))  # all but the last
                arrive(empty.index((i - 1) % SLOTS))
        total = warpgroup_mma_wait(0, deps=(total,))
        arrive(empty.index(((u + 1) * BLOCKS + BLOCKS - 1) % SLOTS))
        left, right = total.reshape([TOKENS, 2, STORED]).permute((0, 2, 1)).split()  # 2 x (TOKENS, STORED)
        for h in gl.static_range(2):
            i = (2 * u + h) * PARTS + PART
            mbarrier.wait(phases_full.index(i % PHASES), (i // PHASES) & 1)
            phase = phases.index(i % PHASES).load(HALF)  # (TOKENS, STORED)
            y = gl.convert_layout(left if h == 0 else right, HALF, assert_trivial=True)  # (TOKENS, STORED)
            X, R = rotate(y, phase)  # 2 x (TOKENS, STORED)
            slot = (2 * u + h) * 2 % STORES
            tma.store_wait(STORES - 2)  # the earlier stores from these two slots are complete
            sync_warps()
            mbarrier.arrive(phases_empty.index(i % PHASES), count=1)
            stored.index(slot).store(X)
            stored.index(slot + 1).store(R)
            fence_async_shared()
            sync_warps()
            store_tile(X_desc, [m, n + u * stride + h * STORED], stored.index(slot))
            store_tile(R_desc, [m, n + u * stride + h * STORED], stored.index(slot + 1))
    tma.store_wait(0)


@gluon.jit
def rotate(y, phase):
    """Return relu(y), and that rotated by the phases, both (TOKENS, STORED) bfloat16.

    A thread has the two neurons of a pair in y, and cosine and sine of the pair in phase.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 even, odd, cos, sin, a, b;
        .reg .b32 c, s;
        shl.b32 c, $4, 16;
        and.b32 s, $4, 0xFFFF0000;
        mov.b32 cos, c;
        mov.b32 sin, s;
        max.NaN.f32 even, $2, 0f00000000;
        max.NaN.f32 odd, $3, 0f00000000;
        mul.rn.f32 a, odd, sin;
        mul.rn.f32 b, even, sin;
        neg.f32 a, a;
        fma.rn.f32 a, even, cos, a;
        fma.rn.f32 b, odd, cos, b;
        cvt.rn.bf16x2.f32 $0, odd, even;
        cvt.rn.bf16x2.f32 $1, b, a;
        }""",
        "=&r,=&r,f,f,r",
        [y, phase],
        dtype=(gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=2,
    )


@gluon.jit(do_not_specialize=["all_steps", "splits", "G", "C"])
def hopper_excite_512(
    x_desc,  # (M, D)
    E_desc,  # (N, D)
    X_desc,  # (M, N), out
    R_desc,  # (M, N), out
    phases_desc,  # (C, N): cos and sin of each pair
    all_steps,
    splits,
    G,
    C,
    SHARED: gl.constexpr,
):
    TOKENS: gl.constexpr = x_desc.block_type.shape[0]
    NEURONS: gl.constexpr = E_desc.block_type.shape[0]
    COLUMNS: gl.constexpr = E_desc.block_type.shape[1]
    STORED: gl.constexpr = X_desc.block_type.shape[1]
    # Programs of the same tokens are adjacent, so that they write longer rows at a time.
    split, block = gl.program_id(0) % splits, gl.program_id(0) // splits
    m, position = tile_position(2 * block, G, C, TOKENS)
    m_second, position_second = tile_position(2 * block + 1, G, C, TOKENS)
    n, stride, steps = split * NEURONS, splits * NEURONS, (all_steps - split + splits - 1) // splits
    ring = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, NEURONS, COLUMNS], E_desc.layout)
    phases = gl.allocate_shared_memory(gl.bfloat16, [PHASES, TOKENS, STORED], phases_desc.layout)
    stored = gl.allocate_shared_memory(gl.bfloat16, [STORES, TOKENS, STORED], X_desc.layout)
    stored_second = gl.allocate_shared_memory(gl.bfloat16, [STORES, TOKENS, STORED], X_desc.layout)
    full, empty = barriers(SLOTS, 1), barriers(SLOTS, 2)  # both groups read
    phases_full, phases_empty = barriers(PHASES, 1), barriers(PHASES, 2 if SHARED else 1)
    fence_async_shared()
    bars = full, empty, phases_full, phases_empty
    gl.warp_specialize(
        [
            (excite_tiles, (X_desc, R_desc, ring, phases, stored, bars, m, n, stride, steps, 0, SHARED)),
            (excite_tiles, (X_desc, R_desc, ring, phases, stored_second, bars, m_second, n, stride, steps, 1, SHARED)),
            (load_tiles, (x_desc, E_desc, ring, full, empty, m, m_second, n, stride, steps)),
            (
                load_phases,
                (phases_desc, phases, phases_full, phases_empty, position, position_second, n, stride, steps, SHARED),
            ),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )


def fits(C: int, N: int, D: int) -> bool:
    return D == WIDTH and N % NEURONS == 0 and C % (2 * TOKENS) == 0


def excite(x: Tensor, E: Tensor, phases: Tensor, C: int, R: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """X = relu(x E^T) and R = rope(X), (G * C, N) bfloat16.

    Args:
        x: (G * C, D) bfloat16.
        E: (N, D) bfloat16.
        phases: cos and sin of each pair, (C, N) bfloat16.
        C: Tokens of a chunk.
        R: Where R is written, (G * C, N) bfloat16, contiguous; None allocates it.
    """
    M, N = len(x), len(E)
    G = M // C
    blocks, steps = M // (2 * TOKENS), N // NEURONS
    splits = num_splits(blocks, steps, 4, x.device)
    X = torch.empty(M, N, dtype=x.dtype, device=x.device)  # (M, N)
    R = torch.empty_like(X) if R is None else R  # (M, N)
    arguments = (
        tile_descriptor(x, TOKENS, COLUMNS),
        tile_descriptor(E, NEURONS, COLUMNS),
        *(tile_descriptor(tensor, TOKENS, STORED) for tensor in (X, R, phases)),
        steps, splits, G, C,
    )  # fmt: skip
    run(hopper_excite_512, blocks * splits, arguments, SHARED=G % 2 == 0)
    return X, R
