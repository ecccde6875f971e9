"""Chooses the kernels of a model, for training and for inference, by device, dtype and sizes.

Training uses one of these, in a `FusedLayer` except for the first:

* "reference": the layer's own code in `bdh.model.modeling_bdh`.
* "torch": `bdh.kernels.torch`, on any device.
* "triton": `bdh.kernels.triton`, on NVIDIA GPUs.
* "hopper": `bdh.kernels.hopper`, Triton's with some operations in Gluon, on H100 and H200.

Inference uses "torch" on a CPU and "triton" on NVIDIA GPUs, both in `bdh.kernels.decode`, and "reference" elsewhere.
"""

import logging
from importlib.util import find_spec

import torch
from torch.distributed.fsdp import FSDPModule

from bdh.errors import BDHError, one_line
from bdh.kernels.fused_layer import FusedLayer, is_plain
from bdh.kernels.layer_operations import Operations
from bdh.kernels.torch.operations import TorchOperations
from bdh.kernels.torch.workspace import retain_freed_memory
from bdh.model.modeling_bdh import BDHLayer

logger = logging.getLogger(__name__)

# Products X o Y of a head in a pass from which "auto" uses the kernels. For fewer, the layer's own code is as fast.
MIN_PRODUCTS = {"torch": 1 << 18, "triton": 1 << 24}
TRITON_CAPABILITY = (8, 0)  # compute capability from which GPUs multiply bfloat16
HOPPER = (9, 0)  # compute capability of H100 and H200
MAX_SAVED_BYTES = 1 << 30  # activations that a pass on a CPU may save for its backward pass
MAX_SAVED_PART = 3  # on a GPU, the same is a third of the free memory


def use_kernels(layer: BDHLayer, name: str, device: torch.device) -> None:
    """Choose the kernels that a layer is trained with, and log the choice.

    Args:
        layer: The layer, with adapters if it is to have any.
        name: Value of `model.kernels`: "auto", "reference", "torch" or "triton".
        device: Device of the training.

    Raises:
        BDHError: The kernels are requested by name and cannot be used.
    """
    rejected = rejected_kernels(layer, device)
    if name in rejected:
        raise BDHError(f"model.kernels is {name}, but {rejected[name]}; choose auto")
    kernels, min_products, dtype = name, 0, None
    if name == "auto":
        rejected |= {other: why for other, why in auto_rejected(device).items() if other not in rejected}
        kernels = next(other for other in ("triton", "torch", "reference") if other not in rejected)
        min_products = MIN_PRODUCTS.get(kernels, 0)
        dtype = torch.bfloat16 if kernels == "triton" else None  # in float32 it is hardly faster
    elif name == "reference":
        rejected = {}
    if kernels == "triton" and (reason := hopper_unavailable(device, layer.config.n_embd, layer.config.dropout)):
        rejected["hopper"] = reason
    elif kernels == "triton":
        kernels = "hopper"
    layer.kernels = None
    if kernels != "reference":
        operations = make_operations(kernels, device)
        layer.kernels = FusedLayer(operations, min_products, dtype, max_saved_bytes(device))
    faster = ["hopper", "triton", "torch", "reference"]
    faster = [other for other in faster[: faster.index(kernels)] if other in rejected]
    reasons = "".join(f"; not {other}, because {rejected[other]}" for other in faster)
    logger.info("training on %s uses the %s kernels (model.kernels %s)%s", device, kernels, name, reasons)


def rejected_kernels(layer: BDHLayer, device: torch.device) -> dict[str, str]:
    """Return the kernels that cannot train a layer on a device, with the reasons."""
    reason = None
    if isinstance(layer, FSDPModule):  # its weights are whole only while it computes
        reason = "it does not work with distributed.strategy fsdp"
    elif not is_plain(layer):
        reason = "it works on plain weights, and this model has adapters or quantized weights"
    reasons = {"triton": reason or triton_unavailable(device), "torch": reason}
    return {kernels: reason for kernels, reason in reasons.items() if reason is not None}


def auto_rejected(device: torch.device) -> dict[str, str]:
    """Return the kernels that "auto" does not use on a device because they were not measured there to be faster."""
    rejected = {}
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != HOPPER:
        rejected["triton"] = "auto uses it on H100 and H200 only"
    if device.type != "cpu":
        rejected["torch"] = "auto uses it on CPUs only"
    return rejected


def triton_unavailable(device: torch.device) -> str | None:
    """Return the reason why the Triton kernels of training cannot run on a device; None if they can."""
    if device.type != "cuda":
        return f"Triton needs an NVIDIA GPU, and the device is {device.type}"
    if find_spec("triton") is None:
        return "Triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < TRITON_CAPABILITY:
        return f"the GPU is of compute capability {'.'.join(map(str, capability))}, and 8.0 is needed"
    return None


def hopper_unavailable(device: torch.device, n_embd: int, dropout: float) -> str | None:
    """Return the reason why the Gluon kernels cannot run on a device; None if they can.

    Gluon is experimental: its interface, and what it compiles, change with Triton's versions. A failure on a GPU that
    the kernels are made for is logged as a warning.
    """
    if torch.cuda.get_device_capability(device) != HOPPER:
        return "the GPU is not an H100 or H200"
    try:
        from bdh.kernels.hopper.operations import check_kernels

        check_kernels(device, n_embd, dropout)
    except Exception as error:  # of any kind, from an import to the driver
        reason = f"Gluon failed: {type(error).__name__}: {one_line(error)}"
        logger.warning("the Hopper kernels are not used, which are faster than Triton's; %s", reason)
        return reason
    return None


def make_operations(kernels: str, device: torch.device) -> Operations:
    """Create the backend "torch", "triton" or "hopper"."""
    if kernels == "torch":
        if device.type == "cpu":
            retain_freed_memory()
        return TorchOperations(device)
    if kernels == "hopper":
        from bdh.kernels.hopper.operations import HopperOperations

        return HopperOperations()
    from bdh.kernels.triton.operations import TritonOperations

    return TritonOperations()


def max_saved_bytes(device: torch.device) -> int:
    """Return the memory for activations that a pass saves so that its backward pass need not recompute them."""
    return torch.cuda.mem_get_info(device)[0] // MAX_SAVED_PART if device.type == "cuda" else MAX_SAVED_BYTES


def choose_decode_kernels(device: torch.device) -> str:
    """Choose the kernels that inference uses on a device: "torch", "triton" or "reference"; log the choice."""
    kernels, reason = "reference", ""
    if device.type == "cpu":
        kernels = "torch"
    elif device.type != "cuda":
        reason = f"; not triton, because it needs an NVIDIA GPU, and the device is {device.type}"
    elif find_spec("triton") is None:  # it does not exist for some systems
        reason = "; not triton, because it is not installed"
    else:
        kernels = "triton"
    logger.info("inference on %s uses the %s kernels%s", device, kernels, reason)
    return kernels
