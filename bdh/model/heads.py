"""Heads of one model on several devices: each process has some of them, with their neurons and synapses.

Heads know nothing of each other before the decoder, so the part that a process has is a whole, smaller model: one of
fewer heads, whose layer adds up what all processes' decoders say. That sum of (B, T, D) is all that a layer sends, and
one more in the backward pass, of the gradient of the vector that all heads read.

The encoder, the decoder and the gates are `DTensor`s of the whole, so that FSDP, the optimizer and checkpoints know
them by their whole shapes; `encoder_v` is one matrix a head, which its process alone has, numbered from 0 there:
`HeadNames` tells the number that it has in the whole.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from bdh.errors import BDHError
from bdh.model.configuration_bdh import BDHConfig
from bdh.model.modeling_bdh import BDHForCausalLM

HEAD = re.compile(r"\bencoder_v\.(\d+)\b")


@dataclass(frozen=True)
class HeadNames:
    """Names of parameters here and in the whole model: heads from `first` on are here, as 0, 1, …"""

    first: int = 0

    def whole(self, name: str) -> str:
        """What a parameter, or what belongs to one, is called in the whole model."""
        return HEAD.sub(lambda found: f"encoder_v.{int(found[1]) + self.first}", name)

    def here(self, name: str) -> str:
        return HEAD.sub(lambda found: f"encoder_v.{int(found[1]) - self.first}", name)


class Part(nn.Module):
    """Hands a vector to the heads here; its gradient is the sum of all processes'. (B, T, D) -> (B, T, D)."""

    def __init__(self, mesh: DeviceMesh):
        super().__init__()
        self.mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        everywhere = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
        return everywhere.to_local(grad_placements=[Partial()])


class Meet(nn.Module):
    """Adds up what the decoders of all processes say. (B, T, D) -> (B, T, D)."""

    def __init__(self, mesh: DeviceMesh):
        super().__init__()
        self.mesh = mesh

    def forward(self, y: Tensor) -> Tensor:
        parts = DTensor.from_local(y, self.mesh, [Partial()], run_check=False)
        return parts.redistribute(placements=[Replicate()]).to_local()


class HereLinear(nn.Linear):
    """A linear map with the part of a weight that is here."""

    weight: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        return F.linear(input, weight.to_local() if isinstance(weight, DTensor) else weight)


def check_heads(n_head: int, processes: int) -> None:
    """Raises BDHError unless heads can be shared by so many processes."""
    if n_head % processes:
        raise BDHError(
            f"{processes} processes are to share the {n_head} heads of the model (model.n_head); their number, in "
            "training distributed.tensor_parallel, must divide that of the heads"
        )


def part_config(config: BDHConfig, processes: int, place: int = 0) -> BDHConfig:
    """The configuration of the part that one of several processes has. Raises BDHError if there is none.

    Args:
        config: Of the whole model.
        processes: How many share its heads.
        place: Which of them, from 0; the half-lives are those of its heads.
    """
    check_heads(config.n_head, processes)
    if config.mlp_internal_dim_multiplier % processes:
        raise BDHError(
            f"{processes} processes are to share the heads of the model; their number, in training "
            "distributed.tensor_parallel, must divide model.mlp_internal_dim_multiplier "
            f"{config.mlp_internal_dim_multiplier}"
        )
    settings = config.to_dict()
    settings["n_head"] //= processes
    settings["mlp_internal_dim_multiplier"] //= processes
    if config.decay_half_lives is not None:
        heads = settings["n_head"]
        settings["decay_half_lives"] = config.decay_half_lives[place * heads : (place + 1) * heads]
    return BDHConfig.from_dict(settings)


def part_of(model: BDHForCausalLM, mesh: DeviceMesh) -> tuple[BDHForCausalLM, HeadNames]:
    """The part of a model that this process of a mesh of one dimension has, and the names of its heads.

    Args:
        model: The whole, the same in all processes; parameters that are not split are shared with it, not copied.
        mesh: The processes that share the heads.

    Raises:
        BDHError: The heads cannot be shared by so many.
    """
    count, place = mesh.size(), mesh.get_local_rank()
    part = BDHForCausalLM(part_config(model.config, count, place))
    part.train(model.training)
    part.generation_config = model.generation_config
    part.model.embed_tokens, part.lm_head = model.model.embed_tokens, model.lm_head
    whole, layer = model.model.layer, part.model.layer
    layer.encoder = here_linear(whole.encoder, mesh, 0)
    layer.decoder = here_linear(whole.decoder, mesh, 1)
    if whole.gates is not None and layer.gates is not None:
        for name, parameter in whole.gates.named_parameters():
            layer.gates.register_parameter(name, shard_parameter(parameter, mesh, 0))
    heads = part.config.n_head
    first = place * heads
    layer.encoder_v = nn.ModuleList(whole.encoder_v[first : first + heads])
    layer.part, layer.meet = Part(mesh), Meet(mesh)
    return part, HeadNames(first)


def here_linear(whole: nn.Linear, mesh: DeviceMesh, dim: int) -> HereLinear:
    """A linear map with this process's slice of a weight along a dimension, kept as a `DTensor` of the whole."""
    weight = shard_parameter(whole.weight, mesh, dim)
    linear = HereLinear(whole.in_features, whole.out_features, bias=False, device="meta")
    linear.weight = weight
    return linear


def shard_parameter(whole: Tensor, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    """This process's slice of a parameter along a dimension, kept as a `DTensor` of the whole."""
    local = whole.detach().chunk(mesh.size(), dim)[mesh.get_local_rank()]
    local = local.clone(memory_format=torch.contiguous_format)  # or the whole would stay in memory
    sharded = DTensor.from_local(local, mesh, [Shard(dim)], run_check=False)
    return nn.Parameter(sharded, requires_grad=whole.requires_grad)
