"""Device functions of the Triton kernels: masks, order of tiles, products, rotary pairs, dropout."""

import triton
import triton.language as tl

from bdh.kernels import layer_operations

SMALLEST = tl.constexpr(layer_operations.SMALLEST)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # by Triton's interpreter, on a CPU


# ------------------------------------------------------------------------------------------------ blocks


@triton.jit
def add_product(a, b, total):
    """total + a b, of blocks (M, K) and (K, N), in float32."""
    if INTERPRETED:  # there bfloat16 is multiplied as if it were whole numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def load(pointers, inside, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store(pointers, values, inside, EVEN: tl.constexpr):
    if EVEN:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=inside)


@triton.jit
def stream(pointers, values, inside, EVEN: tl.constexpr):
    """Stores what is too much for the cache, so that other things stay there."""
    if EVEN:
        tl.store(pointers, values, cache_modifier=".cs")
    else:
        tl.store(pointers, values, mask=inside, cache_modifier=".cs")


@triton.jit
def relu(values):
    return tl.maximum(values, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tile_of(rows, columns, GROUP: tl.constexpr):
    """Which of rows x columns tiles a program does: those of GROUP rows go before the next, to share the cache."""
    program = tl.program_id(0)
    first = program // (GROUP * columns) * GROUP
    height = min(rows - first, GROUP)
    place = program % (GROUP * columns)
    return first + place % height, place // height


@triton.jit
def rows_of(x, rows_left, start, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr):
    """Columns `start` and on of BLOCK_M rows of x (rows, D), of which `rows_left` are there: (BLOCK_M, BLOCK_K)."""
    r, d = tl.arange(0, BLOCK_M), start + tl.arange(0, BLOCK_K)
    return load(x + r[:, None] * D + d[None, :], (r < rows_left)[:, None] & (d < D)[None, :], EVEN)


@triton.jit
def halves(pairs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns 2i and columns 2i + 1: (BLOCK_M, BLOCK_N) -> twice (BLOCK_M, BLOCK_N / 2)."""
    return tl.split(pairs.reshape(BLOCK_M, BLOCK_N // 2, 2))


@triton.jit
def rope(values, cos, sin, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pairs of columns turned by phases: (BLOCK_M, BLOCK_N), twice (BLOCK_M, BLOCK_N / 2) -> (BLOCK_M, BLOCK_N)."""
    even, odd = halves(values, BLOCK_M, BLOCK_N)
    return tl.interleave(even * cos - odd * sin, odd * cos + even * sin)


@triton.jit
def add_products(
    total,  # (BLOCK_M, BLOCK_N) float32
    a,  # (rows, D)
    b,  # (columns, D)
    rows_left,
    columns_left,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    """total + a b^T."""
    for start in range(0, D, BLOCK_K):
        left = rows_of(a, rows_left, start, D, BLOCK_M, BLOCK_K, EVEN)  # (BLOCK_M, BLOCK_K)
        right = rows_of(b, columns_left, start, D, BLOCK_N, BLOCK_K, EVEN)  # (BLOCK_N, BLOCK_K)
        total = add_product(left, right.T, total)  # (BLOCK_M, BLOCK_N)
    return total


# ------------------------------------------------------------------------------------------------ dropout


@triton.jit
def mix(h):
    """uint32 to uint32, one to one, every bit of the result depending on all."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def keeps(m, i, key, dropped, BLOCK_M: tl.constexpr, PAIRS: tl.constexpr):
    """Which products dropout keeps: (BLOCK_M, 2 * PAIRS), of tokens m and pairs i and on.

    A pair's 32 random bits are 16 for each neuron, and those below `dropped` are dropped. The upper halves of two
    products of what token and pair have been mixed to: the second adds the lower half of the first to its upper one.
    """
    token = mix((m + tl.arange(0, BLOCK_M)).to(tl.uint32) ^ key.to(tl.uint32))  # (BLOCK_M)
    pair = mix((i + tl.arange(0, PAIRS)).to(tl.uint32) + 0x9E3779B9)  # (PAIRS)
    bits = (token[:, None] ^ pair[None, :]) * 0x9E3779B1  # (BLOCK_M, PAIRS)
    least = dropped.to(tl.uint32) << 16
    return tl.interleave(bits >= least, bits * 0x10001 >= least)  # (BLOCK_M, 2 * PAIRS)
