"""Runs are read with patience, whatever state they are in."""

import json
from pathlib import Path

import numpy as np
import pytest

from bdh.errors import BDHError
from bdh.report.runs import POINTS, distinct_names, read_runs, thin


def write(folder: Path, records: list[object], tail: bytes = b"") -> Path:
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_bytes(lines.encode() + tail)
    return folder


def test_a_finished_run(finished_run: Path) -> None:
    (run,) = read_runs([finished_run])
    assert run.name == "run" and run.notes == []
    assert run.settings["model.n_layer"] == "2" and run.settings["logging.sample_prompts"] == '["The ", "In "]'
    steps, losses = run.series["loss"]
    assert steps.tolist() == [1, 5, 10, 15, 20, 25, 30, 35, 40] and losses[0] > losses[-1]
    assert {"validation_loss", "active_x/layer_1", "state_norm/layer_0", "never_fired"} <= run.series.keys()
    assert list(run.samples) == [20, 40] and len(run.samples[40]) == 2
    assert run.samples[40][0].startswith("The ") and run.samples[40][1].startswith("In ")
    steps, tokens, seconds = run.places
    assert tokens.tolist() == [64 * step for step in steps] and (np.diff(seconds) >= 0).all()


def test_a_run_in_progress_torn_and_odd(tmp_path: Path) -> None:
    good = {"step": 1, "tokens": 10, "loss": 2.0, "seconds": 1.0}
    odd = [
        {**good, "step": 2, "loss": float("nan")},
        [1],
        {"loss": 1.0},
        {"step": "x"},
        {**good, "step": 3, "loss": "1"},
    ]
    folder = write(
        tmp_path / "run", [good, *odd, {"step": 4, "tokens": 40, "validation_loss": 1.5}], b'{"step": 5, "lo'
    )
    (run,) = read_runs([folder])
    assert run.series["loss"][0].tolist() == [1] and run.series["validation_loss"][0].tolist() == [4]
    assert run.places[1].tolist() == [10, 10, 10, 40] and run.places[2].tolist() == [1, 1, 1, 1]
    assert run.notes == [
        "it has no config.yaml, so its settings are not known",
        "3 lines of its metrics.jsonl could not be read",
    ]


@pytest.mark.parametrize("config", [b"model: [\n", b"\xff\xfe", b"- 1\n", b"", b"!!python/object:os.system {}\n"])
def test_damaged_files_are_notes(tmp_path: Path, config: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(config)
    (tmp_path / "samples.md").write_bytes(b"\xff## Step\n## Step 7\n\n    a\n    \n    b\n\n    c")
    (run,) = read_runs([tmp_path])
    assert run.notes == ["its config.yaml is damaged, so its settings are not known", "nothing is logged yet"]
    assert run.samples == {7: ["a\n\nb", "c"]}


def test_long_curves_are_thinned_without_losing_their_peaks() -> None:
    steps = np.arange(100_000.0)
    values = np.random.default_rng(0).normal(size=len(steps))
    values[[777, 50_001]] = -100, 100
    kept, thinned = thin(steps, values)
    assert POINTS // 2 < len(kept) <= POINTS
    assert (np.diff(kept) > 0).all() and kept[0] == 0 and kept[-1] == steps[-1]
    assert thinned.min() == -100 and thinned.max() == 100 and kept[thinned.argmax()] == 50_001
    assert thin(steps[:POINTS], values[:POINTS])[0].tolist() == steps[:POINTS].tolist()


def test_names_are_as_short_as_they_may_be() -> None:
    assert distinct_names([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert distinct_names([Path("/a/x/run"), Path("/a/y/run"), Path("/b")]) == ["x/run", "y/run", "/b"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    run = write(tmp_path / "run", [])
    for folders, message in (
        ([tmp_path / "nowhere"], "nowhere does not exist; give the folder of a run"),
        ([tmp_path / "file"], "file is a file; give the folder of a run"),
        ([tmp_path / "empty"], "empty holds no run: it has neither metrics.jsonl nor config.yaml"),
        ([run, run / ".." / "run"], "run/../run is given twice; leave one out"),
    ):
        with pytest.raises(BDHError, match=message):
            read_runs(folders)
