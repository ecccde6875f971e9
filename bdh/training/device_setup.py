"""Device, precision and memory settings of a run."""

import random
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from bdh.model import BDHForCausalLM
from bdh.training.config import TrainingConfig


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products run in hardware, where they are worth having."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # x86, x86, ARM
    return False


def autocast(config: TrainingConfig, device: torch.device) -> AbstractContextManager[object]:
    """The context a forward pass runs in: bfloat16 autocast, or nothing for float32."""
    wanted = config.precision == "bfloat16" or (config.precision == "auto" and has_fast_bfloat16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16) if wanted else nullcontext()


def recompute_layers(model: BDHForCausalLM) -> None:
    """Keeps only each layer's input for the backward pass and computes the rest again."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # transformers' newer name for the same
    (enable or model.gradient_checkpointing_enable)()


def hardware(device: torch.device) -> str:
    """Describes the device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{'CPU' if device.type == 'cpu' else device.type} ({threads} thread{'s' if threads > 1 else ''})"


def seed_everything(seed: int) -> None:
    """Seeds the generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
