"""What goes from token to token in training on a GPU, in Triton: scores, synapses from chunk to chunk, layer norms.

A head at a time, with the batch's tokens in G chunks of C. Shapes: B sequences of c chunks, D `n_embd`, N neurons.
"""

import triton
import triton.language as tl

from bdh.kernels.triton.device_functions import add_product, load, store
from bdh.model import modeling_bdh

KEY_EPS = tl.constexpr(modeling_bdh.KEY_EPS)

# ------------------------------------------------------------------------------------------------ pairs of tokens


@triton.jit
def pairs(
    a,  # (G, C, K)
    b,  # (G, C, K)
    documents,  # (G, C) int32 or int64, or None: all tokens are of one
    u,  # (G, C) float32, cumulative log-decay, or None
    squares,  # (G, C) float32, |R|^2 of keys of unit length, or None
    diagonal,  # (G, C) float32, or None
    M,  # (G, C, C), 0 where P is, or None
    P,  # (G, C, C), out
    differences,  # (G, tiles of C, C) float32, out, if there is M
    squares_out,  # (G, C) float32, out: the diagonal of a b^T, or None
    C,
    K,
    SAME: tl.constexpr,  # whether a is b
    BOTH_WAYS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    """P = tril(a b^T, -1), 0 where documents differ: one square tile on or below a chunk's diagonal.

    With u, P_ts is scaled by exp(u_t - u_s), and with squares by the inverse lengths of both keys; `diagonal` is put on
    the diagonal of the result. With M, the sum of `differences` over tiles is, for each token, the sum over its row
    minus the sum over its column of a b^T * M.

    The tile above the diagonal that mirrors it is written too: with zeros or, BOTH_WAYS, with this one's transpose.
    """
    row, column = below_diagonal(tl.program_id(0))
    g = tl.program_id(1).to(tl.int64)
    a += g * C * K
    b += g * C * K
    P += g * C * C
    q, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    t, s = row * BLOCK + q, column * BLOCK + q
    a_t = a + row.to(tl.int64) * BLOCK * K + q[:, None] * K + k[None, :]
    b_s = b + column.to(tl.int64) * BLOCK * K + q[:, None] * K + k[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    if SAME and row == column:
        for start in range(0, K, BLOCK_K):
            left = load(a_t + start, (t < C)[:, None] & (k < K - start)[None, :], EVEN)  # (BLOCK, BLOCK_K)
            total = add_product(left, left.T, total)  # (BLOCK, BLOCK)
    else:
        for start in range(0, K, BLOCK_K):
            left = load(a_t + start, (t < C)[:, None] & (k < K - start)[None, :], EVEN)  # (BLOCK, BLOCK_K)
            right = load(b_s + start, (s < C)[:, None] & (k < K - start)[None, :], EVEN)  # (BLOCK, BLOCK_K)
            total = add_product(left, right.T, total)  # (BLOCK, BLOCK)
    seen = t[:, None] > s[None, :]  # (BLOCK, BLOCK)
    if documents is not None:
        of_t = tl.load(documents + g * C + t, mask=t < C, other=0)  # (BLOCK)
        of_s = tl.load(documents + g * C + s, mask=s < C, other=0)  # (BLOCK)
        seen = seen & (of_t[:, None] == of_s[None, :])  # (BLOCK, BLOCK)
    result = tl.where(seen, total, 0.0)  # (BLOCK, BLOCK)
    if M is not None:
        tiles = tl.cdiv(C, BLOCK)
        differences += g * tiles * C
        factors = load(M + g * C * C + t[:, None] * C + s[None, :], (t < C)[:, None] & (s < C)[None, :], EVEN)
        products = result * factors.to(tl.float32)  # (BLOCK, BLOCK)
        of_rows, of_columns = tl.sum(products, 1), tl.sum(products, 0)  # (BLOCK)
        if row == column:
            tl.store(differences + row * C + t, of_rows - of_columns, mask=t < C)
        else:
            tl.store(differences + column * C + t, of_rows, mask=t < C)
            tl.store(differences + row * C + s, -of_columns, mask=s < C)
    if u is not None:
        of_keys = u if squares is None else squares
        result *= pair_weights(u + g * C, of_keys + g * C, t, s, C, squares is not None)  # (BLOCK, BLOCK)
    if squares_out is not None:  # noqa: SIM102  (Triton knows the first when it compiles)
        if row == column:
            on_diagonal = tl.sum(tl.where(t[:, None] == s[None, :], total, 0.0), 1)  # (BLOCK)
            tl.store(squares_out + g * C + t, on_diagonal, mask=t < C)
    mirrored = tl.zeros((BLOCK, BLOCK), tl.float32)
    if BOTH_WAYS:
        mirrored = result.T  # (BLOCK, BLOCK)
        if row == column:
            result += mirrored
            if diagonal is not None:
                on_diagonal = tl.load(diagonal + g * C + t, mask=t < C, other=0.0)  # (BLOCK)
                result = tl.where(t[:, None] == s[None, :], on_diagonal[:, None], result)  # (BLOCK, BLOCK)
    dt: tl.constexpr = P.dtype.element_ty
    store(P + t[:, None] * C + s[None, :], result.to(dt), (t < C)[:, None] & (s < C)[None, :], EVEN)
    if row != column:
        store(P + s[:, None] * C + t[None, :], mirrored.to(dt), (s < C)[:, None] & (t < C)[None, :], EVEN)


@triton.jit
def pair_weights(u, squares, t, s, C, UNIT: tl.constexpr):
    """exp(u_t - u_s), times a_t a_s if UNIT, for s <= t of one chunk."""
    u_t = tl.load(u + t, mask=t < C, other=0.0)  # (BLOCK)
    u_s = tl.load(u + s, mask=s < C, other=0.0)  # (BLOCK)
    weights = tl.exp(tl.minimum(u_t[:, None] - u_s[None, :], 0.0))  # (BLOCK, BLOCK)
    if UNIT:
        a_t = inverse_length(tl.load(squares + t, mask=t < C, other=0.0))  # (BLOCK)
        a_s = inverse_length(tl.load(squares + s, mask=s < C, other=0.0))  # (BLOCK)
        weights = weights * a_t[:, None] * a_s[None, :]  # (BLOCK, BLOCK)
    return weights


@triton.jit
def inverse_length(squares):
    return 1.0 / (tl.sqrt(squares) + KEY_EPS)


@triton.jit
def below_diagonal(place):
    """Row and column of the tiles (0, 0), (1, 0), (1, 1), (2, 0) … by their place in that order."""
    row = ((tl.sqrt(8.0 * place.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > place, row - 1, row)  # what the root's rounding did
    row = tl.where((row + 1) * (row + 2) // 2 <= place, row + 1, row)
    return row, place - row * (row + 1) // 2


# ------------------------------------------------------------------------------------------------ from chunk to chunk


@triton.jit(do_not_specialize=["HALF"])
def scan(
    new,  # (B, c, N, D): what comes in by each chunk
    begin,  # (B, N, D) float32, or None: zeros
    cos,  # (HALF) float32, of a chunk's whole length
    sin,  # (HALF) float32, of how far it turns
    kept,  # (B, c) float32, or None: all
    there,  # (B, c, N, D), out: what was there when each came in
    end,  # (B, N, D) float32, out
    chunks,
    HALF,
    D: tl.constexpr,
    BACK: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Synapses from chunk to chunk, or their gradients from the last chunk BACK: PAIRS pairs, BLOCK_D values of each.

    On the way there S^{c+1} = rope(kept_c S^c + new_c) and there_c = S^c; on the way back there_c = rope(g^{c+1}) and
    g^c = kept_c there_c + new_c.
    """
    b = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (i < HALF)[:, None] & (d < D)[None, :]
    size = 2 * HALF.to(tl.int64) * D  # of a chunk's
    tile = i.to(tl.int64)[:, None] * (2 * D) + d[None, :]  # of the even neurons; the odd ones' is D further
    c = tl.load(cos + i, mask=i < HALF, other=1.0)[:, None]  # (PAIRS, 1)
    s = tl.load(sin + i, mask=i < HALF, other=0.0)[:, None]  # (PAIRS, 1)
    even = tl.zeros((PAIRS, BLOCK_D), tl.float32)
    odd = tl.zeros((PAIRS, BLOCK_D), tl.float32)
    if begin is not None:
        even = tl.load(begin + b * size + tile, mask=inside, other=0.0)  # (PAIRS, BLOCK_D)
        odd = tl.load(begin + b * size + tile + D, mask=inside, other=0.0)  # (PAIRS, BLOCK_D)
    first = chunks - 1 if BACK else 0
    tile += (b * chunks + first) * size
    come_even = tl.load(new + tile, mask=inside, other=0.0)  # (PAIRS, BLOCK_D)
    come_odd = tl.load(new + tile + D, mask=inside, other=0.0)  # (PAIRS, BLOCK_D)
    for step in range(0, chunks):
        following = tile - size if BACK else tile + size
        more = (i < HALF * min(chunks - 1 - step, 1))[:, None] & (d < D)[None, :]
        next_even = tl.load(new + following, mask=more, other=0.0)  # (PAIRS, BLOCK_D)  asked for before it is needed
        next_odd = tl.load(new + following + D, mask=more, other=0.0)  # (PAIRS, BLOCK_D)
        if BACK:
            even, odd = even * c - odd * s, odd * c + even * s  # (PAIRS, BLOCK_D)
        tl.store(there + tile, even.to(there.dtype.element_ty), mask=inside)
        tl.store(there + tile + D, odd.to(there.dtype.element_ty), mask=inside)
        if kept is not None:
            share = tl.load(kept + b * chunks + (chunks - 1 - step if BACK else step))
            even, odd = even * share, odd * share  # (PAIRS, BLOCK_D)
        even, odd = even + come_even.to(tl.float32), odd + come_odd.to(tl.float32)  # (PAIRS, BLOCK_D)
        if not BACK:
            even, odd = even * c - odd * s, odd * c + even * s  # (PAIRS, BLOCK_D)
        come_even, come_odd, tile = next_even, next_odd, following
    tile = i.to(tl.int64)[:, None] * (2 * D) + d[None, :]
    tl.store(end + b * size + tile, even, mask=inside)
    tl.store(end + b * size + tile + D, odd, mask=inside)


# ------------------------------------------------------------------------------------------------ layer norms


@triton.jit
def normalised(a, inside, eps, D):
    """Layer norm of rows (ROWS, WIDTH), and 1 / deviation (ROWS, 1)."""
    off = tl.where(inside, a - (tl.sum(a, 1) / D)[:, None], 0.0)  # (ROWS, WIDTH)
    inverse = tl.math.rsqrt(tl.sum(off * off, 1) / D + eps)[:, None]  # (ROWS, 1)
    return off * inverse, inverse


@triton.jit
def back_through(g, a, inverse, D):
    """The gradient before a layer norm that gave a, from that after it: (ROWS, WIDTH), of which D count."""
    return (g - (tl.sum(g, 1) / D)[:, None] - a * (tl.sum(g * a, 1) / D)[:, None]) * inverse  # (ROWS, WIDTH)


@triton.jit
def norm(
    A,  # (M, D)
    result,  # (M, D), out
    rstd,  # (M) float32, out
    eps,
    M,
    D,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,  # at least D
):
    """LN(A) of ROWS tokens, and 1 / deviation."""
    m, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (m < M)[:, None] & (d < D)[None, :]
    place = m.to(tl.int64)[:, None] * D + d[None, :]
    a, inverse = normalised(tl.load(A + place, mask=inside, other=0.0).to(tl.float32), inside, eps, D)  # (ROWS, WIDTH)
    tl.store(result + place, a.to(result.dtype.element_ty), mask=inside)
    tl.store(rstd + m[:, None], inverse, mask=(m < M)[:, None])


@triton.jit
def norm_backward(
    gradient,  # (M, D)
    A,  # (M, D), normalised
    rstd,  # (M) float32
    result,  # (M, D), out
    M,
    D,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(g - mean(g) - A mean(g A)) / deviation, of ROWS tokens."""
    m, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (m < M)[:, None] & (d < D)[None, :]
    place = m.to(tl.int64)[:, None] * D + d[None, :]
    g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)  # (ROWS, WIDTH)
    a = tl.load(A + place, mask=inside, other=0.0).to(tl.float32)  # (ROWS, WIDTH)
    inverse = tl.load(rstd + m, mask=m < M, other=0.0)[:, None]  # (ROWS, 1)
    tl.store(result + place, back_through(g, a, inverse, D).to(result.dtype.element_ty), mask=inside)


@triton.jit
def add_norm(
    x,  # (M, D)
    y,  # (M, D)
    result,  # (M, D), out
    eps,
    M,
    D,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """LN(x + LN(y)) of ROWS tokens."""
    m, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (m < M)[:, None] & (d < D)[None, :]
    place = m.to(tl.int64)[:, None] * D + d[None, :]
    before = tl.load(x + place, mask=inside, other=0.0)  # (ROWS, WIDTH)
    made, _ = normalised(tl.load(y + place, mask=inside, other=0.0), inside, eps, D)  # (ROWS, WIDTH)
    total, _ = normalised(before + made, inside, eps, D)  # (ROWS, WIDTH)
    tl.store(result + place, total, mask=inside)


@triton.jit
def add_norm_backward(
    gradient,  # (M, D)
    x,  # (M, D)
    y,  # (M, D)
    dx,  # (M, D), out
    dy,  # (M, D), out
    eps,
    M,
    D,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The gradients of x and y of ROWS tokens; both norms are worked out again."""
    m, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (m < M)[:, None] & (d < D)[None, :]
    place = m.to(tl.int64)[:, None] * D + d[None, :]
    before = tl.load(x + place, mask=inside, other=0.0)  # (ROWS, WIDTH)
    made, of_y = normalised(tl.load(y + place, mask=inside, other=0.0), inside, eps, D)  # (ROWS, WIDTH), (ROWS, 1)
    total, of_total = normalised(before + made, inside, eps, D)  # (ROWS, WIDTH), (ROWS, 1)
    g = back_through(tl.load(gradient + place, mask=inside, other=0.0), total, of_total, D)  # (ROWS, WIDTH)
    g = tl.where(inside, g, 0.0)  # (ROWS, WIDTH)
    tl.store(dx + place, g, mask=inside)
    tl.store(dy + place, back_through(g, made, of_y, D), mask=inside)
