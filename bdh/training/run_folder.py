"""A run's folder: taken by one process at a time, never mixed with another run or with anything else."""

import itertools
import os
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import yaml

from bdh.errors import BDHError
from bdh.file_locks import lock_file, unlock
from bdh.model.export import check_target
from bdh.training.checkpoint import CheckpointStore
from bdh.training.config import TrainConfig
from bdh.training.run_log import write_atomically

LEFTOVERS = ("metrics.jsonl", "samples.md", "loss.png", "trackers.json")


class RunFolder:
    """`runs/NAME`, for a run that begins in it or goes on from a checkpoint.

    Args:
        path: The folder; made by `claim`.
        store: Its checkpoints.
        resume: The checkpoint the run goes on from, None to begin.
    """

    def __init__(self, path: Path, store: CheckpointStore, resume: Path | None):
        self.path = path
        self.store = store
        self.goes_on_here = resume is not None and resume.absolute().parent.resolve() == store.directory.resolve()
        self.lock: int | None = None

    def check(self) -> None:
        """Refuses a folder that holds another run, or something else. Raises BDHError; changes nothing."""
        if self.store.paths() and not self.goes_on_here:
            whole, _ = self.store.latest()
            way = f"go on with it: bdh train --resume {self.path}, or" if whole else "its checkpoints are all damaged;"
            raise BDHError(f"run_dir {self.path} already holds a run; {way} name another: --run_dir DIR")
        if self.path.is_dir() and any(self.path.iterdir()) and not is_run(self.path):
            raise BDHError(f"run_dir {self.path} holds something that is not a run; name another: --run_dir DIR")
        check_target(self.path / "model")

    def claim(self, config: TrainConfig) -> None:
        """Makes the folder, keeps other processes out of it, and writes the resolved configuration. Raises BDHError."""
        try:
            self.store.directory.mkdir(parents=True, exist_ok=True)
            self.lock = take_lock(self.path, self.store.directory)
            self.check()
            self.store.clean()
            if not self.goes_on_here:
                for name in LEFTOVERS:  # of a run that never reached a checkpoint
                    (self.path / name).unlink(missing_ok=True)
            write_atomically(self.path / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False))
        except OSError as error:
            raise BDHError(f"run_dir {self.path} cannot be written: {error.strerror}") from error

    def release(self) -> None:
        """Lets other processes in again; the end of the process does so too."""
        unlock(self.lock)
        self.lock = None

    def location(self) -> Path | None:
        """The path of the folder now: another one than `path` if it was renamed since it was claimed.

        None if it was removed, or renamed on a system that does not tell to what.
        """
        if self.lock is None:
            return self.path
        claimed = os.fstat(self.lock)
        with suppress(OSError):
            if os.path.samestat(claimed, self.store.directory.stat()):
                return self.path
        with suppress(OSError):
            checkpoints = Path(f"/proc/self/fd/{self.lock}").readlink()
            if os.path.samestat(claimed, checkpoints.stat()):
                return checkpoints.parent
        return None

    def recreate(self, config: TrainConfig) -> Path:
        """Makes the folder again after it was removed, and claims it; under another name if another run has taken its.

        Returns:
            Its path; the attributes still name the one that was removed.

        Raises:
            BDHError: It cannot be made.
        """
        self.release()
        for number in itertools.count():
            path = self.path.with_name(f"{self.path.name}-{number}") if number else self.path
            folder = RunFolder(path, CheckpointStore(path / "checkpoints", self.store.keep), None)
            try:
                folder.check()
                folder.goes_on_here = not number  # what is left in it is of this run, as when its checkpoints are gone
                folder.claim(replace(config, run_dir=str(path)))
            except BDHError as error:
                folder.release()
                if not path.exists():
                    raise BDHError(
                        f"run_dir {self.path} was removed during the run and cannot be made again: {error}"
                    ) from error
                continue
            self.lock = folder.lock
            return path
        raise AssertionError

    def move(self, path: Path) -> None:
        """Makes `path` the folder that checkpoints are written into."""
        self.path, self.store.directory = path, path / "checkpoints"

    def remove_if_empty(self) -> None:
        """Removes the folder if nothing is in it but the empty one for checkpoints."""
        with suppress(OSError):
            self.store.directory.rmdir()
            self.path.rmdir()

    def way_on(self) -> str:
        """The command that resumes this run."""
        if self.store.latest()[0] is None:
            return f"begin again (no checkpoint was written): bdh train --config {self.path / 'config.yaml'}"
        return f"go on with: bdh train --resume {self.path}"


def take_lock(path: Path, checkpoints: Path) -> int | None:
    """Locks a run for this process; returns what `unlock` takes.

    Raises:
        BDHError: Another process has it.
    """
    try:
        return lock_file(checkpoints)
    except BlockingIOError as error:
        raise BDHError(
            f"run_dir {path} is in use by another process; wait for it, or name another: --run_dir DIR"
        ) from error


def refuse_if_in_use(path: Path) -> None:
    """Raises BDHError if the run at a path, or the run of the checkpoint at a path, is being trained."""
    for run in (path, path.absolute().parent.parent):
        if (run / "checkpoints").is_dir():
            unlock(take_lock(run, run / "checkpoints"))
            return


def is_run(path: Path) -> bool:
    """Whether a folder was made by a run: it has checkpoints, or a configuration of ours."""
    if (path / "checkpoints").is_dir():
        return True
    try:
        settings = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(settings, dict) and {"run_dir", "model", "training"} <= settings.keys()
