"""The recall tasks pose what they say, and the benchmark of long contexts writes whole results, at small sizes."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import long_context
from benchmarks.recall_tasks import (
    CUE,
    DIGITS,
    IGNORED,
    MARKER,
    PAIRS,
    TASKS,
    Source,
    evaluation_batch,
    training_batches,
)
from benchmarks.text_loss import training_rows
from benchmarks.variants import OutOfTimeError, TimeLimit


def source() -> Source:
    text = torch.randint(32, 127, (9000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)  # (bytes)
    return Source(torch.Generator().manual_seed(1), text)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("distance", [64, 512, 2048])
def test_what_is_scored_stands_at_the_distance_before(task: str, distance: int) -> None:
    batch = evaluation_batch(task, source(), 3, distance)
    rows, columns = (batch.labels != IGNORED).nonzero(as_tuple=True)  # 2 x (scored)
    assert len(rows) >= 3 * DIGITS
    labels, apart = batch.labels[rows, columns], batch.distances[rows, columns]  # (scored)
    assert (batch.tokens[rows, columns + 1] == labels).all()
    assert (batch.tokens[rows, columns + 1 - apart] == labels).all()
    if task in ("passkey", "induction"):
        assert (apart == distance).all()
    elif distance > 512:
        assert ((apart > distance // 2) & (apart <= distance)).all()


def test_keys_of_a_sequence_are_distinct_and_similar_ones_differ_in_at_most_two_bytes() -> None:
    batch = evaluation_batch("similar_keys", source(), 2, 1024)
    n = PAIRS["similar_keys"]
    keys = batch.tokens[:, : 5 * n].unflatten(1, (n, 5))[:, :, :4]  # (2, n, 4)
    differing = (keys[:, :, None] != keys[:, None]).sum(-1)  # (2, n, n)
    off_diagonal = differing[:, ~torch.eye(n, dtype=torch.bool)]  # (2, n * (n - 1))
    assert off_diagonal.min() == 1
    assert off_diagonal.max() == 2


def test_a_passkey_can_be_told_from_the_filler_and_a_cue_is_not_scored() -> None:
    batch = evaluation_batch("passkey", source(), 2, 256)
    assert (batch.tokens == MARKER).sum(1).tolist() == [2, 2]
    batch = evaluation_batch("induction", source(), 2, 256)
    assert (batch.labels[0] != IGNORED).nonzero()[0].item() == 256 + CUE - 1


def test_training_batches_fit_the_block_and_vary() -> None:
    sizes, given = random.Random(0), source()
    shapes = set()
    for _ in range(20):
        made = training_batches(given, sizes, 2, 128)
        assert list(made) == list(TASKS)
        for batch in made.values():
            assert batch.tokens.shape[1] <= 128
            scored = batch.labels != IGNORED  # (B, T)
            assert scored.any(1).all()
            assert (batch.tokens[:, 1:][scored[:, :-1]] == batch.labels[scored]).all()
        shapes.add(tuple(batch.tokens.shape[1] for batch in made.values()))
    assert len(shapes) > 10


def test_training_rows_continue_those_of_the_step_before() -> None:
    text = torch.arange(200, dtype=torch.uint8)
    first, second = training_rows(text, 0, 4, 8), training_rows(text, 1, 4, 8)  # (4, 9) each
    assert first[:, 0].tolist() == [0, 50, 100, 150]
    assert torch.equal(first[:, -1], second[:, 0])
    assert training_rows(text, 7, 4, 8)[3, 0] == 6  # after the last byte comes the first


def test_a_run_that_would_not_end_in_time_is_refused() -> None:
    TimeLimit(None).require(1e9)
    with pytest.raises(OutOfTimeError, match="needs 120 s more"):
        TimeLimit(1).require(120)


def test_results_hold_every_variant_and_later_commands_add_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny: dict[str, Any] = {"n_layer": 1, "n_embd": 16, "n_head": 2, "mlp_internal_dim_multiplier": 4}
    monkeypatch.setitem(long_context.SIZES, ("cpu", "small"), tiny)
    monkeypatch.setitem(long_context.RECALL_SIZES, "cpu", tiny)
    given = ["long_context", "--device", "cpu", "--tokens", "3072", "--recall_steps", "2", "--longest", "256"]
    for variants in (["none", "gated"], ["gated-delta-carried"]):
        monkeypatch.setattr("sys.argv", [*given, "--output", str(tmp_path), "--variants", *variants])
        long_context.main()
    loss = json.loads((tmp_path / "long_context_cpu_small.json").read_text())
    assert list(loss["variants"]) == ["none", "gated", "gated-delta-carried"]
    assert loss["complete"]
    for found in loss["variants"].values():
        assert list(found["by_position"]) == ["64", "128", "256"]
        assert found["with_past"]["256"]["tokens"] == 2 * 128
        # An untrained model knows nothing, and a model that has learned byte frequencies knows them at any position.
        assert all(4 < bits < 8.2 for bits in found["by_position"].values())
    recall = json.loads((tmp_path / "recall_cpu.json").read_text())
    for found in recall["variants"].values():
        assert set(found["accuracy"]) == set(TASKS)
        assert list(found["accuracy"]["passkey"]) == ["64", "128", "256"]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}
