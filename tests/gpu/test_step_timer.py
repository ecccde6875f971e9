"""Parts of a step by CUDA events. On a machine with an NVIDIA GPU: `pytest -m gpu -n 0 tests/gpu`."""

import time

import pytest
import torch

from bdh.training.step_timer import StepClock

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_what_the_gpu_does_is_counted_and_not_waited_for() -> None:
    clock = StepClock(torch.device("cuda"))
    started = time.perf_counter()
    with clock("forward"):
        torch.cuda._sleep(200_000_000)  # cycles: 0.1 s or so
    with clock("data"):
        pass
    assert time.perf_counter() - started < 0.05
    clock.collect()
    assert clock.pending, "it is not done yet"
    figures = clock.read(1)
    assert 0.05 < figures["forward_seconds"] < 1 and figures["data_seconds"] < 0.05 and not clock.pending
