"""Matrix products with sums in a wider dtype than the factors."""

import torch
from torch import Tensor

from bdh.model.modeling_bdh import synapse_dtype


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to `total`: (G, C, I), (G, I, J) or (I, J) -> (G, C, J)."""
    if a.dtype == total.dtype:
        total.baddbmm_(a, b.expand(len(a), *b.shape[-2:]))
    elif total.device.type == "cuda":  # accumulates in the dtype of the result
        if b.dim() == 2:
            total, a = total.view(-1, total.shape[-1]), a.flatten(0, 1)  # (M, J), (M, I)
        add = torch.addmm if b.dim() == 2 else torch.baddbmm
        add(total, a, b, out_dtype=total.dtype, out=total)
    else:
        product = a @ b  # (G, C, J)
        # Mixed dtypes are slow on a CPU.
        total += product.to(total.dtype) if total.device.type == "cpu" else product


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute a b in the dtype of `out`: (I, M), (M, J) -> (I, J)."""
    if a.device.type == "cuda" and a.dtype != out.dtype:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(a @ b)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Compute a b in float32 at least: (G, I, J), (G, J, K) -> (G, I, K)."""
    wide = synapse_dtype(a.dtype)
    if a.dtype == wide:
        return torch.bmm(a, b)  # (G, I, K)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=wide)  # (G, I, K)
    return torch.bmm(a.to(wide), b.to(wide))  # (G, I, K)
