"""What the kernels of `bdh.kernels.train` have in common: words, masks, the order of tiles, products, and dropout."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # by Triton's interpreter, on a CPU


# ------------------------------------------------------------------------------------------------ words and blocks


@triton.jit
def add_product(a, b, total):
    """total + a b, of blocks (M, K) and (K, N), in float32."""
    if INTERPRETED:  # there bfloat16 is multiplied as if it were whole numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def split_word(word):
    """The two numbers of a pair, in float32."""
    if word.dtype == tl.int64:
        even = word.to(tl.int32).to(tl.float32, bitcast=True)
        odd = (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:  # a bfloat16 is the upper half of a float32
        even = (word << 16).to(tl.float32, bitcast=True)
        odd = (word & -65536).to(tl.float32, bitcast=True)
    return even, odd


@triton.jit
def join_word(even, odd, WORD: tl.constexpr):
    """Two numbers in float32 as the word of a pair."""
    if WORD == tl.int64:
        low = even.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        word = low | (odd.to(tl.int32, bitcast=True).to(tl.int64) << 32)
    else:
        low = even.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        word = low | (odd.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return word


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
def pair_products(
    held,  # (BLOCK_M, BLOCK_K): the rows of x, if they are no longer than BLOCK_K; else None
    x,  # (rows, D)
    W,  # (2 * pairs, D)
    rows_left,
    pairs_left,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    """x W^T of BLOCK_M rows and PAIRS pairs: (BLOCK_M, PAIRS) float32 of the even neurons, and of the odd ones."""
    i = tl.arange(0, PAIRS)
    even = tl.zeros((BLOCK_M, PAIRS), tl.float32)
    odd = tl.zeros((BLOCK_M, PAIRS), tl.float32)
    for start in range(0, D, BLOCK_K):
        if held is None:
            a = rows_of(x, rows_left, start, D, BLOCK_M, BLOCK_K, EVEN)  # (BLOCK_M, BLOCK_K)
        else:
            a = held  # (BLOCK_M, BLOCK_K)
        d = start + tl.arange(0, BLOCK_K)
        inside = (d < D)[:, None] & (i < pairs_left)[None, :]
        rows = W + i[None, :] * (2 * D) + d[:, None]
        even = add_product(a, load(rows, inside, EVEN), even)  # (BLOCK_M, PAIRS)
        odd = add_product(a, load(rows + D, inside, EVEN), odd)  # (BLOCK_M, PAIRS)
    return even, odd


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
def dropout_factors(m, i, key, dropped, scale, BLOCK_M: tl.constexpr, PAIRS: tl.constexpr):
    """What dropout multiplies by, 0 or `scale`: (BLOCK_M, PAIRS) float32 of the even neurons, and of the odd ones.

    A pair's 32 random bits are 16 for each neuron, and those below `dropped` are dropped.
    """
    token = mix((m + tl.arange(0, BLOCK_M)).to(tl.uint32) ^ key.to(tl.uint32))  # (BLOCK_M)
    pair = mix((i + tl.arange(0, PAIRS)).to(tl.uint32) + 0x9E3779B9)  # (PAIRS)
    bits = mix(token[:, None] ^ pair[None, :])  # (BLOCK_M, PAIRS)
    return tl.where((bits & 0xFFFF) >= dropped, scale, 0.0), tl.where((bits >> 16) >= dropped, scale, 0.0)
