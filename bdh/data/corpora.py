"""Corpora: text by name, or from any file or folder.

`pydoc`        the Python language reference, which every Python carries: English prose, no download (default)
`stdlib`       the source of Python's standard library, without its tests
`shakespeare`  tinyshakespeare, 1.1 MB; downloaded once (BDH_SHAKESPEARE_URL names another address), checked, and kept
               in the cache folder
"""

import hashlib
import http.client
import os
import sysconfig
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from bdh.errors import BDHError

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".rst", ".py", ".tex", ".html", ".csv", ".log"})
DOCUMENT_BREAK = "\n\n"


CORPORA = ("pydoc", "stdlib", "shakespeare")


@dataclass(frozen=True)
class Corpus:
    """A text and where it came from."""

    name: str
    text: str


def load_corpus(name: str, path: str | None = None, cache_dir: str = "~/.cache/bdh") -> Corpus:
    """The text at `path` if one is given, otherwise the corpus called `name`.

    Args:
        name: One of `CORPORA`.
        path: A text file, or a folder whose text files are joined in the order of their names.
        cache_dir: Where a downloaded corpus is kept.

    Raises:
        BDHError: The file is missing, empty or not UTF-8; the folder has no text; a download fails.
    """
    if path is not None:
        return Corpus(path, read_path(Path(path).expanduser()))
    if name == "shakespeare":
        return Corpus(name, shakespeare(Path(cache_dir).expanduser()))
    return Corpus(name, {"pydoc": pydoc, "stdlib": stdlib}[name]())


def pydoc() -> str:
    """The topics of Python's own `help()`: most of the language reference, about half a megabyte."""
    from pydoc_data.topics import topics

    return DOCUMENT_BREAK.join(topics[name] for name in sorted(topics))


def stdlib() -> str:
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
    return DOCUMENT_BREAK.join(texts)


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
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            partial = Path(folder) / path.name
            partial.write_bytes(content)
            partial.replace(path)
    except OSError as error:
        raise BDHError(f"data.cache_dir {path.parent} cannot be written: {error.strerror}") from error


def read_path(path: Path) -> str:
    """The text of a file, or of all text files below a folder, joined in the order of their paths."""
    if not path.exists():
        raise BDHError(f"data.path {path} does not exist")
    if path.is_file():
        text = _read_text(path)
        if not text:
            raise BDHError(f"data.path {path} is empty")
        return text
    files = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix.lower() in TEXT_SUFFIXES)
    texts = [text for text in map(_read_text, files) if text]
    if not texts:
        raise BDHError(f"data.path {path} holds no text; looked for files ending in {' '.join(sorted(TEXT_SUFFIXES))}")
    return DOCUMENT_BREAK.join(texts)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # no newline translation: what is in the file is what is learned
    except UnicodeDecodeError as error:
        raise BDHError(
            f"data.path {path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from error
    except OSError as error:
        raise BDHError(f"data.path {path} cannot be read: {error.strerror}") from error
