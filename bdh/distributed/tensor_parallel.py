"""Tensor parallelism over the heads of a model: each process holds some heads, with their neurons and synapses.

Heads are independent of each other before the decoder, so the shard of a process is a smaller model with fewer heads,
whose layer sums the decoder outputs of all processes. That all-reduce of (B, T, D) is the only communication of a layer
in the forward pass; the backward pass has one more, of the gradient of the vector that all heads read.

The encoder, the decoder and the gates are `DTensor`s, so that FSDP, the optimizer and checkpoints see their global
shapes. `encoder_v` is one matrix for each head, which exists in one process only, where heads are numbered from 0;
`HeadNames` translates between these numbers and those in the whole model.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from bdh.distributed.head_sharding import local_shard
from bdh.errors import BDHError
from bdh.model.configuration_bdh import BDHConfig
from bdh.model.modeling_bdh import BDHForCausalLM

HEAD = re.compile(r"\bencoder_v\.(\d+)\b")


@dataclass(frozen=True)
class HeadNames:
    """Translates parameter names between the shard of a process and the whole model.

    Attributes:
        first: Number in the whole model of the shard's head 0.
    """

    first: int = 0

    def global_name(self, name: str) -> str:
        """Return the name in the whole model of a parameter of the shard, or of something that belongs to one."""
        return HEAD.sub(lambda match: f"encoder_v.{int(match[1]) + self.first}", name)

    def local_name(self, name: str) -> str:
        """Undo `global_name`."""
        return HEAD.sub(lambda match: f"encoder_v.{int(match[1]) - self.first}", name)


class CopyToTensorParallel(nn.Module):
    """Identity, whose backward pass sums the gradients of all processes. (B, T, D) -> (B, T, D)."""

    def __init__(self, mesh: DeviceMesh):
        super().__init__()
        self.mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        replicated = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
        return replicated.to_local(grad_placements=[Partial()])


class ReduceFromTensorParallel(nn.Module):
    """Sums the decoder outputs of all processes. (B, T, D) -> (B, T, D)."""

    def __init__(self, mesh: DeviceMesh):
        super().__init__()
        self.mesh = mesh

    def forward(self, y: Tensor) -> Tensor:
        partial = DTensor.from_local(y, self.mesh, [Partial()], run_check=False)
        return partial.redistribute(placements=[Replicate()]).to_local()


class LocalShardLinear(nn.Linear):
    """Linear layer without bias that multiplies by this process's shard of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, local_shard(self.weight))


def shard_config(config: BDHConfig, size: int, rank: int = 0) -> BDHConfig:
    """Return the configuration of the shard of one process.

    Args:
        config: Of the whole model.
        size: Number of processes that share the heads.
        rank: Of the process among these; it selects the half-lives.

    Raises:
        BDHError: The heads or the neurons cannot be divided among so many processes.
    """
    if config.n_head % size:
        raise BDHError(
            f"{size} processes are to share the {config.n_head} heads of the model (model.n_head); their number, in "
            "training distributed.tensor_parallel, must divide that of the heads"
        )
    if config.mlp_internal_dim_multiplier % size:
        raise BDHError(
            f"{size} processes are to share the heads of the model; their number, in training "
            "distributed.tensor_parallel, must divide model.mlp_internal_dim_multiplier "
            f"{config.mlp_internal_dim_multiplier}"
        )
    settings = config.to_dict()
    settings["n_head"] //= size
    settings["mlp_internal_dim_multiplier"] //= size
    if config.decay_half_lives is not None:
        heads = settings["n_head"]
        settings["decay_half_lives"] = config.decay_half_lives[rank * heads : (rank + 1) * heads]
    return BDHConfig.from_dict(settings)


def shard_model(model: BDHForCausalLM, mesh: DeviceMesh) -> tuple[BDHForCausalLM, HeadNames]:
    """Return this process's shard of a model, and the names of its heads.

    Args:
        model: The whole model, the same in all processes; the shard shares the parameters that are not split.
        mesh: One-dimensional mesh of the processes that share the heads.

    Raises:
        BDHError: The heads cannot be divided among so many processes.
    """
    size, rank = mesh.size(), mesh.get_local_rank()
    shard = BDHForCausalLM(shard_config(model.config, size, rank))
    shard.train(model.training)
    shard.generation_config = model.generation_config
    shard.model.embed_tokens, shard.lm_head = model.model.embed_tokens, model.lm_head
    whole, layer = model.model.layer, shard.model.layer
    layer.encoder = shard_linear(whole.encoder, mesh, 0)
    layer.decoder = shard_linear(whole.decoder, mesh, 1)
    if whole.gates is not None and layer.gates is not None:
        for name, parameter in whole.gates.named_parameters():
            layer.gates.register_parameter(name, shard_parameter(parameter, mesh, 0))
    heads = shard.config.n_head
    first = rank * heads
    layer.encoder_v = nn.ModuleList(whole.encoder_v[first : first + heads])
    layer.copy_to_tensor_parallel = CopyToTensorParallel(mesh)
    layer.reduce_from_tensor_parallel = ReduceFromTensorParallel(mesh)
    return shard, HeadNames(first)


def shard_linear(whole: nn.Linear, mesh: DeviceMesh, dim: int) -> LocalShardLinear:
    """Return a linear layer with this process's shard of a weight along a dimension."""
    linear = LocalShardLinear(whole.in_features, whole.out_features, bias=False, device="meta")
    linear.weight = shard_parameter(whole.weight, mesh, dim)
    return linear


def shard_parameter(whole: Tensor, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    """Return this process's shard of a parameter along a dimension, as a `DTensor` of the global shape."""
    local = whole.detach().chunk(mesh.size(), dim)[mesh.get_local_rank()]
    local = local.clone(memory_format=torch.contiguous_format)  # a view would keep the whole tensor in memory
    sharded = DTensor.from_local(local, mesh, [Shard(dim)], run_check=False)
    return nn.Parameter(sharded, requires_grad=whole.requires_grad)
