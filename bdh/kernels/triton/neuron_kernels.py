"""Triton kernels of training over tensors (tokens, neurons) of one head: each reads and writes them once.

Reading and writing tensors (M, N) takes the time; a product with D or C terms takes no longer than writing its result.
So all operations on a neuron between two products are fused with the first. A rotary pair is columns 2i and 2i + 1,
which are in one thread. Tokens and neurons beyond the end of a tensor are masked, unless EVEN says that all sizes are
multiples of the tile's.

Shapes: G chunks of C tokens, M = G * C, D `n_embd`, N neurons of the head.
"""

import triton
import triton.language as tl

from bdh.kernels.triton.device_functions import (
    SMALLEST_NORMAL,
    add_products,
    dropout_keeps,
    load,
    program_tile,
    relu,
    rope,
    split_pairs,
    store,
    store_streaming,
)

# ------------------------------------------------------------------------------------------------ excite


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
    row, column = program_tile(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    m, n = row.to(tl.int64) * BLOCK_M, column * BLOCK_N
    r, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = (r < M - m)[:, None] & (j < N - n)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    E += n.to(tl.int64) * D
    total = add_products(total, x + m * D, E, M - m, N - n, D, BLOCK_M, BLOCK_N, BLOCK_K, EVEN)  # (BLOCK_M, BLOCK_N)
    activity = relu(total)  # (BLOCK_M, BLOCK_N)
    start = m * N + n
    tile = r[:, None] * N + j[None, :]
    store_streaming(X + start + tile, activity.to(X.dtype.element_ty), inside, EVEN)
    t = ((m + r) % C).to(tl.int32)  # (BLOCK_M)
    phase = load(phases + t[:, None] * N + (n + j)[None, :], inside, EVEN).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    cos, sin = split_pairs(phase, BLOCK_M, BLOCK_N)  # (BLOCK_M, BLOCK_N / 2)
    store_streaming(R + start + tile, rope(activity, cos, sin, BLOCK_M, BLOCK_N).to(R.dtype.element_ty), inside, EVEN)


@triton.jit
def excite_backward(
    dR,  # (G, C, N)
    X,  # (G, C, N)
    dX,  # (G, C, N), in and out
    phases,  # (C, N): cos and sin of each pair
    C,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
):
    """(dX + rope^-1(dR)) where X > 0, of BLOCK_M tokens and BLOCK_N neurons of a chunk."""
    t, n = tl.program_id(1) * BLOCK_M, tl.program_id(0) * BLOCK_N
    r, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = (r < C - t)[:, None] & (j < N - n)[None, :]
    tile = r[:, None] * N + j[None, :]
    phase = load(phases + t.to(tl.int64) * N + n + tile, inside, EVEN).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    cos, sin = split_pairs(phase, BLOCK_M, BLOCK_N)  # (BLOCK_M, BLOCK_N / 2)
    start = (tl.program_id(2).to(tl.int64) * C + t) * N + n
    rotated = load(dR + start + tile, inside, EVEN).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    activity = load(X + start + tile, inside, EVEN)  # (BLOCK_M, BLOCK_N)
    total = load(dX + start + tile, inside, EVEN).to(tl.float32) + rope(rotated, cos, -sin, BLOCK_M, BLOCK_N)
    total = tl.where(activity > 0, total, 0.0)  # (BLOCK_M, BLOCK_N)
    store(dX + start + tile, total.to(dX.dtype.element_ty), inside, EVEN)


# ------------------------------------------------------------------------------------------------ gate


@triton.jit
def gate_tile(
    A,  # (M, D), normalized
    Ev,  # (N, D)
    X,  # (M, N)
    M,
    N,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Return relu(A Ev^T) and X of a program's tile, its first token, neuron and offset, its mask and its offsets."""
    row, column = program_tile(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    m, n = row.to(tl.int64) * BLOCK_M, column * BLOCK_N
    r, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    Y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    Ev += n.to(tl.int64) * D
    Y = add_products(Y, A + m * D, Ev, M - m, N - n, D, BLOCK_M, BLOCK_N, BLOCK_K, EVEN)  # (BLOCK_M, BLOCK_N)
    inside = (r < M - m)[:, None] & (j < N - n)[None, :]
    start = m * N + n
    tile = r[:, None] * N + j[None, :]
    activity = load(X + start + tile, inside, EVEN).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    return relu(Y), activity, m, n, start, inside, tile


@triton.jit(do_not_specialize=["key", "dropped"])
def gate(
    A,  # (M, D), normalized
    Ev,  # (N, D)
    X,  # (M, N)
    Z,  # (M, N), out
    key,
    dropped,
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
    """Z = X o relu(A Ev^T) with dropout, of BLOCK_M tokens and BLOCK_N neurons."""
    Y, activity, m, n, start, inside, tile = gate_tile(
        A, Ev, X, M, N, D, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, EVEN
    )  # 2 x (BLOCK_M, BLOCK_N)
    product = activity * Y  # (BLOCK_M, BLOCK_N)
    if DROPOUT:
        product = tl.where(dropout_keeps(m, n // 2, key, dropped, BLOCK_M, BLOCK_N // 2), product, 0.0)
    store_streaming(Z + start + tile, product.to(Z.dtype.element_ty), inside, EVEN)


@triton.jit(do_not_specialize=["key", "dropped"])
def gate_backward(
    A,  # (M, D), normalized
    Ev,  # (N, D)
    X,  # (M, N)
    dX,  # (M, N), in (dZ) and out
    Z,  # (M, N), out
    dY,  # (M, N), out
    key,
    dropped,
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
    """Z, and from dZ the gradients before relu(A Ev^T) and of X, of BLOCK_M tokens and BLOCK_N neurons."""
    dt: tl.constexpr = Z.dtype.element_ty
    Y, activity, m, n, start, inside, tile = gate_tile(
        A, Ev, X, M, N, D, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, EVEN
    )  # 2 x (BLOCK_M, BLOCK_N)
    dZ = load(dX + start + tile, inside, EVEN).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    if DROPOUT:
        Y = tl.where(dropout_keeps(m, n // 2, key, dropped, BLOCK_M, BLOCK_N // 2), Y, 0.0)  # (BLOCK_M, BLOCK_N)
    store_streaming(Z + start + tile, (activity * Y).to(dt), inside, EVEN)
    store_streaming(dX + start + tile, (dZ * Y).to(dt), inside, EVEN)
    store_streaming(dY + start + tile, tl.where(Y > 0, dZ * activity, 0.0).to(dt), inside, EVEN)


@triton.jit
def gate_backward_saved(
    X,  # (M, N)
    Z,  # (M, N)
    dX,  # (M, N), in (dZ) and out
    dY,  # (M, N), out
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The same gradients from dZ and the saved X and Z, of BLOCK_M tokens and BLOCK_N neurons."""
    m, n = tl.program_id(1).to(tl.int64) * BLOCK_M, tl.program_id(0) * BLOCK_N
    r, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = (r < M - m)[:, None] & (j < N - n)[None, :]
    start = m * N + n
    tile = r[:, None] * N + j[None, :]
    dt: tl.constexpr = dX.dtype.element_ty
    activity = load(X + start + tile, inside, EVEN).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    product = load(Z + start + tile, inside, EVEN).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    dZ = load(dX + start + tile, inside, EVEN).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    normal = activity >= SMALLEST_NORMAL  # (BLOCK_M, BLOCK_N)
    Y = product / tl.where(normal, activity, 1.0)  # (BLOCK_M, BLOCK_N)
    store_streaming(dX + start + tile, tl.where(normal, dZ * Y, 0.0).to(dt), inside, EVEN)
    store_streaming(dY + start + tile, tl.where(product > 0, dZ * activity, 0.0).to(dt), inside, EVEN)
