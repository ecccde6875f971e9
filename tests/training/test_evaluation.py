"""Validation figures against their definitions."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from bdh.data.blocks import ValidationWindows
from bdh.data.tokens import Tokens
from bdh.model import BDHConfig, BDHForCausalLM, state_of
from bdh.training.evaluation import evaluate


@pytest.fixture
def model() -> BDHForCausalLM:
    torch.manual_seed(0)
    return BDHForCausalLM(
        BDHConfig(n_layer=1, n_embd=8, n_head=1, mlp_internal_dim_multiplier=4, vocab_size=50, dropout=0.5)
    )


def test_figures_follow_their_definitions_whatever_the_batch(model: BDHForCausalLM) -> None:
    tokens = np.random.default_rng(0).integers(0, 50, 200).astype(np.uint8)
    windows = ValidationWindows(Tokens([tokens]), 7)
    model.train()
    results = [evaluate(model, windows, 2.5, size, nullcontext) for size in (1, 4, 100)]
    assert model.training
    nats, hits, count = 0.0, 0, 0
    model.eval()
    for start in range(0, 199 - 6, 7):
        window = torch.from_numpy(tokens[start : start + 8].astype(np.int64))
        logits = model(window[None, :-1]).logits[0].double().log_softmax(-1)
        nats -= logits.gather(1, window[1:, None]).sum().item()
        hits += int((logits.argmax(-1) == window[1:]).sum())
        count += 7
    for result in results:
        assert result.tokens == count == 196
        assert result.loss == pytest.approx(nats / count, rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(nats / count), rel=1e-5)
        assert result.bits_per_byte == pytest.approx(nats / count / math.log(2) / 2.5, rel=1e-5)
        assert result.perplexity_per_byte == pytest.approx(math.exp(nats / count / 2.5), rel=1e-5)
        assert result.accuracy == hits / count


def test_an_untrained_model_knows_nothing(model: BDHForCausalLM) -> None:
    tokens = np.random.default_rng(0).integers(0, 50, 500).astype(np.uint8)
    result = evaluate(model, ValidationWindows(Tokens([tokens]), 10), 1.0, 8, nullcontext)
    assert result.loss == pytest.approx(math.log(50), abs=0.05) and result.accuracy < 0.1


def test_progress_counts_windows(model: BDHForCausalLM) -> None:
    seen: list[int] = []
    evaluate(model, ValidationWindows(Tokens([np.zeros(101, dtype=np.uint8)]), 10), 1.0, 4, nullcontext, seen.append)
    assert seen == [4, 8, 10]


@pytest.mark.parametrize("carry_state", [False, True])
def test_every_token_after_the_first_is_scored_in_a_whole_text(model: BDHForCausalLM, carry_state: bool) -> None:
    tokens = Tokens([np.random.default_rng(0).integers(0, 50, 151).astype(np.uint8)])
    scored = [
        evaluate(model, ValidationWindows(tokens, 128, whole=True), 1.0, size, nullcontext, carry_state=carry_state)
        for size in (1, 8)
    ]
    nats = 0.0
    model.eval()
    state = None
    with torch.no_grad():
        for start, stop in ((0, 129), (128, 151)):
            window = torch.from_numpy(tokens.read(start, stop - start).astype(np.int64))
            outputs = model(window[None, :-1], past_key_values=state, use_cache=True)
            state = state_of(outputs) if carry_state else None
            nats -= outputs.logits[0].double().log_softmax(-1).gather(1, window[1:, None]).sum().item()
    for result in scored:
        assert result.tokens == 150 and result.loss == pytest.approx(nats / 150, rel=1e-5)
