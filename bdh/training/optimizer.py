"""The optimizer and the learning-rate schedule.

Muon (Jordan et al., 2024) makes the momentum of a matrix nearly orthogonal before it follows it, so it is for the
matrices of the layer, which are maps from vectors to vectors, and AdamW does the rest. Its steps are scaled to be as
large as AdamW's usually are (Liu et al., arXiv 2502.16982), so that both have one learning rate and one weight decay.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from bdh.training.config import TrainingConfig


class CombinedOptimizer:
    """Several optimizers with disjoint parameters behind the interface of one.

    Iterating over it yields the optimizers, in the form that `torch.distributed.checkpoint.state_dict` takes.
    """

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        return iter(self.parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all optimizers, not copied."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW | CombinedOptimizer:
    """AdamW for all that is trained; or Muon for the matrices of the layer, and AdamW for all else."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if config.optimizer == "adamw":
        return adamw(trained, config)
    matrices = {name: p for name, p in trained if name.startswith("model.layer.") and is_matrix(name, p)}
    muon = torch.optim.Muon(
        matrices.values(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return CombinedOptimizer(muon, adamw([(name, p) for name, p in trained if name not in matrices], config))


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a map between vectors, or the vectors of tokens. A gate is a vector for each head."""
    return parameter.ndim >= 2 and ".gates." not in name


def adamw(parameters: Iterable[tuple[str, nn.Parameter]], config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW for those that are trained, with weight decay on matrices only; fused where the device has it.

    Args:
        parameters: With their names, as `named_parameters` returns them.
        config: Rates and decay.
    """
    trained = [(name, p) for name, p in parameters if p.requires_grad]
    matrices = [p for name, p in trained if is_matrix(name, p)]
    others = [p for name, p in trained if not is_matrix(name, p)]
    groups: list[dict[str, Any]] = [
        {"params": alike, "weight_decay": decay}
        for kind, decay in ((matrices, config.weight_decay), (others, 0.0))
        for alike in by_mesh(kind)
    ]
    fused = trained[0][1].device.type in ("cpu", "cuda", "mps")
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
