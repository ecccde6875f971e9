"""Files and folders that are written whole or not at all, whatever kills the process meanwhile."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EBADF, EINVAL, ENOTSUP
from pathlib import Path

from bdh.file_locks import make_locked_folder, remove_unlocked_folders, unlock

PREFIX = ".bdh-partial-"  # of the temporary folders
NEW, OLD = "new", "old"  # folders in one: for what is being written, and for the folder that it replaces


@contextmanager
def replace_atomically(target: Path, private: bool = False) -> Iterator[Path]:
    """Yields the path at which to write a file or a folder, which replaces `target` when the block ends.

    It has the name of the target and lies in a temporary folder beside it, which only its owner can read. If the block
    raises an exception, the target is as it was. What processes that were killed left in the same folder is removed
    first. What is written is flushed to the disk before it gets its name.

    Args:
        target: Its parent must exist.
        private: Whether only the owner can read what is written; otherwise the umask decides.

    Raises:
        OSError: The disk is full or not writable.
    """
    target = target.absolute()
    remove_leftovers(target.parent)
    folder, lock = make_locked_folder(target.parent, PREFIX)
    try:
        (folder / NEW).mkdir()
        partial = folder / NEW / target.name
        yield partial
        _set_permissions(folder / NEW, private)
        for path in (*folder.rglob("*"), folder):
            if not path.is_symlink():
                sync(path)
        if target.is_dir() and not target.is_symlink():
            target.rename(folder / OLD)
        try:
            partial.replace(target)
        except OSError:
            if (folder / OLD).exists() and not target.exists():
                (folder / OLD).rename(target)
            raise
        sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        unlock(lock)


def remove_leftovers(parent: Path) -> None:
    """Removes what processes left in a folder that were killed inside `replace_atomically`."""
    remove_unlocked_folders(parent, f"{PREFIX}*", _complete_replacement)


def _complete_replacement(folder: Path) -> None:
    """Renames what is whole, if its process was killed between the renaming of the old folder and of the new one."""
    if (folder / OLD).exists():
        for path in (folder / NEW).iterdir():
            if not (folder.parent / path.name).exists():
                path.rename(folder.parent / path.name)


def _set_permissions(folder: Path, private: bool) -> None:
    """Gives the files below a folder the permissions of new files, or makes them private.

    safetensors writes through a private temporary file, so weights would be readable by their owner only.
    """
    mode = 0o600 if private else folder.stat().st_mode & 0o666  # the umask cannot be read without changing it
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)


def sync(path: Path) -> None:
    """Flushes a file or a folder to the disk, where the file system can do that to folders. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (EBADF, EINVAL, ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
