"""Device functions of the Triton kernels of training: loads and stores, tiles, products, rotary pairs, dropout."""

import triton
import triton.language as tl

from bdh.kernels import layer_operations

SMALLEST_NORMAL = tl.constexpr(layer_operations.SMALLEST_NORMAL)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # runs in Triton's interpreter, on a CPU


# ------------------------------------------------------------------------------------------------ blocks


@triton.jit
def add_product(a, b, total):
    """Return total + a b of blocks (M, K) and (K, N), in float32."""
    if INTERPRETED:  # the interpreter multiplies bfloat16 as integers
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
def store_streaming(pointers, values, inside, EVEN: tl.constexpr):
    """Store with a hint not to cache, for tensors larger than the cache."""
    if EVEN:
        tl.store(pointers, values, cache_modifier=".cs")
    else:
        tl.store(pointers, values, mask=inside, cache_modifier=".cs")


@triton.jit
def relu(values):
    return tl.maximum(values, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def program_tile(rows, columns, GROUP: tl.constexpr):
    """Return row and column of a program's tile; tiles of GROUP rows precede the next rows, to share the cache."""
    program = tl.program_id(0)
    first = program // (GROUP * columns) * GROUP
    height = min(rows - first, GROUP)
    index = program % (GROUP * columns)
    return first + index % height, index // height


@triton.jit
def token_rows(M, D, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return a program's ROWS tokens of M, and of these the mask and the offsets in (M, D), both (ROWS, WIDTH)."""
    m, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    return m, (m < M)[:, None] & (d < D)[None, :], m.to(tl.int64)[:, None] * D + d[None, :]


@triton.jit
def chunk_rows(C, D, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return a program's chunk, its ROWS tokens of C, and their mask and offsets in (C, D), both (ROWS, WIDTH)."""
    t, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    return tl.program_id(1).to(tl.int64), t, (t < C)[:, None] & (d < D)[None, :], t[:, None] * D + d[None, :]


@triton.jit
def load_rows(x, rows_left, start, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr):
    """Load columns from `start` of BLOCK_M rows of x (rows, D), of which `rows_left` exist: (BLOCK_M, BLOCK_K)."""
    r, d = tl.arange(0, BLOCK_M), start + tl.arange(0, BLOCK_K)
    return load(x + r[:, None] * D + d[None, :], (r < rows_left)[:, None] & (d < D)[None, :], EVEN)


@triton.jit
def split_pairs(pairs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Split columns 2i from columns 2i + 1: (BLOCK_M, BLOCK_N) -> twice (BLOCK_M, BLOCK_N / 2)."""
    return tl.split(pairs.reshape(BLOCK_M, BLOCK_N // 2, 2))


@triton.jit
def rope(values, cos, sin, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rotate pairs of columns by phases: (BLOCK_M, BLOCK_N), twice (BLOCK_M, BLOCK_N / 2) -> (BLOCK_M, BLOCK_N)."""
    even, odd = split_pairs(values, BLOCK_M, BLOCK_N)
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
    """Return total + a b^T."""
    for start in range(0, D, BLOCK_K):
        left = load_rows(a, rows_left, start, D, BLOCK_M, BLOCK_K, EVEN)  # (BLOCK_M, BLOCK_K)
        right = load_rows(b, columns_left, start, D, BLOCK_N, BLOCK_K, EVEN)  # (BLOCK_N, BLOCK_K)
        total = add_product(left, right.T, total)  # (BLOCK_M, BLOCK_N)
    return total


# ------------------------------------------------------------------------------------------------ dropout


@triton.jit
def mix(h):
    """Hash uint32 to uint32, one to one, so that each bit of the result depends on all bits."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def dropout_keeps(m, i, key, dropped, BLOCK_M: tl.constexpr, PAIRS: tl.constexpr):
    """Return which products dropout keeps, of tokens from m and pairs from i: (BLOCK_M, 2 * PAIRS).

    A pair has 16 random bits for each neuron; values below `dropped` are dropped. They are the upper halves of two
    products of the hash of token and pair, the second of which adds the lower half of the first to its upper half.
    """
    token = mix((m + tl.arange(0, BLOCK_M)).to(tl.uint32) ^ key.to(tl.uint32))  # (BLOCK_M)
    pair = mix((i + tl.arange(0, PAIRS)).to(tl.uint32) + 0x9E3779B9)  # (PAIRS)
    bits = (token[:, None] ^ pair[None, :]) * 0x9E3779B1  # (BLOCK_M, PAIRS)
    least = dropped.to(tl.uint32) << 16
    return tl.interleave(bits >= least, bits * 0x10001 >= least)  # (BLOCK_M, 2 * PAIRS)
