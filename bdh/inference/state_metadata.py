"""What a saved state's file tells besides the state; to be read without torch."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from bdh.errors import BDHError, one_line

FORMAT = "bdh-state-1"


def read_metadata(path: str | Path) -> dict[str, str]:
    """What a saved state's file tells besides the state, which is not read and may be damaged.

    Raises:
        BDHError: It is no saved state.
    """
    try:
        with safe_open(path, "numpy") as file:
            metadata = dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise BDHError(f"{path} is no saved state: {reason(error)}") from error
    if metadata.get("format") != FORMAT:
        raise BDHError(f"{path} is no saved state that this version of bdh knows")
    return metadata


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    return getattr(error, "strerror", None) or one_line(error)
