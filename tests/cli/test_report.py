"""`bdh report` as a user runs it."""

import os
from pathlib import Path

from tests.conftest import Run, environment, run_bdh


def test_it_writes_one_page_that_needs_nothing_else(finished_run: Path, tmp_path: Path, bdh: Run) -> None:
    done = bdh("report", finished_run)
    assert (done.returncode, done.stdout, done.stderr) == (0, "report.html shows run\n", "")
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>") and '"validation_loss"' in page
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("model: {n_layer: 9}\n")
    done = bdh("report", finished_run, "other", "--output", "two.html")
    assert (done.returncode, done.stdout) == (0, "two.html compares 2 runs\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "report.html", "two.html"]


def test_mistakes_are_one_line_and_write_nothing(finished_run: Path, tmp_path: Path, bdh: Run) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "old.html").write_text("old")
    for arguments, message in (
        (["nowhere", "--output", "old.html"], "nowhere does not exist; give the folder of a run, as runs/quickstart"),
        ([finished_run, finished_run, "--output", "old.html"], f"{finished_run} is given twice; leave one out"),
        ([finished_run, "--output", "folder"], "--output folder is a folder; name a file, as report.html"),
        ([finished_run, "--output", "no/where.html"], "--output no/where.html cannot be written: No such file or dir"),
        ([finished_run, "--output", "x", "--run"], "--run is not an option"),
        ([], "the following arguments are required: runs"),
    ):
        done = bdh("report", *arguments)
        assert done.returncode == 2 and done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("bdh report: error: ") and message in line
    assert (tmp_path / "old.html").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "old.html"]


def test_it_loads_no_torch(finished_run: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise SystemExit('torch was imported')")
    path = os.pathsep.join([str(blocked), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run_bdh("report", finished_run, cwd=tmp_path, env=environment(PYTHONPATH=path))
    assert done.returncode == 0, done.stderr
