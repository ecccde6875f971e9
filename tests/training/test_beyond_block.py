"""The last validation of a run measures the positions beyond the training block."""

import math
from pathlib import Path

import numpy as np
import pytest

from bdh.data.blocks import ValidationWindows
from bdh.data.tokens import Tokens
from bdh.evaluation.by_position import score_beyond_block
from bdh.model.export import load_export
from bdh.training.checkpoint import find_checkpoint, read_state
from bdh.training.run_log import read_metrics
from tests.conftest import TEXT, TINY, Run


def test_the_last_validation_measures_the_held_out_text(finished_run: Path) -> None:
    records = [r for r in read_metrics(finished_run / "metrics.jsonl") if "validation_loss" in r]
    assert all("validation_long_loss" not in record for record in records[:-1])
    last = records[-1]
    assert last["validation_long_length"] == 128  # eight blocks
    tokens = [*TEXT.encode(), 255]
    held_out = Tokens([np.array(tokens[int(len(tokens) * 0.9) :], dtype=np.uint8)])
    tokens_per_byte = len(held_out) / (len(held_out) - 1)  # the end of the text is no byte of it
    bits_per_byte = last["validation_long_loss"] / math.log(2) * tokens_per_byte
    assert last["validation_long_bits_per_byte"] == pytest.approx(bits_per_byte)
    state = read_state(find_checkpoint(finished_run))["beyond_block"]
    assert state["loss"] == last["validation_long_loss"]
    assert (state["after"], state["up_to"], state["tokens"]) == (16, 128, 112)  # one window, as eight of a block
    model, _ = load_export(finished_run / "model")
    beyond = score_beyond_block(model, ValidationWindows(held_out, 128, 1), 16, 1.0)
    assert beyond is not None and beyond.loss == pytest.approx(last["validation_long_loss"], rel=1e-2)  # of bfloat16


def test_it_stands_in_the_card_and_in_the_report(finished_run: Path, tmp_path: Path, bdh: Run) -> None:
    card = (finished_run / "model" / "README.md").read_text()
    last = read_metrics(finished_run / "metrics.jsonl")[-1]
    shown = f"{last['validation_long_bits_per_byte']:.3f}"
    assert f"| bits per byte beyond the block | {shown} (positions 17 to 128, 112 tokens) |" in card
    assert bdh("report", finished_run, "--output", "report.html").returncode == 0
    page = (tmp_path / "report.html").read_text()
    assert '"validation_long_bits_per_byte"' in page and "Bits per byte beyond the block" in page


def test_it_stands_in_the_line_of_the_last_validation(tmp_path: Path, bdh: Run) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    few = ["--training.max_steps", 10, "--training.warmup_steps", 2]
    done = bdh("train", "--data.path", "text.txt", "--run_dir", "run", *TINY, *few)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "beyond the block" in line]
    record = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "validation_loss" in r][-1]
    shown = f"{record['validation_long_bits_per_byte']:.3f}"
    assert line.startswith("step 10  validation:")
    assert line.endswith(f"beyond the block, to 128 tokens: {shown} bits per byte")


def test_a_short_validation_text_is_said_and_skipped(tmp_path: Path, bdh: Run) -> None:
    (tmp_path / "text.txt").write_text(TEXT[:4000])
    few = ["--training.max_steps", 10, "--training.warmup_steps", 2, "--data.block_size", 256]
    done = bdh("train", "--data.path", "text.txt", "--run_dir", "run", *TINY, *few)
    assert done.returncode == 0, done.stderr
    assert "validation beyond the block is skipped: the validation text has 401 tokens; 513 are needed" in done.stdout
    assert all("validation_long_loss" not in r for r in read_metrics(tmp_path / "run" / "metrics.jsonl"))
