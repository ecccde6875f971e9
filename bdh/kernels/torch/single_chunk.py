"""Attention with decay and with the delta rule for sequences of one chunk, in PyTorch.

Equations and names as in `bdh.kernels.gated_attention`, without synapses. With the weights of pairs of tokens

    W_ts = a_t a_s exp(u_t - u_s), and times beta_s for the delta rule, for s < t of the same document, else 0,

and L = W o (R R^T), which is M for "add" and M diag(beta) for "delta":

    A = K x,    add: K = L,    delta: K = (I + L)^-1 L = I - (I + L)^-1, and U = beta (x - A)

and backward, with H = E x^T for "add" and E (x - A)^T = E x^T (I - K)^T for "delta":

    dx = K^T dA,    E = dA for "add", dA - dx for "delta"
    dM o (weights of M) = W o H,    A . E = row sums of L o H,    U . V = column sums of L o H

Thus elementwise operations are over (C, C), not over (C, D); on a CPU that multiplies bfloat16 in hardware they take as
long as the products.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bdh.kernels.attention import AttentionGradient
from bdh.kernels.forward_context import ForwardContext
from bdh.kernels.gated_attention import ChunkedGates, sums_over_later_tokens
from bdh.kernels.products import add_product_
from bdh.kernels.torch.workspace import Workspace
from bdh.model.modeling_bdh import KEY_EPS


class SingleChunkAttention:
    """`bdh.kernels.attention.Attention` without synapses before or after.

    Args:
        context: Of the forward pass.
        gates: Of the layer.
        x: Values, (B, C, D) dt.
        workspace: For short-lived results.
        same_decay: Whether all sequences have the same u, so that the weights of pairs are computed for one of them.

    Attributes:
        needs_decay_gradient: Whether the gradient of log_decay is needed.
    """

    heads_per_call = 1

    def __init__(self, context: ForwardContext, gates: ChunkedGates, x: Tensor, workspace: Workspace, same_decay: bool):
        self.document_ids = None if context.documents is None else context.documents.ids  # (B, C)
        self.gates, self.x, self.workspace = gates, x, workspace
        self.same_decay = same_decay and self.document_ids is None
        self.written_u = gates.u if gates.beta is None else gates.u - gates.beta.log()  # (h, B, C)  inf at padding
        self.needs_decay_gradient = False
        self.read, self.written = torch.empty_like(gates.u), torch.empty_like(gates.u)  # (h, B, C)  A . E and U . V

    def forward(
        self, heads: slice, R: Tensor, S: Tensor | None
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
        u = self.gates.u[heads.start]  # (B, C)
        L = R @ R.mT  # (B, C, C)  weighted below
        if self.gates.beta is None:
            u = u[:1] if self.same_decay else u  # (1, C) or (B, C)
            W = self.pair_weights(u, u, L.dtype)  # (1, C, C) or (B, C, C)
            L *= W
            return L @ self.x, None, (W, L, None, None)
        length = L.diagonal(dim1=1, dim2=2).to(u.dtype).sqrt()  # (B, C)  |R|
        key = length + KEY_EPS  # (B, C)
        log_key = key.log()  # (B, C)
        W = self.pair_weights(u - log_key, self.written_u[heads.start] + log_key, L.dtype)  # (B, C, C)
        L *= W
        wide = self.workspace.take("wide", L.shape, u.dtype).copy_(L)  # (B, C, C)
        K = self.workspace.take("K", L.shape, u.dtype)  # (B, C, C)  by rows; else it is by columns, which is slower
        torch.linalg.solve_triangular(wide, wide, upper=False, unitriangular=True, out=K)
        K = K.to(L.dtype, copy=True)  # (B, C, C)
        return K @ self.x, None, (W, L, K, length * key)

    def backward(
        self, heads: slice, R: Tensor, dA: Tensor, saved: Sequence[Tensor | None], dS: Tensor | None, dx: Tensor
    ) -> AttentionGradient:
        W, L, K, key_scale = saved  # the last two are None for "add"
        assert W is not None and L is not None
        if K is not None:
            of_x = K.mT @ dA  # (B, C, D)
            dx += of_x.to(dx.dtype)
            H = (dA - of_x) @ self.x.mT  # (B, C, C)
            H = torch.baddbmm(H, H, K.mT, alpha=-1)  # (B, C, C)
        else:
            add_product_(dx, L.mT, dA)  # (B, C, D)
            H = dA @ self.x.mT  # (B, C, C)
        read, written = self.read[heads.start], self.written[heads.start]  # (B, C)
        if self.needs_decay_gradient or K is not None:
            products = torch.mul(L, H, out=self.workspace.take("products", L.shape, L.dtype))  # (B, C, C)
            torch.sum(products, -1, dtype=read.dtype, out=read)
            torch.sum(products, -2, dtype=read.dtype, out=written)
        half = H.mul_(W)  # (B, C, C)
        dP = half + half.mT  # (B, C, C)
        if key_scale is not None:  # by the length of keys; a key of length 0 has no gradient
            of_length = torch.where(key_scale > 0, (read + written) / -key_scale, 0)  # (B, C)
            dP.diagonal(dim1=1, dim2=2).copy_(of_length)
        return AttentionGradient(dP, None, None)

    def pair_weights(self, of_t: Tensor, of_s: Tensor, dtype: torch.dtype) -> Tensor:
        """Return exp(of_t - of_s) for s < t of the same document, else 0: (B, C) twice -> (B, C, C)."""
        weights = self.workspace.take("weights", (*of_t.shape, of_t.shape[-1]), of_t.dtype)  # (B, C, C)
        torch.sub(of_t[:, :, None], of_s[:, None, :], out=weights)
        weights.exp_().tril_(-1)  # what may be infinite above the diagonal is 0 then
        if (ids := self.document_ids) is not None:
            weights.masked_fill_(ids[:, :, None] != ids[:, None, :], 0)
        return weights.to(dtype, copy=True)

    def decay_gradient(self) -> Tensor:
        """Return the gradient of log_decay after the backward pass, (h, B, C)."""
        return sums_over_later_tokens(self.read - self.written, len(self.x))

    @property
    def d_beta(self) -> Tensor:
        """The gradient of the write strength after the backward pass, (h, B, C); 0 at padding, which does not write."""
        beta = self.gates.beta
        assert beta is not None
        return torch.where(beta > 0, self.written / beta, 0)  # V . (x - A), and U = beta (x - A)
