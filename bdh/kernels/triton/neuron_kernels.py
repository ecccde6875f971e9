"""What moves tensors of (tokens, neurons) in training on a GPU, in Triton: one pass an operation over each of them.

A head at a time, with the batch's tokens in G chunks of C, M = G * C in all. Moving tensors of (M, N) numbers is what
takes the time: a product with D or C terms takes no longer than writing what comes out. So all that is done to a neuron
between two products is done where its product is. A rotary pair is columns 2i, 2i+1, which a thread has side by side.
Tokens and neurons that a tile has too many are masked, unless EVEN says that all sizes are multiples of the tile's.

What goes from token to token is in `bdh.kernels.triton.token_kernels`.

Shapes: M = G * C tokens, D `n_embd`, N neurons of the head.
"""

import triton
import triton.language as tl

from bdh.kernels.triton.device_functions import (
    SMALLEST,
    add_products,
    halves,
    keeps,
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
    dR,  # (G, C, N)
    X,  # (G, C, N)
    dX,  # (G, C, N); left as the result
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
    cos, sin = halves(phase, BLOCK_M, BLOCK_N)  # (BLOCK_M, BLOCK_N / 2)
    place = (tl.program_id(2).to(tl.int64) * C + t) * N + n
    turned = load(dR + place + tile, inside, EVEN).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    fired = load(X + place + tile, inside, EVEN)  # (BLOCK_M, BLOCK_N)
    total = load(dX + place + tile, inside, EVEN).to(tl.float32) + rope(turned, cos, -sin, BLOCK_M, BLOCK_N)
    total = tl.where(fired > 0, total, 0.0)  # (BLOCK_M, BLOCK_N)
    store(dX + place + tile, total.to(dX.dtype.element_ty), inside, EVEN)


# ------------------------------------------------------------------------------------------------ who answers


@triton.jit(do_not_specialize=["key", "dropped"])
def gate(
    A,  # (M, D), normalised
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
    """Z = X o relu(A Ev^T), dropped, of BLOCK_M tokens and BLOCK_N neurons."""
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
        answer = tl.where(keeps(m, n // 2, key, dropped, BLOCK_M, BLOCK_N // 2), answer, 0.0)  # (BLOCK_M, BLOCK_N)
    stream(Z + place + tile, answer.to(Z.dtype.element_ty), inside, EVEN)


@triton.jit
def gate_backward_saved(
    X,  # (M, N)
    Z,  # (M, N)
    dX,  # (M, N): dZ; left as dX
    dY,  # (M, N), out
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
):
    """From dZ and what was kept the gradients before relu(A Ev^T) and of X, of BLOCK_M tokens and BLOCK_N neurons."""
    m, n = tl.program_id(1).to(tl.int64) * BLOCK_M, tl.program_id(0) * BLOCK_N
    r, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = (r < M - m)[:, None] & (j < N - n)[None, :]
    place = m * N + n
    tile = r[:, None] * N + j[None, :]
    dt: tl.constexpr = dX.dtype.element_ty
    fired = load(X + place + tile, inside, EVEN).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    answer = load(Z + place + tile, inside, EVEN).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    dZ = load(dX + place + tile, inside, EVEN).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    normal = fired >= SMALLEST  # (BLOCK_M, BLOCK_N)
    Y = answer / tl.where(normal, fired, 1.0)  # (BLOCK_M, BLOCK_N)
    stream(dX + place + tile, tl.where(normal, dZ * Y, 0.0).to(dt), inside, EVEN)
    stream(dY + place + tile, tl.where(answer > 0, dZ * fired, 0.0).to(dt), inside, EVEN)


@triton.jit(do_not_specialize=["key", "dropped"])
def gate_backward(
    A,  # (M, D), normalised
    Ev,  # (N, D)
    X,  # (M, N)
    dX,  # (M, N): dZ; left as dX
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
    """Z again, and from dZ the gradients before relu(A Ev^T) and of X, of BLOCK_M tokens and BLOCK_N neurons."""
    row, column = tile_of(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    m, n = row.to(tl.int64) * BLOCK_M, column * BLOCK_N
    r, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    dt: tl.constexpr = Z.dtype.element_ty
    Y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    Ev += n.to(tl.int64) * D
    Y = add_products(Y, A + m * D, Ev, M - m, N - n, D, BLOCK_M, BLOCK_N, BLOCK_K, EVEN)  # (BLOCK_M, BLOCK_N)
    Y = relu(Y)  # (BLOCK_M, BLOCK_N)
    inside = (r < M - m)[:, None] & (j < N - n)[None, :]
    place = m * N + n
    tile = r[:, None] * N + j[None, :]
    fired = load(X + place + tile, inside, EVEN).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    dZ = load(dX + place + tile, inside, EVEN).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    if DROPOUT:
        Y = tl.where(keeps(m, n // 2, key, dropped, BLOCK_M, BLOCK_N // 2), Y, 0.0)  # (BLOCK_M, BLOCK_N)
    stream(Z + place + tile, (fired * Y).to(dt), inside, EVEN)
    stream(dX + place + tile, (dZ * Y).to(dt), inside, EVEN)
    stream(dY + place + tile, tl.where(Y > 0, dZ * fired, 0.0).to(dt), inside, EVEN)
