"""A model that writes with its heads in several processes, each of which has some of them and reads everything.

All of them get the same requests in the same order, and run an engine each. What an engine does next is decided by the
tokens chosen. So these must be the same everywhere: chosen from the same logits, the first process's to the last bit,
by the same random numbers.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from bdh.errors import BDHError
from bdh.inference.llm import LLM, default_batch_size
from bdh.inference.runner import DTYPES, ModelRunner, cast, choose_dtype
from bdh.model.export import load_export
from bdh.model.heads import part_of


def check_shared(device: str, quantization: str | None) -> None:
    """Refuses settings that shared heads do not have. Raises BDHError."""
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
    """An LLM of this process's part of a model; all processes of the mesh call it, and then each of its methods.

    The whole model is read, and only what is this process's is kept, with all of the embedding and of the head.

    Args:
        directory: An export.
        mesh: The processes that share its heads, in one dimension.
        device: Where this one computes.
        dtype: As for `LLM`.
        max_batch_size: As for `LLM`; None takes what fits everywhere.

    Raises:
        BDHError: The export cannot be loaded, or so many processes cannot share its heads.
    """
    model, tokenizer = load_export(directory)
    part, _ = part_of(model, mesh)
    del model
    part = cast(part.to(device), DTYPES[choose_dtype(dtype, device.type)])
    part.lm_head.register_forward_hook(Agree(mesh))
    return LLM(ModelRunner(part, max_batch_size or common_batch_size(part.config, mesh, device)), tokenizer)


class Agree:
    """A hook that puts the first process's logits in the place of all others'. (B, T, V) -> (B, T, V).

    Sums of the same numbers are the same on the same hardware, but nobody promises that all GPUs are the same, and one
    other token would have processes wait for each other for ever.
    """

    def __init__(self, mesh: DeviceMesh):
        self.group = mesh.get_group()

    def __call__(self, module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
        logits = logits.contiguous()  # (B, T, V)
        dist.broadcast(logits, group=self.group, group_src=0)
        return logits


def common_batch_size(config: Any, mesh: DeviceMesh, device: torch.device) -> int:
    """As many states as every process has room for."""
    fitting = torch.tensor(default_batch_size(config, device), device=device)
    dist.all_reduce(fitting, dist.ReduceOp.MIN, group=mesh.get_group())
    return int(fitting)
