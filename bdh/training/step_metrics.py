"""Metrics of a training step: time, memory and hardware utilization."""

import os
import resource
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from bdh.model import BDHConfig
from bdh.training.config import TrainConfig
from bdh.training.step_timer import StepClock
from bdh.training.throughput import flops_per_token, peak_flops


class Meter:
    """Measures from one logged step to the next.

    Args:
        config: The run's.
        model: Its model's.
        device: Where this process computes.
        bfloat16: Whether matrix products run in bfloat16.

    Attributes:
        clock: Sums up the parts of steps.
    """

    def __init__(self, config: TrainConfig, model: BDHConfig, device: torch.device, bfloat16: bool):
        self.device = device
        self.clock = StepClock(device)
        self.flops_per_token = flops_per_token(model, config.data.block_size, config.training.carry_state)
        given = config.logging.peak_tflops
        self.peak = given * 1e12 if given is not None else peak_flops(device, bfloat16)

    def read(self, steps: int, tokens_per_second: float) -> dict[str, float]:
        """Figures of the last `steps` steps, in which all processes together read so many tokens a second.

        `mfu` is missing where the hardware's peak is not known; `memory_bytes` of a GPU is the most that was allocated
        in these steps.
        """
        found = {**self.clock.read(steps), "memory_bytes": memory_bytes(self.device)}
        if self.peak is not None:
            processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
            found["mfu"] = tokens_per_second * self.flops_per_token / (self.peak * processes)
        return found


def memory_bytes(device: torch.device) -> float:
    """The most bytes allocated on a GPU since this was last asked; elsewhere what the process has in memory now."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return float(peak)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return float(pages * os.sysconf("SC_PAGE_SIZE"))
    except OSError:  # no Linux: the most it ever had
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return float(most if sys.platform == "darwin" else most * 1024)
