"""Tensor-parallel inference: each of several processes holds some heads of the model.

All processes get the same requests in the same order and run their own engine, whose steps depend on the sampled
tokens. These must be the same everywhere, so all processes sample from the first one's logits with the same random
numbers.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from bdh.distributed.tensor_parallel import shard_model
from bdh.errors import BDHError
from bdh.inference.llm import LLM, default_batch_size
from bdh.inference.runner import DTYPES, ModelRunner, cast, choose_dtype
from bdh.model.export import load_export


def check_shared(device: str, quantization: str | None) -> None:
    """Raise BDHError for settings that tensor parallelism does not support."""
    if quantization is not None:
        raise BDHError(
            f"quantization {quantization} is for a model in one process; leave it out where several share the heads"
        )
    if device == "mps":
        raise BDHError("the device is to be mps, on which heads are not shared; choose cpu, or start one process")


def load_shared(
    directory: str | Path,
    mesh: DeviceMesh,
    device: torch.device,
    dtype: str = "auto",
    max_batch_size: int | None = None,
) -> LLM:
    """Create an `LLM` with this process's shard of a model. All processes must call it, and then each of its methods.

    The whole model is read; this process keeps its heads, and all of the embedding and the language model head.

    Args:
        directory: Folder of an export.
        mesh: One-dimensional mesh of the processes.
        device: Device of this process.
        dtype: As for `LLM`.
        max_batch_size: As for `LLM`; None takes the number that fits in every process.

    Raises:
        BDHError: The export cannot be loaded, or its heads cannot be divided among the processes.
    """
    model, tokenizer = load_export(directory)
    shard, _ = shard_model(model, mesh)
    del model
    shard = cast(shard.to(device), DTYPES[choose_dtype(dtype, device.type)])
    shard.lm_head.register_forward_hook(BroadcastLogits(mesh))
    return LLM(ModelRunner(shard, max_batch_size or common_batch_size(shard.config, mesh, device)), tokenizer)


class BroadcastLogits:
    """Forward hook that replaces the logits of all processes with those of the first. (B, T, V) -> (B, T, V).

    Different hardware may round sums differently, and a single different token would deadlock the processes.
    """

    def __init__(self, mesh: DeviceMesh):
        self.group = mesh.get_group()

    def __call__(self, module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
        logits = logits.contiguous()  # (B, T, V)
        dist.broadcast(logits, group=self.group, group_src=0)
        return logits


def common_batch_size(config: Any, mesh: DeviceMesh, device: torch.device) -> int:
    """Return the number of states that fit in every process."""
    fitting = torch.tensor(default_batch_size(config, device), device=device)
    dist.all_reduce(fitting, dist.ReduceOp.MIN, group=mesh.get_group())
    return int(fitting)
