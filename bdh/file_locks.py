"""Advisory locks (flock) that tell whether the process that made a file or folder still runs.

A lock ends with its process, however that ends. Process ids do not tell as much: they come again, and in containers
most servers have the same one, on hosts of the same name.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

LOCK = "lock"  # the file in a temporary folder that its process holds locked

_held: set[int] = set()  # descriptors of locks that this process holds


def _close_in_child() -> None:
    """Closes the locks in a forked child, which may outlive this process and must not keep them."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def lock_file(path: Path, flags: int = os.O_RDONLY) -> int | None:
    """Locks a file or a folder for this process; returns a descriptor for `unlock`.

    Args:
        path: It must be writable if `flags` say so, which network file systems ask for.
        flags: As for `os.open`.

    Returns:
        None on systems without such locks.

    Raises:
        BlockingIOError: Another process holds the lock.
        OSError: The path cannot be opened, or its file system has no locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    _held.add(descriptor)
    return descriptor


def unlock(descriptor: int | None) -> None:
    """Releases a lock that `lock_file` returned."""
    if descriptor is not None:
        _held.discard(descriptor)
        os.close(descriptor)


def make_locked_folder(parent: Path, prefix: str) -> tuple[Path, int | None]:
    """Makes a private folder of a new name, with a locked file in it, for `remove_unlocked_folders` to know its owner.

    Returns:
        The folder and its lock; None for the lock where the file system has no locks.

    Raises:
        OSError: The folder cannot be made.
    """
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            descriptor = lock_file(folder / LOCK, os.O_RDWR | os.O_CREAT)
        except (FileNotFoundError, BlockingIOError):  # another process removes it as a leftover, before it was locked
            continue
        except OSError:  # a file system without locks, or one that is full
            if not (folder / LOCK).exists():
                shutil.rmtree(folder, ignore_errors=True)
                raise
            return folder, None
        if folder.exists():
            return folder, descriptor
        unlock(descriptor)


def remove_unlocked_folders(
    parent: Path, pattern: str, before_removal: Callable[[Path], None] = lambda folder: None
) -> None:
    """Removes folders that `make_locked_folder` made for processes that no longer run.

    Args:
        parent: Where the folders are.
        pattern: Of their names, as for `glob`.
        before_removal: Called with each folder.
    """
    for folder in parent.glob(pattern):
        if folder.is_symlink():
            continue
        with suppress(OSError):  # it is locked, another user's, or just being removed
            if not (folder / LOCK).exists():
                folder.rmdir()  # of a process that was killed before it made the lock; else it is not one of ours
                continue
            descriptor = lock_file(folder / LOCK, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            if descriptor is not None:
                try:
                    before_removal(folder)
                    shutil.rmtree(folder, ignore_errors=True)
                finally:
                    unlock(descriptor)
