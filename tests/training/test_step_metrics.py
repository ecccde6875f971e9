"""Figures of the work: time by part, FLOPs, norms of tensors whole and spread."""

import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.utils.flop_counter import FlopCounterMode

from bdh.model import BDHConfig, BDHForCausalLM
from bdh.training.norms import histogram, norms, parameter_figures
from bdh.training.step_timer import StepClock
from bdh.training.throughput import flops_per_token, peak_flops


@pytest.mark.parametrize("length", [16, 32])
def test_flops_are_those_that_torch_counts(length: int) -> None:
    """Forward only: of the backward pass torch leaves out what no gradient needs."""
    config = BDHConfig(n_layer=3, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=11, chunk_size=16)
    model = BDHForCausalLM(config).eval()
    tokens = torch.zeros(2, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, use_cache=False)
    assert 3 * counter.get_total_flops() == flops_per_token(config, length) * tokens.numel()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, use_cache=True)
    assert 3 * counter.get_total_flops() == flops_per_token(config, length, carry_state=True) * tokens.numel()


def test_flops_of_gates_are_counted() -> None:
    """torch counts no triangular systems: each is as large as a product of (T, T) and (T, D) a head."""
    config = BDHConfig(
        n_layer=3, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=11, decay="gated", write="delta"
    )
    model = BDHForCausalLM(config).eval()
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, use_cache=False)
    solved = 3 * 2 * 16 * 16 * 8 * 2  # layers, and twice (T, T) (T, D) for each of two heads
    counted = counter.get_total_flops() + solved * len(tokens)
    assert 3 * counted == flops_per_token(config, 16) * tokens.numel()


@pytest.mark.parametrize(
    ("name", "bfloat16", "peak"),
    [
        ("NVIDIA H200", True, 989.4e12),
        ("NVIDIA H100 80GB HBM3", True, 989.4e12),
        ("NVIDIA H100 PCIe", True, 756e12),
        ("NVIDIA A100-SXM4-80GB", False, 19.5e12),
        ("NVIDIA L4", True, 121e12),
        ("NVIDIA GeForce RTX 4090", True, 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", True, None),
        ("NVIDIA A800", True, None),
    ],
)
def test_peaks_are_found_by_name(
    name: str, bfloat16: bool, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), bfloat16) == peak
    assert peak_flops(torch.device("cpu"), bfloat16) is None


def test_parts_of_steps_are_summed_and_averaged() -> None:
    clock = StepClock(torch.device("cpu"))
    for _ in range(2):
        with clock("data"):
            time.sleep(0.02)
        with clock("forward"):
            time.sleep(0.01)
    figures = clock.read(2)
    assert 0.02 <= figures["data_seconds"] < 0.1 and 0.01 <= figures["forward_seconds"] < 0.1
    assert figures["backward_seconds"] == 0
    assert clock.read(1)["data_seconds"] == 0


def test_norms_of_spread_tensors_are_those_of_the_whole(tmp_path: Path) -> None:
    """One process of gloo: what matters here is that DTensors pass through."""
    model = nn.Linear(4, 6)
    model(torch.ones(1, 4)).sum().backward()
    plain = parameter_figures(model)
    assert plain["gradient_norm/weight"] == pytest.approx(24**0.5) and "gradient_norm" not in plain
    assert plain["parameter_norm"] == pytest.approx(
        (plain["parameter_norm/weight"] ** 2 + plain["parameter_norm/bias"] ** 2) ** 0.5
    )
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        spread = DTensor.from_local(model.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
        assert norms("parameter_norm", [("weight", spread)])["parameter_norm/weight"] == plain["parameter_norm/weight"]
        found = histogram(spread)
        assert found is not None and sum(found.counts) == 24
    finally:
        torch.distributed.destroy_process_group()


def test_histograms_count_every_finite_value() -> None:
    found = histogram(torch.tensor([1.0, 2.0, float("inf"), 2.0]))
    assert found is not None and sum(found.counts) == 3 and (found.edges[0], found.edges[-1]) == (1.0, 2.0)
    assert (found.total, found.squares) == (5.0, 9.0)
    same = histogram(torch.full((5,), 3.0))
    assert same is not None and sum(same.counts) == 5
    assert histogram(torch.empty(0)) is None
