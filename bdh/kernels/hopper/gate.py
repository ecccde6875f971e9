"""The gate and the decoder's product, for D = 256, without writing tensors (tokens, neurons) to memory.

A program has 128 tokens and iterates over all neurons, 64 at a time. Two halves have 64 tokens each, with their rows of
y in registers; both read the same tiles of the weights. Z stays in registers between the two products:

    multiply_tiles: Y = A Ev^T, Z = X o relu(Y) with dropout; y += Z Dec. Twice, for one half of the tokens each.
    load_weight, load_tokens: one warp for each weight and one for each half's A and X; they prefetch two tiles.

A half queues the next Y before this tile's product with Dec, and gates that Y during the product. The halves queue in
turns, so that the tensor cores compute for one half while the other half gates. Programs share no sums, so results are
deterministic.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
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
    tile_descriptor,
    to_int32,
)
from bdh.kernels.triton.launch import cdiv

TOKENS = 64  # of a half; a program has two
NEURONS = 64  # of a tile
WIDTH = 256  # D


@gluon.jit
def load_weight(desc, buffer, full, empty, tiles):
    NEURONS: gl.constexpr = desc.block_type.shape[0]
    for t in range(tiles):
        slot = t % 2
        mbarrier.wait(empty.index(slot), ((t // 2) & 1) ^ 1)
        fetch(desc, [t * NEURONS, 0], full.index(slot), buffer.index(slot))


@gluon.jit
def load_tokens(HALF: gl.constexpr, descs, buffers, bars, m, tiles):
    A_desc, X_desc = descs
    A, X, _, _ = buffers
    A_full, X_full, _, _, X_empty, _, _, _ = bars
    NEURONS: gl.constexpr = X_desc.block_type.shape[1]
    fetch(A_desc, [m, 0], A_full.index(HALF), A.index(HALF))
    for t in range(tiles):
        slot = 2 * HALF + t % 2
        mbarrier.wait(X_empty.index(slot), ((t // 2) & 1) ^ 1)
        fetch(X_desc, [m, t * NEURONS], X_full.index(slot), X.index(slot))


@gluon.jit
def start_product(HALF: gl.constexpr, t, buffers, zeros):
    """Queue the product Y of tile t, (TOKENS, NEURONS)."""
    A, _, Ev, _ = buffers
    return warpgroup_mma(A.index(HALF), Ev.index(t % 2).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def prepare(HALF: gl.constexpr, t, buffers, bars, TILE: gl.constexpr):
    """Load X (TOKENS, NEURONS) of tile t during the product Y, and hash its pairs (NEURONS)."""
    _, X, _, _ = buffers
    _, X_full, _, _, _, _, _, _ = bars
    NEURONS: gl.constexpr = X.type.shape[2]
    # unsigned, so that the compiler knows that both neurons of a pair have one hash
    pair, _ = hash_of_neurons(gl.to_tensor(t * NEURONS).to(gl.uint32), NEURONS, gl.SliceLayout(0, TILE))  # (NEURONS)
    slot = 2 * HALF + t % 2
    mbarrier.wait(X_full.index(slot), (t // 2) & 1)
    return X.index(slot).load(TILE), pair


@gluon.jit
def release_inputs(HALF: gl.constexpr, t, bars):
    """Release Ev and X of tile t after its product Y."""
    _, _, _, _, X_empty, Ev_empty, _, _ = bars
    arrive(Ev_empty.index(t % 2))
    mbarrier.arrive(X_empty.index(2 * HALF + t % 2), count=1)


@gluon.jit
def gate_tile(Y, x, token, pair, first_kept, DROPOUT: gl.constexpr, LEFT: gl.constexpr):
    """Return Z in the register layout of the next product, (TOKENS, NEURONS).

    With dropout the code is for the two neurons of a pair, which a thread has in adjacent registers: they share a hash
    h, and the random number of the second is that of the first times 0x10001.
    """
    if DROPOUT:
        h = gl.expand_dims(token, 1) ^ gl.expand_dims(pair, 0)  # (TOKENS, NEURONS)
        least = gl.full(Y.type.shape, first_kept.to(gl.uint32), gl.uint32, layout=Y.type.layout)  # (TOKENS, NEURONS)
        z = gl.inline_asm_elementwise(
            """{
            .reg .pred p, q;
            .reg .b32 h, g, u, v;
            .reg .f32 a, b;
            mul.lo.u32 h, $4, 0x9E3779B1;
            shl.b32 g, h, 16;
            add.u32 g, g, h;
            setp.ge.u32 p, h, $6;
            setp.ge.u32 q, g, $7;
            shl.b32 u, $3, 16;
            and.b32 v, $3, 0xFFFF0000;
            max.NaN.f32 a, $1, 0f00000000;
            max.NaN.f32 b, $2, 0f00000000;
            mul.f32 a, a, u;
            mul.f32 b, b, v;
            selp.f32 a, a, 0f00000000, p;
            selp.f32 b, b, 0f00000000, q;
            cvt.rn.bf16x2.f32 $0, b, a;
            }""",
            "=r,f,f,r,r,r,r,r",
            [Y, x, h, least],
            dtype=gl.bfloat16,
            is_pure=True,
            pack=2,
        )  # (TOKENS, NEURONS)
    else:
        z = (x.to(gl.float32) * gl.maximum(Y, 0.0, propagate_nan=NAN)).to(gl.bfloat16)  # (TOKENS, NEURONS)
    return gl.convert_layout(z, LEFT)


@gluon.jit
def multiply_tiles(
    HALF: gl.constexpr, buffers, bars, y, m, M, tiles, key, first_kept, D: gl.constexpr, DROPOUT: gl.constexpr
):
    """Compute tokens from m. From M on A and X are 0, and y is masked; from neuron N on Ev, Dec and X are 0."""
    _, X, _, Dec = buffers
    A_full, _, Ev_full, Dec_full, _, _, Dec_empty, turns = bars
    TOKENS: gl.constexpr = X.type.shape[1]
    NEURONS: gl.constexpr = X.type.shape[2]
    TILE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, NEURONS, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUM, k_width=2)
    r = m + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, SUM))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, SUM))
    pointers = y + (gl.expand_dims(r.to(gl.int64) * D, 1) + gl.expand_dims(d, 0))  # (TOKENS, D)
    inside = gl.expand_dims(r < M, 1) & (gl.expand_dims(d, 0) >= 0)  # (TOKENS, D)
    total = gl.load(pointers, mask=inside, other=0.0)  # (TOKENS, D)
    zeros = gl.zeros([TOKENS, NEURONS], gl.float32, layout=TILE)
    token = hash_of_tokens(m, key, TOKENS, gl.SliceLayout(1, TILE))  # (TOKENS)

    mbarrier.wait(A_full.index(HALF), 0)
    mbarrier.wait(Ev_full.index(0), 0)
    Y = start_product(HALF, 0, buffers, zeros)
    x, pair = prepare(HALF, 0, buffers, bars, TILE)
    Y = warpgroup_mma_wait(0, deps=(Y,))  # (TOKENS, NEURONS)
    release_inputs(HALF, 0, bars)
    z = gate_tile(Y, x, token, pair, first_kept, DROPOUT, LEFT)
    mbarrier.wait(Dec_full.index(0), 0)
    for t in range(tiles - 1):
        slot = t % 2
        turn = ((t + 1) // 2) & 1  # of tile t + 1
        mbarrier.wait(Ev_full.index(slot ^ 1), turn)
        # half 0 waits for the product that half 1 queued at t - 1, half 1 for that of half 0 at t
        mbarrier.wait(turns.index(HALF), (t & 1) ^ 1 ^ HALF)
        Y = start_product(HALF, t + 1, buffers, zeros)
        total = warpgroup_mma(z, Dec.index(slot), total, is_async=True)  # (TOKENS, D)
        mbarrier.arrive(turns.index(1 - HALF), count=1)
        x, pair = prepare(HALF, t + 1, buffers, bars, TILE)
        Y = warpgroup_mma_wait(1, deps=(Y,))  # (TOKENS, NEURONS)
        release_inputs(HALF, t + 1, bars)
        z_after = gate_tile(Y, x, token, pair, first_kept, DROPOUT, LEFT)
        # this wait also stops the compiler from moving the wait for the product before the gate
        mbarrier.wait(Dec_full.index(slot ^ 1), turn)
        total, z = warpgroup_mma_wait(0, deps=(total, z))
        arrive(Dec_empty.index(slot))
        z = z_after
    total = warpgroup_mma(z, Dec.index((tiles - 1) % 2), total, is_async=True)  # (TOKENS, D)
    total, z = warpgroup_mma_wait(0, deps=(total, z))
    gl.store(pointers, total, mask=inside)


@gluon.jit(do_not_specialize=["key", "first_kept", "M", "tiles"])
def hopper_gate(
    A_desc,  # (M, D), normalised
    X_desc,  # (M, N)
    Ev_desc,  # (N, D)
    Dec_desc,  # (N, D)
    y,  # (M, D) float32, added to
    key,
    first_kept,
    M,
    tiles,
    DROPOUT: gl.constexpr,
):
    TOKENS: gl.constexpr = A_desc.block_type.shape[0]
    D: gl.constexpr = A_desc.block_type.shape[1]
    NEURONS: gl.constexpr = Ev_desc.block_type.shape[0]
    m = gl.program_id(0) * (2 * TOKENS)
    A = gl.allocate_shared_memory(gl.bfloat16, [2, TOKENS, D], A_desc.layout)  # of each half
    X = gl.allocate_shared_memory(gl.bfloat16, [4, TOKENS, NEURONS], X_desc.layout)  # 2 slots of each half
    Ev = gl.allocate_shared_memory(gl.bfloat16, [2, NEURONS, D], Ev_desc.layout)
    Dec = gl.allocate_shared_memory(gl.bfloat16, [2, NEURONS, D], Dec_desc.layout)
    A_full, X_full, Ev_full, Dec_full = barriers(2, 1), barriers(4, 1), barriers(2, 1), barriers(2, 1)
    X_empty, Ev_empty, Dec_empty = barriers(4, 1), barriers(2, 2), barriers(2, 2)  # both halves read Ev and Dec
    turns = barriers(2, 1)
    bars = (A_full, X_full, Ev_full, Dec_full, X_empty, Ev_empty, Dec_empty, turns)
    fence_async_shared()
    descs = (A_desc, X_desc)
    buffers = (A, X, Ev, Dec)
    gl.warp_specialize(
        [
            (multiply_tiles, (0, buffers, bars, y, m, M, tiles, key, first_kept, D, DROPOUT)),
            (multiply_tiles, (1, buffers, bars, y, m + TOKENS, M, tiles, key, first_kept, D, DROPOUT)),
            (load_weight, (Ev_desc, Ev, Ev_full, Ev_empty, tiles)),
            (load_weight, (Dec_desc, Dec, Dec_full, Dec_empty, tiles)),
            (load_tokens, (0, descs, buffers, bars, m, tiles)),
            (load_tokens, (1, descs, buffers, bars, m + TOKENS, tiles)),
        ],
        [4, 1, 1, 1, 1],
        [240, 24, 24, 24, 24],
    )


def fits(M: int, N: int, D: int) -> bool:
    return M > 0 and N > 0 and N % 8 == 0 and D == WIDTH  # rows of X begin at multiples of 16 bytes


def gate(A: Tensor, Ev: Tensor, X: Tensor, key: int, dropped: int, Dec: Tensor, y: Tensor) -> None:
    """Add Z Dec to y, where Z = X o relu(A Ev^T) with dropout.

    Args:
        A: Normalised, (M, D) bfloat16.
        Ev: (N, D) bfloat16.
        X: (M, N) bfloat16.
        key: Of dropout, 32 bits, signed.
        dropped: How many of 2^16 random numbers drop.
        Dec: (N, D) bfloat16.
        y: (M, D) float32, in place.
    """
    (M, D), N = A.shape, len(Ev)
    arguments = (
        tile_descriptor(A, TOKENS, D),
        tile_descriptor(X, TOKENS, NEURONS),
        *(tile_descriptor(weight, NEURONS, D) for weight in (Ev, Dec)),
        y, key, to_int32(dropped << 16), M, cdiv(N, NEURONS),
    )  # fmt: skip
    run(hopper_gate, cdiv(M, 2 * TOKENS), arguments, DROPOUT=dropped > 0)
