"""Settings of runs in several processes. Nothing here imports torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class DistributedConfig:
    """Several processes, as torchrun starts them.

    Args:
        strategy: Data parallelism. ddp: each process has the whole model. fsdp: each process keeps a shard of the
            weights, gradients and optimizer states (FSDP2), and gathers a weight when it is used.
        shards: With fsdp, the number of processes that a copy of the model is sharded over; there are as many copies as
            fit (HSDP). Null: all of them.
        tensor_parallel: Number of processes that share the heads of a model, each with the neurons and synapses of its
            own heads.
        cpu_offload: With fsdp, keep weights, gradients and optimizer states in CPU memory.
        timeout_seconds: How long a process waits for the others before it gives up.
    """

    strategy: Literal["ddp", "fsdp"] = "ddp"
    shards: int | None = None
    tensor_parallel: int = 1
    cpu_offload: bool = False
    timeout_seconds: float = 600.0
