"""`bdh calibrate` as a user runs it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bdh.model.export import load_export
from tests.conftest import TEXT, TINY, Run, run_bdh


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a run without decay that has learned enough to fall apart beyond its block. Do not change it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT)
    more = ["--training.max_steps", 150, "--training.batch_size", 16, "--training.learning_rate", 5e-3]
    more += ["--model.decay", "none", "--model.write", "add", "--training.eval_interval", 150]
    done = run_bdh("train", "--data.path", "text.txt", "--run_dir", "run", *TINY, *more, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run" / "model"


@pytest.fixture
def given(trained: Path, tmp_path: Path) -> list[object]:
    (tmp_path / "held out.txt").write_text(TEXT[-2500:])
    return ["calibrate", trained, "--data.path", "held out.txt", "--output", "calibrated"]


def test_an_export_with_a_decay(given: list[object], trained: Path, tmp_path: Path, bdh: Run) -> None:
    done = bdh(*given)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("no decay ") and lines[1].startswith("half-life 1 tokens ")
    assert any("beyond the training block" in line for line in lines)
    model, tokenizer = load_export(tmp_path / "calibrated")
    before, _ = load_export(trained)
    config = json.loads((tmp_path / "calibrated" / "config.json").read_text())
    assert config["decay"] == "fixed" and len(config["decay_half_lives"]) == 2 and config["training_block_size"] == 16
    assert lines[-1].startswith(f"calibrated is {trained} with half-li") and len(tokenizer) == 256
    old, new = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "calibrated"))
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    card = (tmp_path / "calibrated" / "README.md").read_text()
    assert "## Calibration" in card and "held out.txt" in card and "## Training" in card
    old_texts, new_texts = (
        json.loads((folder / "tokenizer_config.json").read_text()) for folder in (trained, tmp_path / "calibrated")
    )
    assert old_texts.pop("model_max_length") == 16 < new_texts.pop("model_max_length")  # none, with decay
    assert old_texts == new_texts
    for name in ("tokenizer.json", "generation_config.json", "modeling_bdh.py"):
        assert (tmp_path / "calibrated" / name).read_bytes() == (trained / name).read_bytes()
    ends = []
    for folder in (trained, "calibrated"):
        shown = bdh("eval", "--model", folder, *given[2:4], "--by_position", 128, "--json")
        ends.append(json.loads(shown.stdout)["bins"][-1]["loss"])
    assert ends[1] < ends[0] and model.config.decay == "fixed" and before.config.decay == "none"
    again = bdh("calibrate", "calibrated", *given[2:4], "--output", "twice")
    assert again.returncode == 2 and "calibrated already decays (decay fixed)" in again.stderr


def test_a_corpus_and_an_older_export(trained: Path, tmp_path: Path, bdh: Run) -> None:
    shutil.copytree(trained, tmp_path / "older")
    config = json.loads((tmp_path / "older" / "config.json").read_text())
    (tmp_path / "older" / "config.json").write_text(json.dumps({**config, "training_block_size": None}))
    given = ["calibrate", "older", "--data.corpus", "pydoc", "--output", "calibrated"]
    done = bdh(*given)
    assert done.returncode == 2 and done.stderr.endswith("trained on; give it: --block_size N\n")
    done = bdh(*given, "--block_size", 16, "--per_head", "false", "--windows", 2, "--length", 100)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "calibrated" / "config.json").read_text())["training_block_size"] == 16


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data.path", "short.txt"], "short.txt has 21 tokens; calibration needs at least 33, two blocks of 16"),
        (["--data.path", "missing.txt"], "missing.txt"),
        (["--output", "held out.txt"], "held out.txt is a file"),
        (["--output", "."], "holds something that is not an export"),
        (["--block_size", 32], "--block_size is 32, but"),
        (["--block_size", 0], "block_size is 0; it must be at least 1"),
        (["--length", 16], "length is 16; it must be above 16, the block"),
        (["--length", 5000], "length is 5000, but held out.txt has 2,501 tokens; use at most 2500"),
        (["--windows", 0], "windows is 0; it must be at least 1"),
    ],
)
def test_mistakes_are_one_line(given: list[object], more: list[object], words: str, tmp_path: Path, bdh: Run) -> None:
    (tmp_path / "short.txt").write_text(TEXT[:20])
    done = bdh(*given, *more)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("bdh calibrate: error: ") and words in done.stderr
    assert not (tmp_path / "calibrated").exists()


def test_the_model_must_be_there_and_stays(trained: Path, tmp_path: Path, bdh: Run) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    data = ["--data.path", "text.txt", "--output"]
    assert "missing does not exist; give the folder of an export" in bdh("calibrate", "missing", *data, "new").stderr
    done = bdh("calibrate", trained, *data, trained)
    assert done.returncode == 2 and "is the model itself; name another folder" in done.stderr
