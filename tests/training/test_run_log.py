"""metrics.jsonl, samples.md and loss.png."""

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bdh.training.run_log import Tracker, draw_curves, read_metrics

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


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owners here")
def test_files_that_become_unwritable_are_warned_of_and_written_again_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    tracker = Tracker(folder, 100, 0)
    tracker.step({"step": 1, **RECORD})
    tracker.samples(1, [("a", "b")])
    tracker.draw()  # loads all that draws, as long as its files can be read
    files = [folder / "metrics.jsonl", folder / "samples.md"]
    with unprivileged(tmp_path):
        for closed in (files, [folder]):  # files that cannot be opened, and a folder that cannot be entered
            for path in closed:
                path.chmod(0)
            for step in (2, 3):
                tracker.step({"step": step, **RECORD})
                tracker.samples(step, [("a", "b")])
                tracker.draw()
            for path in closed:
                path.chmod(0o700)
        tracker.step({"step": 4, **RECORD})
    said = capsys.readouterr().out
    assert said.count("metrics.jsonl cannot be written (Permission denied); training goes on without it") == 1
    assert said.count("samples.md cannot be written (Permission denied)") == 1
    assert [record["step"] for record in read_metrics(files[0])] == [1, 4]


@contextmanager
def unprivileged(folder: Path) -> Iterator[None]:
    """Without the rights of root, to whom every file is writable; the folder is the other user's meanwhile."""
    if os.geteuid() != 0:
        yield
        return
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, 65534, 65534)
    above = [parent for parent in folder.parents if parent.stat().st_mode & 0o077 != 0o077 and parent != Path("/")]
    modes = {parent: parent.stat().st_mode for parent in above}
    for parent in above:
        parent.chmod(0o755)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        for parent, mode in modes.items():
            parent.chmod(mode)


def test_lines_that_are_no_records_are_left_out(tmp_path: Path) -> None:
    lines = [b"12", b"null", b'{"loss": 1}', b"\xff\xfe", json.dumps({"step": 3, **RECORD}).encode()]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [3]
    Tracker(tmp_path, 100, 10)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


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
