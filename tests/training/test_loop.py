"""The loop, through the real command: what a run leaves on disk, and what it says."""

import json
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bdh.errors import BDHError
from bdh.model import BDHConfig, BDHForCausalLM
from bdh.model.export import load_export
from bdh.training import checkpoint
from bdh.training.config import TrainConfig, compare, from_dict
from bdh.training.export import load_model
from bdh.training.loop import Trainer
from bdh.training.run_log import read_metrics
from tests.conftest import TEXT, TINY, Run, environment, run_bdh

CLOCK = {"seconds", "seconds_per_step", "tokens_per_second", "evaluation_seconds", "memory_bytes"}
CLOCK |= {f"{part}_seconds" for part in ("data", "forward", "backward", "optimizer", "checkpoint")}


def figures(run: Path) -> list[dict[str, Any]]:
    """A run's metrics without what depends on the clock."""
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in read_metrics(run / "metrics.jsonl")]


def weights(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, optimizer included."""
    from safetensors.torch import load_file

    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_end(a: Path, b: Path) -> None:
    """Two runs ended with the same bits: weights, moments, metrics and samples."""
    first, second = checkpoint.find_checkpoint(a), checkpoint.find_checkpoint(b)
    assert first.name == second.name
    x, y = weights(first), weights(second)
    assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
    assert figures(a) == figures(b)
    assert (a / "samples.md").read_text() == (b / "samples.md").read_text()
    assert (a / "checkpoints" / "best").readlink() == (b / "checkpoints" / "best").readlink()


def test_a_run_leaves_what_the_house_says(finished_run: Path) -> None:
    names = {path.name for path in finished_run.iterdir()}
    assert names == {"config.yaml", "checkpoints", "metrics.jsonl", "samples.md", "loss.png", "model"}
    kept = sorted(path.name for path in (finished_run / "checkpoints").iterdir())
    assert kept == ["best", "checkpoint-0000030", "checkpoint-0000040", "latest"]
    assert (finished_run / "loss.png").stat().st_size > 10_000
    samples = (finished_run / "samples.md").read_text()
    assert samples.startswith("## Step 20\n") and "## Step 40\n" in samples and "    The " in samples


def test_metrics_are_complete_and_the_model_learns(finished_run: Path) -> None:
    records = read_metrics(finished_run / "metrics.jsonl")
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == [1, 5, 10, 15, 20, 25, 30, 35, 40]
    assert steps[-1]["loss"] < steps[0]["loss"] - 1.0 and steps[0]["loss"] == pytest.approx(math.log(256), abs=0.1)
    assert all(r["tokens"] == r["step"] * 4 * 16 and r["gradient_norm"] > 0 for r in steps)
    evaluations = [r for r in records if "validation_loss" in r]
    assert [r["step"] for r in evaluations] == [10, 20, 30, 40]  # at each checkpoint, once where both are due
    tokens = len(TEXT) + 1 - int((len(TEXT) + 1) * 0.9)  # held out; the last one is the end of the text, no byte
    for r in evaluations:
        assert r["bits_per_byte"] == pytest.approx(r["validation_loss"] / math.log(2) * tokens / (tokens - 1))
        assert r["perplexity"] == pytest.approx(math.exp(r["validation_loss"])) and 0 <= r["accuracy"] <= 1


def test_the_export_is_the_best_checkpoint(finished_run: Path) -> None:
    model, tokenizer = load_export(finished_run / "model")
    best = checkpoint.find_checkpoint(finished_run, prefer="best")
    expected, state = load_model(best)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    losses = {r["step"]: r["validation_loss"] for r in read_metrics(finished_run / "metrics.jsonl") if "accuracy" in r}
    assert state["step"] == min(losses, key=losses.__getitem__) and len(tokenizer) == 256
    card = (finished_run / "model" / "README.md").read_text()
    assert "text.txt" in card and f"{losses[state['step']]:.4f} nats" in card and "How to load it" in card


def test_repeating_from_the_saved_configuration_repeats_the_run(finished_run: Path, tmp_path: Path, bdh: Run) -> None:
    again = tmp_path / "again"
    done = bdh("train", "--config", finished_run / "config.yaml", "--run_dir", again, cwd=finished_run.parent)
    assert done.returncode == 0, done.stderr
    assert_same_end(finished_run, again)
    assert yaml.safe_load((again / "config.yaml").read_text())["model"]["vocab_size"] == 256


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path, bdh: Run) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    done = bdh("train", "--data.path", "text.txt", "--run_dir", "run", *TINY)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "text.txt (train): 28,118 tokens tokenized"
    assert lines[1].startswith("14,406 parameters, ") and lines[1].endswith("4 x 16 tokens a step")
    assert any(line.startswith("step 40/40  loss ") and "tokens/s" in line for line in lines)
    assert any("validation: loss" in line and "bits per byte" in line for line in lines)
    assert lines[-1].startswith("done: run/model is the export of checkpoint-0000040")
    assert "\x1b" not in done.stdout and "%|" not in done.stdout


def test_a_progress_bar_where_there_is_one(tmp_path: Path) -> None:
    """Under `script`, which gives the command a terminal of its own."""
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = " ".join(["train", "--data.path", "text.txt", "--run_dir", "run", *TINY])
    done = subprocess.run(
        ["script", "-qec", f"{sys.executable} -m bdh {arguments}", "/dev/null"],
        cwd=tmp_path,
        env=environment(TERM="xterm", COLUMNS="150"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert "━" in done.stdout and "40/40" in done.stdout and "tokens/s" in done.stdout


def trainer(tmp_path: Path, name: str = "run", **changes: Any) -> Trainer:
    """A Trainer of the tiny model in this process; changes go into the training section."""
    (tmp_path / "text.txt").write_text(TEXT)
    small = {"max_steps": 6, "batch_size": 4, "warmup_steps": 0, "precision": "float32", "eval_windows": 4}
    config = from_dict(
        {
            "run_dir": str(tmp_path / name),
            "model": {"n_layer": 2, "n_embd": 16, "n_head": 2, "mlp_internal_dim_multiplier": 8, "dropout": 0.0},
            "data": {"path": str(tmp_path / "text.txt"), "block_size": 16},
            "training": {**small, **changes},
            "logging": {"sample_interval": 0, "interval": 1},
        }
    )
    return Trainer(config, None)


def parameters(run: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.model.parameters()]


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    whole, pieces = trainer(tmp_path), trainer(tmp_path, "pieces", micro_batch_size=1)
    blocks = whole.data.next_batch()
    assert whole.accumulator.accumulate(blocks) == pytest.approx(pieces.accumulator.accumulate(blocks), rel=1e-6)
    for a, b in zip(whole.model.parameters(), pieces.model.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.allclose(a.grad, b.grad, atol=1e-7)


def adamw_by_hand(parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)


def muon_by_hand(parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Muon(
        parameters, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_is_the_optimizers_on_the_clipped_gradient_of_the_batch(tmp_path: Path, optimizer: str) -> None:
    """One step of the loop against the same step written out.

    Muon rounds gradients to bfloat16, where one that differs in its last bit may become another number: not with this
    seed.
    """
    constant: dict[str, Any] = {"learning_rate": 0.02, "min_learning_rate": 0.0, "schedule": "constant", "seed": 2}
    run = trainer(tmp_path, gradient_clip=0.01, optimizer=optimizer, **constant)
    torch.manual_seed(2)
    model = BDHForCausalLM(BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=8, dropout=0.0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), run.model.parameters(), strict=True))
    blocks = run.data.next_batch().tokens
    run.data.source.load_state_dict({"position": 0})
    model.train()
    logits = model(blocks[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert norm > 0.01
    (adamw_by_hand if optimizer == "adamw" else muon_by_hand)(model.model.layer.parameters()).step()
    adamw_by_hand([model.model.embed_tokens.weight, model.lm_head.weight]).step()
    run.model.train()
    run.step()
    for a, b in zip(model.parameters(), run.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_recomputing_layers_trains_the_same(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    one.run()
    (tmp_path / "run").rename(tmp_path / "first")
    two = trainer(tmp_path, gradient_checkpointing=True)
    two.run()
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_bfloat16_is_autocast_over_float32_weights(tmp_path: Path) -> None:
    run = trainer(tmp_path, precision="bfloat16")
    run.run()
    assert all(p.dtype == torch.float32 for p in run.model.parameters())
    assert {p.grad is None for p in run.model.parameters()} == {True}
    assert figures(tmp_path / "run")[-1]["validation_loss"] < math.log(256)


def test_compiled_training_learns_the_same(tmp_path: Path) -> None:
    plain = trainer(tmp_path, max_steps=2)
    plain.run()
    (tmp_path / "run").rename(tmp_path / "plain")
    compiled = trainer(tmp_path, max_steps=2, compile=True)
    compiled.run()
    for a, b in zip(plain.model.parameters(), compiled.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_evaluation_and_samples_do_not_touch_the_training(tmp_path: Path) -> None:
    quiet = trainer(tmp_path)
    quiet.config.model.dropout = quiet.model.config.dropout = 0.3
    quiet.run()
    (tmp_path / "run").rename(tmp_path / "quiet")
    busy = trainer(tmp_path, eval_interval=1)
    busy.model.config.dropout = 0.3
    busy.config.logging.sample_interval = 1
    busy.run()
    assert all(torch.equal(a, b) for a, b in zip(parameters(quiet), parameters(busy), strict=True))


def test_a_full_disk_does_not_end_training(tmp_path: Path) -> None:
    """The operating system refuses files over 20 kB: every checkpoint fails, is reported, and leaves nothing behind."""
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = " ".join(["train", "--data.path", "text.txt", "--run_dir", "run", *TINY])
    run_bdh("tokenizer", "info", "bytes", "--data.path", "text.txt", cwd=tmp_path)  # it is in the cache then
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 20; exec {sys.executable} -m bdh {arguments}"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    for step in (10, 20, 30, 40):
        assert f"warning: run/checkpoints/checkpoint-{step:07d} could not be written (File too large)" in done.stdout
    assert "step 40/40" in done.stdout
    assert done.stderr.splitlines() == [
        "bdh train: error: the last checkpoint could not be written; make room, then begin again (no checkpoint was "
        "written): bdh train --config run/config.yaml"
    ]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    finished_run: Path, tmp_path: Path, bdh: Run
) -> None:
    before = weights(checkpoint.find_checkpoint(finished_run))
    done = bdh(
        *("train", "--resume", finished_run, "--run_dir", tmp_path / "b", "--training.max_steps", 90),
        *("--training.learning_rate", "1e38", "--training.schedule", "constant"),
        cwd=finished_run.parent,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert (
        f"so training stops; the last good checkpoint is {finished_run}/checkpoints/checkpoint-0000040; try a" in line
    )
    after = weights(checkpoint.find_checkpoint(finished_run))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_last_good_checkpoint_is_named(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=4)
    run.config.checkpoint.interval = 2
    steps, step = [0], run.step

    def spoil() -> None:
        steps[0] += 1
        if steps[0] == 4:
            with torch.no_grad():
                run.model.lm_head.weight.fill_(float("nan"))
        step()

    run.step = spoil  # type: ignore[method-assign]
    with pytest.raises(BDHError, match=r"step 4: the loss is nan .* last good checkpoint is .*checkpoint-0000002; try"):
        run.run()
    assert all(torch.isfinite(t).all() for t in weights(checkpoint.find_checkpoint(tmp_path / "run")).values())


def test_a_model_that_fails_its_validation_is_neither_saved_nor_exported(tmp_path: Path, bdh: Run) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    silly = ["--training.max_steps", 1, "--training.learning_rate", "1e38", "--training.warmup_steps", 0]
    silly += ["--training.gradient_clip", 0, "--training.precision", "float32", "--training.schedule", "constant"]
    done = bdh("train", "--data.path", "text.txt", "--run_dir", "run", *TINY, *silly)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "step 1: the validation loss is nan, so training stops; there is no checkpoint yet" in line
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == [] and not (tmp_path / "run" / "model").exists()
    assert all("NaN" not in text for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())


def test_output_that_cannot_be_written_does_not_end_training(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = " ".join(["train", "--data.path", "text.txt", *TINY])
    for name, target in (("full", "> /dev/full"), ("pipe", "| head -1 > first.txt; exit ${PIPESTATUS[0]}")):
        done = subprocess.run(
            ["bash", "-c", f"{sys.executable} -m bdh {arguments} --run_dir {name} {target}"],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert "Traceback" not in done.stderr and (tmp_path / name / "model" / "config.json").exists()
        assert checkpoint.find_checkpoint(tmp_path / name).name == "checkpoint-0000040"
        assert done.returncode in (0, 2), done.stderr


def test_differences_of_architecture_are_listed_together() -> None:
    saved = TrainConfig()
    now = TrainConfig()
    now.model.n_layer, now.model.n_embd, now.training.learning_rate, now.run_dir = 7, 128, 1e-2, "elsewhere"
    from dataclasses import asdict

    with pytest.raises(BDHError, match=r"model.n_layer 6 -> 7, model.n_embd 256 -> 128; keep"):
        compare(asdict(saved), now)
    now.model.n_layer, now.model.n_embd = 6, 256
    assert compare(asdict(saved), now) == ["training.learning_rate was 0.001 and is now 0.01"]


def test_metrics_lines_are_json_objects(finished_run: Path) -> None:
    for line in (finished_run / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["step"] > 0
