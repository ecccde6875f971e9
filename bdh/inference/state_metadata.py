"""Reads the metadata of a saved state's file, without torch."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from bdh.errors import BDHError, error_text

FORMAT = "bdh-state-1"


def read_metadata(path: str | Path) -> dict[str, str]:
    """Reads the metadata of a saved state's file; the state itself is not read, and may be damaged.

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
