"""Operations of `gate_512` on a tile of neurons between its product and its stores.

All of them are in bfloat16 with the two neurons of a pair in one register, because no registers are left.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from bdh.kernels.hopper.device_functions import hash_of_neurons, store_tile, sync_warps
from bdh.kernels.hopper.gate import gate_tile as gate_tile_256

TILE = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))


@gluon.jit
def narrow(product, MODE: gl.constexpr):
    """Convert a product, for "back" its relu, to bfloat16, (TOKENS, NEURONS), which takes half the registers.

    Not pure, so that the compiler does not move it to the use of the result.
    """
    CONVERT: gl.constexpr = "cvt.rn.relu.bf16x2.f32 $0, $2, $1;" if MODE == "back" else "cvt.rn.bf16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(CONVERT, "=r,f,f", [product], dtype=gl.bfloat16, is_pure=False, pack=2)


@gluon.jit
def gate_tiles(
    product, t, m, n, token, first_kept, descs, tiles, tiles_full,
    group: gl.constexpr, DROPOUT: gl.constexpr, MODE: gl.constexpr,
):  # fmt: skip
    """Compute a group's tile t, of tokens from m and neurons from n, and start to store the results."""
    X, Z = tiles[0], tiles[1]
    SLOTS: gl.constexpr = X.type.shape[0] // 2  # of the group
    slot = group * SLOTS + t % SLOTS
    # unsigned, so that the compiler knows that both neurons of a pair have one hash
    pair, _ = hash_of_neurons(n.to(gl.uint32), X.type.shape[2], gl.SliceLayout(0, TILE))  # (NEURONS)
    mbarrier.wait(tiles_full.index(slot), (t // SLOTS) & 1)
    x = X.index(slot).load(TILE)  # (TOKENS, NEURONS)
    if MODE == "gate":
        Z.index(slot).store(gate_tile_256(product, x, token, pair, first_kept, DROPOUT, TILE))
    if MODE == "back":
        dX, Y = tiles[2], product
        dz = dX.index(slot).load(TILE)  # (TOKENS, NEURONS)
        if DROPOUT:
            Y = apply_dropout(Y, token, pair, first_kept)  # (TOKENS, NEURONS)
        z, dx, dy = x * Y, dz * Y, where_positive(Y, dz * x)  # 3 x (TOKENS, NEURONS)
        Z.index(slot).store(z)
        dX.index(slot).store(dx)
        X.index(slot).store(dy)
    if MODE == "ungate":
        z = Z.index(slot).load(TILE)  # (TOKENS, NEURONS)
        Z.index(slot).store(where_positive(z, product * x))  # dY
        X.index(slot).store(divide_gradient(product, x, z))  # dX
    fence_async_shared()
    sync_warps()
    if MODE == "gate":
        store_tile(descs[3], [m, n], Z.index(slot))
    if MODE == "back":
        store_tile(descs[3], [m, n], Z.index(slot))
        store_tile(descs[4], [m, n], dX.index(slot))
        store_tile(descs[5], [m, n], X.index(slot))  # dY
    if MODE == "ungate":
        store_tile(descs[4], [m, n], X.index(slot))  # dX
        store_tile(descs[5], [m, n], Z.index(slot))  # dY


@gluon.jit
def apply_dropout(y, token, pair, first_kept):
    """Return y where dropout keeps it, else 0, (TOKENS, NEURONS) bfloat16.

    As in `gate.gate_tile`, the two neurons of a pair share a hash; here they are in one register, with a mask of two
    halves.
    """
    h = gl.expand_dims(token, 1) ^ gl.expand_dims(pair, 0)  # (TOKENS, NEURONS)
    least = gl.full(y.type.shape, first_kept.to(gl.uint32), gl.uint32, layout=TILE)  # (TOKENS, NEURONS)
    return gl.inline_asm_elementwise(
        """{
        .reg .pred p, q;
        .reg .b32 h, g, u, v;
        mul.lo.u32 h, $2, 0x9E3779B1;
        shl.b32 g, h, 16;
        add.u32 g, g, h;
        setp.ge.u32 p, h, $4;
        setp.ge.u32 q, g, $5;
        selp.b32 u, 0x0000FFFF, 0, p;
        selp.b32 v, 0xFFFF0000, 0, q;
        or.b32 u, u, v;
        and.b32 $0, $1, u;
        }""",
        "=r,r,r,r,r,r",
        [y, h, least],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def where_positive(y, tile):
    """Return a tile where y > 0, else 0, (TOKENS, NEURONS) bfloat16, two at a time, which Triton does not do."""
    zero = gl.full(y.type.shape, 0.0, gl.bfloat16, layout=TILE)  # (TOKENS, NEURONS)
    return gl.inline_asm_elementwise(
        "{ .reg .b32 u; set.gt.u32.bf16x2 u, $1, $3; and.b32 $0, $2, u; }",
        "=r,r,r,r",
        [y, tile, zero],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def divide_gradient(dz, x, z):
    """Return dz z / x where x is at least SMALLEST_NORMAL (0x0080), else 0, (TOKENS, NEURONS) bfloat16, by pairs."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c, d, u, v, least;
        shl.b32 a, $2, 16;
        and.b32 b, $2, 0xFFFF0000;
        rcp.approx.ftz.f32 a, a;
        rcp.approx.ftz.f32 b, b;
        shl.b32 c, $3, 16;
        and.b32 d, $3, 0xFFFF0000;
        mul.f32 a, a, c;
        mul.f32 b, b, d;
        shl.b32 c, $1, 16;
        and.b32 d, $1, 0xFFFF0000;
        mul.f32 a, a, c;
        mul.f32 b, b, d;
        cvt.rn.bf16x2.f32 u, b, a;
        mov.b32 least, 0x00800080;
        set.ge.u32.bf16x2 v, $2, least;
        and.b32 $0, u, v;
        }""",
        "=r,r,r,r",
        [dz, x, z],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=2,
    )
