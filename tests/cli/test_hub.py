"""Texts and tokenizers of a hub, by name through the commands; what goes wrong there is one line."""

import json
from collections.abc import Iterator
from pathlib import Path

import pandas
import pytest

from bdh.data.tokenizer import save_tokenizer
from bdh.data.vocabulary import train_tokenizer
from tests.conftest import TEXT, TINY, Run
from tests.data.hub import Hub

TEXTS = TEXT.splitlines()
CARD = """---
configs:
- config_name: small
  data_files: [{split: train, path: small/train*}, {split: validation, path: small/validation*}]
- config_name: large
  data_files: large/*
---
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    texts = root / "datasets" / "owner" / "texts"
    for name in ("small/train-0", "small/train-1", "small/validation", "large/all"):
        (texts / name).parent.mkdir(parents=True, exist_ok=True)
        pandas.DataFrame({"story": TEXTS}).to_parquet(texts / f"{name}.parquet", row_group_size=100)
    (texts / "README.md").write_text(CARD)
    for name in ("gated", "empty"):
        (root / "datasets" / "owner" / name).mkdir()
        (root / "datasets" / "owner" / name / "README.md").write_text("nothing here")
    (root / "datasets" / "owner" / "gated" / "a.jsonl").write_text(json.dumps({"text": TEXT}))
    save_tokenizer(train_tokenizer("bpe", TEXTS, 400), root / "models" / "owner" / "words")
    with Hub(root, gated=frozenset({"owner/gated"})) as hub:
        yield hub


def variables(hub: Hub, home: Path) -> dict[str, str]:
    return {**hub.environment(home), "COLUMNS": "200"}


SMALL = ("--data.path", "owner/texts", "--data.config", "small", "--data.validation_split", "validation")


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_dataset_and_a_tokenizer_by_name(tmp_path: Path, bdh: Run, hub: Hub, streaming: str) -> None:
    given = ("--data.tokenizer", "owner/words", "--data.streaming", streaming, "--run_dir", "run", *TINY)
    env = variables(hub, tmp_path / "home")
    done = bdh("train", *SMALL, *given, env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model" / "tokenizer.json").exists()
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "owner/texts small" in card and "| tokenizer | words |" in card
    if streaming == "false":  # all of it is in the cache now, so that the hub is not needed
        env["HF_ENDPOINT"] = "http://127.0.0.1:9"
        done = bdh("train", *SMALL, "--run_dir", "again", *TINY, env=env)
        assert done.returncode == 0, done.stderr
        done = bdh("train", "--resume", "run", "--training.max_steps", 45, env={**env, "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0 and "found tokenized in the cache" in done.stdout, done.stdout + done.stderr


CASES = {
    "--data.path owner/gated": "owner/gated is gated: ask for access on its page on the hub, then log in",
    "--data.path owner/unknown": "owner/unknown is neither a file here nor a dataset on the hub that can be read",
    "--data.path owner/texts": "owner/texts has several configurations; choose one with --data.config: small, large",
    "--data.path owner/texts --data.config huge": "data.config huge is not a configuration of owner/texts; there are",
    "--data.path owner/texts --data.config small --data.split test": "data.split test is not a split of owner/texts; "
    "there are train, validation",
    "--data.path owner/texts --data.revision v9": "data.revision v9 does not exist for owner/texts",
    "--data.path owner/texts --data.config small --data.text_column body": "data.text_column body is not a text column",
    "--data.path owner/empty": "owner/empty holds no files that can be read as text",
    "--data.tokenizer owner/nothing": "data.tokenizer owner/nothing is no folder here and cannot be loaded",
}


@pytest.mark.parametrize("line", list(CASES))
def test_what_the_hub_refuses_is_one_line(tmp_path: Path, bdh: Run, hub: Hub, line: str) -> None:
    streaming = len(line) % 2 and "path" in line  # half of them each way
    given = ("--data.streaming", "true") if streaming else ()
    done = bdh("train", *line.split(), *given, env=variables(hub, tmp_path / "home"))
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("bdh train: error: ") and CASES[line] in lines[0], done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("broken", ["nobody there", "500"])
def test_a_hub_that_cannot_be_reached_is_said_at_once(tmp_path: Path, bdh: Run, hub: Hub, broken: str) -> None:
    env = variables(hub, tmp_path / "home")
    if broken == "nobody there":
        env["HF_ENDPOINT"] = "http://127.0.0.1:9"
    else:
        hub.broken = True
    try:
        done = bdh("train", *SMALL, env=env)
    finally:
        hub.broken = False
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "owner/texts cannot be reached (" in done.stderr and "or give a local path" in done.stderr
