"""Runs that begin with a model there is, and runs on conversations, of which the answers alone are learned."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from bdh import LLM, SamplingParams
from bdh.cli.main import main
from bdh.data.blocks import inputs_and_targets
from bdh.data.tokenizer import load_tokenizer, save_tokenizer
from bdh.data.vocabulary import train_tokenizer
from bdh.errors import BDHError
from bdh.model import BDHForCausalLM
from bdh.model.export import load_export
from bdh.model.model_card import parameter_count
from bdh.training.checkpoint import _fingerprint
from bdh.training.config import SYNAPSES, TrainConfig, from_dict
from bdh.training.export import load_model
from bdh.training.init_from import starting_settings
from bdh.training.loop import Trainer
from bdh.training.run_log import read_metrics
from tests.conftest import TEXT, TINY, Run, run_bdh

# As TINY, without the sizes of the model.
SHORT = [*TINY[8:], "--training.max_steps", "20", "--data.path", "text.txt"]
NAMES = ("Ada", "Ben", "Cleo", "Dov")

Command = Callable[..., tuple[int, str, str]]


def write_chat(path: Path) -> None:
    rows = [
        [
            {"role": "user", "content": f"What does {name} eat?"},
            {"role": "assistant", "content": f"{name} eats {food}."},
        ]
        for name, food in zip(NAMES * 40, ("fish", "soup", "rice", "figs") * 40, strict=True)
    ]
    path.write_text("\n".join(json.dumps({"messages": row}) for row in rows))


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """`bdh ARGS…` in this process, in the test's folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    write_chat(tmp_path / "chat.jsonl")

    def run(*argv: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(word) for word in argv])
        return code, *capfd.readouterr()

    return run


def same_weights(one: BDHForCausalLM, other: BDHForCausalLM) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_begins_with_the_weights_and_sizes_of_an_export(
    command: Command, finished_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished_run / "model", tmp_path / "base")
    code, said, wrong = command("train", "--init_from", "base", "--run_dir", "tuned", "--model.dropout", 0.2, *SHORT)
    assert code == 0, wrong
    saved = yaml.safe_load((tmp_path / "tuned" / "config.yaml").read_text())
    assert saved["init_from"] == saved["data"]["tokenizer"] == str(tmp_path / "base")
    assert (saved["model"]["n_layer"], saved["model"]["n_embd"], saved["model"]["dropout"]) == (2, 16, 0.2)
    records = read_metrics(tmp_path / "tuned" / "metrics.jsonl")
    before = read_metrics(finished_run / "metrics.jsonl")
    assert records[0]["loss"] < before[0]["loss"] - 1  # it goes on where the base stopped
    assert "| fine-tuned from | base |" in (tmp_path / "tuned" / "model" / "README.md").read_text()

    shutil.rmtree(tmp_path / "base")  # a checkpoint has all that is needed to go on
    code, said, wrong = command("train", "--resume", "tuned", "--training.max_steps", 25)
    assert code == 0 and "going on from step 20 of 25" in said, wrong
    code, _, wrong = command("train", "--resume", "tuned", "--init_from", finished_run)
    assert code == 2 and "a run that goes on has its weights from the checkpoint; leave it out" in wrong


def test_the_first_step_sees_the_very_weights(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    checkpoint = finished_run / "checkpoints" / "checkpoint-0000030"
    for start, weights in (
        (finished_run / "model", load_export(finished_run / "model")[0]),
        (checkpoint, load_model(checkpoint)[0]),
        (finished_run, load_export(finished_run / "model")[0]),  # its best checkpoint
    ):
        run = trainer(tmp_path / "run", start, data={"path": str(tmp_path / "text.txt")})
        assert same_weights(run.model, weights)


def trainer(
    run_dir: Path,
    start: Path,
    data: dict[str, Any],
    lora: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **training: Any,
) -> Trainer:
    settings = starting_settings(str(start), data.get("tokenizer"))
    given = asdict(TrainConfig(run_dir=str(run_dir), init_from=settings["init_from"]))
    given["model"] |= {**settings["model"], **(model or {})}
    given["data"] |= {"block_size": 32, **settings["data"], **data}
    given["lora"] |= lora or {}
    given["training"] |= {"batch_size": 8, "precision": "float32", "eval_windows": 4, **training}
    shutil.rmtree(run_dir, ignore_errors=True)
    return Trainer(from_dict(given), None)


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a model as published, whose synapses never decay. Do not change it."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "text.txt").write_text(TEXT)
    sizes = [*TINY, "--model.decay", "none", "--model.write", "add", "--training.max_steps", "20"]
    done = run_bdh("train", "--data.path", "text.txt", "--run_dir", "run", *sizes, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


GATED = {"decay": "gated", "decay_half_lives": [16.0, None], "write": "delta"}


def test_a_model_that_never_decays_may_learn_to(plain_run: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    data = {"path": str(tmp_path / "text.txt")}
    base, _ = load_export(plain_run / "model")
    assert not base.config.has_gates
    run = trainer(tmp_path / "run", plain_run / "model", data, model=GATED)
    changes = "model.decay none -> gated, model.decay_half_lives None -> [16.0, None], model.write add -> delta"
    assert run.notices == [f"synapses decay or are written differently from the model of init_from: {changes}"]
    weights = run.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in base.state_dict().items())
    gates = {name: p for name, p in run.model.named_parameters() if ".gates." in name}
    assert set(weights) - set(base.state_dict()) == set(gates) and len(gates) == 5
    assert gates["model.layer.gates.decay_rate"].tolist() == pytest.approx([math.log(2 * math.log(2) / 16), 0.0])
    losses = [run.learn()[0]["loss"] for _ in range(4)]
    assert all(map(math.isfinite, losses))
    assert not gates["model.layer.gates.write_bias"].eq(0).any()


def test_a_model_that_decays_is_gone_on_with_as_it_is(command: Command, tmp_path: Path) -> None:
    sizes = [*TINY[:8], "--model.decay", "gated", "--model.write", "delta"]
    code, _, wrong = command("train", *sizes, *SHORT, "--run_dir", "first")
    assert code == 0, wrong
    first, _ = load_export(tmp_path / "first" / "model")
    config = first.config
    assert (config.decay, config.decay_half_lives, config.write) == ("gated", [16.0, 1024.0], "delta")
    assert config.training_block_size == 16
    shown = (tmp_path / "first" / "model" / "README.md").read_text()
    assert (
        "| write rule | delta rule |" in shown and "gated by the token, at initialization half-lives 16, 102" in shown
    )
    assert parameter_count(config) == first.num_parameters()
    assert command("info", "first", "--json")[1] == command("info", "first/model", "--json")[1]

    data = {"path": str(tmp_path / "text.txt")}
    run = trainer(tmp_path / "run", tmp_path / "first", data)
    assert run.notices == [] and same_weights(run.model, first)
    run = trainer(tmp_path / "run", tmp_path / "first", data, model={"decay_half_lives": [8.0, 8.0]})
    gates = {name: p for name, p in run.model.named_parameters() if ".gates." in name}
    rate, write = gates["model.layer.gates.decay_rate"], gates["model.layer.gates.write_weight"]
    assert rate.tolist() == pytest.approx([math.log(2 * math.log(2) / 8)] * 2)  # begins anew
    assert torch.equal(write, first.get_parameter("model.layer.gates.write_weight")) and len(run.notices) == 1
    run = trainer(tmp_path / "run", tmp_path / "first", data, model={"decay": "none"})
    assert {name.rpartition(".")[2] for name in run.model.state_dict() if ".gates." in name} == {
        "write_weight",
        "write_bias",
    }

    code, said, wrong = command("train", "--resume", "first", "--training.max_steps", 25)
    assert code == 0 and "going on from step 20 of 25" in said, wrong
    code, _, wrong = command("train", "--resume", "first", "--model.write", "add")
    assert code == 2 and "the checkpoint has another architecture: model.write delta -> add" in wrong


def test_a_run_that_was_saved_before_decay_goes_on_without(command: Command, plain_run: Path, tmp_path: Path) -> None:
    """Its state.json and config.yaml know neither `model.decay` nor `model.write`."""
    shutil.copytree(plain_run, tmp_path / "old", symlinks=True)
    for path in tmp_path.glob("old/checkpoints/checkpoint-*"):
        state = json.loads((path / "state.json").read_text())
        for name in SYNAPSES:
            del state["config"]["model"][name]
        (path / "state.json").write_text(json.dumps(state))
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["state.json"] = _fingerprint(path / "state.json")
        (path / "manifest.json").write_text(json.dumps(manifest))
    code, said, wrong = command("train", "--resume", "old", "--training.max_steps", 25, "--data.path", "text.txt")
    assert code == 0 and "going on from step 20 of 25" in said, wrong
    assert "model.decay" not in said and "model.write" not in said
    saved = yaml.safe_load((tmp_path / "old" / "config.yaml").read_text())["model"]
    assert (saved["decay"], saved["decay_half_lives"], saved["write"]) == ("none", None, "add")
    code, said, wrong = command("train", "--init_from", "old", "--run_dir", "new", *SHORT)
    assert code == 0 and "synapses" not in said, wrong
    assert not load_export(tmp_path / "new" / "model")[0].config.has_gates


MISTAKES = {
    "--init_from nowhere": "init_from nowhere does not exist; give the folder of an export, a run or a checkpoint",
    "--init_from empty": "empty has no config.json; give the folder of an export",
    "--init_from=": "init_from is empty",
    "--init_from base --model.n_layer 3": "base has another architecture: model.n_layer 2 -> 3; leave these settings",
    "--init_from base --config quickstart": "has another architecture: model.n_layer 2 -> 3, model.n_embd 16 -> 256",
    "--init_from base --model.vocab_size 300": "has another architecture: model.vocab_size 256 -> 300",
    "--init_from base --data.tokenizer words": "data.tokenizer words gives the model of ",
    "--init_from base --lora.rank 2 --data.tokenizer special": "lora.rank 2 does not train new ones: keep the model's",
    "--init_from base --lora.rank 2 --model.decay fixed": "adapters do not learn how synapses decay or are written: "
    "model.decay gated -> fixed; leave these settings out, or train all weights",
    "--lora.rank 2": "lora.rank is 2, but there is no model to fine-tune; name one: --init_from DIR",
    "--init_from base --lora.rank 2 --lora.targets []": "lora.targets is empty; it must name a matrix at least",
    "--init_from base --lora.rank -1": "lora.rank is -1; it must be at least 0",
    "--data.chat true": "data.chat true is for data.path, which is missing",
    '--data.chat true --data.mixture [{"path":"text.txt"}]': "data.chat true is for each of data.mixture, not for all",
}


def test_mistakes_are_one_line(command: Command, finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run / "model", tmp_path / "base")
    (tmp_path / "empty").mkdir()
    save_tokenizer(train_tokenizer("bytes", (), 0), tmp_path / "special")
    save_tokenizer(train_tokenizer("bpe", [TEXT], 300), tmp_path / "words")
    for line, words in MISTAKES.items():
        code, _, wrong = command("train", *line.split(), "--run_dir", "x", "--data.block_size", 16)
        assert code == 2 and words in wrong and wrong.count("\n") == 1, (line, wrong)
        assert not (tmp_path / "x").exists()


def test_a_tokenizer_that_adds_tokens_lets_the_vocabulary_grow(finished_run: Path, tmp_path: Path) -> None:
    """As for chats with a model that has learned plain bytes."""
    write_chat(tmp_path / "chat.jsonl")
    save_tokenizer(train_tokenizer("bytes", (), 0), tmp_path / "special")
    data = {"path": str(tmp_path / "chat.jsonl"), "chat": True, "tokenizer": str(tmp_path / "special")}
    run = trainer(tmp_path / "run", finished_run / "model", data)
    assert "the vocabulary grows from 256 to 261 tokens" in run.notices[0]
    base, _ = load_export(finished_run / "model")
    assert torch.equal(run.model.lm_head.weight[:256], base.lm_head.weight)
    assert 0 < run.model.model.embed_tokens.weight[256:].std() < 0.05
    assert torch.equal(run.model.model.layer.encoder.weight, base.model.layer.encoder.weight)


# --------------------------------------------------------------------------------------------------------- chats


def test_the_loss_is_the_mean_over_answers_however_the_batch_is_cut(finished_run: Path, tmp_path: Path) -> None:
    write_chat(tmp_path / "chat.jsonl")
    data = {"path": str(tmp_path / "chat.jsonl"), "chat": True}
    found = []
    for size in (None, 1, 2, 4):
        run = trainer(tmp_path / "run", finished_run / "model", data, micro_batch_size=size)
        run.model.config.dropout = 0.0
        batch = run.data.next_batch()
        loss = run.accumulator.accumulate(batch)
        gradient = torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None])
        found.append((loss, gradient))
        counts = (batch.tokens[:, 1:] >= 0).sum(1)
    assert len(set(counts.tolist())) > 1  # rows have different numbers of answer tokens
    inputs, targets = inputs_and_targets(batch.tokens)
    logits = run.model(inputs, use_cache=False).logits
    plain = F.cross_entropy(logits[targets >= 0], targets[targets >= 0]).item()
    for loss, gradient in found:
        assert loss == pytest.approx(plain, abs=1e-5)
        assert torch.allclose(gradient, found[0][1], atol=1e-6)


def test_a_model_learns_to_answer_and_to_stop(bdh: Run, finished_run: Path, tmp_path: Path) -> None:
    """As a user does it: a base without chat tokens, a tokenizer with them, a file of conversations; then a chat."""
    write_chat(tmp_path / "chat.jsonl")
    save_tokenizer(train_tokenizer("bytes", (), 0), tmp_path / "tokenizer")
    done = bdh(
        *("train", "--init_from", finished_run / "model", "--data.path", "chat.jsonl", "--data.chat", "true"),
        *("--data.tokenizer", "tokenizer", "--data.cross_documents", "false", "--data.block_size", 64),
        *("--training.batch_size", 8, "--training.max_steps", 250, "--training.warmup_steps", 10),
        *("--training.learning_rate", 1e-2, "--training.eval_interval", 250, "--run_dir", "run"),
        *("--logging.sample_prompts", "[What does Ben eat?]", "--logging.sample_interval", 250),
        *("--logging.interval", 50, "--model.dropout", 0),
    )
    assert done.returncode == 0, done.stderr
    assert "step 250/250  loss of answers 0." in done.stdout
    assert "step 250  validation: loss of answers 0." in done.stdout
    assert "it writes: What does Ben eat? Ben eats soup." in done.stdout
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert last[-2]["answer_tokens"] < 8 * 64 and last[-1]["validation_answer_tokens"] > 0
    llm = LLM(tmp_path / "run" / "model")
    completion = llm.chat([{"role": "user", "content": "What does Cleo eat?"}], SamplingParams(temperature=0))
    assert completion.text == "Cleo eats rice." and completion.choices[0].finish_reason == "stop"
    assert load_tokenizer(str(tmp_path / "run" / "model")).chat_template


def test_validation_scores_answers_alone(finished_run: Path, tmp_path: Path) -> None:
    write_chat(tmp_path / "chat.jsonl")
    data = {"path": str(tmp_path / "chat.jsonl"), "chat": True}
    run = trainer(tmp_path / "run", finished_run / "model", data)
    run.evaluate()
    total = count = 0.0
    for rows in run.evaluator.windows.batches(4):
        inputs, targets = inputs_and_targets(rows)
        with torch.no_grad():
            logits = run.model.eval()(inputs, use_cache=False).logits
        total += F.cross_entropy(logits[targets >= 0], targets[targets >= 0], reduction="sum").item()
        count += int((targets >= 0).sum())
    result = run.state.evaluation
    assert result is not None and result.tokens == count
    assert result.loss == pytest.approx(total / count, rel=1e-5)


def test_nothing_to_score_is_said(finished_run: Path, tmp_path: Path) -> None:
    row = [{"role": "user", "content": "x" * 3000}, {"role": "assistant", "content": "y"}]
    (tmp_path / "chat.jsonl").write_text("\n".join([json.dumps({"messages": row})] * 4))
    data = {"path": str(tmp_path / "chat.jsonl"), "chat": True}
    with pytest.raises(
        BDHError, match=r"no token of an answer is in the 1 windows of data\.block_size 32 to validate on"
    ):
        trainer(tmp_path / "run", finished_run / "model", data, eval_windows=1)
