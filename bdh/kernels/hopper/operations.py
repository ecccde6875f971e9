"""The operations of `bdh.kernels.layer_operations` on a Hopper GPU: Gluon kernels where sizes fit, else Triton's."""

import torch
from torch import Tensor

from bdh.kernels.hopper import excite, excite_512, excite_backward, gate, gate_512, gate_backward
from bdh.kernels.hopper.device_functions import of_bfloat16
from bdh.kernels.layer_operations import Dropout, Past
from bdh.kernels.triton.operations import TritonOperations, dropout_numbers


class HopperOperations(TritonOperations):
    """See `Operations`."""

    def excite(
        self, x: Tensor, E: Tensor, cos: Tensor, sin: Tensor, keep: bool = False, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        (G, C, D), N = x.shape, len(E)
        kernel = next((module for module in (excite, excite_512) if module.fits(C, N, D)), None)
        if kernel is None or not of_bfloat16(x, E):
            return super().excite(x, E, cos, sin, keep, out)
        R = None if out is None else out.view(G * C, N)  # (M, N)
        X, R = kernel.excite(x.view(G * C, D), E, self.phases(cos, sin).view(C, N), C, R)  # (M, N)
        return X.view(G, C, N), R.view(G, C, N)

    def gate(
        self, A: Tensor, Ev: Tensor, X: Tensor, dropout: Dropout, Dec: Tensor, y: Tensor, keep: bool = False
    ) -> Tensor | None:
        G, C, N = X.shape
        D = A.shape[2]
        if keep or not (gate.fits(G * C, N, D) and of_bfloat16(A, Ev, X, Dec.mT)):
            return super().gate(A, Ev, X, dropout, Dec, y, keep)
        key, dropped = dropout_numbers(dropout)
        gate.gate(A.view(G * C, D), Ev, X.view(G * C, N), key, dropped, Dec.mT, y.view(G * C, D))
        return None

    def gated(self, A: Tensor, Ev: Tensor, X: Tensor, dropout: Dropout) -> Tensor:
        G, C, N = X.shape
        D = A.shape[2]
        if not (gate_512.fits(G * C, N, D) and of_bfloat16(A, Ev, X)):
            return super().gated(A, Ev, X, dropout)
        Z = gate_512.gated(A.view(G * C, D), Ev, X.view(G * C, N), *dropout_numbers(dropout))  # (M, N)
        return Z.view(G, C, N)

    def gate_backward(
        self,
        dy: Tensor,
        Dec: Tensor,
        A: Tensor,
        Ev: Tensor,
        X: Tensor,
        dropout: Dropout,
        dDec: Tensor,
        dEv: Tensor,
    ) -> tuple[Tensor, Tensor]:
        G, C, N = X.shape
        D = A.shape[2]
        if not (gate_backward.fits(G * C, N, D) and of_bfloat16(dy, Dec.mT, A, Ev, X) and dDec.mT.is_contiguous()):
            return super().gate_backward(dy, Dec, A, Ev, X, dropout, dDec, dEv)
        dy, A, X = dy.view(G * C, D), A.view(G * C, D), X.view(G * C, N)  # (M, D), (M, D), (M, N)
        dY, dX = gate_backward.gate_backward(dy, Dec.mT, A, Ev, X, *dropout_numbers(dropout), dDec.mT, dEv)
        return dY.view(G, C, N), dX.view(G, C, N)

    def gated_backward(
        self, dy: Tensor, Dec: Tensor, A: Tensor, Ev: Tensor, X: Tensor, dropout: Dropout
    ) -> tuple[Tensor, Tensor, Tensor]:
        G, C, N = X.shape
        D = A.shape[2]
        if not (gate_512.fits(G * C, N, D) and of_bfloat16(A, Ev, X)):
            return super().gated_backward(dy, Dec, A, Ev, X, dropout)
        dX = dy @ Dec  # (G, C, N)  dZ, for the time being
        rows = A.view(G * C, D), Ev, X.view(G * C, N), dX.view(G * C, N)
        Z, dY = gate_512.gated_backward(*rows, *dropout_numbers(dropout))  # (M, N)
        return Z.view(G, C, N), dY.view(G, C, N), dX

    def worth_keeping(self, C: int, N: int, D: int, dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16 and excite_512.fits(C, N, D) and gate_512.fits(C, N, D)

    def ungated(self, dy: Tensor, Dec: Tensor, X: Tensor, Z: Tensor) -> tuple[Tensor, Tensor]:
        G, C, N = X.shape
        D = dy.shape[2]
        if not (gate_512.fits(G * C, N, D) and of_bfloat16(dy, Dec.mT, X, Z)):
            return super().ungated(dy, Dec, X, Z)
        dY, dX = gate_512.ungated(dy.view(G * C, D), Dec.mT, X.view(G * C, N), Z.view(G * C, N))  # (M, N)
        return dY.view(G, C, N), dX.view(G, C, N)

    def excite_backward(
        self, dP: Tensor, R: Tensor, X: Tensor, dX: Tensor, cos: Tensor, sin: Tensor, past: Past | None
    ) -> Tensor:
        _, C, N = X.shape
        if not (excite_backward.fits(C, N) and of_bfloat16(dP, R, X, dX)):
            return super().excite_backward(dP, R, X, dX, cos, sin, past)
        extra = None
        if past is not None:
            dA, S, values, dS = past
            extra = (dA @ S.mT).baddbmm_(values, dS.mT)  # (G, C, N)
        return excite_backward.excite_backward(dP, R, X, dX, self.phases(cos, sin).view(C, N), extra)


def works(device: torch.device, D: int, p: float) -> bool:
    """Whether the kernels for a width, and a dropout of p or none, compile and run here.

    Gluon is new, and what it is called changes with Triton's versions.
    """
    try:
        with torch.cuda.device(device):
            for dropped in {0.0, p}:
                for _ in range(2):  # the first time they are compiled
                    once_through(HopperOperations(), D, dropped)
            torch.cuda.synchronize()
    except Exception:  # of any kind: what a compiler says to a language that it does not know
        return False
    return True


def once_through(op: TritonOperations, D: int, p: float) -> None:
    """Every operation that has kernels here, on small tensors of ones."""
    C, N, dropout = 256, 128, Dropout(p)

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.bfloat16, device="cuda")

    x, E, X, y = ones(1, C, D), ones(N, D), ones(1, C, N), torch.ones(1, C, D, device="cuda")
    cos, sin = ones(C, N // 2, 2).unbind(-1)  # (C, N/2)
    sums = torch.empty(2, N, D, device="cuda")  # (2, N, D)
    op.excite(x, E, cos, sin)
    op.gate(x, E, X, dropout, E.mT, y)
    op.gate_backward(x, E.mT, x, E, X, dropout, sums[0].mT, sums[1])
    if op.worth_keeping(C, N, D, x.dtype):
        op.gate_backward_kept(x, E.mT, x, X, X, sums[0].mT, sums[1])
    for past in (None, (x, E[None], x, E[None])):
        op.excite_backward(ones(1, C, C), X, X, ones(1, C, N), cos, sin, past)
