"""A run's folder: taken by one process at a time, never mixed with another run or with anything else."""

import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import yaml

from bdh.errors import BDHError
from bdh.model.export import check_target
from bdh.training.checkpoint import CheckpointStore
from bdh.training.config import TrainConfig
from bdh.training.tracking import write_atomically

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
        if self.lock is not None:
            drop_lock(self.lock)
            self.lock = None

    def moved_to(self) -> Path | None:
        """Where the folder is if it was renamed since it was claimed; None while it is where it was.

        Raises:
            BDHError: It was removed, or renamed on a system that does not say to what.
        """
        if self.lock is None:
            return None
        ours = os.fstat(self.lock)
        try:
            if os.path.samestat(ours, self.store.directory.stat()):
                return None
        except OSError:
            pass
        try:
            place = Path(f"/proc/self/fd/{self.lock}").readlink()
            if os.path.samestat(ours, place.stat()):
                return place.parent
        except OSError:
            pass
        raise BDHError(f"run_dir {self.path} was renamed or removed during the run, so training stops")

    def remove_if_empty(self) -> None:
        """Removes the folder if nothing is in it but the empty one for checkpoints."""
        with suppress(OSError):
            self.store.directory.rmdir()
            self.path.rmdir()

    def way_on(self) -> str:
        """How to take this run up again."""
        if self.store.latest()[0] is None:
            return f"begin again (no checkpoint was written): bdh train --config {self.path / 'config.yaml'}"
        return f"go on with: bdh train --resume {self.path}"


_held: set[int] = set()  # descriptors of locks that this process has taken


def _leave_locks_to_the_parent() -> None:
    """A process that reads text may outlive this one when it is killed, and must not keep the run locked."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_locks_to_the_parent)


def drop_lock(descriptor: int) -> None:
    """Gives a lock back."""
    _held.discard(descriptor)
    os.close(descriptor)


def take_lock(path: Path, checkpoints: Path) -> int | None:
    """Locks a run for this process: a descriptor to close, or None where there are no such locks.

    Raises:
        BDHError: Another process has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows has none
        return None
    descriptor = os.open(checkpoints, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise BDHError(
            f"run_dir {path} is in use by another process; wait for it, or name another: --run_dir DIR"
        ) from error
    _held.add(descriptor)
    return descriptor


def refuse_if_in_use(where: Path) -> None:
    """Raises BDHError if the run at `where`, or the one a checkpoint at `where` lies in, is being trained."""
    for run in (where, where.absolute().parent.parent):
        if (run / "checkpoints").is_dir():
            lock = take_lock(run, run / "checkpoints")
            if lock is not None:
                drop_lock(lock)
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
