"""What moves tensors of (tokens, neurons) in training on a GPU, in Triton: one pass an operation over each of them.

A head at a time, with the batch's tokens in G chunks of C, M = G * C in all. Moving tensors of (M, N) numbers is what
takes the time: a product with D or C terms takes no longer than writing what comes out. So all that is done to a neuron
between two products is done where its product is. A rotary pair is columns 2i, 2i+1, which a thread has side by side.
Tokens and neurons that a tile has too many are masked, unless EVEN says that all sizes are multiples of the tile's.

Shapes: M = G * C tokens, D `n_embd`, N neurons of the head.
"""

import triton
import triton.language as tl

from bdh.kernels.train_parts import (
    add_product,
    add_products,
    dropout_factors,
    halves,
    load,
    relu,
    rope,
    store,
    stream,
    tile_of,
)

# ------------------------------------------------------------------------------------------------ who fires


@triton.jit
def excite(
    x,  # (M, D)
    E,  # (N, D)
    phases,  # (C, N): cos and sin of each pair
    X,  # (M, N), out
    R,  # (M, N), out
    M,
    C,
    N,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
):
    """X = relu(x E^T) and R = rope(X) of BLOCK_M tokens and BLOCK_N neurons."""
    row, column = tile_of(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    m, n = row.to(tl.int64) * BLOCK_M, column * BLOCK_N
    r, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = (r < M - m)[:, None] & (j < N - n)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    E += n.to(tl.int64) * D
    total = add_products(total, x + m * D, E, M - m, N - n, D, BLOCK_M, BLOCK_N, BLOCK_K, EVEN)  # (BLOCK_M, BLOCK_N)
    fired = relu(total)  # (BLOCK_M, BLOCK_N)
    place = m * N + n
    tile = r[:, None] * N + j[None, :]
    stream(X + place + tile, fired.to(X.dtype.element_ty), inside, EVEN)
    t = ((m + r) % C).to(tl.int32)  # (BLOCK_M)
    phase = load(phases + t[:, None] * N + (n + j)[None, :], inside, EVEN).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    cos, sin = halves(phase, BLOCK_M, BLOCK_N)  # (BLOCK_M, BLOCK_N / 2)
    stream(R + place + tile, rope(fired, cos, sin, BLOCK_M, BLOCK_N).to(R.dtype.element_ty), inside, EVEN)


@triton.jit
def excite_backward(
    dP,  # (G, C, C), symmetric
    R,  # (G, C, N)
    X,  # (G, C, N)
    dX,  # (G, C, N); left as the result
    phases,  # (C, N): cos and sin of each pair
    dA,  # (G, C, D), or None: nothing came before the chunks
    S,  # (G, N, D), or None
    v,  # (G, C, D), or None
    dS,  # (G, N, D), or None
    C,
    N,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
):
    """(dX + rope^-1(dR)) where X > 0, dR = dP R + dA S^T + v dS^T, of BLOCK_M tokens and BLOCK_N neurons of a chunk."""
    row, column = tile_of(tl.cdiv(C, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    g = tl.program_id(1).to(tl.int64)
    t, n = row * BLOCK_M, column * BLOCK_N
    r, j, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    dR = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tokens = dP + g * C * C + t.to(tl.int64) * C + r[:, None] * C + k[None, :]
    others = R + g * C * N + n + k[:, None] * N + j[None, :]
    for start in range(0, C, BLOCK_K):
        there = k < C - start
        a = load(tokens, (r < C - t)[:, None] & there[None, :], EVEN)  # (BLOCK_M, BLOCK_K)
        b = load(others, there[:, None] & (j < N - n)[None, :], EVEN)  # (BLOCK_K, BLOCK_N)
        dR = add_product(a, b, dR)  # (BLOCK_M, BLOCK_N)
        tokens += BLOCK_K
        others += BLOCK_K * N
    if dA is not None:
        weights, tokens = (g * N + n) * D, (g * C + t) * D
        dR = add_products(dR, dA + tokens, S + weights, C - t, N - n, D, BLOCK_M, BLOCK_N, BLOCK_K, EVEN)
        dR = add_products(dR, v + tokens, dS + weights, C - t, N - n, D, BLOCK_M, BLOCK_N, BLOCK_K, EVEN)
    inside = (r < C - t)[:, None] & (j < N - n)[None, :]
    phase = load(phases + (t + r)[:, None] * N + (n + j)[None, :], inside, EVEN).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    cos, sin = halves(phase, BLOCK_M, BLOCK_N)  # (BLOCK_M, BLOCK_N / 2)
    place = (g * C + t) * N + n
    tile = r[:, None] * N + j[None, :]
    fired = load(X + place + tile, inside, EVEN)  # (BLOCK_M, BLOCK_N)
    total = load(dX + place + tile, inside, EVEN).to(tl.float32) + rope(dR, cos, -sin, BLOCK_M, BLOCK_N)
    total = tl.where(fired > 0, total, 0.0)  # (BLOCK_M, BLOCK_N)
    stream(dX + place + tile, total.to(dX.dtype.element_ty), inside, EVEN)


# ------------------------------------------------------------------------------------------------ who answers


@triton.jit(do_not_specialize=["key", "dropped"])
def gate(
    A,  # (M, D), normalised
    Ev,  # (N, D)
    X,  # (M, N)
    Z,  # (M, N), out
    key,
    dropped,
    scale,
    M,
    N,
    D: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Z = dropout(X o relu(A Ev^T)) of BLOCK_M tokens and BLOCK_N neurons."""
    row, column = tile_of(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    m, n = row.to(tl.int64) * BLOCK_M, column * BLOCK_N
    r, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    Ev += n.to(tl.int64) * D
    total = add_products(total, A + m * D, Ev, M - m, N - n, D, BLOCK_M, BLOCK_N, BLOCK_K, EVEN)  # (BLOCK_M, BLOCK_N)
    inside = (r < M - m)[:, None] & (j < N - n)[None, :]
    place = m * N + n
    tile = r[:, None] * N + j[None, :]
    answer = load(X + place + tile, inside, EVEN).to(tl.float32) * relu(total)  # (BLOCK_M, BLOCK_N)
    if DROPOUT:
        answer *= dropout_factors(m, n // 2, key, dropped, scale, BLOCK_M, BLOCK_N // 2)  # (BLOCK_M, BLOCK_N)
    stream(Z + place + tile, answer.to(Z.dtype.element_ty), inside, EVEN)


@triton.jit(do_not_specialize=["key", "dropped"])
def gate_backward(
    dy,  # (M, D)
    Dec,  # (N, D)
    A,  # (M, D), normalised
    Ev,  # (N, D)
    X,  # (M, N)
    Z,  # (M, N), out
    dY,  # (M, N), out
    dX,  # (M, N), out
    key,
    dropped,
    scale,
    M,
    N,
    D: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Z again, and the gradients before relu(A Ev^T) and of X, of BLOCK_M tokens and BLOCK_N neurons."""
    row, column = tile_of(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    m, n = row.to(tl.int64) * BLOCK_M, column * BLOCK_N
    r, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    dt: tl.constexpr = Z.dtype.element_ty
    rows, neurons = m * D, n.to(tl.int64) * D
    Y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    Y = add_products(Y, A + rows, Ev + neurons, M - m, N - n, D, BLOCK_M, BLOCK_N, BLOCK_K, EVEN)  # (BLOCK_M, BLOCK_N)
    Y = relu(Y).to(dt)  # (BLOCK_M, BLOCK_N), so that it takes half the registers
    dZ = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dZ = add_products(dZ, dy + rows, Dec + neurons, M - m, N - n, D, BLOCK_M, BLOCK_N, BLOCK_K, EVEN)
    inside = (r < M - m)[:, None] & (j < N - n)[None, :]
    place = m * N + n
    tile = r[:, None] * N + j[None, :]
    fired = load(X + place + tile, inside, EVEN).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    answer = fired * Y.to(tl.float32)  # (BLOCK_M, BLOCK_N)
    if DROPOUT:
        factors = dropout_factors(m, n // 2, key, dropped, scale, BLOCK_M, BLOCK_N // 2)  # (BLOCK_M, BLOCK_N)
        answer, dZ = answer * factors, dZ * factors  # (BLOCK_M, BLOCK_N)
    stream(Z + place + tile, answer.to(dt), inside, EVEN)
    stream(dX + place + tile, (dZ * Y.to(tl.float32)).to(dt), inside, EVEN)
    stream(dY + place + tile, tl.where(Y > 0, dZ * fired, 0.0).to(dt), inside, EVEN)


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
