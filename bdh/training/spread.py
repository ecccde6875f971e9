"""How a model is spread over the processes of a run: copies (DDP), shards (FSDP2, HSDP), and heads (tensor parallel).

All layers of a BDH share one set of weights. So gradients are complete only when the first layer's backward pass ends,
and there is nothing to send before; and a shard that is gathered serves a layer's pass, each weight by itself, of large
ones each head's part, so that no more than one is there whole at a time.
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

from bdh.model import BDHForCausalLM
from bdh.model.heads import HeadNames, part_of
from bdh.model.modeling_bdh import BDHLayer
from bdh.training.pieces import ALONG, LinearInPieces, local
from bdh.training.processes import Processes

LARGE = 2**24  # parameters of a matrix that is sharded head by head; for smaller ones, fewer messages count more


class Spread:
    """A model in one or many processes.

    Args:
        model: The whole, on the CPU or wherever it was made, the same in all processes.
        processes: Who shares it.
        bfloat16: Whether matrices are multiplied in it.
        compiled: Makes a compiled form of a module; None leaves it as it is.

    Attributes:
        model: The part that is here, as it is trained, validated and saved.
        names: What its parameters are called in the whole.
        forward: Calls it.
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
            self.model, self.names = part_of(model, mesh["heads"])
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
            # Or a compiled graph would be cut into pieces, to send what is ready sooner; here nothing is (see above).
            torch._dynamo.config.optimize_ddp = False
            self.forward = DistributedDataParallel(
                self.forward,
                device_ids=devices,
                process_group=mesh.get_group("replicas"),
                gradient_as_bucket_view=True,
            )

    def _shard(self, bfloat16: bool, compiled: Callable[[nn.Module], Any] | None) -> None:
        """FSDP2: over all processes that share the rows, or, as HSDP, over some of them and copied to the others."""
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
            in_float32 = MixedPrecisionPolicy(reduce_dtype=torch.float32)  # as gates compute, whatever the rest is in
            fully_shard(layer.gates, **{**policy, "mp_policy": in_float32})
        if compiled is None:  # hooks inside would break a compiled layer into pieces
            self._shard_by_head(layer, policy)
        fully_shard(layer, **policy)
        fully_shard(self.model, **policy)
        if compiled is not None:
            self.model.model.layer.compile()

    def _shard_by_head(self, layer: BDHLayer, policy: dict[str, Any]) -> None:
        """Shards each matrix by itself, and of large ones each head's part.

        A gradient is complete only when the first layer's backward pass ends, and is then there whole, beside the copy
        that is sent; for a head's part that is little, for a whole matrix it is a third of the model.
        """
        mesh = policy["mesh"]
        shards = mesh.size(mesh.ndim - 1)
        whole: list[nn.Module] = [*layer.encoder_v]
        for name, along in ALONG.items():
            linear = getattr(layer, name)
            # A piece is sharded along D, as the decoder's rows are; FSDP cuts columns, the encoder's, evenly only.
            even = along == 1 or layer.config.n_embd % shards == 0
            # With adapters, or with other processes' heads besides (`bdh.model.heads`), it is another kind of map.
            if type(linear) is not nn.Linear or linear.weight.numel() < LARGE or not even:
                whole.append(linear)
                continue
            cut = LinearInPieces(linear, layer.config.n_head, along)
            setattr(layer, name, cut)
            for piece in cut.pieces:
                fully_shard(piece, **policy, shard_placement_fn=columns if along == 0 else None)
        for linear in whole:
            fully_shard(linear, **policy)
        for module in [module for module in layer.modules() if isinstance(module, FSDPModule)]:
            module.register_forward_hook(let_go)  # type: ignore[attr-defined]

    def piece(self, is_last: bool) -> AbstractContextManager[object]:
        """What a forward and backward pass runs in: gradients are sent with the last of a step only."""
        if isinstance(self.forward, DistributedDataParallel):
            return nullcontext() if is_last else self.forward.no_sync()
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(is_last)
        return nullcontext()

    @contextmanager
    def whole_steps(self) -> Iterator[None]:
        """For forward passes without gradients one after the other: what is gathered stays until they are done."""
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

    def clip(self, largest: float) -> float:
        """Scales the gradient so that its norm over the whole model is at most `largest`; the norm before."""
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        norm = self.norm(gradients)
        factor = min(1.0, largest / (norm + 1e-6))
        if factor < 1.0:
            for gradient in gradients.values():
                local(gradient).mul_(factor)
        return norm

    def norm(self, tensors: dict[str, Tensor]) -> float:
        """The norm of all these together, over the whole model: parameters or their gradients, by name."""
        device = self.processes.device
        wide = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        square = sum(
            (
                square_sum(local(tensor)).to(device, wide) / self.copies(name, tensor)
                for name, tensor in tensors.items()
            ),
            start=torch.zeros((), dtype=wide, device=device),
        )
        if not self.processes.alone:
            dist.all_reduce(square)
        return float(square.sqrt())

    def copies(self, name: str, tensor: Tensor) -> int:
        """How many processes have the very numbers of a tensor that this one has."""
        size = self.processes.size
        if self.processes.mesh is None:
            return 1
        shards = 1
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh
            for dim, placement in enumerate(tensor.placements):
                shards *= 1 if isinstance(placement, Replicate) else mesh.size(dim)
        if ".encoder_v." in name:  # others have other heads
            shards *= self.processes.mesh["heads"].size()
        return size // shards

    def together(self, figures: dict[str, float]) -> dict[str, float]:
        """Figures of the whole model from those of the parts that processes have which share its heads.

        Norms of states and of all parameters are put together as norms, shares of neurons as means; what is of one head
        is taken from who has it.
        """
        mesh = self.processes.mesh
        if mesh is None or mesh["heads"].size() == 1:
            return figures
        parts = self.processes.gather({self.names.whole(name): value for name, value in figures.items()})
        parts = parts[: mesh["heads"].size()]  # the others have the same
        found = {}
        for name in dict.fromkeys(name for part in parts for name in part):
            values = [part[name] for part in parts if name in part]
            is_norm = name.startswith("state_norm")
            found[name] = sum(v * v for v in values) ** 0.5 if is_norm else sum(values) / len(values)
        each = [value for name, value in found.items() if name.startswith("parameter_norm/")]
        return {**found, "parameter_norm": sum(v * v for v in each) ** 0.5} if each else found


def let_go(module: nn.Module, inputs: object, output: object) -> None:
    """Gives up what was gathered for a forward pass.

    FSDP does so itself, but not where a layer is worked out again in the backward pass, at whose end all of it would be
    whole at once.
    """
    if torch.is_grad_enabled() and isinstance(module, FSDPModule):
        module.reshard()


def columns(weight: nn.Parameter) -> Shard:
    return Shard(1)


def square_sum(tensor: Tensor) -> Tensor:
    """The sum of the squares, in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).square().sum()
