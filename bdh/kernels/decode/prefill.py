"""Prefill of one sequence on a GPU in chunks, with Triton kernels that fuse operations on (T, n) tensors.

Shapes: T tokens in chunks of C, D `n_embd`, h heads, N neurons of a head, n = h * N. Neurons are ordered
as in `bdh.kernels.decode.cuda`: a head's even ones first (`halved`), so that a rotary pair is columns i and i + N/2.

A layer is a product with the encoder, `rotate_tokens` (R from X), `scan_synapses` (the synapses before every chunk, and
after the last), products for tril(R_c R_c^T, -1) x_c + R_c S_c, `gate_tokens` (Z from A), and one with the decoder.
Products are in Triton where fusion saves more than cuBLAS would.

With decay `scan_synapses` adds values that are scaled by their retention until the end of the chunk. With the delta
rule (`attend_delta`) chunks are sequential, because what a chunk writes depends on the synapses before it.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bdh.kernels.products import wide_product
from bdh.model.modeling_bdh import KEY_EPS


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
    """R = rope(relu(X)) of one token and PAIRS rotary pairs of each head."""
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
    x,  # (T, D); (h, T, D) with decay: scaled by the retention until the end of the chunk
    retention,  # (h, T / C) float32: retention of the synapses over each chunk; None without decay
    S,  # (n, D) float32: before the first token; out: after the last
    before,  # (h, T / C, N, D), out: before each chunk
    T,
    N,
    D,
    C,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Cumulative sums S of R_s^T x_s, stored before each chunk of C tokens. TOKENS divides C, C divides T.

    With decay each chunk multiplies S by its retention before it adds to S.
    """
    blocks = tl.cdiv(N, ROWS)
    k = (tl.program_id(0) // blocks).to(tl.int64)
    j = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (j < N)[:, None] & (d < D)[None, :]
    tile = j.to(tl.int64)[:, None] * D + d[None, :]
    total = tl.load(S + k * N * D + tile, mask=inside, other=0.0)  # (ROWS, COLUMNS) float32
    if retention is not None:
        x += k * T * D
    for chunk in range(0, T // C):
        place = before + (k * (T // C) + chunk) * N * D
        tl.store(place + tile, total.to(before.dtype.element_ty), mask=inside)
        if retention is not None:
            total *= tl.load(retention + k * (T // C) + chunk)
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
        activity = tl.load(X + place, mask=inside, other=0.0).to(tl.float32)  # (TOKENS, ROWS)
        tl.store(Z + place, (tl.maximum(activity, 0.0) * tl.maximum(total, 0.0)).to(Z.dtype.element_ty), mask=inside)


def attend_chunks(R: Tensor, x: Tensor, before: Tensor, u: Tensor | None = None) -> Tensor:
    """Compute A = tril(R_c R_c^T, -1) x_c + R_c S_c for all chunks c in parallel.

    Args:
        R: Rotated activity, (h, T, N), T a multiple of the chunks' length C.
        x: Values, (T, D).
        before: The synapses before each chunk, (h, T / C, N, D).
        u: Cumulative log-decay since the beginning of the chunk, (h, T / C, C) float32 at least; None without decay.

    Returns:
        A, (h, T, D); without decay in R's dtype, else in u's.
    """
    h, chunks, N, D = before.shape
    C = len(x) // chunks
    R_c, S_c = R.view(h * chunks, C, N), before.view(h * chunks, N, D)  # (h chunks, C, N), (h chunks, N, D)
    x_c = x.view(chunks, C, D).repeat(h, 1, 1)  # (h chunks, C, D)
    if u is None:
        scores = torch.bmm(R_c, R_c.mT).tril_(-1)  # (h chunks, C, C)
        return torch.baddbmm(torch.bmm(scores, x_c), R_c, S_c).view(h, chunks * C, D)
    u = u.view(h * chunks, C)  # (h chunks, C)
    scores = decayed_scores(wide_product(R_c, R_c.mT), u)  # (h chunks, C, C)
    past = wide_product(R_c, S_c) * u.exp()[..., None]  # (h chunks, C, D)
    return (past + wide_product(scores.to(x.dtype), x_c)).view(h, chunks * C, D)


def attend_delta(R: Tensor, x: Tensor, S: Tensor, u: Tensor | None, beta: Tensor) -> Tensor:
    """Compute attention with the delta rule by chunk; k, M, P and U as in the model's `gated_attention_quadratic`.

    A chunk writes U = (I + diag(beta) M)^-1 diag(beta) (x - P). The inverse does not depend on the synapses, so it is
    computed for all chunks in parallel; M and the inverse are in float32, products with R and S in R's dtype.

    Args:
        R: Rotated activity, (h, T, N), T a multiple of the chunks' length C.
        x: Values, (T, D) float32.
        S: Synapses before the first token, (h, N, D) float32; overwritten with those after the last.
        u: Cumulative log-decay since the beginning of the chunk, (h, T / C, C) float32; None without decay.
        beta: Write strength, (h, T / C, C) float32; 0 for a token that does not write.

    Returns:
        A, (h, T, D) float32.
    """
    (h, chunks, C), N, D = beta.shape, R.shape[-1], x.shape[-1]
    beta = beta.reshape(h * chunks, C)  # (h chunks, C)
    u = torch.zeros_like(beta) if u is None else u.reshape(h * chunks, C)  # (h chunks, C)
    R_c, x_c = R.view(h * chunks, C, N), x.view(chunks, C, D).repeat(h, 1, 1)  # (h chunks, C, N), (h chunks, C, D)
    M = wide_product(R_c, R_c.mT)  # (h chunks, C, C)
    a = 1 / (M.diagonal(dim1=-2, dim2=-1).sqrt() + KEY_EPS)  # (h chunks, C), k = a R
    M = decayed_scores(M, u) * (a[..., :, None] * a[..., None, :])  # (h chunks, C, C)
    inverse = torch.linalg.solve_triangular(
        beta[..., None] * M, beta.diag_embed(), upper=False, unitriangular=True
    )  # (h chunks, C, C), (I + diag(beta) M)^-1 diag(beta)
    to_past = u.exp() * a  # (h chunks, C), P = to_past (R S)
    U = torch.bmm(inverse, x_c).view(h, chunks, C, D)
    inverse = (inverse * to_past[:, None, :]).view(h, chunks, C, C)
    to_end = ((u[:, -1:] - u).exp() * a).view(h, chunks, C, 1)  # scale of U at the end of its chunk
    retention = u[:, -1].exp().view(h, chunks, 1, 1)
    R_c = R_c.view(h, chunks, C, N)
    past = torch.empty_like(U)  # (h, chunks, C, D)
    for c in range(chunks):
        past[:, c] = wide_product(R_c[:, c], S.to(R.dtype))  # (h, C, D)
        U[:, c] = torch.baddbmm(U[:, c], inverse[:, c], past[:, c], alpha=-1)  # (h, C, D)
        written = wide_product(R_c[:, c].mT, (to_end[:, c] * U[:, c]).to(R.dtype))  # (h, N, D)
        torch.addcmul(written, S, retention[:, c], out=S)
    past = past.view(h * chunks, C, D) * to_past[..., None]  # (h chunks, C, D)
    return torch.baddbmm(past, M, U.view(h * chunks, C, D)).view(h, chunks * C, D)


def decayed_scores(scores: Tensor, u: Tensor) -> Tensor:
    """Compute scores exp(u_t - u_s) for s < t, and 0 elsewhere: (G, C, C) and (G, C) -> (G, C, C)."""
    C = u.shape[-1]
    masked = torch.ones(C, C, dtype=torch.bool, device=u.device).triu()  # (C, C)
    return scores * (u[:, :, None] - u[:, None, :]).masked_fill(masked, -math.inf).exp()  # (G, C, C)
