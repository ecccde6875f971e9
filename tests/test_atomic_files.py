"""Files and folders that appear whole or not at all, and the removal of what killed processes left."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bdh.atomic_files import NEW, OLD, PREFIX, remove_leftovers, replace_atomically
from bdh.file_locks import make_locked_folder, remove_unlocked_folders, unlock
from tests.conftest import environment

WRITER = """
import sys, time
from pathlib import Path
from bdh.atomic_files import replace_atomically

with replace_atomically(Path(sys.argv[1])) as partial:
    partial.write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


@contextmanager
def writer(target: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that has written a part of a file."""
    command = [sys.executable, "-c", WRITER, str(target)]
    env = environment(PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        try:
            yield process
        finally:
            process.kill()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_leftovers_of_killed_processes_are_removed_and_those_of_living_ones_are_not(tmp_path: Path) -> None:
    with writer(tmp_path / "a") as process:
        [partial] = names(tmp_path)
        with replace_atomically(tmp_path / "b") as path:
            path.write_text("whole")
        assert names(tmp_path) == [partial, "b"]
        process.kill()
        process.wait()
        with replace_atomically(tmp_path / "b") as path:
            path.write_text("newer")
        assert names(tmp_path) == ["b"] and (tmp_path / "b").read_text() == "newer"


def test_a_process_killed_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    folder, lock = make_locked_folder(tmp_path, PREFIX)
    for state, text in ((OLD, "old"), (f"{NEW}/model", "new")):
        (folder / state).mkdir(parents=True)
        (folder / state / "file").write_text(text)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [folder.name]
    unlock(lock)  # as the end of the process does
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "file").read_text() == "new"


def test_a_folder_that_nobody_has_locked_yet_is_removed_only_if_it_is_empty(tmp_path: Path) -> None:
    """A process may be killed after it made a folder and before it locked it; folders of others may have the name."""
    empty, foreign = tmp_path / f"{PREFIX}a", tmp_path / f"{PREFIX}b"
    empty.mkdir()
    foreign.mkdir()
    (foreign / "file").touch()
    (tmp_path / f"{PREFIX}c").symlink_to(foreign)
    remove_unlocked_folders(tmp_path, f"{PREFIX}*")
    assert names(tmp_path) == [foreign.name, f"{PREFIX}c"] and names(foreign) == ["file"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "file").write_text("old")
    with pytest.raises(OSError, match="full"), replace_atomically(tmp_path / "model") as partial:
        partial.mkdir()
        raise OSError("the disk is full")
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "file").read_text() == "old"


@pytest.mark.parametrize(("private", "mode"), [(False, 0o640), (True, 0o600)])
def test_files_obey_the_umask_or_are_private(tmp_path: Path, private: bool, mode: int) -> None:
    before = os.umask(0o027)
    try:
        with replace_atomically(tmp_path / "model", private=private) as partial:
            partial.mkdir()
            (partial / "link").symlink_to(tmp_path / "other")
            for name, given in (("weights", 0o600), ("config", 0o666)):
                os.close(os.open(partial / name, os.O_CREAT, given))
    finally:
        os.umask(before)
    assert [(tmp_path / "model" / name).stat().st_mode & 0o777 for name in ("weights", "config")] == [mode, mode]
