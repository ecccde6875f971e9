"""The operations of `bdh.kernels.operations` in PyTorch: for all devices and dtypes, and fast on a CPU.

Where a CPU multiplies matrices of bfloat16 in hardware, all that is done beside the products takes as long as these. So
tensors (G, C, N) are changed in place, and some bits are handled as the integers they are: a number of bfloat16 is
negative when its 16 bits are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bdh.kernels.operations import Dropout, Past

BLOCK = 128  # rows of scores worked out at once; what lies above their diagonal is worth leaving out


class TorchOperations:
    """See `Operations`."""

    def excite(self, x: Tensor, E: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        X = relu_(F.linear(x, E))  # (G, C, N)
        return X, turn(X, phases(cos, sin)).to(X.dtype)  # (G, C, N)

    def scores(self, R: Tensor, documents: Tensor | None) -> Tensor:
        G, C, _ = R.shape
        if C <= BLOCK:
            P = (R @ R.mT).tril_(-1)  # (G, C, C)
        else:
            P = R.new_zeros(G, C, C)
            for start in range(0, C, BLOCK):
                rows, before = slice(start, start + BLOCK), slice(0, start)
                P[:, rows, before] = R[:, rows] @ R[:, before].mT  # (G, rows, start)
                P[:, rows, rows] = (R[:, rows] @ R[:, rows].mT).tril_(-1)  # (G, rows, rows)
        if documents is not None:
            P.masked_fill_(documents[:, :, None] != documents[:, None, :], 0)
        return P

    def gate(self, A: Tensor, Ev: Tensor, X: Tensor, dropout: Dropout) -> Tensor:
        Z = relu_(F.linear(A, Ev)).mul_(X)  # (G, C, N)
        return Z if dropout.p == 0 else drop_(Z, keeps(Z, dropout)).div_(1 - dropout.p)

    def gate_backward(
        self, dy: Tensor, Dec: Tensor, A: Tensor, Ev: Tensor, X: Tensor, dropout: Dropout
    ) -> tuple[Tensor, Tensor, Tensor]:
        Y = relu_(F.linear(A, Ev))  # (G, C, N)
        Z = X * Y  # (G, C, N)
        dZ = dy @ Dec  # (G, C, N)
        if dropout.p > 0:
            kept = keeps(Z, dropout)  # (G, C, N)
            drop_(Z, kept).div_(1 - dropout.p)
            drop_(dZ, kept).div_(1 - dropout.p)
        dX = dZ * Y  # (G, C, N)
        return Z, where_positive_(dZ.mul_(X), Y), dX

    def excite_backward(
        self, dP: Tensor, R: Tensor, X: Tensor, dX: Tensor, cos: Tensor, sin: Tensor, past: Past | None
    ) -> Tensor:
        dR = dP @ R  # (G, C, N)
        if past is not None:
            dA, S, values, dS = past
            dR.baddbmm_(dA, S.mT).baddbmm_(values, dS.mT)  # (G, C, N)
        return where_positive_(dX.add_(turn(dR, phases(cos, -sin))), X)  # (G, C, N)

    def scan(self, U: Tensor, S: Tensor | None, cos: Tensor, sin: Tensor, kept: Tensor | None) -> Tensor:
        if S is None:
            S = torch.zeros_like(U[:, 0], dtype=cos.dtype)  # (B, N, D)
        for chunk in range(U.shape[1]):
            after = S if kept is None else S * kept[:, chunk, None, None]  # (B, N, D)
            after = turn_rows(after + U[:, chunk], cos, -sin)  # (B, N, D)
            U[:, chunk] = S
            S = after
        return S

    def scan_backward(self, V: Tensor, dS: Tensor | None, cos: Tensor, sin: Tensor, kept: Tensor | None) -> Tensor:
        g = torch.zeros_like(V[:, 0], dtype=cos.dtype) if dS is None else dS  # (B, N, D)
        for chunk in reversed(range(V.shape[1])):
            turned = turn_rows(g, cos, sin)  # (B, N, D)
            g = turned if kept is None else turned * kept[:, chunk, None, None]  # (B, N, D)
            g = g + V[:, chunk]  # (B, N, D)
            V[:, chunk] = turned
        return g


# ------------------------------------------------------------------------------------------------ neuron by neuron


def relu_(X: Tensor) -> Tensor:
    """relu in place. Of bfloat16, -nan becomes 0."""
    if X.dtype != torch.bfloat16:
        return X.relu_()
    X.view(torch.int16).clamp_min_(0)
    return X


def where_positive_(gradient: Tensor, activity: Tensor) -> Tensor:
    """The gradient, in place, of a relu that gave `activity`: 0 where that is 0."""
    return torch.ops.aten.threshold_backward.grad_input(gradient, activity, 0, grad_input=gradient)


def phases(cos: Tensor, sin: Tensor) -> Tensor:
    """cos + i sin: (C, N/2) -> (C, N/2) complex."""
    wide = torch.promote_types(cos.dtype, torch.float32)
    return torch.complex(cos.to(wide), sin.to(wide))


def turn(X: Tensor, phases: Tensor) -> Tensor:
    """Turns each pair of neurons by its phase: (G, C, N), (C, N/2) complex -> (G, C, N) in float32 at least."""
    wide = phases.real.dtype
    pairs = torch.view_as_complex(X.to(wide).unflatten(-1, (-1, 2)))  # (G, C, N/2) complex
    pairs = pairs * phases if X.dtype == wide else pairs.mul_(phases)
    return torch.view_as_real(pairs).flatten(-2)  # (G, C, N)


def turn_rows(S: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns synapses (…, N, D) by phases (N/2), or (…, N/2), of their neurons."""
    even, odd = S.unflatten(-2, (-1, 2)).unbind(-2)  # 2 x (…, N/2, D)
    cos, sin = cos[..., None], sin[..., None]  # (…, N/2, 1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-2).flatten(-3, -2)  # (…, N, D)


# ------------------------------------------------------------------------------------------------ dropout

STEPS = 1 << 15  # a product is dropped where 15 bits are less than p of so many


def keeps(Z: Tensor, dropout: Dropout) -> Tensor:
    """Which of Z (G, C, N) are kept: (G, C, N) int16, -1 where so and 0 where not.

    Two neighbouring neurons take the halves of a whole number of 32 bits: one of their token, one of their pair, and
    multiplications that mix them.
    """
    G, C, N = Z.shape
    draw = torch.Generator().manual_seed(dropout.seed ^ (dropout.head * 0x9E3779B97F4A7C15 % 2**63))
    whole = torch.empty(G * C + N // 2, dtype=torch.int32).random_(-(2**31), 2**31, generator=draw).to(Z.device)
    bits = whole[: G * C, None] ^ whole[None, G * C :]  # (G * C, N/2)
    for factor in (0x7FEB352D, 0x2C1B3C6D):
        bits.mul_(factor)
        bits ^= bits >> 15
    halves = bits.view(torch.int16).bitwise_and_(STEPS - 1)  # (G * C, N)
    first = round(dropout.p * STEPS)
    return halves.neg_().add_(first - 1).bitwise_right_shift_(15).view(G, C, N)


def drop_(Z: Tensor, kept: Tensor) -> Tensor:
    """Zeros in place of what is not kept."""
    if Z.dtype != torch.bfloat16:
        return Z.masked_fill_(kept == 0, 0)
    Z.view(torch.int16).bitwise_and_(kept)
    return Z
