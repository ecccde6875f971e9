"""What a saved state's file tells besides the state, and what killed processes left beside one; without torch."""

import os
import shutil
import socket
from pathlib import Path

from safetensors import SafetensorError, safe_open

from bdh.errors import BDHError, one_line

FORMAT = "bdh-state-1"
PARTIAL = ".partial-state-"  # in the names of folders for what is being written


def read_metadata(path: str | Path) -> dict[str, str]:
    """What a saved state's file tells besides the state, which is not read and may be damaged.

    Raises:
        BDHError: It is no saved state.
    """
    try:
        with safe_open(path, "numpy") as file:
            metadata = dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise BDHError(f"{path} is no saved state: {error_text(error)}") from error
    if metadata.get("format") != FORMAT:
        raise BDHError(f"{path} is no saved state that this version of bdh knows")
    return metadata


def error_text(error: Exception) -> str:
    """What went wrong, in one line."""
    return getattr(error, "strerror", None) or one_line(error)


def partial_prefix() -> str:
    """How the name of a folder begins in which this process writes a state."""
    return f"{PARTIAL}{socket.gethostname()}-{os.getpid()}-"


def remove_leftovers(parent: Path) -> None:
    """Removes what processes of this machine left in a folder that were killed while they saved."""
    for folder in parent.glob(f"{PARTIAL}{socket.gethostname()}-*"):
        process = folder.name.split("-")[-2]
        if process.isdecimal() and not is_alive(int(process)) and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)


def is_alive(process: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is another user's
        pass
    return True
