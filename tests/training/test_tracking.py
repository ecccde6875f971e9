"""metrics.jsonl, samples.md and loss.png."""

import json
import resource
from pathlib import Path

import pytest

from bdh.training.tracking import Tracker, draw_curves, read_metrics

RECORD = {"loss": 2.0, "learning_rate": 1e-3, "tokens_per_second": 10.0, "seconds_per_step": 0.1}


def test_what_came_after_the_checkpoint_is_forgotten(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, **RECORD}) for step in (1, 5, 10, 15)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 20, "lo')  # torn by a kill
    first = Tracker(tmp_path, 100, 0)
    first.samples(5, [("a", "b\n## Step 3\nc")])
    first.samples(12, [("a", "later")])
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 20, "lo')
    before = (tmp_path / "samples.md").read_text()
    Tracker(tmp_path, 100, 10)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 5, 10]
    text = (tmp_path / "samples.md").read_text()
    assert "    ## Step 3\n    c" in text and "later" not in text and before.startswith(text)


def test_a_disk_that_refuses_is_reported_once_and_not_fatal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(tmp_path, 100, 0)
    (tmp_path / "metrics.jsonl").mkdir()  # cannot be appended to, whoever asks
    for step in (1, 2):
        tracker.step({"step": step, **RECORD})
    assert capsys.readouterr().out.count("training goes on without it") == 1


def test_a_record_cut_short_by_a_full_disk_is_taken_back(tmp_path: Path) -> None:
    """The operating system accepts ten bytes more and refuses the rest."""
    tracker = Tracker(tmp_path, 100, 0)
    tracker.step({"step": 1, **RECORD})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
    try:
        tracker.step({"step": 2, **RECORD})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    tracker.step({"step": 3, **RECORD})
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3]


def test_curves_are_drawn_from_whatever_there_is(tmp_path: Path) -> None:
    for records in ([], [{"step": 1, **RECORD}], [{"step": 1, **RECORD}, {"step": 2, "validation_loss": 1.5}]):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert not list(tmp_path.glob(".*"))
