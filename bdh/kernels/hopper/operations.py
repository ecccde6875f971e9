"""`bdh.kernels.layer_operations` on a Hopper GPU: Gluon kernels for the sizes that they support, else Triton's."""

import torch
from torch import Tensor

from bdh.kernels.hopper import excite, excite_512, excite_backward, gate, gate_512, gate_backward
from bdh.kernels.hopper.device_functions import all_bfloat16
from bdh.kernels.layer_operations import Dropout, SynapseTerms
from bdh.kernels.triton.operations import TritonOperations, dropout_numbers


class HopperOperations(TritonOperations):
    """See `Operations`."""

    def excite(
        self, x: Tensor, E: Tensor, cos: Tensor, sin: Tensor, save: bool = False, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        (G, C, D), N = x.shape, len(E)
        kernel = next((module for module in (excite, excite_512) if module.fits(C, N, D)), None)
        if kernel is None or not all_bfloat16(x, E):
            return super().excite(x, E, cos, sin, save, out)
        R = None if out is None else out.view(G * C, N)  # (M, N)
        X, R = kernel.excite(x.view(G * C, D), E, self.phases(cos, sin).view(C, N), C, R)  # (M, N)
        return X.view(G, C, N), R.view(G, C, N)

    def gate(
        self, A: Tensor, Ev: Tensor, X: Tensor, dropout: Dropout, Dec: Tensor, y: Tensor, save: bool = False
    ) -> Tensor | None:
        G, C, N = X.shape
        D = A.shape[2]
        if save or not (gate.fits(G * C, N, D) and all_bfloat16(A, Ev, X, Dec.mT)):
            return super().gate(A, Ev, X, dropout, Dec, y, save)
        key, dropped = dropout_numbers(dropout)
        gate.gate(A.view(G * C, D), Ev, X.view(G * C, N), key, dropped, Dec.mT, y.view(G * C, D))
        return None

    def gate_product(self, A: Tensor, Ev: Tensor, X: Tensor, dropout: Dropout) -> Tensor:
        G, C, N = X.shape
        D = A.shape[2]
        if not (gate_512.fits(G * C, N, D) and all_bfloat16(A, Ev, X)):
            return super().gate_product(A, Ev, X, dropout)
        Z = gate_512.gate_product(A.view(G * C, D), Ev, X.view(G * C, N), *dropout_numbers(dropout))  # (M, N)
        return Z.view(G, C, N)

    def gate_backward(
        self, dy: Tensor, Dec: Tensor, A: Tensor, Ev: Tensor, X: Tensor, dropout: Dropout, dDec: Tensor, dEv: Tensor
    ) -> tuple[Tensor, Tensor]:
        G, C, N = X.shape
        D = A.shape[2]
        if not (gate_backward.fits(G * C, N, D) and all_bfloat16(dy, Dec.mT, A, Ev, X) and dDec.mT.is_contiguous()):
            return super().gate_backward(dy, Dec, A, Ev, X, dropout, dDec, dEv)
        dy, A, X = dy.view(G * C, D), A.view(G * C, D), X.view(G * C, N)  # (M, D), (M, D), (M, N)
        dY, dX = gate_backward.gate_backward(dy, Dec.mT, A, Ev, X, *dropout_numbers(dropout), dDec.mT, dEv)
        return dY.view(G, C, N), dX.view(G, C, N)

    def gate_product_backward(
        self, dy: Tensor, Dec: Tensor, A: Tensor, Ev: Tensor, X: Tensor, dropout: Dropout
    ) -> tuple[Tensor, Tensor, Tensor]:
        G, C, N = X.shape
        D = A.shape[2]
        if not (gate_512.fits(G * C, N, D) and all_bfloat16(A, Ev, X)):
            return super().gate_product_backward(dy, Dec, A, Ev, X, dropout)
        dX = dy @ Dec  # (G, C, N)  dZ, overwritten
        rows = A.view(G * C, D), Ev, X.view(G * C, N), dX.view(G * C, N)
        Z, dY = gate_512.gate_product_backward(*rows, *dropout_numbers(dropout))  # (M, N)
        return Z.view(G, C, N), dY.view(G, C, N), dX

    def should_save_activations(self, C: int, N: int, D: int, dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16 and excite_512.fits(C, N, D) and gate_512.fits(C, N, D)

    def gate_product_backward_saved(self, dy: Tensor, Dec: Tensor, X: Tensor, Z: Tensor) -> tuple[Tensor, Tensor]:
        G, C, N = X.shape
        D = dy.shape[2]
        if not (gate_512.fits(G * C, N, D) and all_bfloat16(dy, Dec.mT, X, Z)):
            return super().gate_product_backward_saved(dy, Dec, X, Z)
        dy, X, Z = dy.view(G * C, D), X.view(G * C, N), Z.view(G * C, N)  # (M, D), (M, N), (M, N)
        dY, dX = gate_512.gate_product_backward_saved(dy, Dec.mT, X, Z)  # (M, N)
        return dY.view(G, C, N), dX.view(G, C, N)

    def excite_backward(
        self, dP: Tensor, R: Tensor, X: Tensor, dX: Tensor, cos: Tensor, sin: Tensor, terms: SynapseTerms | None
    ) -> Tensor:
        _, C, N = X.shape
        if not (excite_backward.fits(C, N) and all_bfloat16(dP, R, X, dX)):
            return super().excite_backward(dP, R, X, dX, cos, sin, terms)
        extra = None
        if terms is not None:
            dA, S, values, dS = terms
            extra = (dA @ S.mT).baddbmm_(values, dS.mT)  # (G, C, N)
        return excite_backward.excite_backward(dP, R, X, dX, self.phases(cos, sin).view(C, N), extra)


def check_kernels(device: torch.device, D: int, p: float) -> None:
    """Compile and run the kernels for a width, without dropout and with dropout of p; raise what fails."""
    with torch.cuda.device(device):
        for dropout in {0.0, p}:
            for _ in range(2):  # the first time they are compiled
                run_all(HopperOperations(), D, dropout)
        torch.cuda.synchronize()


def run_all(op: TritonOperations, D: int, p: float) -> None:
    """Run every operation that has kernels in this package, on small tensors of ones."""
    C, N, dropout = 256, 128, Dropout(p)

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.bfloat16, device="cuda")

    x, E, X, y = ones(1, C, D), ones(N, D), ones(1, C, N), torch.ones(1, C, D, device="cuda")
    cos, sin = ones(C, N // 2, 2).unbind(-1)  # (C, N/2)
    sums = torch.empty(2, N, D, device="cuda")  # (2, N, D)
    op.excite(x, E, cos, sin)
    op.gate(x, E, X, dropout, E.mT, y)
    op.gate_backward(x, E.mT, x, E, X, dropout, sums[0].mT, sums[1])
    if op.should_save_activations(C, N, D, x.dtype):
        op.gate_backward_saved(x, E.mT, x, X, X, sums[0].mT, sums[1])
    for terms in (None, (x, E[None], x, E[None])):
        op.excite_backward(ones(1, C, C), X, X, ones(1, C, N), cos, sin, terms)
