"""The operations of `bdh.kernels.gated_operations` in PyTorch, for all devices and dtypes."""

import math

import torch
from torch import Tensor

from bdh.model.modeling_bdh import KEY_EPS, synapse_dtype


class TorchGatedOperations:
    """See `GatedOperations`."""

    all_heads_at_once = False

    def add_scores(self, R: Tensor, u: Tensor, documents: Tensor | None) -> Tensor:
        P = R @ R.mT  # (G, C, C)
        return (P * pair_weights(u, None, documents)).to(P.dtype)

    def delta_scores(
        self, R: Tensor, u: Tensor, beta: Tensor, documents: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        P = R @ R.mT  # (G, C, C)
        squares = P.diagonal(dim1=1, dim2=2).to(u.dtype, copy=True)  # (G, C)
        M = P * pair_weights(u, squares, documents)  # (G, C, C)
        identity = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device).expand_as(M)  # (G, C, C)
        L = beta[..., None] * M  # (G, C, C)
        inverse = torch.linalg.solve_triangular(L, identity, upper=False, unitriangular=True)  # (G, C, C)
        return M.to(P.dtype), inverse.to(P.dtype), squares

    def gated_scores_backward(
        self, E: Tensor, U: Tensor, u: Tensor, squares: Tensor | None, documents: Tensor | None, diagonal: Tensor | None
    ) -> Tensor:
        dP = ((E @ U.mT) * pair_weights(u, squares, documents)).to(E.dtype)  # (G, C, C)
        dP = dP + dP.mT  # (G, C, C)
        if diagonal is not None:
            dP.diagonal(dim1=1, dim2=2).copy_(diagonal)
        return dP

    def scaled_matrix(self, X: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return (rows[:, :, None] * X * columns[:, None, :]).to(X.dtype)  # (G, C, C)

    def scaled_difference(
        self, w: Tensor, x: Tensor, r: Tensor | None = None, Q: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        if len(x) < len(w):
            x = x.repeat(len(w) // len(x), 1, 1)  # (G, C, D)
        difference = x if r is None or Q is None else x - r[..., None] * Q  # (G, C, D)
        result = (w[..., None] * difference).to(x.dtype)  # (G, C, D)
        return result if out is None else out.copy_(result)

    def add_scaled_(self, A: Tensor, Q: Tensor, r: Tensor) -> None:
        A += r[..., None] * Q  # (G, C, D)

    def scan_delta(
        self,
        R: Tensor,
        W: Tensor,
        Y: Tensor,
        remains: Tensor,
        state: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        back: bool,
    ) -> tuple[Tensor, Tensor]:
        states, Q = start_scan(R, Y, state, back)  # (B, c, N, D), (B, c, C, D)
        S = torch.zeros_like(states[:, 0], dtype=cos.dtype) if state is None else state  # (B, N, D)
        for i in chunk_order(R, back):
            states[:, i] = S
            Q[:, i] = R[:, i] @ states[:, i]
            Y[:, i] -= W[:, i] @ Q[:, i]
            S = turn_rows(S * remains[:, i, None, None] + R[:, i].mT @ Y[:, i], cos, -sin)  # (B, N, D)
        if state is not None:
            state.copy_(S)
        return states, Q

    def delta_rows_backward(
        self, dA: Tensor, V: Tensor, A: Tensor, U: Tensor, x: Tensor, beta: Tensor, squares: Tensor, dx: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide, G = synapse_dtype(x.dtype), len(x)
        of_x = beta[..., None] * V  # (k * G, C, D)
        E = (dA - of_x).to(dA.dtype)  # (k * G, C, D)
        for of_head in of_x.split(G):  # k x (G, C, D)
            dx += of_head
        d_beta = torch.cat([row_dots(V_k, x - A_k, wide) for V_k, A_k in zip(V.split(G), A.split(G), strict=True)])
        read, written, length = row_dots(A, E, wide), row_dots(U, V, wide), squares.sqrt()  # (k * G, C)
        diagonal = torch.where(squares > 0, -(read + written) / (length * (length + KEY_EPS)), 0)  # (k * G, C)
        return E, read - written, diagonal, d_beta

    def add_rows_backward(self, dA: Tensor, V: Tensor, A: Tensor, x: Tensor, dx: Tensor) -> Tensor:
        wide = synapse_dtype(x.dtype)
        dx += V
        return row_dots(A, dA, wide) - row_dots(x, V, wide)


def start_scan(R: Tensor, Y: Tensor, state: Tensor | None, back: bool) -> tuple[Tensor, Tensor]:
    """What `scan_delta` returns, still empty but for the state before the first chunk: (B, c, N, D), (B, c, C, D)."""
    B, c, _, N = R.shape
    states = Y.new_empty(B, c, N, Y.shape[-1])  # (B, c, N, D)
    first = states[:, -1 if back else 0]  # (B, N, D)
    if state is None:
        first.zero_()
    else:
        first.copy_(state)
    return states, torch.empty_like(Y)


def chunk_order(R: Tensor, back: bool) -> list[int]:
    """The chunks of R (B, c, C, N) in the order in which they are computed."""
    chunks = range(R.shape[1])
    return [*(reversed(chunks) if back else chunks)]


def turn_rows(S: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns synapses (..., N, D) by phases (N/2), or (..., N/2), of their neurons."""
    even, odd = S.unflatten(-2, (-1, 2)).unbind(-2)  # 2 x (..., N/2, D)
    cos, sin = cos[..., None], sin[..., None]  # (..., N/2, 1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-2).flatten(-3, -2)  # (..., N, D)


def pair_weights(u: Tensor, squares: Tensor | None, documents: Tensor | None) -> Tensor:
    """a_t a_s exp(u_t - u_s) for s < t of the same document, else 0: (G, C, C)."""
    C = u.shape[-1]
    seen = torch.ones(C, C, dtype=torch.bool, device=u.device).tril(-1)  # (C, C)
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None, :])  # (G, C, C)
    weights = (u[:, :, None] - u[:, None, :]).masked_fill(~seen, -math.inf).exp()  # (G, C, C)
    if squares is None:
        return weights
    a = 1 / (squares.sqrt() + KEY_EPS)  # (G, C)
    return weights * a[:, :, None] * a[:, None, :]


def row_dots(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """Sums over the last dimension of a b, in a wide dtype: (..., D) twice -> (...)."""
    return (a.to(wide) * b.to(wide)).sum(-1)
