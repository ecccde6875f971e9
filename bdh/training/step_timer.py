"""Timer of the phases of a training step that does not synchronize with the GPU."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

ON_DEVICE = ("forward", "backward", "optimizer")
ON_HOST = ("data", "checkpoint")


class StepClock:
    """Sums up the seconds of a step's parts: `ON_DEVICE` by CUDA events where there is CUDA, all else by the clock.

    A GPU works behind the program that feeds it, so how long the program took says little about a part. An event is a
    mark in the GPU's own queue; the time between two is read once both have passed, and nobody waits for that.
    """

    def __init__(self, device: torch.device):
        self.by_events = device.type == "cuda"
        self.seconds: dict[str, float] = defaultdict(float)
        self.pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Counts the time within as `part`."""
        if self.by_events and part in ON_DEVICE:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            yield
            last.record()
            self.pending.append((part, first, last))
            return
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started

    def collect(self) -> None:
        """Takes in the events that have passed."""
        while self.pending and self.pending[0][2].query():
            part, first, last = self.pending.pop(0)
            self.seconds[part] += first.elapsed_time(last) / 1000

    def read(self, steps: int) -> dict[str, float]:
        """`PART_seconds` of a step, averaged over the last `steps`; then counts from zero."""
        if self.pending:
            self.pending[-1][2].synchronize()
        self.collect()
        figures = {f"{part}_seconds": self.seconds[part] / steps for part in (*ON_DEVICE, *ON_HOST)}
        self.seconds.clear()
        return figures
