"""`bdh eval --by_position` as a user runs it."""

import json
from pathlib import Path

import pytest

from tests.conftest import TEXT, Run


@pytest.fixture
def given(finished_run: Path, tmp_path: Path) -> list[object]:
    (tmp_path / "known.txt").write_text(TEXT[:5000])
    return ["eval", "--model", finished_run / "model", "--data.path", "known.txt"]


def test_a_table_json_and_a_picture(given: list[object], tmp_path: Path, bdh: Run) -> None:
    done = bdh(*given, "--by_position", 100, "--windows", 3, "--picture", "loss.png")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    title, heading, *rows = done.stdout.splitlines()
    assert title == "known.txt: 3 windows of 100 tokens" and heading.split()[0] == "position"
    assert [row.split()[:2] for row in rows] == [["<=", "16"], ["<=", "32"], ["<=", "64"], ["<=", "100"]]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    shown = json.loads(bdh(*given, "--by_position", 100, "--windows", 3, "--json").stdout)
    assert (shown["text"], shown["length"], shown["windows"]) == ("known.txt", 100, 3)
    assert sum(entry["tokens"] for entry in shown["bins"]) == 300
    assert [f"{entry['loss']:.4f}" for entry in shown["bins"]] == [row.split()[2] for row in rows]


def test_inside_the_block_it_is_what_eval_says(given: list[object], bdh: Run) -> None:
    plain = json.loads(bdh(*given, "--data.block_size", 16, "--json").stdout)
    shown = json.loads(bdh(*given, "--by_position", 16, "--windows", 1000, "--json").stdout)
    total = sum(entry["loss"] * entry["tokens"] for entry in shown["bins"])
    assert sum(entry["tokens"] for entry in shown["bins"]) == plain["tokens"]
    assert total / plain["tokens"] == pytest.approx(plain["loss"], rel=1e-5)


def test_the_length_follows_from_the_block_and_the_text(given: list[object], tmp_path: Path, bdh: Run) -> None:
    long = json.loads(bdh(*given, "--data.block_size", 16, "--json", "--by_position").stdout)
    assert long["length"] == 256 and long["windows"] == 8
    (tmp_path / "short.txt").write_text(TEXT[:101])
    short = json.loads(bdh(*given, "--data.path", "short.txt", "--json", "--by_position").stdout)
    assert short["length"] == 101 and short["windows"] == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--by_position", 5001], "by_position is 5001, but known.txt has 5,001 tokens; use a length of at most 5000"),
        (["--by_position", 1], "by_position is 1; it must be at least 2 tokens"),
        (["--by_position", "-5"], "by_position is -5; it must be at least 2 tokens"),
        (["--by_position", "x"], "by_position is x; it must be a whole number"),
        (["--by_position", "--windows", 0], "windows is 0; it must be at least 1"),
        (["--by_position", "--carry_state"], "leave --carry_state out"),
        (["--picture", "x.png"], "--picture is for --by_position"),
        (["--by_position", 64, "--picture", "."], "--picture . is a folder"),
        (["--by_position", 64, "--picture", "missing/x.png"], "missing/x.png cannot be written"),
    ],
)
def test_mistakes_are_one_line(given: list[object], more: list[object], words: str, bdh: Run) -> None:
    done = bdh(*given, *more)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("bdh eval: error: ") and words in done.stderr
