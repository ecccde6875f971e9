"""Norms and histograms of a model's tensors, whole or spread over ranks (DTensors).

All ranks must call these functions together: a DTensor's parts are gathered by all of them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bdh.distributed.head_sharding import unshard

BINS = 64


@dataclass(frozen=True)
class Histogram:
    """Counts of values between neighbouring edges.

    Attributes:
        edges: `len(counts) + 1` of them, rising.
        counts: Values in each bin.
        total: Sum of the values.
        squares: Sum of their squares.
    """

    edges: list[float]
    counts: list[float]
    total: float
    squares: float

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Counts and edges, as NumPy's own `histogram` gives them."""
        return np.array(self.counts), np.array(self.edges)


def whole(tensor: Tensor) -> Tensor:
    """The tensor, put together if it lies spread over ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def norms(kind: str, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    """Euclidean norms: `KIND` of all tensors together, and `KIND/NAME` of each."""
    named = {name: whole(torch.linalg.vector_norm(tensor)).float() for name, tensor in tensors}
    if not named:
        return {}
    each = torch.stack(list(named.values()))
    values = [torch.linalg.vector_norm(each).item(), *each.tolist()]
    return dict(zip([kind, *(f"{kind}/{name}" for name in named)], values, strict=True))


def parameter_figures(model: nn.Module) -> dict[str, float]:
    """Norms of all parameters and of their gradients; the gradient's over all is left to who clips it."""
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    gradients = norms("gradient_norm", unshard((name, p.grad) for name, p in parameters if p.grad is not None))
    gradients.pop("gradient_norm", None)
    return {**norms("parameter_norm", unshard(parameters)), **gradients}


@torch.no_grad()
def histogram(values: Tensor) -> Histogram | None:
    """The histogram of a tensor's finite values in `BINS` bins of equal width; None if there are none."""
    values = whole(values.detach()).flatten().float()
    values = values[values.isfinite()]
    if not len(values):
        return None
    low, high = values.aminmax()
    lowest, highest = low.item(), high.item()
    if lowest == highest:
        lowest, highest = lowest - 0.5, highest + 0.5
    counts = torch.histc(values, BINS, lowest, highest)
    edges = torch.linspace(lowest, highest, BINS + 1)
    return Histogram(edges.tolist(), counts.tolist(), values.sum().item(), values.square().sum().item())


def weight_histograms(model: nn.Module) -> dict[str, Histogram]:
    """`weights/NAME` of every parameter."""
    found = {f"weights/{name}": histogram(p) for name, p in unshard(model.named_parameters())}
    return {name: values for name, values in found.items() if values is not None}
