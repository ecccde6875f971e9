"""dX = (dX + rope^-1(dP R + extra)) where X > 0, in place; dP R is not written to memory.

A program has 128 tokens of a chunk and iterates over neurons, 64 at a time. Its rows of dP stay in registers, so that
dP is read once, and R once for every 128 tokens, from the L2 cache.

    multiply_tiles: two groups of four warps with 64 tokens each: compute dP R, rotate it back, add, store to dX.
    load_ring, load_tiles: one warp for dP and R, and one for each group's X, dX, phases and extra.

dP and R are loaded in pieces (128, 64) into one ring: first dP of group 0, then of group 1, then R. As dP is symmetric,
its columns are loaded for its rows, so that its pieces have the shape of R's.
Slots 2 * group + i % 2 have the tiles of a group's step i; the result replaces dX there and is stored from there.
"""

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
)

TOKENS = 64  # of a group's tile
NEURONS = 64  # of a step
PIECE = 128  # rows of dP and R in a slot of the ring


@gluon.jit
def load_ring(descs, buffers, bars, chunk, m, first, last, PIECES: gl.constexpr):
    """Load dP and R for tokens from m of the chunk that begins at row `chunk`."""
    dP_desc, R_desc, _, _, _, _ = descs
    ring, _, _, _, _ = buffers
    ring_full, _, ring_empty, _ = bars
    PIECE: gl.constexpr = R_desc.block_type.shape[0]
    NEURONS: gl.constexpr = R_desc.block_type.shape[1]
    TOKENS: gl.constexpr = dP_desc.block_type.shape[1]
    SLOTS: gl.constexpr = ring.type.shape[0]
    for p in range(2 * PIECES):
        slot = p % SLOTS
        group = p // PIECES
        mbarrier.wait(ring_empty.index(slot), ((p // SLOTS) & 1) ^ 1)
        coords = [chunk + (p - group * PIECES) * PIECE, m + group * TOKENS]
        fetch(dP_desc, coords, ring_full.index(slot), ring.index(slot))
    p = 2 * PIECES
    for t in range(first, last):
        for k in range(PIECES):
            slot = p % SLOTS
            mbarrier.wait(ring_empty.index(slot), ((p // SLOTS) & 1) ^ 1)
            fetch(R_desc, [chunk + k * PIECE, t * NEURONS], ring_full.index(slot), ring.index(slot))
            p += 1


@gluon.jit
def load_tiles(descs, buffers, bars, chunk, m, first, last, group: gl.constexpr, EXTRA: gl.constexpr):
    _, _, X_desc, dX_desc, phases_desc, extra_desc = descs
    _, X, dX, phases, extra = buffers
    _, tiles_full, _, tiles_empty = bars
    NEURONS: gl.constexpr = X_desc.block_type.shape[1]
    for t in range(first, last):
        i = t - first
        slot = 2 * group + i % 2
        n = t * NEURONS
        full = tiles_full.index(slot)
        mbarrier.wait(tiles_empty.index(slot), ((i // 2) & 1) ^ 1)
        mbarrier.expect(full, X_desc.block_type.nbytes * (4 if EXTRA else 3))
        load_tile(X_desc, [chunk + m, n], full, X.index(slot))
        load_tile(dX_desc, [chunk + m, n], full, dX.index(slot))
        load_tile(phases_desc, [m, n], full, phases.index(slot))
        if EXTRA:
            load_tile(extra_desc, [chunk + m, n], full, extra.index(slot))


@gluon.jit
def multiply_tiles(
    descs, buffers, bars, chunk, m, first, last, group: gl.constexpr, PIECES: gl.constexpr, EXTRA: gl.constexpr
):
    _, _, _, dX_desc, _, _ = descs
    ring, X, dX, phases, extra = buffers
    ring_full, tiles_full, ring_empty, tiles_empty = bars
    TOKENS: gl.constexpr = dX_desc.block_type.shape[0]
    NEURONS: gl.constexpr = dX_desc.block_type.shape[1]
    SLOTS: gl.constexpr = ring.type.shape[0]
    TILE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, NEURONS, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=TILE, k_width=2)
    dP = ()  # PIECES x (TOKENS, PIECE)
    for p in gl.static_range(2 * PIECES):
        mbarrier.wait(ring_full.index(p % SLOTS), (p // SLOTS) & 1)
        if p // PIECES == group:
            dP += (ring.index(p % SLOTS).permute((1, 0)).load(LEFT),)  # (TOKENS, PIECE)
        arrive(ring_empty.index(p % SLOTS))
    zeros = gl.zeros([TOKENS, NEURONS], gl.float32, layout=TILE)
    p = 2 * PIECES
    for t in range(first, last):
        i = t - first
        product = zeros
        for k in gl.static_range(PIECES):
            mbarrier.wait(ring_full.index(p % SLOTS), (p // SLOTS) & 1)
            product = warpgroup_mma(dP[k], ring.index(p % SLOTS), product, use_acc=k > 0, is_async=True)
            if k > 0:  # the previous piece has been read
                product = warpgroup_mma_wait(1, deps=(product,))
                arrive(ring_empty.index((p - 1) % SLOTS))
            if k == 1:  # late enough for the stores of the previous step, early enough for the tiles of the next
                tma.store_wait(0)
                sync_warps()
                mbarrier.arrive(tiles_empty.index(2 * group + (i + 1) % 2), count=1, pred=i > 0)
            p += 1
        product = warpgroup_mma_wait(0, deps=(product,))  # (TOKENS, NEURONS)
        arrive(ring_empty.index((p - 1) % SLOTS))
        slot = 2 * group + i % 2
        mbarrier.wait(tiles_full.index(slot), (i // 2) & 1)
        if EXTRA:
            product += extra.index(slot).load(TILE).to(gl.float32)
        total = rotate_back(product, phases.index(slot).load(TILE), TILE)  # (TOKENS, NEURONS)
        total += dX.index(slot).load(TILE).to(gl.float32)
        x = X.index(slot).load(TILE).to(gl.float32)  # (TOKENS, NEURONS)
        dX.index(slot).store(gl.where(x > 0, total, zeros).to(gl.bfloat16))
        fence_async_shared()
        sync_warps()
        store_tile(dX_desc, [chunk + m, t * NEURONS], dX.index(slot))
    tma.store_wait(0)


@gluon.jit
def rotate_back(tile, phase, TILE: gl.constexpr):
    """Rotate each pair of neurons by minus its angle; `phase` has cos and sin of each pair, in the tile's shape."""
    TOKENS: gl.constexpr = tile.type.shape[0]
    NEURONS: gl.constexpr = tile.type.shape[1]
    even, odd = tile.reshape([TOKENS, NEURONS // 2, 2]).split()  # (TOKENS, NEURONS / 2)
    cos, sin = phase.to(gl.float32).reshape([TOKENS, NEURONS // 2, 2]).split()  # (TOKENS, NEURONS / 2)
    rotated = gl.join(even * cos + odd * sin, odd * cos - even * sin)  # (TOKENS, NEURONS / 2, 2)
    return gl.convert_layout(rotated.reshape([TOKENS, NEURONS]), TILE, assert_trivial=True)


@gluon.jit(do_not_specialize=["steps", "parts"])
def hopper_excite_backward(
    dP_desc,  # (G C, C)
    R_desc,  # (G C, N)
    X_desc,  # (G C, N)
    dX_desc,  # (G C, N), in and out
    phases_desc,  # (C, N)
    extra_desc,  # (G C, N), or any if not EXTRA
    steps,
    parts,  # programs that share the neurons of a block
    PIECES: gl.constexpr,
    SLOTS: gl.constexpr,
    EXTRA: gl.constexpr,
):
    PIECE: gl.constexpr = R_desc.block_type.shape[0]
    TOKENS: gl.constexpr = X_desc.block_type.shape[0]
    NEURONS: gl.constexpr = X_desc.block_type.shape[1]
    BLOCKS: gl.constexpr = PIECES * PIECE // (2 * TOKENS)  # of a chunk
    block = gl.program_id(0) % BLOCKS
    rest = gl.program_id(0) // BLOCKS
    part = rest % parts
    m = block * (2 * TOKENS)
    chunk = rest // parts * (PIECES * PIECE)
    first = part * steps // parts
    last = (part + 1) * steps // parts
    ring = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, PIECE, NEURONS], R_desc.layout)
    X = gl.allocate_shared_memory(gl.bfloat16, [4, TOKENS, NEURONS], X_desc.layout)
    dX = gl.allocate_shared_memory(gl.bfloat16, [4, TOKENS, NEURONS], X_desc.layout)
    phases = gl.allocate_shared_memory(gl.bfloat16, [4, TOKENS, NEURONS], X_desc.layout)
    if EXTRA:
        extra = gl.allocate_shared_memory(gl.bfloat16, [4, TOKENS, NEURONS], X_desc.layout)
    else:
        extra = phases  # not read
    bars = (barriers(SLOTS, 1), barriers(4, 1), barriers(SLOTS, 2), barriers(4, 1))  # full: ring, tiles; then empty
    fence_async_shared()
    descs = (dP_desc, R_desc, X_desc, dX_desc, phases_desc, extra_desc)
    buffers = (ring, X, dX, phases, extra)
    other = m + TOKENS
    gl.warp_specialize(
        [
            (multiply_tiles, (descs, buffers, bars, chunk, m, first, last, 0, PIECES, EXTRA)),
            (multiply_tiles, (descs, buffers, bars, chunk, other, first, last, 1, PIECES, EXTRA)),
            (load_ring, (descs, buffers, bars, chunk, m, first, last, PIECES)),
            (load_tiles, (descs, buffers, bars, chunk, m, first, last, 0, EXTRA)),
            (load_tiles, (descs, buffers, bars, chunk, other, first, last, 1, EXTRA)),
        ],
        [4, 1, 1, 1],
        [240, 24, 24, 24],
    )


def fits(C: int, N: int) -> bool:
    """Return whether the sizes are supported; the rows of dP must fit into registers."""
    return C in (256, 512) and N % NEURONS == 0


def excite_backward(dP: Tensor, R: Tensor, X: Tensor, dX: Tensor, phases: Tensor, extra: Tensor | None) -> Tensor:
    """(dX + rope^-1(dP R + extra)) where X > 0, (G, C, N), over dX.

    Args:
        dP: Symmetric, (G, C, C) bfloat16.
        R: (G, C, N) bfloat16.
        X: (G, C, N) bfloat16.
        dX: (G, C, N) bfloat16, overwritten.
        phases: cos and sin of each pair, (C, N) bfloat16.
        extra: (G, C, N) bfloat16, or None.
    """
    G, C, N = R.shape
    blocks, steps = G * C // (2 * TOKENS), N // NEURONS
    parts = num_splits(blocks, steps, 2, R.device)
    dX_tiles = tile_descriptor(dX.view(G * C, N), TOKENS, NEURONS)
    arguments = (
        tile_descriptor(dP.view(G * C, C), PIECE, TOKENS),
        tile_descriptor(R.view(G * C, N), PIECE, NEURONS),
        tile_descriptor(X.view(G * C, N), TOKENS, NEURONS),
        dX_tiles,
        tile_descriptor(phases, TOKENS, NEURONS),
        dX_tiles if extra is None else tile_descriptor(extra.view(G * C, N), TOKENS, NEURONS),
        steps, parts,
    )  # fmt: skip
    run(
        hopper_excite_backward,
        blocks * parts,
        arguments,
        PIECES=C // PIECE,
        SLOTS=8 if extra is None else 6,
        EXTRA=extra is not None,
    )
    return dX
