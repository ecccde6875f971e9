"""The operations of `bdh.kernels.gated_operations` in PyTorch, for all devices and dtypes."""

import torch
from torch import Tensor

from bdh.kernels.torch.workspace import Workspace
from bdh.model.modeling_bdh import KEY_EPS, synapse_dtype


class TorchGatedOperations:
    """See `GatedOperations`.

    Args:
        workspace: For short-lived results.
    """

    all_heads_per_call = False

    def __init__(self, workspace: Workspace):
        self.workspace = workspace

    def add_scores(self, R: Tensor, u: Tensor, documents: Tensor | None) -> Tensor:
        P = R @ R.mT  # (G, C, C)
        return P.mul_(self.pair_weights(u, None, documents, P.dtype))

    def delta_scores(
        self, R: Tensor, u: Tensor, beta: Tensor, documents: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        P = R @ R.mT  # (G, C, C)
        squares = P.diagonal(dim1=1, dim2=2).to(u.dtype, copy=True)  # (G, C)
        M = self.pair_weights(u, squares, documents, u.dtype)  # (G, C, C)
        M *= self.convert(P, u.dtype)
        L = beta[..., None] * M  # (G, C, C)
        identity = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device).expand_as(M)  # (G, C, C)
        inverse = torch.linalg.solve_triangular(L, identity, upper=False, unitriangular=True)  # (G, C, C)
        return M.to(P.dtype, copy=True), inverse.to(P.dtype), squares

    def gated_scores_backward(
        self,
        E: Tensor,
        U: Tensor,
        u: Tensor,
        squares: Tensor | None,
        documents: Tensor | None,
        diagonal: Tensor | None,
        M: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        half = E @ U.mT  # (G, C, C)
        of_u = None
        if M is not None:
            products = torch.mul(half, M, out=self.workspace.take("products", M.shape, M.dtype))  # (G, C, C)
            of_u = products.sum(-1, dtype=u.dtype) - products.sum(-2, dtype=u.dtype)  # (G, C)
        half *= self.pair_weights(u, squares, documents, E.dtype)  # (G, C, C)
        dP = half + half.mT  # (G, C, C)
        if diagonal is not None:
            dP.diagonal(dim1=1, dim2=2).copy_(diagonal)
        return dP, of_u

    def pair_weights(self, u: Tensor, squares: Tensor | None, documents: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Compute a_t a_s exp(u_t - u_s) for s < t of the same document, else 0: (G, C, C), in the workspace.

        The factors a, given `squares`, are added to the exponents, which takes fewer operations on (G, C, C).
        """
        of_t, of_s = u, u  # (G, C)
        if squares is not None:
            log_length = (squares.sqrt() + KEY_EPS).log()  # (G, C)
            of_t, of_s = u - log_length, u + log_length  # (G, C)
        weights = self.workspace.take("weights", (*u.shape, u.shape[-1]), u.dtype)  # (G, C, C)
        torch.sub(of_t[:, :, None], of_s[:, None, :], out=weights)
        weights.exp_().tril_(-1)  # what may be infinite above the diagonal is 0 then
        if documents is not None:
            weights.masked_fill_(documents[:, :, None] != documents[:, None, :], 0)
        return weights if dtype == u.dtype else self.convert(weights, dtype)

    def convert(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Convert a tensor to another dtype, in the workspace."""
        return self.workspace.take("converted", tensor.shape, dtype).copy_(tensor)

    def row_dots(self, a: Tensor, b: Tensor) -> Tensor:
        """Sum a b over the last dimension, in float32 at least: (..., D) twice -> (...)."""
        products = torch.mul(a, b, out=self.workspace.take("products", a.shape, a.dtype))  # (..., D)
        return products.sum(-1, dtype=synapse_dtype(a.dtype))

    def scaled_matrix(self, X: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return (rows[:, :, None] * X * columns[:, None, :]).to(X.dtype)  # (G, C, C)

    def scaled_difference(self, w: Tensor, x: Tensor, r: Tensor | None = None, Q: Tensor | None = None) -> Tensor:
        if len(x) < len(w):
            x = x.repeat(len(w) // len(x), 1, 1)  # (G, C, D)
        difference = x if r is None or Q is None else torch.addcmul(x, rows(r, x), Q, value=-1)  # (G, C, D)
        return rows(w, x) * difference

    def add_scaled_(self, A: Tensor, Q: Tensor, r: Tensor) -> None:
        A += rows(r, Q) * Q  # (G, C, D)

    def scan_delta(
        self,
        R: Tensor,
        W: Tensor,
        Y: Tensor,
        retention: Tensor,
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
            S = rotate_rows(S * retention[:, i, None, None] + R[:, i].mT @ Y[:, i], cos, -sin)  # (B, N, D)
        if state is not None:
            state.copy_(S)
        return states, Q

    def delta_rows_backward(
        self, dA: Tensor, V: Tensor, A: Tensor, U: Tensor, x: Tensor, beta: Tensor, squares: Tensor, dx: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        G = len(x)
        of_x = rows(beta, V) * V  # (k * G, C, D)
        E = dA - of_x  # (k * G, C, D)
        for of_head in of_x.split(G):  # k x (G, C, D)
            dx += self.convert(of_head, dx.dtype)
        read, written, length = self.row_dots(A, E), self.row_dots(U, V), squares.sqrt()  # (k * G, C)
        diagonal = torch.where(squares > 0, -(read + written) / (length * (length + KEY_EPS)), 0)  # (k * G, C)
        d_beta = torch.where(beta > 0, written / beta, 0)  # (k * G, C)  as U = beta (x - A)
        return E, diagonal, d_beta

    def difference_of_dots(self, r: Tensor, E: Tensor, Q: Tensor, w: Tensor, U: Tensor, P: Tensor) -> Tensor:
        return r * self.row_dots(E, Q) - w * self.row_dots(U, P)  # (G, C)


def start_scan(R: Tensor, Y: Tensor, state: Tensor | None, back: bool) -> tuple[Tensor, Tensor]:
    """Allocate the results of `scan_delta`, with the state before the first chunk: (B, c, N, D), (B, c, C, D)."""
    B, c, _, N = R.shape
    states = Y.new_empty(B, c, N, Y.shape[-1])  # (B, c, N, D)
    first = states[:, -1 if back else 0]  # (B, N, D)
    if state is None:
        first.zero_()
    else:
        first.copy_(state)
    return states, torch.empty_like(Y)


def chunk_order(R: Tensor, back: bool) -> list[int]:
    """Return the indices of the chunks of R (B, c, C, N), reversed if `back`."""
    chunks = range(R.shape[1])
    return [*(reversed(chunks) if back else chunks)]


def rotate_rows(S: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate synapses (..., N, D) by phases (N/2), or (..., N/2), of their neurons."""
    even, odd = S.unflatten(-2, (-1, 2)).unbind(-2)  # 2 x (..., N/2, D)
    cos, sin = cos[..., None], sin[..., None]  # (..., N/2, 1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-2).flatten(-3, -2)  # (..., N, D)


def rows(w: Tensor, like: Tensor) -> Tensor:
    """Convert factors of rows, (G, C) -> (G, C, 1), to the dtype of a tensor: mixed dtypes are slow on a CPU."""
    return w.to(like.dtype)[..., None]
