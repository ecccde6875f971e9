"""Triton kernels of attention with decay and with the delta rule in training; see `bdh.kernels.gated_attention`.

They read and write tensors (tokens, D) or (C, C), or one state; `bdh.kernels.triton.neuron_kernels` has those of size
(tokens, N). Shapes: G chunks of C tokens, M = G * C, D `n_embd`, N neurons of one
head.
"""

import triton
import triton.language as tl

from bdh.kernels.triton.device_functions import add_product, chunk_rows, token_rows
from bdh.kernels.triton.token_kernels import KEY_EPS, pair_weights

# ------------------------------------------------------------------------------------------------ scores


@triton.jit
def scaled_matrix(
    X,  # (G, C, C), lower triangular
    rows,  # (G, C) float32
    columns,  # (G, C) float32
    out,  # (G, C, C)
    C,
    D,  # C
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """diag(rows) X diag(columns): ROWS rows."""
    g = tl.program_id(1).to(tl.int64)
    t, s = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (t < C)[:, None] & (s < D)[None, :]
    tile = g * C * D + t[:, None] * D + s[None, :]
    below = inside & (t[:, None] >= s[None, :])
    values = tl.load(X + tile, mask=below, other=0.0).to(tl.float32)  # (ROWS, WIDTH)
    of_rows = tl.load(rows + g * C + t, mask=t < C, other=0.0)  # (ROWS)
    of_columns = tl.load(columns + g * C + s, mask=s < D, other=0.0)  # (WIDTH)
    tl.store(out + tile, (values * of_rows[:, None] * of_columns[None, :]).to(out.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------ the inverse


@triton.jit
def lower_block(M, beta, t, s, C):
    """Return diag(beta) M of rows t and columns s of a chunk, in M's dtype, 0 outside."""
    inside = (t < C)[:, None] & (s < C)[None, :]
    scores = tl.load(M + t[:, None] * C + s[None, :], mask=inside, other=0.0).to(tl.float32)
    strength = tl.load(beta + t, mask=t < C, other=0.0)
    return (scores * strength[:, None]).to(M.dtype.element_ty)


@triton.jit
def load_block(X, t, s, C):
    return tl.load(X + t[:, None] * C + s[None, :], mask=(t < C)[:, None] & (s < C)[None, :], other=0.0)


@triton.jit
def store_block(X, t, s, values, C):
    tl.store(X + t[:, None] * C + s[None, :], values.to(X.dtype.element_ty), mask=(t < C)[:, None] & (s < C)[None, :])


@triton.jit
def merge_block(X, M, beta, start, C, SIZE: tl.constexpr):
    """Invert [[L11, 0], [L21, L22]] from the inverses of L11 and L22: -X22 L21 X11 below them. SIZE rows each."""
    first, second = start + tl.arange(0, SIZE), start + SIZE + tl.arange(0, SIZE)
    upper, lower = load_block(X, first, first, C), load_block(X, second, second, C)  # (SIZE, SIZE)
    between = lower_block(M, beta, second, first, C)  # (SIZE, SIZE)
    zeros = tl.zeros((SIZE, SIZE), tl.float32)
    product = add_product(between, upper, zeros).to(X.dtype.element_ty)  # (SIZE, SIZE)
    store_block(X, second, first, -add_product(lower, product, zeros), C)


@triton.jit
def scale_and_invert_diagonal(
    M,  # (G, C, C): scores below the diagonal; in and out
    squares,  # (G, C) float32: |R|^2
    u,  # (G, C) float32: cumulative log-decay
    beta,  # (G, C) float32
    X,  # (G, C, C), out: the blocks on the diagonal, and zeros above them
    C,
    SIDE: tl.constexpr,  # 4 BASE
    BASE: tl.constexpr,
):
    """M_ts = a_t a_s exp(u_t - u_s) P_ts in place, of SIDE rows, and the inverse of their block of I + diag(beta) M.

    Blocks of BASE rows by substitution, X_i = e_i - sum over k<i of L_ik X_k; then pairs of blocks are merged.
    """
    g = tl.program_id(1).to(tl.int64)
    M += g * C * C
    X += g * C * C
    beta += g * C
    start = tl.program_id(0) * SIDE
    rows = start + tl.arange(0, SIDE)
    for k in range(0, tl.program_id(0) + 1):
        columns = k * SIDE + tl.arange(0, SIDE)
        weights = pair_weights(u + g * C, squares + g * C, rows, columns, C, True)  # (SIDE, SIDE)
        store_block(M, rows, columns, load_block(M, rows, columns, C).to(tl.float32) * weights, C)
    for k in range(tl.program_id(0) + 1, tl.cdiv(C, SIDE)):
        store_block(X, rows, k * SIDE + tl.arange(0, SIDE), tl.zeros((SIDE, SIDE), tl.float32), C)
    store_block(X, rows, rows, tl.zeros((SIDE, SIDE), tl.float32), C)
    tl.debug_barrier()
    r = tl.arange(0, BASE)
    for block in tl.static_range(4):
        t = start + block * BASE + r
        L = lower_block(M, beta, t, t, C).to(tl.float32)  # (BASE, BASE)
        inverse = (r[:, None] == r[None, :]).to(tl.float32)  # (BASE, BASE)
        for i in range(1, BASE):
            row = tl.sum(tl.where(r[:, None] == i, L, 0.0), 0)  # (BASE)
            change = tl.sum(row[:, None] * inverse, 0)  # (BASE)
            inverse = tl.where(r[:, None] == i, inverse - change[None, :], inverse)  # (BASE, BASE)
        store_block(X, t, t, inverse, C)
    tl.debug_barrier()
    merge_block(X, M, beta, start, C, BASE)
    merge_block(X, M, beta, start + 2 * BASE, C, BASE)
    tl.debug_barrier()
    merge_block(X, M, beta, start, C, 2 * BASE)


@triton.jit
def invert_columns(
    M,  # (G, C, C), strictly lower triangular
    beta,  # (G, C) float32
    X,  # (G, C, C), in: the inverses of the blocks on the diagonal; out: all
    C,
    SIDE: tl.constexpr,
):
    """Columns of SIDE tokens of the inverse, from the diagonal down: X_ij = -X_ii sum over j<=k<i of L_ik X_kj."""
    g = tl.program_id(1).to(tl.int64)
    M += g * C * C
    X += g * C * C
    beta += g * C
    j = tl.program_id(0)
    r = tl.arange(0, SIDE)
    s = j * SIDE + r
    for i in range(j + 1, tl.cdiv(C, SIDE)):
        t = i * SIDE + r
        total = tl.zeros((SIDE, SIDE), tl.float32)
        for k in range(j, i):
            between = lower_block(M, beta, t, k * SIDE + r, C)  # (SIDE, SIDE)
            total = add_product(between, load_block(X, k * SIDE + r, s, C), total)  # (SIDE, SIDE)
        diagonal = load_block(X, t, t, C)  # (SIDE, SIDE)
        zeros = tl.zeros((SIDE, SIDE), tl.float32)
        store_block(X, t, s, -add_product(diagonal, total.to(X.dtype.element_ty), zeros), C)
        tl.debug_barrier()


# ------------------------------------------------------------------------------------------------ rows of tokens


@triton.jit
def scaled_difference(
    w,  # (G, C) float32; G strided
    x,  # (x_chunks, C, D), x_chunks a divisor of G: heads share them; strided
    r,  # (G, C) float32, or None; G strided
    Q,  # (G, C, D), or None; G strided
    out,  # (G, C, D); G strided
    w_stride,
    x_stride,
    r_stride,
    Q_stride,
    out_stride,
    x_chunks,
    C,
    D,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """w (x - r Q), or w x, of ROWS tokens of a chunk."""
    g, t, inside, tile = chunk_rows(C, D, ROWS, WIDTH)
    values = tl.load(x + (g % x_chunks) * x_stride + tile, mask=inside, other=0.0).to(tl.float32)  # (ROWS, WIDTH)
    if Q is not None:
        scale = tl.load(r + g * r_stride + t, mask=t < C, other=0.0)  # (ROWS)
        values -= scale[:, None] * tl.load(Q + g * Q_stride + tile, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(w + g * w_stride + t, mask=t < C, other=0.0)  # (ROWS)
    tl.store(out + g * out_stride + tile, (weight[:, None] * values).to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_scaled(
    A,  # (G, C, D), in and out; G strided
    Q,  # (G, C, D); G strided
    r,  # (G, C) float32; G strided
    A_stride,
    Q_stride,
    r_stride,
    C,
    D,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A + r Q of ROWS tokens of a chunk."""
    g, t, inside, tile = chunk_rows(C, D, ROWS, WIDTH)
    A += g * A_stride
    scale = tl.load(r + g * r_stride + t, mask=t < C, other=0.0)  # (ROWS)
    total = tl.load(A + tile, mask=inside, other=0.0).to(tl.float32)  # (ROWS, WIDTH)
    total += scale[:, None] * tl.load(Q + g * Q_stride + tile, mask=inside, other=0.0).to(tl.float32)
    tl.store(A + tile, total.to(A.dtype.element_ty), mask=inside)


@triton.jit
def delta_rows_backward(
    dA,  # (HEADS * M, D)
    V,  # (HEADS * M, D)
    A,  # (HEADS * M, D)
    U,  # (HEADS * M, D)
    x,  # (M, D)
    beta,  # (HEADS * M) float32
    squares,  # (HEADS * M) float32
    dx,  # (M, D) float32, in and out
    E,  # (HEADS * M, D), out
    diagonal,  # (HEADS * M) float32, out
    d_beta,  # (HEADS * M) float32, out
    M,
    D,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """E = dA - beta V, dx += beta V, and the sums over D that the gates' gradients need, of ROWS tokens."""
    m, inside, tile = token_rows(M, D, ROWS, WIDTH)
    value = tl.load(x + tile, mask=inside, other=0.0).to(tl.float32)  # (ROWS, WIDTH)
    total = tl.load(dx + tile, mask=inside, other=0.0)  # (ROWS, WIDTH)
    for head in tl.static_range(HEADS):
        first = M.to(tl.int64) * head
        offsets = first * D + tile
        gradient = tl.load(V + offsets, mask=inside, other=0.0).to(tl.float32)  # (ROWS, WIDTH)
        strength = tl.load(beta + first + m, mask=m < M, other=0.0)  # (ROWS)
        of_x = strength[:, None] * gradient  # (ROWS, WIDTH)
        total += of_x
        of_A = tl.load(dA + offsets, mask=inside, other=0.0).to(tl.float32) - of_x  # (ROWS, WIDTH)
        tl.store(E + offsets, of_A.to(E.dtype.element_ty), mask=inside)
        read = tl.load(A + offsets, mask=inside, other=0.0).to(tl.float32)  # (ROWS, WIDTH)
        wrote = tl.load(U + offsets, mask=inside, other=0.0).to(tl.float32)  # (ROWS, WIDTH)
        reading, writing = tl.sum(read * of_A, 1), tl.sum(wrote * gradient, 1)  # (ROWS)
        square = tl.load(squares + first + m, mask=m < M, other=0.0)  # (ROWS)
        length = tl.sqrt(square)  # (ROWS)
        through_length = -(reading + writing) / (length * (length + KEY_EPS))  # (ROWS)
        tl.store(diagonal + first + m, tl.where(square > 0, through_length, 0.0), mask=m < M)
        tl.store(d_beta + first + m, tl.sum(gradient * (value - read), 1), mask=m < M)
    tl.store(dx + tile, total, mask=inside)


@triton.jit
def difference_of_dots(
    r,  # (M) float32
    E,  # (M, D)
    Q,  # (M, D)
    w,  # (M) float32
    U,  # (M, D)
    P,  # (M, D)
    difference,  # (M) float32, out
    M,
    D,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """r (E . Q) - w (U . P) of ROWS tokens."""
    m, inside, tile = token_rows(M, D, ROWS, WIDTH)
    left = tl.load(E + tile, mask=inside, other=0.0).to(tl.float32)  # (ROWS, WIDTH)
    read = tl.sum(left * tl.load(Q + tile, mask=inside, other=0.0).to(tl.float32), 1)  # (ROWS)
    right = tl.load(U + tile, mask=inside, other=0.0).to(tl.float32)  # (ROWS, WIDTH)
    wrote = tl.sum(right * tl.load(P + tile, mask=inside, other=0.0).to(tl.float32), 1)  # (ROWS)
    reads, writes = tl.load(r + m, mask=m < M, other=0.0), tl.load(w + m, mask=m < M, other=0.0)  # (ROWS)
    tl.store(difference + m, reads * read - writes * wrote, mask=m < M)


# ------------------------------------------------------------------------------------------------ one state


@triton.jit(do_not_specialize=["HALF"])
def advance(
    before,  # (B, N, D), or None: zeros; B strided
    rest,  # (B, N, D), or None: the rest that rounding took from `before`; then of `after`
    written,  # (B, N, D)
    retention,  # (B) float32, strided
    cos,  # (HALF) float32
    sin,  # (HALF) float32
    after,  # (B, N, D), out; B strided
    before_stride,
    retention_stride,
    after_stride,
    HALF,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """rope_(-C)(retention state + written), of PAIRS pairs of neurons and BLOCK_D values of each.

    The state is the sum of a tensor of its dtype and `rest`, which rounding took from it: two bfloat16 tensors are
    faster to read and write than one of float32, and the products of the next chunk need the first of them.
    """
    b = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (i < HALF)[:, None] & (d < D)[None, :]
    tile = i.to(tl.int64)[:, None] * (2 * D) + d[None, :]  # of the even neurons; the odd ones' is D further
    c = tl.load(cos + i, mask=i < HALF, other=1.0)[:, None]  # (PAIRS, 1)
    s = tl.load(sin + i, mask=i < HALF, other=0.0)[:, None]  # (PAIRS, 1)
    size = 2 * HALF.to(tl.int64) * D
    written += b * size
    even = tl.load(written + tile, mask=inside, other=0.0).to(tl.float32)  # (PAIRS, BLOCK_D)
    odd = tl.load(written + tile + D, mask=inside, other=0.0).to(tl.float32)  # (PAIRS, BLOCK_D)
    if rest is not None:
        rest += b * size
    if before is not None:
        share = tl.load(retention + b * retention_stride)
        before += b * before_stride
        state = tl.load(before + tile, mask=inside, other=0.0).to(tl.float32)  # (PAIRS, BLOCK_D)
        state_odd = tl.load(before + tile + D, mask=inside, other=0.0).to(tl.float32)  # (PAIRS, BLOCK_D)
        if rest is not None:
            state += tl.load(rest + tile, mask=inside, other=0.0).to(tl.float32)
            state_odd += tl.load(rest + tile + D, mask=inside, other=0.0).to(tl.float32)
        even, odd = even + share * state, odd + share * state_odd  # (PAIRS, BLOCK_D)
    turned, turned_odd = even * c + odd * s, odd * c - even * s  # (PAIRS, BLOCK_D)
    after += b * after_stride
    dt: tl.constexpr = after.dtype.element_ty
    tl.store(after + tile, turned.to(dt), mask=inside)
    tl.store(after + tile + D, turned_odd.to(dt), mask=inside)
    if rest is not None:
        tl.store(rest + tile, (turned - turned.to(dt).to(tl.float32)).to(dt), mask=inside)
        tl.store(rest + tile + D, (turned_odd - turned_odd.to(dt).to(tl.float32)).to(dt), mask=inside)
