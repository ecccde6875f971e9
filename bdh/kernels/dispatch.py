"""Which form of the neurons' work a training run takes: plain ("reference"), PyTorch ("chunked"), or "triton"."""

from contextlib import suppress
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from bdh.distributed.tensor_parallel import LocalShardLinear
from bdh.errors import BDHError
from bdh.kernels.forward_context import Reading, Weights
from bdh.kernels.fused_layer import NO_GATES, join, neurons
from bdh.kernels.layer_operations import Operations
from bdh.kernels.torch.operations import TorchOperations
from bdh.kernels.torch.workspace import retain_freed_memory
from bdh.model.configuration_bdh import BDHConfig
from bdh.model.modeling_bdh import BDHLayer, BDHState, Fast, Gates

# What auto takes its forms from: products X o Y of a head in a pass. With fewer, the plain form is as fast.
LEAST = {"chunked": 1 << 18, "triton": 1 << 24}
TRITON_CAPABILITY = (8, 0)  # what the kernels are made for: GPUs that multiply bfloat16
# What neurons that are kept for the way back may take: of a GPU's free memory one part of so many, of a CPU's bytes.
ROOM = {"cuda": 3, "cpu": 1 << 30}
HOPPER = (9, 0)  # which has kernels of its own


def use_kernels(layer: BDHLayer, name: str, device: torch.device) -> None:
    """Lets a layer take the form of its work that a setting names.

    Args:
        layer: As it will be trained, with adapters if it is to have any.
        name: "auto", "reference", "chunked" or "triton", as `model.kernels` has it.
        device: Where it is trained.

    Raises:
        BDHError: The form is asked for by name and cannot work here.
    """
    form = name
    if name == "auto":
        form = choose(layer, device)
    elif name != "reference":
        check(layer, name, device)
    if form == "reference":
        layer.kernels = None
        return
    least, only = 0, None
    if name == "auto":  # Triton where it is much faster, which in float32 it is not
        least, only = LEAST[form], torch.bfloat16 if form == "triton" else None
    layer.kernels = Kernels(operations_of(form, layer.config, device), least, only, room_for_neurons(device))


def choose(layer: BDHLayer, device: torch.device) -> str:
    """The fastest form that works here, of those that were tried: of GPUs, on Hopper."""
    if not is_plain(layer) or isinstance(layer, FSDPModule):
        return "reference"
    if device.type == "cpu":
        return "chunked"
    tried = why_no_triton(device) is None and torch.cuda.get_device_capability(device) == HOPPER
    return "triton" if tried else "reference"


def check(layer: BDHLayer, name: str, device: torch.device) -> None:
    """Raises BDHError unless the form can work."""
    why = why_no_triton(device) if name == "triton" else None
    if isinstance(layer, FSDPModule):  # whose weights are whole only while it works with them
        why = "it does not work with distributed.strategy fsdp"
    elif not is_plain(layer):
        why = "it works on plain weights, and this model has adapters or quantized weights"
    if why is not None:
        raise BDHError(f"model.kernels is {name}, but {why}; choose auto")


def why_no_triton(device: torch.device) -> str | None:
    """What keeps the Triton kernels from working on a device; None if nothing does."""
    if device.type != "cuda":
        return f"Triton needs an NVIDIA GPU, and the device is {device.type}"
    if find_spec("triton") is None:
        return "Triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < TRITON_CAPABILITY:
        return f"the GPU is of compute capability {'.'.join(map(str, capability))}, and 8.0 is needed"
    return None


def operations_of(name: str, config: BDHConfig, device: torch.device) -> Operations:
    if name == "chunked":
        if device.type == "cpu":
            retain_freed_memory()
        return TorchOperations(device)
    from bdh.kernels.triton.operations import TritonOperations

    if torch.cuda.get_device_capability(device) == HOPPER:
        with suppress(Exception):  # of any kind: Gluon is new, and what it is called may change with any Triton
            from bdh.kernels.hopper.operations import HopperOperations, works

            if works(device, config.n_embd, config.dropout):
                return HopperOperations()
    return TritonOperations()


class Kernels:
    """What stands in `BDHLayer.kernels`: finds the fast way for a forward pass, or none.

    There is none for little work and for single tokens that go on from a state (the plain form is the faster), for
    padded rows, and while the layer's linear maps are not plain: adapted, quantized, or looked into by hooks.

    Args:
        operations: The steps of a head.
        least: Products X o Y of a head and a pass from which on it is taken.
        only: What has to be computed in; None: anything.
        room: Bytes that a pass may keep of all its layers' neurons.
    """

    def __init__(self, operations: Operations, least: int, only: torch.dtype | None, room: int):
        self.operations, self.least, self.only, self.room = operations, least, only, room

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, layer: BDHLayer, embeds: Tensor, mask: Tensor | None, state: BDHState | None, documents: Tensor | None
    ) -> Fast | None:
        B, T, _ = embeds.shape
        config = layer.config
        if B * T * config.neurons_per_head < self.least or (state is not None and T == 1) or not is_plain(layer):
            return None
        dtype = computing_dtype(embeds)
        if self.only not in (None, dtype) or not self.operations.takes(dtype):
            return None
        if mask is not None and not bool(mask.all()):
            return None
        encoder, *encoder_v, decoder = (here(linear) for linear in linear_maps(layer))
        reading = Reading.begin(
            self.operations,
            Weights.of(encoder, encoder_v, decoder, dtype),
            (B, T),
            theta=config.rope_theta,
            eps=config.layer_norm_eps,
            chunk_size=config.chunk_size,
            dropout=config.dropout if layer.training else 0.0,
            start=None if state is None else state.position,
            documents=documents,
            room=self.room // config.n_layer,
        )
        return Way(reading, layer)


class Way:
    """`Fast`: through a layer by a reading."""

    def __init__(self, reading: Reading, layer: BDHLayer):
        self.reading, self.layer = reading, layer
        self.constant_gates = NO_GATES if layer.gates is None else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, x: Tensor, S: Tensor | None) -> tuple[Tensor, Tensor | None]:
        encoder, *encoder_v, decoder = (here(linear) for linear in linear_maps(self.layer))
        return neurons(self.reading, x, S, encoder, encoder_v, decoder, self.gates(x))

    def gates(self, x: Tensor) -> Gates:
        """The gates of tokens x (B, T, D), computed once for all layers where they do not depend on the tokens."""
        if self.constant_gates is not None:
            return self.constant_gates
        assert self.layer.gates is not None
        gates: Gates = self.layer.gates(x)
        if not self.layer.gates.depends_on_tokens:
            self.constant_gates = gates
        return gates

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def join(self, x: Tensor, y: Tensor) -> Tensor:
        return join(self.reading, x, y)


def room_for_neurons(device: torch.device) -> int:
    """Bytes that a pass may keep of all its layers' neurons, so that the way back need not work them out again."""
    return torch.cuda.mem_get_info(device)[0] // ROOM["cuda"] if device.type == "cuda" else ROOM["cpu"]


def linear_maps(layer: BDHLayer) -> list[nn.Module]:
    return [layer.encoder, *layer.encoder_v, layer.decoder]


def here(linear: nn.Module) -> Tensor:
    """A weight, of which the part that this process has."""
    weight = linear.get_parameter("weight")
    return weight.to_local() if isinstance(weight, DTensor) else weight


def is_plain(layer: BDHLayer) -> bool:
    """Whether the layer's linear maps are what they seem, and nobody looks at what goes through them."""
    return all(
        type(linear) in (nn.Linear, LocalShardLinear)
        and isinstance(linear.weight, nn.Parameter)
        and type(linear.weight.data) in (Tensor, DTensor)
        and linear.bias is None
        and not (linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks)
        for linear in linear_maps(layer)
    )


def computing_dtype(x: Tensor) -> torch.dtype:
    """What is computed in: autocast's dtype where that is on, else x's."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
