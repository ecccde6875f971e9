"""Reading many tokens of one sequence on a GPU: the chunked form, with what would move (T, n) tensors fused, in Triton.

Shapes: T tokens in chunks of C, D `n_embd`, h heads, N neurons of a head, n = h * N. Neurons lie as in
`bdh.kernels.decode`: a head's even ones first (`halved`), so that a rotary pair is column i and column i + N/2.

A layer is a product with the encoder, `rotate_tokens` (R from X), `scan_synapses` (the synapses before every chunk, and
after the last), products for tril(R_c R_c^T, -1) x_c + R_c S_c, `gate_tokens` (Z from A), and one with the decoder.
Triton's own products are used where something is fused to them that saves more than cuBLAS is faster.
"""

import triton
import triton.language as tl


@triton.jit
def rotate_tokens(
    X,  # (T, n), before relu
    cos,  # (T, N/2) float32
    sin,  # (T, N/2) float32
    R,  # (h, padded, N), out
    n,
    HALF,
    padded,
    h: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """R = rope(relu(X)) of one token and the same PAIRS rotary pairs of every head."""
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    c = tl.load(cos + t * HALF + i, mask=i < HALF, other=0.0)  # (PAIRS)
    s = tl.load(sin + t * HALF + i, mask=i < HALF, other=0.0)  # (PAIRS)
    for k in tl.static_range(h):
        row = X + t * n + k * 2 * HALF + i
        even = tl.maximum(tl.load(row, mask=i < HALF, other=0.0).to(tl.float32), 0.0)  # (PAIRS)
        odd = tl.maximum(tl.load(row + HALF, mask=i < HALF, other=0.0).to(tl.float32), 0.0)  # (PAIRS)
        row = R + (k * padded + t) * 2 * HALF + i
        tl.store(row, (even * c - odd * s).to(R.dtype.element_ty), mask=i < HALF)
        tl.store(row + HALF, (odd * c + even * s).to(R.dtype.element_ty), mask=i < HALF)


@triton.jit
def scan_synapses(
    R,  # (h, T, N)
    x,  # (T, D)
    S,  # (n, D) float32: before the first token; left as after the last
    before,  # (h, T / C, N, D), out: before each chunk
    T,
    N,
    D,
    C,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The sum S = sum of R_s^T x_s as it grows, stored before each chunk of C tokens. TOKENS divides C, C divides T."""
    blocks = tl.cdiv(N, ROWS)
    k = (tl.program_id(0) // blocks).to(tl.int64)
    j = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (j < N)[:, None] & (d < D)[None, :]
    tile = j.to(tl.int64)[:, None] * D + d[None, :]
    total = tl.load(S + k * N * D + tile, mask=inside, other=0.0)  # (ROWS, COLUMNS) float32
    for chunk in range(0, T // C):
        place = before + (k * (T // C) + chunk) * N * D
        tl.store(place + tile, total.to(before.dtype.element_ty), mask=inside)
        for start in range(chunk * C, (chunk + 1) * C, TOKENS):
            t = (start + tl.arange(0, TOKENS)).to(tl.int64)
            R_t = tl.load(R + (k * T + t)[None, :] * N + j[:, None], mask=(j < N)[:, None], other=0.0)  # (ROWS, TOKENS)
            x_t = tl.load(x + t[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)  # (TOKENS, COLUMNS)
            total = tl.dot(R_t, x_t, total, input_precision="ieee")
    tl.store(S + k * N * D + tile, total, mask=inside)


@triton.jit
def gate_tokens(
    A,  # (h, T, D), normalised
    encoder_v,  # (n, D)
    X,  # (T, n), before relu
    Z,  # (T, n), out
    T,
    n,
    D,
    N,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,  # D, rounded up to a multiple of BLOCK_D
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Z = relu(X) o relu(A_k Ev_k) of TOKENS tokens and TILES times ROWS neurons of one head."""
    blocks = tl.cdiv(N, ROWS * TILES)
    k, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, BLOCK_D)
    row = A + (k * T + t[:, None]) * D
    a = tl.load(row + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)  # (TOKENS, BLOCK_D)
    for tile in tl.range(TILES, num_stages=STAGES):
        j = (block * TILES + tile) * ROWS + tl.arange(0, ROWS)
        rows = (k * N + j).to(tl.int64)
        total = tl.zeros((TOKENS, ROWS), tl.float32)
        for start in tl.static_range(0, WIDTH, BLOCK_D):
            if start > 0:
                a = tl.load(row + start + d[None, :], mask=(t < T)[:, None] & (start + d < D)[None, :], other=0.0)
            weights = (j < N)[None, :] & (start + d < D)[:, None]
            V = tl.load(encoder_v + rows[None, :] * D + start + d[:, None], mask=weights, other=0.0)  # (BLOCK_D, ROWS)
            total = tl.dot(a, V, total, input_precision="ieee")  # (TOKENS, ROWS)
        if WIDTH > BLOCK_D:  # for the next tile
            a = tl.load(row + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
        inside = (t < T)[:, None] & (j < N)[None, :]
        place = t.to(tl.int64)[:, None] * n + rows[None, :]
        fired = tl.load(X + place, mask=inside, other=0.0).to(tl.float32)  # (TOKENS, ROWS)
        tl.store(Z + place, (tl.maximum(fired, 0.0) * tl.maximum(total, 0.0)).to(Z.dtype.element_ty), mask=inside)
