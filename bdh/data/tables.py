"""Rows of one column of files with columns: Parquet, Arrow, CSV, JSON and JSON lines.

`datasets` reads files of a format as one table, so that columns, or the fields of messages, that differ between files
are errors. Here each file is read by itself, and of it the column that is asked for. A file without that column gives
None for each of its rows, so that the rows are counted.
"""

import csv
import io
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import repeat
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
from pyarrow import parquet

from bdh.data.json_files import LINES, json_columns, json_has_column, json_values
from bdh.data.path_resolution import suffix_of
from bdh.data.text_files import Part, is_compressed, is_local, open_file, parts_of, version, whole_files
from bdh.errors import BDHError, one_line

SAMPLE_ROWS = 100  # of a file, to learn which columns hold text
SAMPLE_FILES = 100  # looked into, spread evenly
BATCH = 1000  # rows read at a time

Values = Callable[[Part, str], Iterator[tuple[Any, str]]]


def text_values(kind: str, parts: list[Part], column: str) -> Iterator[dict[str, Any]]:
    """The texts of parts: {"text": str or None}. Raises BDHError for a value that is no text."""
    for part in parts:
        for value, position in VALUES[kind](part, column):
            if not isinstance(value, str | None):
                shown = json.dumps(value, default=str)[:40]
                raise BDHError(f"{part[0]} has {shown} {position} where a text should be, under {column}")
            yield {"text": value}


def chat_values(kind: str, parts: list[Part], column: str) -> Iterator[dict[str, Any]]:
    """As `text_values`, of conversations: the value as JSON, whatever it is."""
    for part in parts:
        for value, _ in VALUES[kind](part, column):
            yield {"text": as_json(value)}


def as_json(messages: Any) -> str | None:
    """The messages of a row as JSON; a text is JSON already."""
    return messages if isinstance(messages, str | None) else json.dumps(messages, default=str)


def table_parts(kind: str, files: list[str], streaming: bool, readers: int) -> list[Part]:
    """Files in parts: of a stream bytes of JSON lines, or row groups of Parquet; else, and of the rest, whole files."""
    if streaming and kind == "parquet":
        return [part for file in files for part in _row_groups(file)] or whole_files(files)
    if not streaming or kind != "json":
        return whole_files(files)
    lines = [file for file in files if suffix_of(file) in LINES]
    parts = parts_of(lines, readers)
    order = {file: number for number, file in enumerate(files)}
    whole = whole_files([file for file in files if file not in lines])
    return sorted([*parts, *whole], key=lambda part: (order[part[0]], part[1]))


def sample_columns(kind: str, files: list[str]) -> list[dict[str, bool | None]]:
    """For each of up to SAMPLE_FILES files: its columns, and whether they hold text.

    None for a column whose type is not known: all values that were looked at are null, or it is a number of a CSV file.
    """
    chosen = files
    if len(files) > SAMPLE_FILES:
        chosen = [files[int(i)] for i in np.linspace(0, len(files) - 1, SAMPLE_FILES)]
    return [COLUMNS[kind](part) for part in whole_files(chosen)]


def has_column(kind: str, files: list[str], column: str) -> bool:
    """Whether a column that was not in the sample is in any file. An address is not searched: it may have it."""
    if kind == "json":
        return any(not is_local(part[0]) or json_has_column(part, column) for part in whole_files(files))
    return any(column in COLUMNS[kind](part) for part in whole_files(files))


# ------------------------------------------------------------------------------------------- Arrow and Parquet


def _parquet_values(part: Part, column: str) -> Iterator[tuple[Any, str]]:
    file, begin, end, _ = part
    with _seekable(file) as stream:
        table = parquet.ParquetFile(stream)
        groups = range(table.num_row_groups) if end < 0 else range(begin, end)
        if column not in table.schema_arrow.names:
            yield from repeat((None, ""), sum(table.metadata.row_group(group).num_rows for group in groups))
            return
        for group in groups:
            batches = table.iter_batches(BATCH, row_groups=[group], columns=[column])
            yield from _numbered((batch.column(column) for batch in batches), f" of row group {group}")


def _parquet_columns(part: Part) -> dict[str, bool | None]:
    with _seekable(part[0]) as stream:
        return _arrow_types(parquet.ParquetFile(stream).schema_arrow)


def _row_groups(file: str) -> list[Part]:
    with _seekable(file) as stream:
        count = parquet.ParquetFile(stream).num_row_groups
    return [(file, group, group + 1, version(file)) for group in range(count)]


def _arrow_values(part: Part, column: str) -> Iterator[tuple[Any, str]]:
    with _seekable(part[0]) as stream:
        schema, batches = _arrow_batches(stream)
        if column in schema.names:
            yield from _numbered((batch.column(column) for batch in batches), "")
        else:
            yield from repeat((None, ""), sum(batch.num_rows for batch in batches))


def _arrow_columns(part: Part) -> dict[str, bool | None]:
    with _seekable(part[0]) as stream:
        return _arrow_types(_arrow_batches(stream)[0])


def _arrow_batches(stream: Any) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The schema and the batches of a file in Arrow's stream format, or in its file format."""
    try:
        reader = pa.ipc.open_stream(stream)
        return reader.schema, iter(reader)
    except pa.ArrowInvalid:
        stream.seek(0)
        table = pa.ipc.open_file(stream)
        return table.schema, (table.get_batch(i) for i in range(table.num_record_batches))


def _arrow_types(schema: pa.Schema) -> dict[str, bool | None]:
    return {field.name: _holds_text(field.type) for field in schema}


def _holds_text(kind: pa.DataType) -> bool | None:
    if isinstance(kind, pa.BaseExtensionType):
        return _holds_text(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _holds_text(kind.value_type)
    if pa.types.is_null(kind):
        return None
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _numbered(arrays: Iterable[pa.Array], of: str) -> Iterator[tuple[Any, str]]:
    number = 0
    for array in arrays:
        for value in array.to_pylist():
            number += 1
            yield value, f"in row {number}{of}"


@contextmanager
def _seekable(file: str) -> Iterator[Any]:
    """A stream of a file that can be read in any order; of a compressed file, of a temporary copy."""
    with open_file(file) as stream:
        if not is_compressed(file):
            yield stream
            return
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(stream, copy)
            copy.seek(0)
            yield copy


# --------------------------------------------------------------------------------------------------------- CSV


def _csv_values(part: Part, column: str) -> Iterator[tuple[Any, str]]:
    columns = _csv_columns(part)
    if not columns:
        return
    number = 0
    with open_file(part[0]) as stream, _naming_long_rows(part[0]):
        # All of a CSV file is text: neither "NA" nor "1984" is anything else. All columns are read, as with `usecols`
        # pandas drops what a row has more than the header.
        options = {"dtype": object, "na_filter": False, "chunksize": BATCH}
        frames = iter(pandas.read_csv(stream, **_csv_options(part[0]), **options))
        while (frame := _next_frame(frames)) is not None:
            for value in frame[column].tolist() if column in columns else repeat(None, len(frame)):
                number += 1
                yield value, f"in row {number}"


def _next_frame(frames: Iterator[pandas.DataFrame]) -> pandas.DataFrame | None:
    """The next rows, None at the end. Raises ParserWarning where pandas would warn of fields beyond the header."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", pandas.errors.ParserWarning)
        return next(frames, None)


def _csv_columns(part: Part) -> dict[str, bool | None]:
    with open_file(part[0]) as stream, _naming_long_rows(part[0]), warnings.catch_warnings():
        warnings.simplefilter("ignore", pandas.errors.ParserWarning)  # an error when the values are read
        try:
            head = pandas.read_csv(stream, **_csv_options(part[0]), nrows=SAMPLE_ROWS)
        except pandas.errors.EmptyDataError:  # nothing but line ends
            return {}
    return {str(name): pandas.api.types.is_string_dtype(head[name].dtype) or None for name in head.columns}


@contextmanager
def _naming_long_rows(file: str) -> Iterator[None]:
    """Raises BDHError for a row with more fields than the header, of which pandas tells in several ways."""
    try:
        yield
    except (pandas.errors.ParserError, pandas.errors.ParserWarning) as error:
        row = _first_long_row(file)
        if row is None:
            raise BDHError(f"{file} cannot be read: {one_line(error)}") from error
        raise BDHError(
            f"{file} has more fields in row {row} than its header; put texts that hold the separator "
            "between double quotes"
        ) from error


def _first_long_row(file: str) -> int | None:
    """The number, from 1, of the first row that has more fields than the header; None if that cannot be told."""
    with open_file(file) as stream, suppress(csv.Error):
        lines = io.TextIOWrapper(stream, encoding="utf-8", errors="replace", newline="")
        rows = filter(None, csv.reader(lines, delimiter=_csv_options(file)["sep"]))
        width = len(next(rows, []))
        return next((number for number, row in enumerate(rows, 1) if any(row[width:])), None)
    return None


def _csv_options(file: str) -> dict[str, Any]:
    return {"sep": "\t" if suffix_of(file) == ".tsv" else ",", "encoding_errors": "replace", "index_col": False}


VALUES: dict[str, Values] = {
    "json": json_values,
    "csv": _csv_values,
    "parquet": _parquet_values,
    "arrow": _arrow_values,
}
COLUMNS: dict[str, Callable[[Part], dict[str, bool | None]]] = {
    "json": lambda part: json_columns(part, SAMPLE_ROWS),
    "csv": _csv_columns,
    "parquet": _parquet_columns,
    "arrow": _arrow_columns,
}
