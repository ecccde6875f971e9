"""Splits large matrices by head, so that FSDP gathers one head's part at a time instead of a whole matrix.

In the model that is trained, `HeadShardedLinear` replaces the linear layer. Checkpoints and metrics contain whole
matrices only: `unshard` and `shard` convert between the two.
"""

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

HEAD_WEIGHT = re.compile(r"\b(encoder|decoder)\.heads\.\d+\.weight")
SHARD_DIMS = {"encoder": 0, "decoder": 1}  # the dimension of the weight, (n, D) or (D, n), that is split


class HeadShardedLinear(nn.Module):
    """Linear layer without bias whose weight is split into equal parts, each a linear layer of its own.

    Args:
        linear: The layer to split; the parts are views of its weight.
        n_head: Number of parts; it must divide the dimension that is split.
        dim: 0 splits the outputs, which are concatenated; 1 splits the inputs, and the outputs are summed.
    """

    def __init__(self, linear: nn.Linear, n_head: int, dim: int):
        super().__init__()
        self.dim = dim
        weights = linear.weight.detach().chunk(n_head, dim)
        self.heads = nn.ModuleList(linear_like(linear, weight) for weight in weights)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.dim == 0:
            return torch.cat([head(input) for head in self.heads], dim=-1)
        total = None
        for head, part in zip(self.heads, input.chunk(len(self.heads), dim=-1), strict=True):
            output = head(part).float()  # summing in bfloat16 would lose precision
            total = output if total is None else total + output
        assert total is not None
        return total


def linear_like(linear: nn.Linear, weight: Tensor) -> nn.Linear:
    """Return a linear layer with a weight (out, in), which requires a gradient if that of `linear` does."""
    result = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    result.weight = nn.Parameter(weight.contiguous(), requires_grad=linear.weight.requires_grad)
    return result


def unshard(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters, gradients or optimizer states by their names in the whole model, parts concatenated."""
    for name, parts in by_matrix(tensors).items():
        whole = parts[0].detach()
        if len(parts) > 1 and whole.ndim == 2:
            whole = torch.cat([part.detach() for part in parts], shard_dim(name))
        yield name, whole


@torch.no_grad()
def shard(whole: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Copy the values of whole tensors, as `unshard(tensors.items())` returned them, back into the parts."""
    split = {name: tensor for name, tensor in tensors.items() if HEAD_WEIGHT.search(name)}
    for name, parts in by_matrix(split.items()).items():
        is_matrix = parts[0].ndim == 2
        values = whole[name].chunk(len(parts), shard_dim(name)) if is_matrix else [whole[name]] * len(parts)
        for part, value in zip(parts, values, strict=True):
            local_shard(part).copy_(local_shard(value))


def by_matrix(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, list[Tensor]]:
    """Group tensors by their names in the whole model: the parts of one matrix together, in the order of heads."""
    groups: dict[str, list[Tensor]] = {}
    for name, tensor in tensors:
        groups.setdefault(HEAD_WEIGHT.sub(r"\1.weight", name), []).append(tensor)
    return groups


def shard_dim(name: str) -> int:
    """Return the dimension in which the matrix of this name is split."""
    return next(dim for matrix, dim in SHARD_DIMS.items() if f"{matrix}.weight" in name)


def local_shard(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
