"""Validation figures against their definitions."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bdh.data.blocks import ValidationWindows
from bdh.data.loader import open_data
from bdh.data.settings import DataConfig
from bdh.data.tokenizer import load_tokenizer, save_tokenizer
from bdh.data.tokens import Tokens
from bdh.data.vocabulary import train_tokenizer
from bdh.errors import BDHError
from bdh.model import BDHConfig, BDHForCausalLM, state_of
from bdh.training.config import LoggingConfig, ModelConfig, TrainConfig, TrainingConfig
from bdh.training.loop import train
from bdh.training.run_log import read_metrics
from bdh.training.validation import evaluate


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


def write_chats(path: Path, count: int, answer: str) -> None:
    """Conversations whose answers begin beyond a block of 32 tokens."""
    rows = [
        [{"role": "user", "content": f"{n} " + "dragon " * 30}, {"role": "assistant", "content": answer}]
        for n in range(count)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))


def chat_run(tmp_path: Path, **settings: Any) -> TrainConfig:
    training = TrainingConfig(
        **{"max_steps": 6, "warmup_steps": 0, "batch_size": 1, "eval_interval": 6, "device": "cpu", **settings}
    )
    return TrainConfig(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(n_layer=1, n_embd=8, n_head=1, mlp_internal_dim_multiplier=4),
        data=DataConfig(path=str(tmp_path / "chat.jsonl"), chat=True, block_size=32),
        training=training,
        logging=LoggingConfig(interval=1, sample_interval=0, activity_windows=1),
    )


def test_answers_beyond_the_first_block_are_validated(tmp_path: Path) -> None:
    write_chats(tmp_path / "chat.jsonl", 30, "yes")
    outcome = train(chat_run(tmp_path, eval_windows=2, max_steps=30, eval_interval=30))
    assert outcome.evaluation is not None and outcome.evaluation.tokens > 0
    steps = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "answer_tokens" in record]
    assert len(steps) == 30 and {bool(record["answer_tokens"]) for record in steps} == {False, True}
    for record in steps:
        assert ("loss" in record) == (record["answer_tokens"] > 0)


@pytest.mark.parametrize("carry_state", [False, True])
def test_a_validation_without_answers_is_refused_before_the_first_step(tmp_path: Path, carry_state: bool) -> None:
    write_chats(tmp_path / "chat.jsonl", 10, "yes")  # in the last one the answer is after the last whole window
    config = chat_run(tmp_path, eval_windows=1, carry_state=carry_state)
    if carry_state:
        save_tokenizer(train_tokenizer("bytes", (), 0), tmp_path / "tokenizer")
        config.data.tokenizer = str(tmp_path / "tokenizer")
    data = open_data(config.data, load_tokenizer(config.data.tokenizer), 1, 1)
    predicted = np.flatnonzero(data.validation.read(0, 10_000) >= 0)
    config.data.block_size = int(predicted[0]) - 1
    with pytest.raises(
        BDHError, match=r"no token of an answer is in the 1 windows of data\.block_size .*more conversat"
    ):
        train(config)
    assert not (tmp_path / "run").exists()
