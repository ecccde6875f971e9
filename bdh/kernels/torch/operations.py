"""The operations of `bdh.kernels.layer_operations` in PyTorch: for all devices and dtypes, and fast on a CPU.

Where a CPU multiplies matrices of bfloat16 in hardware, all that is done beside the products takes as long as these. So
tensors (G, C, N) are changed in place and lie where others of their kind lay before, and some bits are handled as the
integers they are: a number of bfloat16 is negative when its 16 bits are.
"""

import torch
from torch import Tensor

from bdh.kernels.gated_operations import GatedOperations
from bdh.kernels.layer_operations import SMALLEST, Dropout, SynapseTerms
from bdh.kernels.products import add_product_, product_into
from bdh.kernels.torch.gated_operations import TorchGatedOperations, rotate_rows
from bdh.kernels.torch.workspace import Workspace

PIECE = 1 << 18  # numbers of a tensor (G, C, N) that are turned at once, so that a processor's cache holds them
BLOCK = 128  # rows of scores worked out at once; what lies above their diagonal is worth leaving out


class TorchOperations:
    """See `Operations`. On a CPU what is returned of size (G, C, N) and not kept lasts until the next head's turn."""

    def __init__(self, device: torch.device):
        self.gated_attention: GatedOperations = TorchGatedOperations(Workspace(device))
        self.workspace = Workspace(device)
        self.turning: tuple[Tensor, ...] = ()  # cos and sin, and what `phases` has made of them
        self.lying: tuple[Tensor, ...] = ()  # dy, and what `transposed` has made of it

    def supports(self, dtype: torch.dtype) -> bool:
        return True

    def excite(
        self, x: Tensor, E: Tensor, cos: Tensor, sin: Tensor, keep: bool = False, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        X = relu_(self.product("X", x, E.mT, keep))  # (G, C, N)
        R = self.workspace.take("R", X.shape, X.dtype, keep) if out is None else out  # (G, C, N)
        self.turn(X, self.phases(cos, sin), R)
        return X, R

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
        return apart_(P, documents)

    def scores_backward(self, dA: Tensor, x: Tensor, documents: Tensor | None) -> Tensor:
        dP = apart_((dA @ x.mT).tril_(-1), documents)  # (G, C, C)
        return dP + dP.mT

    def gate(
        self, A: Tensor, Ev: Tensor, X: Tensor, dropout: Dropout, Dec: Tensor, y: Tensor, keep: bool = False
    ) -> Tensor | None:
        Z = relu_(self.product("Z", A, Ev.mT, keep)).mul_(X)  # (G, C, N)
        if dropout.p > 0:
            drop_(Z, keeps(Z, dropout))
        add_product_(y, Z, Dec.mT)  # (G, C, D)
        return Z if keep else None

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
        Y = relu_(self.product("Y", A, Ev.mT))  # (G, C, N)
        dZ = self.product("dZ", dy, Dec)  # (G, C, N)
        Z = torch.mul(X, Y, out=self.workspace.take("Z", X.shape, X.dtype))  # (G, C, N)
        if dropout.p > 0:
            kept = keeps(Z, dropout)  # (G, C, N)
            drop_(Z, kept), drop_(dZ, kept)
        dX = torch.mul(dZ, Y, out=self.workspace.take("dX", X.shape, X.dtype))  # (G, C, N)
        dY = self.where_positive_(dZ.mul_(X), Y)  # (G, C, N)
        self.fill_weight_gradients(dy, Z, dY, A, dDec, dEv)
        return dY, dX

    def should_save_activations(self, C: int, N: int, D: int, dtype: torch.dtype) -> bool:
        """On a CPU, but not where its matrix units multiply bfloat16: new memory takes as long there as products.

        Nor in float16, in which Z / X may be too small or too large a number.
        """
        if self.workspace.device.type != "cpu" or dtype == torch.float16:
            return False
        return dtype != torch.bfloat16 or not torch.cpu._is_amx_tile_supported()

    def gate_backward_saved(
        self, dy: Tensor, Dec: Tensor, A: Tensor, X: Tensor, Z: Tensor, dDec: Tensor, dEv: Tensor
    ) -> tuple[Tensor, Tensor]:
        dZ = self.product("dZ", dy, Dec)  # (G, C, N)
        dX = torch.clamp_min(X, SMALLEST, out=self.workspace.take("dX", X.shape, X.dtype))  # (G, C, N)
        torch.div(Z, dX, out=dX).mul_(dZ)
        dY = self.where_positive_(dZ.mul_(X), Z)  # (G, C, N)
        self.fill_weight_gradients(dy, Z, dY, A, dDec, dEv)
        return dY, dX

    def fill_weight_gradients(self, dy: Tensor, Z: Tensor, dY: Tensor, A: Tensor, dDec: Tensor, dEv: Tensor) -> None:
        """Fills dDec (D, N) with dy^T Z and dEv (N, D) with dY^T A."""
        product_into(dDec, self.transposed(dy), Z.flatten(0, 1))  # (D, N)
        product_into(dEv, dY.flatten(0, 1).mT, A.flatten(0, 1))  # (N, D)

    def excite_backward(
        self, dP: Tensor, R: Tensor, X: Tensor, dX: Tensor, cos: Tensor, sin: Tensor, past: SynapseTerms | None
    ) -> Tensor:
        dR = torch.bmm(dP, R, out=self.workspace.take("Y", R.shape, R.dtype))  # (G, C, N)
        if past is not None:
            dA, S, values, dS = past
            dR.baddbmm_(dA, S.mT).baddbmm_(values, dS.mT)  # (G, C, N)
        self.add_turned_(dX, dR, self.phases(cos, sin, back=True))
        return self.where_positive_(dX, X)

    def scan(self, U: Tensor, S: Tensor | None, cos: Tensor, sin: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        if S is None:
            S = torch.zeros_like(U[:, 0], dtype=cos.dtype)  # (B, N, D)
        for chunk in range(U.shape[1]):
            after = S if kept is None else S * kept[:, chunk, None, None]  # (B, N, D)
            after = rotate_rows(after + U[:, chunk], cos, -sin)  # (B, N, D)
            U[:, chunk] = S
            S = after
        return U, S

    def scan_backward(
        self, V: Tensor, dS: Tensor | None, cos: Tensor, sin: Tensor, kept: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        g = torch.zeros_like(V[:, 0], dtype=cos.dtype) if dS is None else dS  # (B, N, D)
        for chunk in reversed(range(V.shape[1])):
            turned = rotate_rows(g, cos, sin)  # (B, N, D)
            g = turned if kept is None else turned * kept[:, chunk, None, None]  # (B, N, D)
            g = g + V[:, chunk]  # (B, N, D)
            V[:, chunk] = turned
        return V, g

    def norm(self, A: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        result, _, rstd = torch.native_layer_norm(A, A.shape[-1:], None, None, eps)  # (G, C, D), (G, C, 1)
        return result, rstd

    def norm_backward(self, gradient: Tensor, A: Tensor, rstd: Tensor) -> Tensor:
        zeros, ones = torch.zeros_like(rstd), torch.ones_like(rstd)  # (G, C, 1)
        # As if what went in had been A: its mean is 0 and its deviation 1. The true deviation comes after.
        backward = torch.ops.aten.native_layer_norm_backward
        of_A: Tensor = backward(gradient, A, A.shape[-1:], zeros, ones, None, None, [True, False, False])[0]
        return of_A * rstd.to(of_A.dtype)  # (G, C, D)

    def add_norm(self, x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, tuple[Tensor, ...]]:
        D = x.shape[-1:]
        normalised, *of_y = torch.native_layer_norm(y, D, None, None, eps)  # (B, T, D), 2 x (B, T, 1)
        total = x + normalised  # (B, T, D)
        result, *of_total = torch.native_layer_norm(total, D, None, None, eps)  # (B, T, D), 2 x (B, T, 1)
        return result, (y, *of_y, total, *of_total)

    def add_norm_backward(self, gradient: Tensor, kept: tuple[Tensor, ...], eps: float) -> tuple[Tensor, Tensor]:
        def back(gradient: Tensor, came: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
            backward = torch.ops.aten.native_layer_norm_backward
            result: Tensor
            result, *_ = backward(gradient, came, came.shape[-1:], mean, rstd, None, None, [True, False, False])
            return result

        of_total = back(gradient, *kept[3:])  # (B, T, D)
        return of_total, back(of_total, *kept[:3])

    # ---------------------------------------------------------------------------------------- neuron by neuron

    def product(self, name: str, a: Tensor, b: Tensor, keep: bool = False) -> Tensor:
        """a b in the room of this name, or to keep: (G, C, D), (D, N) -> (G, C, N)."""
        G, C, _ = a.shape
        out = self.workspace.take(name, (G, C, b.shape[1]), a.dtype, keep)  # (G, C, N)
        torch.mm(a.flatten(0, 1), b, out=out.view(G * C, -1))
        return out

    def turn(self, X: Tensor, phases: Tensor, R: Tensor) -> None:
        """Turns each pair of neurons by its phase, into R: (G, C, N), (C, N/2) complex."""
        if X.dtype == phases.real.dtype:
            torch.mul(paired(X), phases, out=paired(R))
            return
        for tokens in pieces(X):
            wide = self.widened("wide", X[:, tokens], phases)  # (G, piece, N)
            paired(wide).mul_(phases[tokens])
            R[:, tokens] = wide

    def add_turned_(self, total: Tensor, X: Tensor, phases: Tensor) -> None:
        """Adds to `total` (G, C, N) what `turn` would give of X."""
        if X.dtype == phases.real.dtype:
            paired(total).addcmul_(paired(X), phases)
            return
        for tokens in pieces(X):
            wide = self.widened("wide", X[:, tokens], phases)  # (G, piece, N)
            wide_total = self.widened("total", total[:, tokens], phases)  # (G, piece, N)
            paired(wide_total).addcmul_(paired(wide), phases[tokens])
            total[:, tokens] = wide_total

    def widened(self, name: str, X: Tensor, phases: Tensor) -> Tensor:
        """X (G, C, N) in the precision of the phases."""
        return self.workspace.take(name, X.shape, phases.real.dtype).copy_(X)

    def where_positive_(self, gradient: Tensor, activity: Tensor) -> Tensor:
        """The gradient, in place, of a relu that gave `activity`: 0 where that is 0. (G, C, N)."""
        if activity.dtype != torch.bfloat16:
            return torch.ops.aten.threshold_backward.grad_input(gradient, activity, 0, grad_input=gradient)
        ones = self.workspace.take("ones", activity.shape, torch.int16)  # (G, C, N)
        torch.clamp_max(activity.view(torch.int16), 1, out=ones)
        gradient.view(torch.int16).mul_(ones)  # the bits times 0 or 1
        return gradient

    def transposed(self, dy: Tensor) -> Tensor:
        """(G, C, D) -> (D, G * C), contiguous: the same for all heads."""
        if not self.lying or self.lying[0] is not dy:
            self.lying = dy, dy.flatten(0, 1).mT.contiguous()  # (D, M)
        return self.lying[1]

    def phases(self, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
        """cos + i sin, or what turns back, (C, N/2) complex: the same for all heads and layers."""
        if not self.turning or self.turning[0] is not cos or self.turning[1] is not sin:
            wide = torch.promote_types(cos.dtype, torch.float32)
            phases = torch.complex(cos.to(wide), sin.to(wide))  # (C, N/2)
            self.turning = cos, sin, phases, phases.conj().resolve_conj()
        return self.turning[3 if back else 2]


def relu_(X: Tensor) -> Tensor:
    """relu in place. Of bfloat16, -nan becomes 0."""
    if X.dtype != torch.bfloat16:
        return X.relu_()
    X.view(torch.int16).clamp_min_(0)
    return X


def apart_(P: Tensor, documents: Tensor | None) -> Tensor:
    """Zeros in P (G, C, C) where documents (G, C) differ."""
    return P if documents is None else P.masked_fill_(documents[:, :, None] != documents[:, None, :], 0)


def pieces(X: Tensor) -> list[slice]:
    """The tokens of a chunk (G, C, N), a few at a time."""
    G, C, N = X.shape
    size = max(1, PIECE // (G * N))
    return [slice(start, start + size) for start in range(0, C, size)]


def paired(X: Tensor) -> Tensor:
    """Pairs of neurons as complex numbers: (G, C, N) -> (G, C, N/2)."""
    return torch.view_as_complex(X.unflatten(-1, (-1, 2)))


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
    if Z.dtype == torch.bfloat16:
        Z.view(torch.int16).bitwise_and_(kept)
        return Z
    return Z.masked_fill_(kept == 0, 0)
