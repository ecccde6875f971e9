"""Files in parts, and plain text as rows: from any part on, in bounded memory, whatever the length of a line.

A stream that continues in the middle of one large file, or that several readers share, needs offsets to start at. So a
file is a list of parts, each part a shard of a `datasets` stream.
"""

import codecs
import io
import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

# A part of a file: path or address, first byte, byte after the last (-1: to the end), and the version of the file. Of
# Parquet, row groups are counted instead of bytes. A tuple of plain values, so that it has a fingerprint.
Part = tuple[str, int, int, str]

TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".rst", ".py", ".tex", ".html", ".log"})
COMPRESSIONS = frozenset({".gz", ".bz2", ".xz", ".zst", ".lz4"})
PART_BYTES = 16 << 20  # what a resumed stream reads again at the most
SMALLEST_PART = 1 << 13
PIECE = 1 << 13  # characters of a row of text
KEY = 256  # characters that tell one part from another
READ = 1 << 16  # bytes read at a time


def whole_files(files: list[str]) -> list[Part]:
    """Each file as one part."""
    return [(file, 0, -1, version(file)) for file in files]


def parts_of(files: list[str], readers: int = 1) -> list[Part]:
    """The files in equal parts, enough for `readers` to share them evenly.

    What is compressed, or not on this disk, stays whole.
    """
    sizes = {file: Path(file).stat().st_size for file in files if is_local(file) and not is_compressed(file)}
    size = min(max(sum(sizes.values()) // (8 * max(readers, 8)), SMALLEST_PART), PART_BYTES)
    parts: list[Part] = []
    for file in files:
        if file not in sizes:
            parts.append((file, 0, -1, version(file)))
            continue
        count = max(round(sizes[file] / size), 1)
        bounds = [sizes[file] * i // count for i in range(count + 1)]
        parts += [(file, begin, end, version(file)) for begin, end in pairwise(bounds)]
    return parts


def is_local(file: str) -> bool:
    """Whether a name is a path on this disk, and not an address such as https://… or zip://…::https://…."""
    return re.match(r"[A-Za-z][\w+.-]*(::[A-Za-z][\w+.-]*)*://", file) is None


def is_compressed(file: str) -> bool:
    return Path(file).suffix.lower() in COMPRESSIONS


def version(file: str) -> str:
    """A value that changes when a local file changes; the address of a remote one."""
    if not is_local(file):
        return file
    known = Path(file).stat()
    return f"{known.st_size}-{known.st_mtime_ns}"


def text_rows(parts: list[Part]) -> Iterator[dict[str, Any]]:
    """The text of parts, a row of at most PIECE characters at a time: {"text": str, "ends": bool, "key": str}.

    A row ends where a line does, or a word, if one does in its second half. `ends` marks the last row of a part, which
    ends a document; `key` is the beginning of the part's text, the same for all its rows. Bytes that are not UTF-8
    become U+FFFD.
    """
    for part in parts:
        pending = key = ""
        for text in _decoded(part):
            pending += text
            while len(pending) > PIECE:
                cut = _good_cut(pending)
                key = key or pending[:KEY]
                yield {"text": pending[:cut], "ends": False, "key": key}
                pending = pending[cut:]
        yield {"text": pending, "ends": True, "key": key or pending[:KEY]}


def _good_cut(text: str) -> int:
    """The index to cut a row at: after a line, else before a word, in the second half of the first PIECE characters."""
    line = text.rfind("\n", PIECE // 2, PIECE)
    if line >= 0:
        return line + 1
    word = text.rfind(" ", PIECE // 2, PIECE)
    return word if word >= 0 else PIECE


def _decoded(part: Part) -> Iterator[str]:
    """The text of a part. A character that a boundary divides belongs to the part it begins in."""
    _, begin, end, _ = part
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    with open_file(part[0]) as stream:
        place = begin
        if begin:
            stream.seek(begin)
        first = True
        while data := stream.read(READ if end < 0 else max(min(READ, end - place), 0)):
            place += len(data)
            if first and begin:
                data = data[_continuation(data) :]
            first = False
            yield decoder.decode(data)
        if end >= 0:
            tail = stream.read(3)
            yield decoder.decode(tail[: _continuation(tail)])
        yield decoder.decode(b"", final=True)


def _continuation(data: bytes) -> int:
    """The number of leading bytes (3 at the most) that continue a character of the bytes before."""
    count = 0
    while count < min(3, len(data)) and data[count] & 0xC0 == 0x80:
        count += 1
    return count


def skip_line(stream: BinaryIO) -> int:
    """Reads to the end of a line in bounded memory; returns the bytes read."""
    count = 0
    while data := stream.readline(1 << 20):
        count += len(data)
        if data.endswith(b"\n"):
            break
    return count


def open_file(file: str) -> Any:
    """A binary stream of a file, decompressed as its name says. The rules of addresses are for addresses only."""
    if is_local(file):
        stream = fsspec.filesystem("file").open(os.path.abspath(file), "rb", compression="infer")  # noqa: PTH100
    else:
        stream = fsspec.open(file, "rb", compression="infer").open()
    return io.BufferedReader(stream) if is_compressed(file) else stream  # not every decompressor has readline
