"""What moves tensors of (tokens, neurons) in training on a GPU, in Triton: one pass an operation over each of them.

A head at a time, with the batch's tokens in G chunks of C, M = G * C in all. Moving tensors of (M, N) numbers is what
takes the time: a product with D or C terms takes no longer than writing what comes out. So all that is done to a neuron
between two products is done where its product is.

A rotary pair is columns 2i, 2i+1, and both lie in one *word*: 32 bits for two bfloat16, 64 for two float32. Kernels
read and write words (M, N/2) and get the two numbers apart with shifts, in registers; and as a weight's row is one
neuron, a product with the even rows and one with the odd ones bring a pair's two sums without any shuffling. Tokens and
neurons that a tile has too many are masked, unless EVEN says that all sizes are multiples of the tile's.

Shapes: M = G * C tokens, D `n_embd`, N neurons of the head, HALF = N/2 pairs.
"""

import triton
import triton.language as tl

from bdh.kernels.train_parts import (
    add_product,
    add_products,
    dropout_factors,
    join_word,
    load,
    pair_products,
    relu,
    rows_of,
    split_word,
    store,
    tile_of,
)

# ------------------------------------------------------------------------------------------------ who fires


@triton.jit
def excite(
    x,  # (M, D)
    E,  # (N, D)
    cos,  # (C, HALF)
    sin,  # (C, HALF)
    X,  # (M, HALF) words, out
    R,  # (M, HALF) words, out
    M,
    C,
    HALF,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
):
    """X = relu(x E^T) and R = rope(X) of BLOCK_M tokens and TILES times PAIRS pairs."""
    row, column = tile_of(tl.cdiv(M, BLOCK_M), tl.cdiv(HALF, PAIRS * TILES), GROUP)
    m = row.to(tl.int64) * BLOCK_M
    r, p = tl.arange(0, BLOCK_M), tl.arange(0, PAIRS)
    t = ((m + r) % C).to(tl.int32)  # (BLOCK_M)
    held = None
    if BLOCK_K >= D:
        held = rows_of(x + m * D, M - m, 0, D, BLOCK_M, BLOCK_K, EVEN)  # (BLOCK_M, BLOCK_K)
    for tile in range(0, TILES):
        i = (column * TILES + tile) * PAIRS
        even, odd = pair_products(
            held, x + m * D, E + i.to(tl.int64) * 2 * D, M - m, HALF - i, D, BLOCK_M, PAIRS, BLOCK_K, EVEN
        )  # (BLOCK_M, PAIRS) float32
        even, odd = relu(even), relu(odd)  # (BLOCK_M, PAIRS)
        inside = (r < M - m)[:, None] & (p < HALF - i)[None, :]
        place = m * HALF + i
        words = r[:, None] * HALF + p[None, :]
        store(X + place + words, join_word(even, odd, X.dtype.element_ty), inside, EVEN)
        phases = t[:, None] * HALF + (i + p)[None, :]
        c = load(cos + phases, inside, EVEN).to(tl.float32)  # (BLOCK_M, PAIRS)
        s = load(sin + phases, inside, EVEN).to(tl.float32)  # (BLOCK_M, PAIRS)
        turned = join_word(even * c - odd * s, odd * c + even * s, R.dtype.element_ty)  # (BLOCK_M, PAIRS)
        store(R + place + words, turned, inside, EVEN)


@triton.jit
def excite_backward(
    dP,  # (G, C, C), symmetric
    R,  # (G, C, N)
    X,  # (G, C, HALF) words
    dX,  # (G, C, HALF) words; left as the result
    cos,  # (C, HALF)
    sin,  # (C, HALF)
    dA,  # (G, C, D), or None: nothing came before the chunks
    S,  # (G, N, D), or None
    v,  # (G, C, D), or None
    dS,  # (G, N, D), or None
    C,
    HALF,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
):
    """(dX + rope^-1(dR)) where X > 0, dR = dP R + dA S^T + v dS^T, of BLOCK_M tokens of a chunk and PAIRS pairs."""
    row, column = tile_of(tl.cdiv(C, BLOCK_M), tl.cdiv(HALF, PAIRS), GROUP)
    g = tl.program_id(1).to(tl.int64)
    t, i = row * BLOCK_M, column * PAIRS
    r, p = tl.arange(0, BLOCK_M), tl.arange(0, PAIRS)
    j = tl.arange(0, 2 * PAIRS)
    k = tl.arange(0, BLOCK_K)
    dR = tl.zeros((BLOCK_M, 2 * PAIRS), tl.float32)
    tokens = dP + g * C * C + t.to(tl.int64) * C + r[:, None] * C + k[None, :]
    others = R + g * C * HALF * 2 + 2 * i + k[:, None] * (2 * HALF) + j[None, :]
    for start in range(0, C, BLOCK_K):
        there = k < C - start
        a = load(tokens, (r < C - t)[:, None] & there[None, :], EVEN)  # (BLOCK_M, BLOCK_K)
        b = load(others, there[:, None] & (j < 2 * (HALF - i))[None, :], EVEN)  # (BLOCK_K, 2 * PAIRS)
        dR = add_product(a, b, dR)  # (BLOCK_M, 2 * PAIRS)
        tokens += BLOCK_K
        others += BLOCK_K * 2 * HALF
    if dA is not None:
        weights, tokens = (g * HALF + i) * 2 * D, (g * C + t) * D
        dR = add_products(dR, dA + tokens, S + weights, C - t, 2 * (HALF - i), D, BLOCK_M, 2 * PAIRS, BLOCK_K, EVEN)
        dR = add_products(dR, v + tokens, dS + weights, C - t, 2 * (HALF - i), D, BLOCK_M, 2 * PAIRS, BLOCK_K, EVEN)
    even, odd = tl.split(dR.reshape(BLOCK_M, PAIRS, 2))  # (BLOCK_M, PAIRS) float32
    inside = (r < C - t)[:, None] & (p < HALF - i)[None, :]
    phases = (t + r)[:, None] * HALF + (i + p)[None, :]
    c = load(cos + phases, inside, EVEN).to(tl.float32)  # (BLOCK_M, PAIRS)
    s = load(sin + phases, inside, EVEN).to(tl.float32)  # (BLOCK_M, PAIRS)
    place = (g * C + t) * HALF + i
    words = r[:, None] * HALF + p[None, :]
    dX_even, dX_odd = split_word(load(dX + place + words, inside, EVEN))  # (BLOCK_M, PAIRS)
    X_even, X_odd = split_word(load(X + place + words, inside, EVEN))  # (BLOCK_M, PAIRS)
    dX_even = tl.where(X_even > 0, dX_even + even * c + odd * s, 0.0)  # (BLOCK_M, PAIRS)
    dX_odd = tl.where(X_odd > 0, dX_odd + odd * c - even * s, 0.0)  # (BLOCK_M, PAIRS)
    store(dX + place + words, join_word(dX_even, dX_odd, dX.dtype.element_ty), inside, EVEN)


# ------------------------------------------------------------------------------------------------ who answers


@triton.jit(do_not_specialize=["key", "dropped"])
def gate(
    A,  # (M, D), normalised
    Ev,  # (N, D)
    X,  # (M, HALF) words
    Z,  # (M, HALF) words, out
    key,
    dropped,
    scale,
    M,
    HALF,
    D: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Z = dropout(X o relu(A Ev^T)) of BLOCK_M tokens and TILES times PAIRS pairs."""
    row, column = tile_of(tl.cdiv(M, BLOCK_M), tl.cdiv(HALF, PAIRS * TILES), GROUP)
    m = row.to(tl.int64) * BLOCK_M
    r, p = tl.arange(0, BLOCK_M), tl.arange(0, PAIRS)
    held = None
    if BLOCK_K >= D:
        held = rows_of(A + m * D, M - m, 0, D, BLOCK_M, BLOCK_K, EVEN)  # (BLOCK_M, BLOCK_K)
    for tile in range(0, TILES):
        i = (column * TILES + tile) * PAIRS
        even, odd = pair_products(
            held, A + m * D, Ev + i.to(tl.int64) * 2 * D, M - m, HALF - i, D, BLOCK_M, PAIRS, BLOCK_K, EVEN
        )  # (BLOCK_M, PAIRS) float32
        inside = (r < M - m)[:, None] & (p < HALF - i)[None, :]
        place = m * HALF + i
        words = r[:, None] * HALF + p[None, :]
        X_even, X_odd = split_word(load(X + place + words, inside, EVEN))  # (BLOCK_M, PAIRS)
        even, odd = X_even * relu(even), X_odd * relu(odd)  # (BLOCK_M, PAIRS)
        if DROPOUT:
            keep_even, keep_odd = dropout_factors(m, i, key, dropped, scale, BLOCK_M, PAIRS)  # (BLOCK_M, PAIRS)
            even, odd = even * keep_even, odd * keep_odd  # (BLOCK_M, PAIRS)
        store(Z + place + words, join_word(even, odd, Z.dtype.element_ty), inside, EVEN)


@triton.jit(do_not_specialize=["key", "dropped"])
def gate_backward(
    dy,  # (M, D)
    Dec,  # (N, D)
    A,  # (M, D), normalised
    Ev,  # (N, D)
    X,  # (M, HALF) words
    Z,  # (M, HALF) words, out
    dY,  # (M, HALF) words, out
    dX,  # (M, HALF) words, out
    key,
    dropped,
    scale,
    M,
    HALF,
    D: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Z again, and the gradients before relu(A Ev^T) and of X, of BLOCK_M tokens and PAIRS pairs."""
    row, column = tile_of(tl.cdiv(M, BLOCK_M), tl.cdiv(HALF, PAIRS), GROUP)
    m, i = row.to(tl.int64) * BLOCK_M, column * PAIRS
    r, p = tl.arange(0, BLOCK_M), tl.arange(0, PAIRS)
    weights = i.to(tl.int64) * 2 * D
    Y_even, Y_odd = pair_products(
        None, A + m * D, Ev + weights, M - m, HALF - i, D, BLOCK_M, PAIRS, BLOCK_K, EVEN
    )  # (BLOCK_M, PAIRS) float32
    WORD: tl.constexpr = Z.dtype.element_ty
    Y = join_word(relu(Y_even), relu(Y_odd), WORD)  # (BLOCK_M, PAIRS), as a word it takes half the registers
    dZ_even, dZ_odd = pair_products(
        None, dy + m * D, Dec + weights, M - m, HALF - i, D, BLOCK_M, PAIRS, BLOCK_K, EVEN
    )  # (BLOCK_M, PAIRS) float32
    inside = (r < M - m)[:, None] & (p < HALF - i)[None, :]
    place = m * HALF + i
    words = r[:, None] * HALF + p[None, :]
    X_even, X_odd = split_word(load(X + place + words, inside, EVEN))  # (BLOCK_M, PAIRS)
    Y_even, Y_odd = split_word(Y)  # (BLOCK_M, PAIRS)
    Z_even, Z_odd = X_even * Y_even, X_odd * Y_odd  # (BLOCK_M, PAIRS)
    if DROPOUT:
        keep_even, keep_odd = dropout_factors(m, i, key, dropped, scale, BLOCK_M, PAIRS)  # (BLOCK_M, PAIRS)
        Z_even, Z_odd = Z_even * keep_even, Z_odd * keep_odd  # (BLOCK_M, PAIRS)
        dZ_even, dZ_odd = dZ_even * keep_even, dZ_odd * keep_odd  # (BLOCK_M, PAIRS)
    store(Z + place + words, join_word(Z_even, Z_odd, WORD), inside, EVEN)
    store(dX + place + words, join_word(dZ_even * Y_even, dZ_odd * Y_odd, WORD), inside, EVEN)
    dY_even = tl.where(Y_even > 0, dZ_even * X_even, 0.0)  # (BLOCK_M, PAIRS)
    dY_odd = tl.where(Y_odd > 0, dZ_odd * X_odd, 0.0)  # (BLOCK_M, PAIRS)
    store(dY + place + words, join_word(dY_even, dY_odd, WORD), inside, EVEN)


# ------------------------------------------------------------------------------------------------ pairs of tokens


@triton.jit
def scores(
    R,  # (G, C, N)
    documents,  # (G, C) int32 or int64, or None: all tokens are of one
    P,  # (G, C, C), out
    C,
    N,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    """P = tril(R R^T, -1), 0 where documents differ: one square tile on or below a chunk's diagonal.

    The tile above the diagonal that mirrors it is written too, with zeros.
    """
    row, column = below_diagonal(tl.program_id(0))
    g = tl.program_id(1).to(tl.int64)
    R += g * C * N
    P += g * C * C
    q, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    t, s = row * BLOCK + q, column * BLOCK + q
    R_t = R + row.to(tl.int64) * BLOCK * N + q[:, None] * N + k[None, :]
    R_s = R + column.to(tl.int64) * BLOCK * N + q[:, None] * N + k[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    if row == column:
        for start in range(0, N, BLOCK_K):
            a = load(R_t + start, (t < C)[:, None] & (k < N - start)[None, :], EVEN)  # (BLOCK, BLOCK_K)
            total = add_product(a, a.T, total)  # (BLOCK, BLOCK)
    else:
        for start in range(0, N, BLOCK_K):
            a = load(R_t + start, (t < C)[:, None] & (k < N - start)[None, :], EVEN)  # (BLOCK, BLOCK_K)
            b = load(R_s + start, (s < C)[:, None] & (k < N - start)[None, :], EVEN)  # (BLOCK, BLOCK_K)
            total = add_product(a, b.T, total)  # (BLOCK, BLOCK)
    seen = t[:, None] > s[None, :]  # (BLOCK, BLOCK)
    if documents is not None:
        of_t = tl.load(documents + g * C + t, mask=t < C, other=0)  # (BLOCK)
        of_s = tl.load(documents + g * C + s, mask=s < C, other=0)  # (BLOCK)
        seen = seen & (of_t[:, None] == of_s[None, :])  # (BLOCK, BLOCK)
    result = tl.where(seen, total, 0.0).to(P.dtype.element_ty)  # (BLOCK, BLOCK)
    store(P + t[:, None] * C + s[None, :], result, (t < C)[:, None] & (s < C)[None, :], EVEN)
    if row != column:
        mirrored = P + s[:, None] * C + t[None, :]
        store(mirrored, tl.zeros((BLOCK, BLOCK), P.dtype.element_ty), (s < C)[:, None] & (t < C)[None, :], EVEN)


@triton.jit
def below_diagonal(place):
    """Row and column of the tiles (0, 0), (1, 0), (1, 1), (2, 0) … by their place in that order."""
    row = ((tl.sqrt(8.0 * place.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > place, row - 1, row)  # what the root's rounding did
    row = tl.where((row + 1) * (row + 2) // 2 <= place, row + 1, row)
    return row, place - row * (row + 1) // 2


# ------------------------------------------------------------------------------------------------ from chunk to chunk


@triton.jit
def scan(
    U,  # (B, c, N, D): what each chunk writes; left as the synapses before it
    S,  # (B, N, D) float32, or None: zeros
    cos,  # (HALF) float32, of a chunk's whole length
    sin,  # (HALF) float32
    kept,  # (B, c) float32, or None: all
    S_end,  # (B, N, D) float32, out
    chunks,
    HALF,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """S^{c+1} = rope_{-C}(kept_c S^c + U_c) of PAIRS pairs and BLOCK_D values of a sequence."""
    b = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (i < HALF)[:, None] & (d < D)[None, :]
    tile = i.to(tl.int64)[:, None] * (2 * D) + d[None, :]  # of the even neurons; the odd ones' is D further
    c = tl.load(cos + i, mask=i < HALF, other=1.0)[:, None]  # (PAIRS, 1)
    s = tl.load(sin + i, mask=i < HALF, other=0.0)[:, None]  # (PAIRS, 1)
    even = tl.zeros((PAIRS, BLOCK_D), tl.float32)
    odd = tl.zeros((PAIRS, BLOCK_D), tl.float32)
    if S is not None:
        even = tl.load(S + b * 2 * HALF * D + tile, mask=inside, other=0.0)  # (PAIRS, BLOCK_D)
        odd = tl.load(S + b * 2 * HALF * D + tile + D, mask=inside, other=0.0)  # (PAIRS, BLOCK_D)
    for chunk in range(0, chunks):
        place = U + (b * chunks + chunk) * 2 * HALF * D + tile
        U_even = tl.load(place, mask=inside, other=0.0).to(tl.float32)  # (PAIRS, BLOCK_D)
        U_odd = tl.load(place + D, mask=inside, other=0.0).to(tl.float32)  # (PAIRS, BLOCK_D)
        tl.debug_barrier()  # what a thread overwrites, another may have had to read
        tl.store(place, even.to(U.dtype.element_ty), mask=inside)
        tl.store(place + D, odd.to(U.dtype.element_ty), mask=inside)
        if kept is not None:
            share = tl.load(kept + b * chunks + chunk)
            even, odd = even * share, odd * share  # (PAIRS, BLOCK_D)
        even, odd = even + U_even, odd + U_odd  # (PAIRS, BLOCK_D)
        even, odd = even * c + odd * s, odd * c - even * s  # (PAIRS, BLOCK_D)
    tl.store(S_end + b * 2 * HALF * D + tile, even, mask=inside)
    tl.store(S_end + b * 2 * HALF * D + tile + D, odd, mask=inside)


@triton.jit
def scan_backward(
    V,  # (B, c, N, D): gradients of the synapses before each chunk, as read there; left as those of what it writes
    dS_end,  # (B, N, D) float32, or None: zeros
    cos,  # (HALF) float32, of a chunk's whole length
    sin,  # (HALF) float32
    kept,  # (B, c) float32, or None: all
    dS,  # (B, N, D) float32, out
    chunks,
    HALF,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """From the last chunk back: G_c = rope_{+C}(g^{c+1}), g^c = kept_c G_c + V_c."""
    b = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (i < HALF)[:, None] & (d < D)[None, :]
    tile = i.to(tl.int64)[:, None] * (2 * D) + d[None, :]  # of the even neurons; the odd ones' is D further
    c = tl.load(cos + i, mask=i < HALF, other=1.0)[:, None]  # (PAIRS, 1)
    s = tl.load(sin + i, mask=i < HALF, other=0.0)[:, None]  # (PAIRS, 1)
    even = tl.zeros((PAIRS, BLOCK_D), tl.float32)
    odd = tl.zeros((PAIRS, BLOCK_D), tl.float32)
    if dS_end is not None:
        even = tl.load(dS_end + b * 2 * HALF * D + tile, mask=inside, other=0.0)  # (PAIRS, BLOCK_D)
        odd = tl.load(dS_end + b * 2 * HALF * D + tile + D, mask=inside, other=0.0)  # (PAIRS, BLOCK_D)
    for step in range(0, chunks):
        chunk = chunks - 1 - step
        place = V + (b * chunks + chunk) * 2 * HALF * D + tile
        V_even = tl.load(place, mask=inside, other=0.0).to(tl.float32)  # (PAIRS, BLOCK_D)
        V_odd = tl.load(place + D, mask=inside, other=0.0).to(tl.float32)  # (PAIRS, BLOCK_D)
        tl.debug_barrier()  # what a thread overwrites, another may have had to read
        even, odd = even * c - odd * s, odd * c + even * s  # (PAIRS, BLOCK_D)
        tl.store(place, even.to(V.dtype.element_ty), mask=inside)
        tl.store(place + D, odd.to(V.dtype.element_ty), mask=inside)
        if kept is not None:
            share = tl.load(kept + b * chunks + chunk)
            even, odd = even * share, odd * share  # (PAIRS, BLOCK_D)
        even, odd = even + V_even, odd + V_odd  # (PAIRS, BLOCK_D)
    tl.store(dS + b * 2 * HALF * D + tile, even, mask=inside)
    tl.store(dS + b * 2 * HALF * D + tile + D, odd, mask=inside)
