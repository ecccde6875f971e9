"""The optimizer and the learning-rate schedule."""

import math
from typing import Any

import torch
from torch import nn

from bdh.training.config import TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; fused where the device has it.

    In BDH every parameter is a matrix, the embedding included; what is not, added by someone later, is not decayed.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": alike, "weight_decay": decay}
        for kind, decay in ((matrices, config.weight_decay), (others, 0.0))
        for alike in by_mesh(kind)
    ]
    fused = parameters[0].device.type in ("cpu", "cuda", "mps")
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.eps, fused=fused)


def by_mesh(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters, those together that are spread over the same processes: a fused step takes no others at once."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return list(groups.values())


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """The learning rate of a step, counted from 0: a linear warm-up, then the schedule, which ends at the last step."""
    peak, floor = config.learning_rate, config.min_learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    last = config.max_steps - 1
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, last - config.warmup_steps)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if config.schedule == "wsd":
        left = max(0, last - step) / config.decay_steps
        return floor + (peak - floor) * min(1.0, left)
    return peak
