"""Large matrices in pieces, one a head, so that no more than a piece of one need ever be whole in a process (FSDP).

A module of pieces stands for the linear map in the model that is trained. Files and figures know the whole only:
`joined` and `parted` go from one to the other.
"""

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

PIECE = re.compile(r"\b(encoder|decoder)\.pieces\.\d+\.weight")
ALONG = {"encoder": 0, "decoder": 1}  # the dimension of the whole weight, (n, D) or (D, n), that pieces share


class LinearInPieces(nn.Module):
    """A linear map without bias whose weight is cut into equal pieces, each a linear map of its own.

    Args:
        whole: The map to cut; the pieces are views of its weight.
        count: How many pieces; must divide the dimension that is cut.
        along: 0 cuts what comes out, which is put side by side; 1 cuts what goes in, and what comes out is added up.
    """

    def __init__(self, whole: nn.Linear, count: int, along: int):
        super().__init__()
        self.along = along
        self.pieces = nn.ModuleList(linear(weight, whole) for weight in whole.weight.detach().chunk(count, along))

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.along == 0:
            return torch.cat([piece(input) for piece in self.pieces], dim=-1)
        parts = input.chunk(len(self.pieces), dim=-1)
        total = None
        for piece, part in zip(self.pieces, parts, strict=True):
            said = piece(part).float()  # a sum of several bfloat16 numbers loses digits
            total = said if total is None else total + said
        assert total is not None
        return total


def linear(weight: Tensor, like: nn.Linear) -> nn.Linear:
    """A linear map with a weight (out, in), trained if `like` is."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.contiguous(), requires_grad=like.weight.requires_grad)
    return made


def joined(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Parameters, or what belongs to them, by name, as they lie in the whole model: pieces put together, one by one."""
    for name, pieces in by_matrix(tensors).items():
        whole = pieces[0].detach()
        if len(pieces) > 1 and whole.ndim == 2:
            whole = torch.cat([piece.detach() for piece in pieces], along(name))
        yield name, whole


@torch.no_grad()
def parted(whole: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Puts what `joined(tensors.items())` has put together, and someone has written to, back into the pieces."""
    for name, pieces in by_matrix((name, tensor) for name, tensor in tensors.items() if PIECE.search(name)).items():
        parts = whole[name].chunk(len(pieces), along(name)) if pieces[0].ndim == 2 else [whole[name]] * len(pieces)
        for piece, part in zip(pieces, parts, strict=True):
            local(piece).copy_(local(part))


def by_matrix(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, list[Tensor]]:
    """Tensors by their names in the whole model: the pieces of one matrix together, in order."""
    groups: dict[str, list[Tensor]] = {}
    for name, tensor in tensors:
        groups.setdefault(PIECE.sub(r"\1.weight", name), []).append(tensor)
    return groups


def along(name: str) -> int:
    """The dimension along which the matrix of this name is cut."""
    return next(dim for matrix, dim in ALONG.items() if f"{matrix}.weight" in name)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
