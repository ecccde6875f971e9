"""Triton kernels of training over tokens and synapses of one head: scores, scans over chunks, layer norms.

Shapes: B sequences of c chunks of C tokens, G = B * c, D `n_embd`, N neurons of the head.
"""

import triton
import triton.language as tl

from bdh.kernels.triton.device_functions import add_product, load, store, token_rows
from bdh.model import modeling_bdh

KEY_EPS = tl.constexpr(modeling_bdh.KEY_EPS)

# ------------------------------------------------------------------------------------------------ pairs of tokens


@triton.jit
def pairs(
    a,  # (G, C, K)
    b,  # (G, C, K)
    documents,  # (G, C) int32 or int64, or None: one document
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

    With u, P_ts is scaled by exp(u_t - u_s), and with squares by the inverse lengths of both keys; `diagonal` becomes
    the diagonal of the result. With M, `differences` summed over tiles is, for each token, the sum over its row minus
    the sum over its column of a b^T * M.

    The mirrored tile above the diagonal is written too: with zeros or, BOTH_WAYS, with the transpose.
    """
    row, column = lower_tile(tl.program_id(0))
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
    """Return exp(u_t - u_s), times a_t a_s if UNIT, for s <= t of one chunk."""
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
def lower_tile(index):
    """Return row and column of a tile, by its index in the order (0, 0), (1, 0), (1, 1), (2, 0) …"""
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)  # corrects the rounding of the root
    row = tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)
    return row, index - row * (row + 1) // 2


# ------------------------------------------------------------------------------------------------ scans over chunks


@triton.jit(do_not_specialize=["HALF"])
def scan(
    updates,  # (B, c, N, D): what each chunk adds
    initial,  # (B, N, D) float32, or None: zeros
    cos,  # (HALF) float32: phases of a whole chunk
    sin,  # (HALF) float32
    retention,  # (B, c) float32, or None: all
    states,  # (B, c, N, D), out: the state when each chunk is added
    end,  # (B, N, D) float32, out
    chunks,
    HALF,
    D: tl.constexpr,
    BACK: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scan of the synapses over chunks, or BACK of their gradients: PAIRS pairs, BLOCK_D values of each.

    Forward, S^{c+1} = rope(retention_c S^c + updates_c) and states_c = S^c; BACK, from the last chunk,
    states_c = rope(g^{c+1}) and g^c = retention_c states_c + updates_c.
    """
    b = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (i < HALF)[:, None] & (d < D)[None, :]
    size = 2 * HALF.to(tl.int64) * D  # of a chunk
    tile = i.to(tl.int64)[:, None] * (2 * D) + d[None, :]  # of the even neurons; the odd ones' is D further
    c = tl.load(cos + i, mask=i < HALF, other=1.0)[:, None]  # (PAIRS, 1)
    s = tl.load(sin + i, mask=i < HALF, other=0.0)[:, None]  # (PAIRS, 1)
    even = tl.zeros((PAIRS, BLOCK_D), tl.float32)
    odd = tl.zeros((PAIRS, BLOCK_D), tl.float32)
    if initial is not None:
        even = tl.load(initial + b * size + tile, mask=inside, other=0.0)  # (PAIRS, BLOCK_D)
        odd = tl.load(initial + b * size + tile + D, mask=inside, other=0.0)  # (PAIRS, BLOCK_D)
    first_chunk = chunks - 1 if BACK else 0
    tile += (b * chunks + first_chunk) * size
    update_even = tl.load(updates + tile, mask=inside, other=0.0)  # (PAIRS, BLOCK_D)
    update_odd = tl.load(updates + tile + D, mask=inside, other=0.0)  # (PAIRS, BLOCK_D)
    for step in range(0, chunks):
        following = tile - size if BACK else tile + size
        has_next = (i < HALF * min(chunks - 1 - step, 1))[:, None] & (d < D)[None, :]
        next_even = tl.load(updates + following, mask=has_next, other=0.0)  # (PAIRS, BLOCK_D)  prefetched
        next_odd = tl.load(updates + following + D, mask=has_next, other=0.0)  # (PAIRS, BLOCK_D)
        if BACK:
            even, odd = even * c - odd * s, odd * c + even * s  # (PAIRS, BLOCK_D)
        tl.store(states + tile, even.to(states.dtype.element_ty), mask=inside)
        tl.store(states + tile + D, odd.to(states.dtype.element_ty), mask=inside)
        if retention is not None:
            share = tl.load(retention + b * chunks + (chunks - 1 - step if BACK else step))
            even, odd = even * share, odd * share  # (PAIRS, BLOCK_D)
        even, odd = even + update_even.to(tl.float32), odd + update_odd.to(tl.float32)  # (PAIRS, BLOCK_D)
        if not BACK:
            even, odd = even * c - odd * s, odd * c + even * s  # (PAIRS, BLOCK_D)
        update_even, update_odd, tile = next_even, next_odd, following
    tile = i.to(tl.int64)[:, None] * (2 * D) + d[None, :]
    tl.store(end + b * size + tile, even, mask=inside)
    tl.store(end + b * size + tile + D, odd, mask=inside)


# ------------------------------------------------------------------------------------------------ layer norms


@triton.jit
def layer_norm(a, inside, eps, D):
    """Return the layer norm of rows (ROWS, WIDTH), and 1 / deviation (ROWS, 1)."""
    centered = tl.where(inside, a - (tl.sum(a, 1) / D)[:, None], 0.0)  # (ROWS, WIDTH)
    inverse = tl.math.rsqrt(tl.sum(centered * centered, 1) / D + eps)[:, None]  # (ROWS, 1)
    return centered * inverse, inverse


@triton.jit
def layer_norm_backward(g, a, inverse, D):
    """Return the gradient before a layer norm with result a, from the one after it: (ROWS, WIDTH), D of them valid."""
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
    m, inside, tile = token_rows(M, D, ROWS, WIDTH)
    a, inverse = layer_norm(tl.load(A + tile, mask=inside, other=0.0).to(tl.float32), inside, eps, D)  # (ROWS, WIDTH)
    tl.store(result + tile, a.to(result.dtype.element_ty), mask=inside)
    tl.store(rstd + m[:, None], inverse, mask=(m < M)[:, None])


@triton.jit
def norm_backward(
    gradient,  # (M, D)
    A,  # (M, D), normalized
    rstd,  # (M) float32
    result,  # (M, D), out
    M,
    D,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(g - mean(g) - A mean(g A)) / deviation, of ROWS tokens."""
    m, inside, tile = token_rows(M, D, ROWS, WIDTH)
    g = tl.load(gradient + tile, mask=inside, other=0.0).to(tl.float32)  # (ROWS, WIDTH)
    a = tl.load(A + tile, mask=inside, other=0.0).to(tl.float32)  # (ROWS, WIDTH)
    inverse = tl.load(rstd + m, mask=m < M, other=0.0)[:, None]  # (ROWS, 1)
    tl.store(result + tile, layer_norm_backward(g, a, inverse, D).to(result.dtype.element_ty), mask=inside)


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
    _, inside, tile = token_rows(M, D, ROWS, WIDTH)
    before = tl.load(x + tile, mask=inside, other=0.0)  # (ROWS, WIDTH)
    normalized, _ = layer_norm(tl.load(y + tile, mask=inside, other=0.0), inside, eps, D)  # (ROWS, WIDTH)
    total, _ = layer_norm(before + normalized, inside, eps, D)  # (ROWS, WIDTH)
    tl.store(result + tile, total, mask=inside)


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
    """The gradients of x and y of ROWS tokens; recomputes both norms."""
    _, inside, tile = token_rows(M, D, ROWS, WIDTH)
    before = tl.load(x + tile, mask=inside, other=0.0)  # (ROWS, WIDTH)
    normalized, of_y = layer_norm(tl.load(y + tile, mask=inside, other=0.0), inside, eps, D)  # (ROWS, WIDTH), (ROWS, 1)
    total, of_total = layer_norm(before + normalized, inside, eps, D)  # (ROWS, WIDTH), (ROWS, 1)
    g = layer_norm_backward(tl.load(gradient + tile, mask=inside, other=0.0), total, of_total, D)  # (ROWS, WIDTH)
    g = tl.where(inside, g, 0.0)  # (ROWS, WIDTH)
    tl.store(dx + tile, g, mask=inside)
    tl.store(dy + tile, layer_norm_backward(g, normalized, of_y, D), mask=inside)
