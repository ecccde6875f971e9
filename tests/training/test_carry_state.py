"""Truncated back-propagation through time: a state carried from step to step, and what only that can learn."""

import dataclasses
import json
import random
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bdh.data.blocks import ValidationWindows, document_ids
from bdh.data.settings import DataConfig
from bdh.data.tokenizer import save_tokenizer
from bdh.data.vocabulary import train_tokenizer
from bdh.model.export import load_export
from bdh.training.config import CheckpointConfig, LoggingConfig, ModelConfig, TrainConfig, TrainingConfig
from bdh.training.loop import Trainer, train
from bdh.training.validation import evaluate

KEYS = "abcdefgh"
BLOCK = 8


def document(draw: random.Random) -> str:
    """A key, dots, and the question for the key: farther apart than a block is long."""
    key = draw.choice(KEYS)
    return key + "." * (BLOCK + 1 + draw.randrange(3)) + "?" + key


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    draw = random.Random(1)
    lines = [json.dumps({"text": document(draw)}) for _ in range(6000)]
    (folder / "keys.jsonl").write_text("\n".join(lines))
    save_tokenizer(train_tokenizer("bytes", (), 0), folder / "tokenizer")
    return folder


def settings(folder: Path, run_dir: Path, carry: bool, steps: int, **data: object) -> TrainConfig:
    return TrainConfig(
        run_dir=str(run_dir),
        model=ModelConfig(
            n_layer=2, n_embd=32, n_head=2, mlp_internal_dim_multiplier=8, dropout=0.0, initializer_range=0.1
        ),
        data=DataConfig(
            path=str(folder / "keys.jsonl"), tokenizer=str(folder / "tokenizer"), block_size=BLOCK,
            cross_documents=False, num_workers=0, **data,  # type: ignore[arg-type]
        ),
        training=TrainingConfig(
            max_steps=steps, batch_size=64, carry_state=carry, learning_rate=5e-3, min_learning_rate=5e-4,
            warmup_steps=20, precision="float32", device="cpu", eval_interval=10_000, eval_windows=64,
        ),
        checkpoint=CheckpointConfig(interval=10_000),
        logging=LoggingConfig(sample_interval=0),
    )  # fmt: skip


def right_answers(run_dir: Path) -> float:
    """Share of questions that a model answers, reading whole documents."""
    model, tokenizer = load_export(run_dir / "model")
    draw = random.Random(2)
    texts = ["<|endoftext|>" + document(draw) for _ in range(64)]
    right = 0
    for text in texts:
        ids = tokenizer(text[:-1], return_tensors="pt").input_ids
        with torch.no_grad():
            right += int(model(ids).logits[0, -1].argmax()) == ord(text[-1])
    return right / len(texts)


def test_a_carried_state_learns_what_blocks_cannot(folder: Path, tmp_path: Path) -> None:
    train(settings(folder, tmp_path / "carried", True, 500))
    train(settings(folder, tmp_path / "plain", False, 500))
    assert right_answers(tmp_path / "carried") > 0.9
    assert right_answers(tmp_path / "plain") < 0.35  # one of eight, by chance


def test_blocks_one_after_another_are_read_as_one_text(folder: Path, tmp_path: Path) -> None:
    """The loss of carried blocks against that of the whole text at once; in pieces of the batch, too."""
    config = settings(folder, tmp_path / "run", True, 40)
    config.training.micro_batch_size = 16
    trainer = Trainer(config, None)
    batches = [trainer.data.next_batch() for _ in range(5)]
    losses = [trainer.accumulator.accumulate(batch) for batch in batches]
    tokens = torch.cat([batch.tokens[:, :-1] for batch in batches] + [batches[-1].tokens[:, -1:]], dim=1)
    ids = document_ids(tokens[:, :-1], trainer.tokenizer.eos_token_id)
    with torch.no_grad():
        logits = trainer.model(tokens[:, :-1], document_ids=ids).logits
        whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    trainer.folder.release()
    assert sum(losses) / 5 == pytest.approx(whole.item(), abs=1e-5)
    assert ids.max() >= 1  # documents ended on the way


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_carries_on_bit_for_bit(folder: Path, tmp_path: Path, streaming: bool) -> None:
    config = settings(folder, tmp_path / "whole", True, 30, streaming=streaming, train_split=0.6)
    config.checkpoint = CheckpointConfig(interval=10, keep=5)
    config.training.micro_batch_size = 32
    train(config)
    train(
        dataclasses.replace(config, run_dir=str(tmp_path / "again")), tmp_path / "whole/checkpoints/checkpoint-0000010"
    )
    ends = [tmp_path / name / "checkpoints" / "checkpoint-0000030" for name in ("whole", "again")]
    tensors = [load_file(next(end.glob("*.safetensors"))) for end in ends]
    assert any(name.startswith("carried.") for name in tensors[0])
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_validation_carries_the_state_too(folder: Path, tmp_path: Path) -> None:
    trainer = Trainer(settings(folder, tmp_path / "run", True, 40), None)
    trainer.evaluate()
    tokens = trainer.evaluator.windows.tokens
    first = trainer.evaluator.windows.count // 8 * BLOCK  # the second of eight rows begins here
    text = torch.from_numpy(tokens.read(first, 8 * BLOCK + 1).astype("int64"))[None]
    ids = document_ids(text[:, :-1], trainer.tokenizer.eos_token_id)
    with torch.no_grad():
        whole = trainer.model(text[:, :-1], document_ids=ids).logits
    nats = torch.nn.functional.cross_entropy(whole[0], text[0, 1:]).item()
    one = ValidationWindows(tokens.slice(first, first + 8 * BLOCK + 1), BLOCK)
    result = evaluate(
        trainer.model, one, 1.0, 1, nullcontext, end_of_text=trainer.tokenizer.eos_token_id, carry_state=True
    )
    trainer.folder.release()
    assert result.tokens == 8 * BLOCK and result.loss == pytest.approx(nats, abs=1e-5)
    assert trainer.state.evaluation is not None and trainer.state.evaluation.tokens == 64 * BLOCK
