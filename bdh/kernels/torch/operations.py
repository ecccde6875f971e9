"""`bdh.kernels.layer_operations` in PyTorch, for all devices and dtypes, optimized for CPUs.

On a CPU that multiplies bfloat16 in hardware, elementwise operations take as long as the products. So they are in
place, tensors (G, C, N) reuse the memory of earlier ones, and some operations on bfloat16 use its bits as int16, whose
sign is the same.
"""

import torch
from torch import Tensor

from bdh.kernels.gated_operations import GatedOperations
from bdh.kernels.layer_operations import SMALLEST_NORMAL, Dropout, SynapseTerms
from bdh.kernels.products import add_product_, product_into
from bdh.kernels.torch.gated_operations import TorchGatedOperations, rotate_rows
from bdh.kernels.torch.workspace import Workspace

SLICE_NUMEL = 1 << 18  # elements of (G, C, N) that are rotated at once, so that they stay in the cache
SCORE_BLOCK = 128  # rows of scores computed at once; blocks above the diagonal are skipped


class TorchOperations:
    """See `Operations`. On a CPU, unsaved results of size (G, C, N) stay valid until the next head's call."""

    def __init__(self, device: torch.device):
        self.gated_attention: GatedOperations = TorchGatedOperations(Workspace(device))
        self.workspace = Workspace(device)
        self.rope_cache: tuple[Tensor, ...] = ()  # cos, sin, and the results of `phases`
        self.transposed_dy: tuple[Tensor, ...] = ()  # dy, and the result of `transposed`

    def supports(self, dtype: torch.dtype) -> bool:
        return True

    def excite(
        self, x: Tensor, E: Tensor, cos: Tensor, sin: Tensor, save: bool = False, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        X = relu_(self.product("X", x, E.mT, save))  # (G, C, N)
        R = self.workspace.take("R", X.shape, X.dtype, save) if out is None else out  # (G, C, N)
        self.rotate(X, self.phases(cos, sin), R)
        return X, R

    def scores(self, R: Tensor, documents: Tensor | None) -> Tensor:
        G, C, _ = R.shape
        if C <= SCORE_BLOCK:
            P = (R @ R.mT).tril_(-1)  # (G, C, C)
        else:
            P = R.new_zeros(G, C, C)
            for start in range(0, C, SCORE_BLOCK):
                rows, before = slice(start, start + SCORE_BLOCK), slice(0, start)
                P[:, rows, before] = R[:, rows] @ R[:, before].mT  # (G, rows, start)
                P[:, rows, rows] = (R[:, rows] @ R[:, rows].mT).tril_(-1)  # (G, rows, rows)
        return mask_cross_document_(P, documents)

    def scores_backward(self, dA: Tensor, x: Tensor, documents: Tensor | None) -> Tensor:
        dP = mask_cross_document_((dA @ x.mT).tril_(-1), documents)  # (G, C, C)
        return dP + dP.mT

    def gate(
        self, A: Tensor, Ev: Tensor, X: Tensor, dropout: Dropout, Dec: Tensor, y: Tensor, save: bool = False
    ) -> Tensor | None:
        Z = relu_(self.product("Z", A, Ev.mT, save)).mul_(X)  # (G, C, N)
        if dropout.p > 0:
            apply_mask_(Z, dropout_mask(Z, dropout))
        add_product_(y, Z, Dec.mT)  # (G, C, D)
        return Z if save else None

    def gate_backward(
        self, dy: Tensor, Dec: Tensor, A: Tensor, Ev: Tensor, X: Tensor, dropout: Dropout, dDec: Tensor, dEv: Tensor
    ) -> tuple[Tensor, Tensor]:
        Y = relu_(self.product("Y", A, Ev.mT))  # (G, C, N)
        dZ = self.product("dZ", dy, Dec)  # (G, C, N)
        Z = torch.mul(X, Y, out=self.workspace.take("Z", X.shape, X.dtype))  # (G, C, N)
        if dropout.p > 0:
            mask = dropout_mask(Z, dropout)  # (G, C, N)
            apply_mask_(Z, mask), apply_mask_(dZ, mask)
        dX = torch.mul(dZ, Y, out=self.workspace.take("dX", X.shape, X.dtype))  # (G, C, N)
        dY = self.relu_backward_(dZ.mul_(X), Y)  # (G, C, N)
        self.weight_gradients(dy, Z, dY, A, dDec, dEv)
        return dY, dX

    def should_save_activations(self, C: int, N: int, D: int, dtype: torch.dtype) -> bool:
        """True on a CPU, except where matrix units multiply bfloat16: there allocating memory is as slow as products.

        False for float16, in which Z / X may underflow or overflow.
        """
        if self.workspace.device.type != "cpu" or dtype == torch.float16:
            return False
        return dtype != torch.bfloat16 or not torch.cpu._is_amx_tile_supported()

    def gate_backward_saved(
        self, dy: Tensor, Dec: Tensor, A: Tensor, X: Tensor, Z: Tensor, dDec: Tensor, dEv: Tensor
    ) -> tuple[Tensor, Tensor]:
        dZ = self.product("dZ", dy, Dec)  # (G, C, N)
        dX = torch.clamp_min(X, SMALLEST_NORMAL, out=self.workspace.take("dX", X.shape, X.dtype))  # (G, C, N)
        torch.div(Z, dX, out=dX).mul_(dZ)
        dY = self.relu_backward_(dZ.mul_(X), Z)  # (G, C, N)
        self.weight_gradients(dy, Z, dY, A, dDec, dEv)
        return dY, dX

    def weight_gradients(self, dy: Tensor, Z: Tensor, dY: Tensor, A: Tensor, dDec: Tensor, dEv: Tensor) -> None:
        """Fill dDec (D, N) with dy^T Z and dEv (N, D) with dY^T A."""
        product_into(dDec, self.transposed(dy), Z.flatten(0, 1))  # (D, N)
        product_into(dEv, dY.flatten(0, 1).mT, A.flatten(0, 1))  # (N, D)

    def excite_backward(
        self, dP: Tensor, R: Tensor, X: Tensor, dX: Tensor, cos: Tensor, sin: Tensor, terms: SynapseTerms | None
    ) -> Tensor:
        dR = torch.bmm(dP, R, out=self.workspace.take("Y", R.shape, R.dtype))  # (G, C, N)
        if terms is not None:
            dA, S, values, dS = terms
            dR.baddbmm_(dA, S.mT).baddbmm_(values, dS.mT)  # (G, C, N)
        self.add_rotated_(dX, dR, self.phases(cos, sin, back=True))
        return self.relu_backward_(dX, X)

    def scan(
        self, U: Tensor, S: Tensor | None, cos: Tensor, sin: Tensor, retention: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if S is None:
            S = torch.zeros_like(U[:, 0], dtype=cos.dtype)  # (B, N, D)
        for chunk in range(U.shape[1]):
            after = S if retention is None else S * retention[:, chunk, None, None]  # (B, N, D)
            after = rotate_rows(after + U[:, chunk], cos, -sin)  # (B, N, D)
            U[:, chunk] = S
            S = after
        return U, S

    def scan_backward(
        self, V: Tensor, dS: Tensor | None, cos: Tensor, sin: Tensor, retention: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        g = torch.zeros_like(V[:, 0], dtype=cos.dtype) if dS is None else dS  # (B, N, D)
        for chunk in reversed(range(V.shape[1])):
            turned = rotate_rows(g, cos, sin)  # (B, N, D)
            g = turned if retention is None else turned * retention[:, chunk, None, None]  # (B, N, D)
            g = g + V[:, chunk]  # (B, N, D)
            V[:, chunk] = turned
        return V, g

    def norm(self, A: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        result, _, rstd = torch.native_layer_norm(A, A.shape[-1:], None, None, eps)  # (G, C, D), (G, C, 1)
        return result, rstd

    def norm_backward(self, gradient: Tensor, A: Tensor, rstd: Tensor) -> Tensor:
        # The backward pass of a norm with input A, whose mean is 0 and deviation 1, scaled by the true deviation.
        unscaled = layer_norm_backward(gradient, A, torch.zeros_like(rstd), torch.ones_like(rstd))  # (G, C, D)
        return unscaled * rstd.to(unscaled.dtype)  # (G, C, D)

    def add_norm(self, x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, tuple[Tensor, ...]]:
        D = x.shape[-1:]
        normalised, *of_y = torch.native_layer_norm(y, D, None, None, eps)  # (B, T, D), 2 x (B, T, 1)
        total = x + normalised  # (B, T, D)
        result, *of_total = torch.native_layer_norm(total, D, None, None, eps)  # (B, T, D), 2 x (B, T, 1)
        return result, (y, *of_y, total, *of_total)

    def add_norm_backward(self, gradient: Tensor, saved: tuple[Tensor, ...], eps: float) -> tuple[Tensor, Tensor]:
        of_total = layer_norm_backward(gradient, *saved[3:])  # (B, T, D)
        return of_total, layer_norm_backward(of_total, *saved[:3])

    # ---------------------------------------------------------------------------------------- elementwise

    def product(self, name: str, a: Tensor, b: Tensor, save: bool = False) -> Tensor:
        """Compute a b in the workspace's buffer of this name, or in new memory: (G, C, D), (D, N) -> (G, C, N)."""
        G, C, _ = a.shape
        out = self.workspace.take(name, (G, C, b.shape[1]), a.dtype, save)  # (G, C, N)
        torch.mm(a.flatten(0, 1), b, out=out.view(G * C, -1))
        return out

    def rotate(self, X: Tensor, phases: Tensor, R: Tensor) -> None:
        """Rotate each pair of neurons by its phase, into R: (G, C, N), (C, N/2) complex."""
        if X.dtype == phases.real.dtype:
            torch.mul(as_complex(X), phases, out=as_complex(R))
            return
        for tokens in token_slices(X):
            wide = self.widen("wide", X[:, tokens], phases)  # (G, slice, N)
            as_complex(wide).mul_(phases[tokens])
            R[:, tokens] = wide

    def add_rotated_(self, total: Tensor, X: Tensor, phases: Tensor) -> None:
        """Add X, rotated as by `rotate`, to `total` (G, C, N)."""
        if X.dtype == phases.real.dtype:
            as_complex(total).addcmul_(as_complex(X), phases)
            return
        for tokens in token_slices(X):
            wide = self.widen("wide", X[:, tokens], phases)  # (G, slice, N)
            wide_total = self.widen("total", total[:, tokens], phases)  # (G, slice, N)
            as_complex(wide_total).addcmul_(as_complex(wide), phases[tokens])
            total[:, tokens] = wide_total

    def widen(self, name: str, X: Tensor, phases: Tensor) -> Tensor:
        """Convert X (G, C, N) to the precision of the phases."""
        return self.workspace.take(name, X.shape, phases.real.dtype).copy_(X)

    def relu_backward_(self, gradient: Tensor, activity: Tensor) -> Tensor:
        """Set the gradient of a relu with the result `activity` to 0 where that is 0. (G, C, N)."""
        if activity.dtype != torch.bfloat16:
            return torch.ops.aten.threshold_backward.grad_input(gradient, activity, 0, grad_input=gradient)
        ones = self.workspace.take("ones", activity.shape, torch.int16)  # (G, C, N)
        torch.clamp_max(activity.view(torch.int16), 1, out=ones)
        gradient.view(torch.int16).mul_(ones)  # the bits times 0 or 1
        return gradient

    def transposed(self, dy: Tensor) -> Tensor:
        """Transpose (G, C, D) -> (D, G * C), contiguous; cached, because all heads pass the same tensor."""
        if not self.transposed_dy or self.transposed_dy[0] is not dy:
            self.transposed_dy = dy, dy.flatten(0, 1).mT.contiguous()  # (D, M)
        return self.transposed_dy[1]

    def phases(self, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
        """Return cos + i sin or its conjugate, (C, N/2) complex; cached for all heads and layers."""
        if not self.rope_cache or self.rope_cache[0] is not cos or self.rope_cache[1] is not sin:
            wide = torch.promote_types(cos.dtype, torch.float32)
            phases = torch.complex(cos.to(wide), sin.to(wide))  # (C, N/2)
            self.rope_cache = cos, sin, phases, phases.conj().resolve_conj()
        return self.rope_cache[3 if back else 2]


def layer_norm_backward(gradient: Tensor, input: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Return the gradient of a layer norm's input: (..., D), with mean and rstd (..., 1)."""
    backward = torch.ops.aten.native_layer_norm_backward
    result: Tensor
    result, *_ = backward(gradient, input, input.shape[-1:], mean, rstd, None, None, [True, False, False])
    return result


def relu_(X: Tensor) -> Tensor:
    """Apply relu in place. -nan in bfloat16 becomes 0."""
    if X.dtype != torch.bfloat16:
        return X.relu_()
    X.view(torch.int16).clamp_min_(0)
    return X


def mask_cross_document_(P: Tensor, documents: Tensor | None) -> Tensor:
    """Set P (G, C, C) to 0 where documents (G, C) differ."""
    return P if documents is None else P.masked_fill_(documents[:, :, None] != documents[:, None, :], 0)


def token_slices(X: Tensor) -> list[slice]:
    """Split the tokens of chunks (G, C, N) into slices of at most SLICE_NUMEL elements."""
    G, C, N = X.shape
    size = max(1, SLICE_NUMEL // (G * N))
    return [slice(start, start + size) for start in range(0, C, size)]


def as_complex(X: Tensor) -> Tensor:
    """View pairs of neurons as complex numbers: (G, C, N) -> (G, C, N/2)."""
    return torch.view_as_complex(X.unflatten(-1, (-1, 2)))


# ------------------------------------------------------------------------------------------------ dropout

DROPOUT_STEPS = 1 << 15  # a product is dropped if its 15 random bits are less than p times this


def dropout_mask(Z: Tensor, dropout: Dropout) -> Tensor:
    """Return a mask for Z (G, C, N), int16: -1 for products that are kept, 0 for others.

    The two neurons of a pair take the halves of 32 random bits, a hash of a random number of their token and one of
    their pair.
    """
    G, C, N = Z.shape
    generator = torch.Generator().manual_seed(dropout.seed ^ (dropout.head * 0x9E3779B97F4A7C15 % 2**63))
    random = torch.empty(G * C + N // 2, dtype=torch.int32).random_(-(2**31), 2**31, generator=generator).to(Z.device)
    bits = random[: G * C, None] ^ random[None, G * C :]  # (G * C, N/2)
    for factor in (0x7FEB352D, 0x2C1B3C6D):
        bits.mul_(factor)
        bits ^= bits >> 15
    halves = bits.view(torch.int16).bitwise_and_(DROPOUT_STEPS - 1)  # (G * C, N)
    first_kept = round(dropout.p * DROPOUT_STEPS)
    return halves.neg_().add_(first_kept - 1).bitwise_right_shift_(15).view(G, C, N)


def apply_mask_(Z: Tensor, mask: Tensor) -> Tensor:
    """Set Z to 0 where the mask is 0."""
    if Z.dtype == torch.bfloat16:
        Z.view(torch.int16).bitwise_and_(mask)
        return Z
    return Z.masked_fill_(mask == 0, 0)
