"""Rows of JSON-lines files, in parts, and of JSON files: arrays, or objects one after another."""

import codecs
import json
from collections.abc import Iterator
from itertools import islice
from typing import Any, BinaryIO

from bdh.data.path_resolution import suffix_of
from bdh.data.text_files import Part, open_file, skip_line
from bdh.errors import BDHError

LINES = frozenset({".jsonl", ".ndjson"})
WHITE = " \t\r\n"

Row = dict[str, Any] | str


def json_values(part: Part, column: str) -> Iterator[tuple[Any, str]]:
    """The value under a column of each row, None where a row has none, and its position in words.

    A row is an object, or the text itself. Raises BDHError for anything else.
    """
    for row, position in rows_of(part):
        yield (row.get(column) if isinstance(row, dict) else row), position


def json_columns(part: Part, rows: int) -> dict[str, bool | None]:
    """The columns of the first rows, and whether they hold text; None for a column of nulls. Raises BDHError."""
    columns: dict[str, bool | None] = {}
    for row, _ in islice(rows_of(part), rows):
        for name, value in row.items() if isinstance(row, dict) else [("text", row)]:
            known = columns.get(name)
            columns[name] = known if value is None else bool(known) or isinstance(value, str)
    return columns


def json_has_column(part: Part, column: str) -> bool:
    """Whether any row has a column: reads to the first that has, and parses only rows that may. Raises BDHError."""
    spelled = [json.dumps(column, ensure_ascii=ascii).encode("utf-8", "replace") for ascii in (False, True)]
    with open_file(part[0]) as stream:
        likely = any(word in line for line in stream for word in spelled)
    return likely and any(isinstance(row, str) or column in row for row, _ in rows_of(part))


def rows_of(part: Part) -> Iterator[tuple[Row, str]]:
    """The rows of a part, each with its position in words. A line belongs to the part it begins in. Raises BDHError."""
    file, begin, end, _ = part
    with open_file(file) as stream:
        lines = suffix_of(file) in LINES or _begins_with_row(stream)
    with open_file(file) as stream:
        if lines:
            yield from _lines(stream, file, begin, end)
        else:
            yield from _values(stream.read().decode("utf-8-sig", errors="replace"), file)


def _begins_with_row(stream: BinaryIO) -> bool:
    """Whether the first line that is not empty is a row by itself."""
    while line := stream.readline(1 << 16):
        line = line.removeprefix(codecs.BOM_UTF8)
        if line.lstrip().startswith(b"["):
            return False
        if line.strip():
            line += b"" if line.endswith(b"\n") else stream.readline()
            try:
                return isinstance(json.loads(line.decode("utf-8", errors="replace")), dict | str)
            except (ValueError, RecursionError):
                return False
    return True


def _lines(stream: BinaryIO, file: str, begin: int, end: int) -> Iterator[tuple[Row, str]]:
    """The rows of the lines that begin between two offsets in bytes; to the end of the file if `end` is negative."""
    offset = begin
    if begin:  # the line that was begun before belongs to the part before
        stream.seek(begin - 1)
        offset = begin - 1 + skip_line(stream)
    while (end < 0 or offset < end) and (line := stream.readline()):
        text = line.removeprefix(codecs.BOM_UTF8) if offset == 0 else line
        if text.strip():
            try:
                row = json.loads(text.decode("utf-8", errors="replace"))
            except (ValueError, RecursionError) as error:
                raise BDHError(f"{file} is not JSON lines at byte {offset}: {error}") from error
            if not isinstance(row, dict | str):
                raise BDHError(f"{file} has a line at byte {offset} that is neither an object nor a text")
            yield row, f"at byte {offset}"
        offset += len(line)


def _values(text: str, file: str) -> Iterator[tuple[Row, str]]:
    """The rows of a whole file: JSON values, of which an array stands for its items."""
    decoder, offset, number = json.JSONDecoder(), 0, 0
    while (offset := _skip_white(text, offset)) < len(text):
        try:
            value, offset = decoder.raw_decode(text, offset)
        except (ValueError, RecursionError) as error:
            raise BDHError(f"{file} is not JSON at character {offset}: {error}") from error
        for row in value if isinstance(value, list) else [value]:
            number += 1
            if not isinstance(row, dict | str):
                raise BDHError(f"{file} has an item {number} that is neither an object nor a text")
            yield row, f"in item {number}"


def _skip_white(text: str, offset: int) -> int:
    """The offset of the first character that is not white space, from an offset on."""
    while offset < len(text) and text[offset] in WHITE:
        offset += 1
    return offset
