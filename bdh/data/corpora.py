"""Corpora: small texts by name.

`pydoc`        the Python language reference, which every Python carries: English prose, no download (default)
`stdlib`       the source of Python's standard library, without its tests
`shakespeare`  tinyshakespeare, 1.1 MB; downloaded once (BDH_SHAKESPEARE_URL names another address), checked, and kept
               in the cache folder
"""

import hashlib
import http.client
import os
import sysconfig
import urllib.request
from pathlib import Path

from bdh.atomic_files import replace_atomically
from bdh.errors import BDHError

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

CORPORA = ("pydoc", "stdlib", "shakespeare")


def load_corpus(name: str, cache_dir: str = "~/.cache/bdh") -> list[str]:
    """The documents of the corpus called `name`.

    Args:
        name: One of `CORPORA`.
        cache_dir: Where a downloaded corpus is kept.

    Raises:
        BDHError: A download fails, or what is kept is not what was downloaded.
    """
    if name == "shakespeare":
        return [shakespeare(Path(cache_dir).expanduser())]
    return {"pydoc": pydoc, "stdlib": stdlib}[name]()


def pydoc() -> list[str]:
    """The topics of Python's own `help()`: most of the language reference, about half a megabyte."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def stdlib() -> list[str]:
    """The standard library's Python files in the order of their paths, tests and installed packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    texts = []
    for file in sorted(root.rglob("*.py")):
        if skipped.isdisjoint(file.relative_to(root).parts):
            try:
                texts.append(file.read_text(encoding="utf-8"))
            except UnicodeDecodeError:  # a handful declare another encoding; they are no loss
                continue
    return [text for text in texts if text]  # a package's __init__ is often empty


def shakespeare(cache_dir: Path) -> str:
    """tinyshakespeare from the cache, downloaded into it the first time and checked every time."""
    cached = cache_dir / "tinyshakespeare.txt"
    if not cached.exists():
        content = _download_shakespeare(cached)
        _write_atomically(cached, content)
    else:
        content = cached.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        raise BDHError(f"{cached} is not the tinyshakespeare text (wrong checksum); delete it and try again")
    return content.decode("utf-8")


def _download_shakespeare(target: Path) -> bytes:
    url = os.environ.get("BDH_SHAKESPEARE_URL", SHAKESPEARE_URL)
    try:
        with urllib.request.urlopen(url, timeout=20) as response:  # noqa: S310 - a fixed https address by default
            content = response.read(8 << 20)
    except (OSError, ValueError, http.client.HTTPException) as error:  # unreachable, no address, no HTTP
        reason = getattr(error, "reason", error)
        raise BDHError(
            f"data.corpus shakespeare must be downloaded once and {url} cannot be reached ({reason}); two ways on: "
            f"put the text at {target} by hand, or train on what is here with --data.corpus pydoc"
        ) from error
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        raise BDHError(f"{url} did not return the tinyshakespeare text (wrong checksum); nothing was kept")
    return content


def _write_atomically(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_atomically(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise BDHError(f"data.cache_dir {path.parent} cannot be written: {error.strerror}") from error
