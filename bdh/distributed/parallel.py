"""Distributes a model over the processes of a run: data parallel (DDP), sharded (FSDP2, HSDP), tensor parallel.

All layers of a BDH share one set of weights. Gradients are therefore complete only when the first layer's backward pass
ends, so there is no communication to overlap with it. Under FSDP each weight is gathered by itself, and of large
weights each head's part, so that at most one of them is unsharded at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from bdh.distributed.head_sharding import SHARD_DIMS, HeadShardedLinear, local_shard
from bdh.distributed.processes import Processes
from bdh.distributed.tensor_parallel import HeadNames, shard_model
from bdh.model import BDHForCausalLM
from bdh.model.modeling_bdh import BDHLayer

LARGE = 2**24  # parameters from which a matrix is sharded by head; smaller ones are cheaper in fewer messages


class ParallelModel:
    """A model in one or many processes.

    Args:
        model: The whole model, on any device, the same in all processes.
        processes: The processes that share it.
        bfloat16: Whether matrices are multiplied in bfloat16.
        compiled: Compiles a module; None for eager mode.

    Attributes:
        model: The part of the model that this process holds; it is trained, validated and saved.
        names: Maps names of its parameters to their names in the whole model.
        forward: Calls the model.
    """

    def __init__(
        self,
        model: BDHForCausalLM,
        processes: Processes,
        bfloat16: bool,
        compiled: Callable[[nn.Module], Any] | None = None,
    ):
        self.processes = processes
        self.names = HeadNames()
        self.model = model
        mesh, config = processes.mesh, processes.config
        if mesh is not None and config.tensor_parallel > 1:
            self.model, self.names = shard_model(model, mesh["heads"])
        offload = mesh is not None and config.strategy == "fsdp" and config.cpu_offload
        if not offload:
            self.model.to(processes.device)
        self.forward: Any = self.model
        if mesh is not None and config.strategy == "fsdp":
            self._shard(bfloat16, compiled)
        elif compiled is not None:
            self.forward = compiled(self.model)
        if mesh is not None and config.strategy == "ddp" and mesh["replicas"].size() > 1:
            devices = [processes.device] if processes.device.type == "cuda" else None
            # Splitting the compiled graph to overlap communication would gain nothing (see the module's docstring).
            torch._dynamo.config.optimize_ddp = False
            self.forward = DistributedDataParallel(
                self.forward,
                device_ids=devices,
                process_group=mesh.get_group("replicas"),
                gradient_as_bucket_view=True,
            )

    def _shard(self, bfloat16: bool, compiled: Callable[[nn.Module], Any] | None) -> None:
        """Apply FSDP2 over all data-parallel processes, or HSDP over some of them with replicas on the others."""
        processes = self.processes
        assert processes.mesh is not None
        mesh = processes.mesh["replicas", "shards"]
        if mesh["replicas"].size() == 1:
            mesh = processes.mesh["shards"]
        offload = CPUOffloadPolicy(pin_memory=processes.device.type == "cuda")
        policy: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if bfloat16 else None, reduce_dtype=torch.float32
            ),
            "offload_policy": offload if processes.config.cpu_offload else OffloadPolicy(),
        }
        layer = self.model.model.layer
        if layer.gates is not None and any(True for _ in layer.gates.parameters()):
            in_float32 = MixedPrecisionPolicy(reduce_dtype=torch.float32)  # gates always compute in float32
            fully_shard(layer.gates, **{**policy, "mp_policy": in_float32})
        if compiled is None:  # hooks of inner modules would break the compiled layer's graph
            self._shard_by_head(layer, policy)
        fully_shard(layer, **policy)
        fully_shard(self.model, **policy)
        if compiled is not None:
            self.model.model.layer.compile()

    def _shard_by_head(self, layer: BDHLayer, policy: dict[str, Any]) -> None:
        """Shard each matrix by itself, and large matrices by head.

        A gradient is complete only when the first layer's backward pass ends. It is then unsharded, beside the buffer
        that is reduced: a third of the model for a whole matrix, little for the part of one head.
        """
        mesh = policy["mesh"]
        shards = mesh.size(mesh.ndim - 1)
        unsplit: list[nn.Module] = [*layer.encoder_v]
        for name, dim in SHARD_DIMS.items():
            linear = getattr(layer, name)
            # Parts are sharded along D: rows of the decoder, columns of the encoder, which FSDP splits evenly only.
            even = dim == 1 or layer.config.n_embd % shards == 0
            # With LoRA or tensor parallelism (`bdh.distributed.tensor_parallel`) it is another class.
            if type(linear) is not nn.Linear or linear.weight.numel() < LARGE or not even:
                unsplit.append(linear)
                continue
            by_head = HeadShardedLinear(linear, layer.config.n_head, dim)
            setattr(layer, name, by_head)
            for head in by_head.heads:
                fully_shard(head, **policy, shard_placement_fn=shard_columns if dim == 0 else None)
        for linear in unsplit:
            fully_shard(linear, **policy)
        for module in [module for module in layer.modules() if isinstance(module, FSDPModule)]:
            module.register_forward_hook(reshard_after_forward)  # type: ignore[attr-defined]

    def sync_gradients(self, is_last: bool) -> AbstractContextManager[object]:
        """Return the context of a forward and backward pass; only the last one of a step reduces gradients."""
        if isinstance(self.forward, DistributedDataParallel):
            return nullcontext() if is_last else self.forward.no_sync()
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(is_last)
        return nullcontext()

    @contextmanager
    def keep_unsharded(self) -> Iterator[None]:
        """Keep gathered weights until the block ends, for consecutive forward passes without gradients."""
        module = self.model
        if not isinstance(module, FSDPModule):
            yield
            return
        module.set_reshard_after_forward(False)
        try:
            yield
        finally:
            module.set_reshard_after_forward(True)
            for part in module.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()

    def clip(self, max_norm: float) -> float:
        """Clip the gradient's norm over the whole model to `max_norm`; return the norm before clipping."""
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        norm = self.norm(gradients)
        factor = min(1.0, max_norm / (norm + 1e-6))
        if factor < 1.0:
            for gradient in gradients.values():
                local_shard(gradient).mul_(factor)
        return norm

    def norm(self, tensors: dict[str, Tensor]) -> float:
        """Return the total norm of parameters or gradients, by name, over the whole model."""
        device = self.processes.device
        wide = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        square = sum(
            (
                square_sum(local_shard(tensor)).to(device, wide) / self.replicas(name, tensor)
                for name, tensor in tensors.items()
            ),
            start=torch.zeros((), dtype=wide, device=device),
        )
        if not self.processes.alone:
            dist.all_reduce(square)
        return float(square.sqrt())

    def replicas(self, name: str, tensor: Tensor) -> int:
        """Return the number of processes that hold the same local shard of a tensor as this one."""
        size = self.processes.size
        if self.processes.mesh is None:
            return 1
        shards = 1
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh
            for dim, placement in enumerate(tensor.placements):
                shards *= 1 if isinstance(placement, Replicate) else mesh.size(dim)
        if ".encoder_v." in name:  # each tensor-parallel rank has other heads
            shards *= self.processes.mesh["heads"].size()
        return size // shards

    def gather_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Combine the metrics of tensor-parallel ranks into those of the whole model.

        Norms of states and of all parameters are combined as norms, shares of neurons as means. A metric of one head is
        that of the rank with the head.
        """
        mesh = self.processes.mesh
        if mesh is None or mesh["heads"].size() == 1:
            return metrics
        parts = self.processes.gather({self.names.global_name(name): value for name, value in metrics.items()})
        parts = parts[: mesh["heads"].size()]  # other data-parallel ranks have the same values
        combined = {}
        for name in dict.fromkeys(name for part in parts for name in part):
            values = [part[name] for part in parts if name in part]
            is_norm = name.startswith("state_norm")
            combined[name] = sum(v * v for v in values) ** 0.5 if is_norm else sum(values) / len(values)
        norms = [value for name, value in combined.items() if name.startswith("parameter_norm/")]
        return {**combined, "parameter_norm": sum(v * v for v in norms) ** 0.5} if norms else combined


def reshard_after_forward(module: nn.Module, inputs: object, output: object) -> None:
    """Reshard a module after a forward pass with gradients.

    FSDP does so itself, except when activation checkpointing recomputes a layer in the backward pass: at its end, all
    weights of the layer would be unsharded.
    """
    if torch.is_grad_enabled() and isinstance(module, FSDPModule):
        module.reshard()


def shard_columns(weight: nn.Parameter) -> Shard:
    """Return the placement that shards a weight (out, in) along its inputs."""
    return Shard(1)


def square_sum(tensor: Tensor) -> Tensor:
    """Return the sum of squares, computed in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).square().sum()
