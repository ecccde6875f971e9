"""The end of a text in models of bytes: new runs have a token for it; those of earlier versions go on without one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from bdh import load_export
from bdh.cli.main import main
from bdh.data.tokenizer import byte_tokenizer, same_tokenizer
from bdh.training.checkpoint import find_checkpoint, tokenizer_of
from bdh.training.export import load_any
from bdh.training.run_log import read_metrics
from tests.conftest import TEXT, TINY

PLAIN = byte_tokenizer(end_of_text=False)
FEW = ["--training.max_steps", 10, "--training.eval_interval", 10, "--model.decay", "none", "--model.write", "add"]

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as an earlier version of bdh left it, whose bytes had no end-of-text token. Do not change it."""
    folder = tmp_path_factory.mktemp("old")
    (folder / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("bdh.data.tokenizer.byte_tokenizer", lambda: PLAIN)
        words = ["train", "--data.path", "text.txt", "--run_dir", "run", *TINY, *FEW]
        assert main([str(word) for word in words]) == 0
    assert same_tokenizer(tokenizer_of(find_checkpoint(folder / "run")), PLAIN)
    return folder / "run"


@pytest.fixture
def command(
    old_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Command:
    """`bdh ARGS…` in this process, in a folder with a copy of the old run and its text."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(old_run.parent, tmp_path, dirs_exist_ok=True, symlinks=True)

    def run(*argv: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(word) for word in argv])
        return code, *capfd.readouterr()

    return run


@pytest.mark.parametrize("named", [[], ["--data.tokenizer", "bytes"]], ids=["as saved", "by name"])
def test_an_old_run_goes_on_with_its_own_bytes(command: Command, tmp_path: Path, named: list[str]) -> None:
    code, said, wrong = command("train", "--resume", "run", "--training.max_steps", 12, *named)
    assert code == 0 and "going on from step 10 of 12" in said and "the text is not the one" not in said, wrong
    assert same_tokenizer(tokenizer_of(find_checkpoint(tmp_path / "run")), PLAIN)
    code, _, wrong = command("train", "--resume", "run", "--training.max_steps", 14, "--data.cross_documents", "false")
    assert code == 2 and "the tokenizer has no end-of-text token" in wrong and wrong.count("\n") == 1


def test_an_old_checkpoint_without_a_tokenizer_has_plain_bytes(old_run: Path, tmp_path: Path) -> None:
    shutil.copytree(find_checkpoint(old_run), tmp_path / "checkpoint")
    for path in (tmp_path / "checkpoint").glob("*token*"):
        path.unlink()
    assert same_tokenizer(tokenizer_of(tmp_path / "checkpoint"), PLAIN)


def test_an_old_model_is_used_as_before(command: Command, tmp_path: Path) -> None:
    text = ["--data.path", "text.txt"]
    assert command("export", "run", "exported")[0] == 0
    assert same_tokenizer(load_export(tmp_path / "exported")[1], PLAIN)
    assert GenerationConfig.from_pretrained(tmp_path / "exported").eos_token_id is None
    losses = []
    for named in ([], ["--data.tokenizer", "bytes"]):
        code, said, wrong = command("eval", "--model", "exported", *text, *named, "--json")
        assert code == 0, wrong
        losses.append(json.loads(said))
    assert losses[0] == losses[1] and losses[0]["tokens"] == len(TEXT.encode()) - 1
    code, _, wrong = command("eval", "--model", "exported", *text, "--data.cross_documents", "false")
    assert code == 2 and "has a tokenizer without an end-of-text token" in wrong
    code, _, wrong = command(
        "calibrate", "exported", *text, "--data.tokenizer", "bytes", "--output", "calibrated", "--length", 64
    )
    assert code == 0 and same_tokenizer(load_export(tmp_path / "calibrated")[1], PLAIN), wrong
    assert command("convert", "exported", "published.safetensors", "--to-published")[0] == 0
    assert command("convert", "published.safetensors", "again")[0] == 0  # a published model has learned no end either
    assert same_tokenizer(load_export(tmp_path / "again")[1], PLAIN)
    code, _, wrong = command("average", "run", "exported", "--output", "averaged")
    assert code == 0 and same_tokenizer(load_export(tmp_path / "averaged")[1], PLAIN), wrong


def test_a_run_that_begins_with_an_old_model(command: Command, tmp_path: Path) -> None:
    """It keeps the model's bytes; with those of now, which give every text the same ids, it learns where texts end."""
    few = ["--data.path", "text.txt", *TINY[8:], "--training.max_steps", 5]
    code, said, wrong = command("train", "--init_from", "run", "--run_dir", "kept", *few)
    assert code == 0 and "documents end with" not in said, wrong
    assert same_tokenizer(load_any(tmp_path / "kept")[1] or byte_tokenizer(), PLAIN)
    code, said, wrong = command("train", "--init_from", "run", "--run_dir", "ends", "--data.tokenizer", "bytes", *few)
    assert code == 0 and "documents end with <|endoftext|>, token 255, which the model of init_from has not" in said
    model, tokenizer = load_export(tmp_path / "ends" / "model")
    assert same_tokenizer(tokenizer, byte_tokenizer()) and model.config.vocab_size == 256
    shutil.copytree(tmp_path / "kept" / "model", tmp_path / "old")
    code, _, wrong = command("train", "--init_from", "ends", "--run_dir", "x", "--data.tokenizer", "old", *few)
    assert code == 2 and "data.tokenizer old gives the model of" in wrong
    assert command("tokenizer", "train", "--kind", "bytes", "--output", "chat")[0] == 0
    for start in ("kept", "ends"):
        more = ["--run_dir", f"{start}-chat", "--data.tokenizer", "chat"]
        code, said, wrong = command("train", "--init_from", start, *few, *more)
        assert code == 0 and "the vocabulary grows from 256 to 261 tokens" in said, wrong


def test_a_new_run_learns_where_documents_end(command: Command, tmp_path: Path) -> None:
    """And can keep them apart, without a tokenizer of its own."""
    rows = [json.dumps({"text": f"{n} dragons hatch"}) for n in range(100, 400)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    settings = [*TINY, "--training.max_steps", 150, "--training.batch_size", 8, "--training.learning_rate", 1e-2]
    apart = ["--data.cross_documents", "false", "--training.carry_state", "true", "--training.eval_interval", 150]
    code, said, wrong = command("train", "--data.path", "rows.jsonl", "--run_dir", "new", *settings, *apart)
    assert code == 0, wrong
    assert read_metrics(tmp_path / "new" / "metrics.jsonl")[-1]["validation_loss"] < 2
    code, said, wrong = command("eval", "--model", "new/model", "--data.path", "rows.jsonl", "--carry_state", "--json")
    assert code == 0 and json.loads(said)["tokens"] == 300 * (len("100 dragons hatch") + 1) - 1, wrong
    check_with_transformers(tmp_path / "new" / "model")


def check_with_transformers(export: Path) -> None:
    """What evaluation harnesses ask of an export: a token before a text and one after it."""
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == model.generation_config.eos_token_id == 255
    assert model.generation_config.bos_token_id == 255 and tokenizer.decode([255]) == "<|endoftext|>"
    prefix: int = tokenizer.bos_token_id
    text = tokenizer("217 dragons hatch").input_ids
    with torch.no_grad():
        rolling = model(torch.tensor([[prefix, *text]])).logits.log_softmax(-1)[0]  # (T + 1, V)
    after = rolling[range(len(text) + 1), [*text, tokenizer.eos_token_id]]
    assert after.isfinite().all() and after[-1] > -0.5  # it has learned where a text ends
    prompt: Any = tokenizer("217 dragons ha", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert written[-1] == 255 and len(written) < 40
    unprompted = model.generate(max_new_tokens=2, do_sample=False)
    assert unprompted[0, 0] == 255
