"""The operations of `bdh.kernels.operations` on a Hopper GPU: Gluon kernels where sizes fit them, else Triton's."""

import torch
from torch import Tensor

from bdh.kernels.hopper import gate_backward
from bdh.kernels.hopper.parts import of_bfloat16
from bdh.kernels.operations import Dropout
from bdh.kernels.triton_operations import TritonOperations, dropout_numbers


class HopperOperations(TritonOperations):
    """See `Operations`."""

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
        rows = (tensor.view(G * C, -1) for tensor in (A, X, dy))
        A, X, dy = rows  # (M, D), (M, N), (M, D)
        dY, dX = gate_backward.gate_backward(dy, Dec.mT, A, Ev, X, *dropout_numbers(dropout), dDec.mT, dEv)
        return dY.view(G, C, N), dX.view(G, C, N)


def works(device: torch.device) -> bool:
    """Whether the kernels work here: Gluon is new, and what it is called changes from one Triton to the next."""
    M, N, D = 128, 128, gate_backward.WIDTH
    wide, narrow = (torch.ones(M, size, dtype=torch.bfloat16, device=device) for size in (D, N))
    sums = [torch.empty(N, D, device=device) for _ in range(2)]
    try:
        gate_backward.gate_backward(wide, wide, wide, wide, narrow, 0, 0, *sums)
    except Exception:  # of any kind: what a compiler says to a language that it does not know
        return False
    return True
