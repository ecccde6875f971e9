"""Sessions on a server's disk: saved ones, in a folder for each key, and a folder for what ends with the server."""

import logging
import os
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from bdh.atomic_files import remove_leftovers
from bdh.errors import BDHError
from bdh.file_locks import make_locked_folder, remove_unlocked_folders, unlock
from bdh.serving.api.errors import ApiError, not_found
from bdh.serving.config import NAME, checked_name

EVERYBODY = "everybody"  # whose sessions these are where no keys are asked for; no key's id is like this
ENDING = ".safetensors"
SCRATCH = ".bdh-sessions-"  # how the folders begin that end with their servers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedSession:
    """A file that a session was saved to.

    Attributes:
        name: As it was saved.
        model: What the server that saved it called the model; None if another program wrote the file.
        created: Seconds since 1970.
        bytes: Of the file.
    """

    name: str
    model: str | None
    created: int
    bytes: int


class SavedFiles:
    """Files of saved sessions: `FOLDER/saved/OWNER/NAME.safetensors`. No name and no link leads outside the folder.

    Args:
        folder: Is made if it is not there.

    Raises:
        BDHError: The folder cannot be made, or not be written to.
    """

    def __init__(self, folder: Path):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder = folder.resolve(strict=True)
            self.root = self.folder / "saved"
            self.root.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise BDHError(f"serve.sessions.folder {folder} cannot be used: {error.strerror}") from error
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise BDHError(f"serve.sessions.folder {folder} cannot be written to")

    def remove_leftovers(self) -> None:
        """Removes what engines left that were killed while they saved."""
        for folder in self.root.iterdir():
            try:
                if folder.is_dir() and not folder.is_symlink():
                    remove_leftovers(folder)
            except OSError as error:  # the folders of the other owners can still be read
                log.warning("incomplete session files in %s cannot be removed: %s", folder, error.strerror)

    def place(self, owner: str | None, name: str) -> Path:
        """The path to save a session to; creates its folder. Raises BDHError for an invalid name, and ApiError or
        OSError."""
        checked_name(name, "the session's name")
        folder = self._of(owner)
        folder.mkdir(mode=0o700, exist_ok=True)
        if not self._is_own(folder):
            raise ApiError(
                500, "the folder of saved sessions is not as it should be", "server_error", reason="internal"
            )
        return folder / f"{name}{ENDING}"

    def find(self, owner: str | None, name: str) -> Path:
        """The file of a saved session. Raises BDHError for what is no name, and ApiError 404 if there is none."""
        checked_name(name, "the session's name")
        folder = self._of(owner)
        path = folder / f"{name}{ENDING}"
        if not self._is_own(folder) or not is_file(path):
            raise unknown_saved(name)
        return path

    def delete(self, owner: str | None, name: str) -> None:
        """Raises as `find`."""
        path = self.find(owner, name)
        try:
            path.unlink()
        except FileNotFoundError as error:  # somebody was faster
            raise unknown_saved(name) from error

    def names(self, owner: str | None) -> list[str]:
        """The names of an owner's saved sessions."""
        folder = self._of(owner)
        if not self._is_own(folder):
            return []
        files = [path for path in folder.iterdir() if path.name.endswith(ENDING) and is_file(path)]
        found = [path.name.removesuffix(ENDING) for path in files]
        return sorted(name for name in found if NAME.fullmatch(name))

    def list(self, owner: str | None) -> list[SavedSession]:
        """The saved sessions of an owner, without files of other kinds."""
        from bdh.inference.state_metadata import read_metadata

        saved = []
        for name in self.names(owner):
            path = self._of(owner) / f"{name}{ENDING}"
            with suppress(BDHError, OSError):  # OSError: it was deleted meanwhile
                metadata, status = read_metadata(path), path.lstat()
                saved.append(SavedSession(name, metadata.get("model"), int(status.st_mtime), status.st_size))
        return saved

    def _of(self, owner: str | None) -> Path:
        return self.root / (EVERYBODY if owner is None else checked_name(owner, "the key's id"))

    def _is_own(self, folder: Path) -> bool:
        return folder.is_dir() and not folder.is_symlink() and not self.root.is_symlink()


class Scratch:
    """A folder for what ends with this server, which holds a lock in it.

    Several servers can share the folder that these lie in; what one that was killed has left, another removes.

    Raises:
        BDHError: The folder cannot be made.
    """

    def __init__(self, parent: Path):
        try:
            self.folder, self._lock = make_locked_folder(parent, SCRATCH)
        except OSError as error:
            raise BDHError(f"sessions need a folder in {parent}, which cannot be made: {error.strerror}") from error
        self._numbers = count()

    def file(self) -> Path:
        """A name for a new file."""
        return self.folder / f"{next(self._numbers)}{ENDING}"

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        unlock(self._lock)


def remove_left(parent: Path) -> None:
    """Removes the folders of servers that no longer run."""
    remove_unlocked_folders(parent, f"{SCRATCH}*")


def is_file(path: Path) -> bool:
    """Whether a path is a file, and no link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def unknown_saved(name: str) -> ApiError:
    return not_found(f"there is no saved session {name[:80]!r}", "saved_session_not_found")
