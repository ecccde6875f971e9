"""The optimizer's groups and the learning-rate schedule."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bdh.model import BDHConfig, BDHForCausalLM
from bdh.training.config import TrainingConfig
from bdh.training.optimizer import CombinedOptimizer, adamw, build_optimizer, learning_rate_at


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    settings = TrainingConfig(weight_decay=0.3, learning_rate=0.01, beta1=0.8, beta2=0.9)
    optimizer = adamw(model.named_parameters(), settings)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {p.ndim: d for p, d in decay.items()} == {2: 0.3, 1: 0.0} and len(decay) == 4
    assert optimizer.defaults["betas"] == (0.8, 0.9) and optimizer.defaults["fused"]


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(3, 4)
    model.bias.requires_grad_(False)
    groups = build_optimizer(model, TrainingConfig()).param_groups
    assert sum(len(group["params"]) for group in groups) == 1


def test_weights_shrink_by_the_decay_alone_when_gradients_are_zero() -> None:
    model = nn.Linear(3, 4, bias=False)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(model, TrainingConfig(weight_decay=0.5, learning_rate=0.1))
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    assert torch.allclose(model.weight, before * (1 - 0.1 * 0.5))


def test_muon_has_the_matrices_of_the_layer_and_adamw_the_rest_at_one_rate() -> None:
    model = BDHForCausalLM(BDHConfig(n_layer=1, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4))
    model.model.layer.register_parameter("added", nn.Parameter(torch.ones(3)))
    optimizer = build_optimizer(model, TrainingConfig(optimizer="muon", learning_rate=0.02, weight_decay=0.3))
    assert isinstance(optimizer, CombinedOptimizer)
    name_of = {p: name for name, p in model.named_parameters()}
    muon, adamw = ({name_of[p] for group in part.param_groups for p in group["params"]} for part in optimizer)
    matrices = ("encoder", "encoder_v.0", "encoder_v.1", "decoder")
    assert muon == {f"model.layer.{matrix}.weight" for matrix in matrices}
    assert adamw == {"model.embed_tokens.weight", "lm_head.weight", "model.layer.added"}
    settings = [(len(group["params"]), group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert settings == [(4, 0.02, 0.3), (2, 0.02, 0.3), (1, 0.02, 0.0)]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_gates_are_followed_by_adamw_without_weight_decay(name: str) -> None:
    config = BDHConfig(n_layer=1, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, decay="gated", write="delta")
    model = BDHForCausalLM(config)
    optimizer = build_optimizer(model, TrainingConfig(optimizer=name, weight_decay=0.3))  # type: ignore[arg-type]
    parts = [*optimizer] if isinstance(optimizer, CombinedOptimizer) else [optimizer]
    of_adamw = {p: group["weight_decay"] for group in parts[-1].param_groups for p in group["params"]}
    gates = [p for name, p in model.named_parameters() if ".gates." in name]
    assert len(gates) == 5 and [of_adamw[p] for p in gates] == [0.0] * 5
    matrices = sum(len(group["params"]) for group in optimizer.param_groups if group["weight_decay"])
    assert matrices == 6  # encoder, two of encoder_v, decoder, embed_tokens, lm_head


schedules = st.sampled_from(["cosine", "constant", "wsd"])


@given(
    schedule=schedules,
    warmup=st.integers(0, 50),
    decay=st.integers(1, 50),
    extra=st.integers(2, 200),
    peak=st.floats(1e-5, 1e-1),
    share=st.floats(0, 1),
)
def test_warm_up_peak_and_end(schedule: str, warmup: int, decay: int, extra: int, peak: float, share: float) -> None:
    config = TrainingConfig(
        schedule=schedule,  # type: ignore[arg-type]
        warmup_steps=warmup,
        decay_steps=decay,
        max_steps=warmup + decay + extra,
        learning_rate=peak,
        min_learning_rate=peak * share,
    )
    rates = [learning_rate_at(step, config) for step in range(config.max_steps)]
    assert (max(rates) == pytest.approx(peak) and min(rates) > 0) or share == 0
    assert all(b > a for a, b in pairwise(rates[:warmup]))
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(rates[warmup:]))
    assert rates[-1] == pytest.approx(peak if schedule == "constant" else peak * share)
    if schedule == "wsd":
        assert rates[warmup : -decay - 1] == pytest.approx([peak] * (extra - 1))


def test_cosine_is_half_way_in_the_middle() -> None:
    config = TrainingConfig(warmup_steps=0, max_steps=101, learning_rate=1.0, min_learning_rate=0.2)
    assert learning_rate_at(50, config) == pytest.approx(0.6)
    assert learning_rate_at(25, config) == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi / 4)))
