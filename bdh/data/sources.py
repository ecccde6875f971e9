"""Texts from anywhere, read by `datasets`: files, folders, globs, addresses, and datasets of the Hugging Face hub.

Every source comes out the same: a `Dataset`, or an `IterableDataset` when streaming, with the columns `text` (str or
None) and, for plain text read in pieces, `ends` (whether the document ends with the row).
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value, load_dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from bdh.atomic_files import replace_atomically
from bdh.data.chat import CHAT_COLUMNS
from bdh.data.path_resolution import Location, find, suffix_of
from bdh.data.settings import SourceConfig
from bdh.data.source_errors import cache_folder, explain, offline, reason
from bdh.data.tables import (
    SAMPLE_ROWS,
    as_json,
    chat_values,
    has_column,
    sample_columns,
    table_parts,
    text_values,
)
from bdh.data.text_files import is_local, parts_of, text_rows, whole_files
from bdh.errors import BDHError

datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it then raises, which is said in our words
huggingface_hub.logging.set_verbosity_error()
if not sys.stderr.isatty():
    datasets.disable_progress_bars()

TABLE_ROWS = Features({"text": Value("large_string")})
TEXT_ROWS = Features({"text": Value("large_string"), "ends": Value("bool"), "key": Value("string")})


def open_source(
    source: SourceConfig,
    streaming: bool,
    split: str | None = None,
    ask_hub: bool = True,
    readers: int = 1,
    location: Location | None = None,
) -> Dataset | IterableDataset:
    """The rows of a source, with the columns `text` and perhaps `ends` and `key` (see `text_rows`).

    Args:
        source: The text.
        streaming: Whether to read lazily.
        split: Another split than `source.split`.
        ask_hub: Whether to find out first if the hub can be reached; False for a source that was opened before.
        readers: How many will share a stream.
        location: Where `source.path` is, if that is known already.

    Raises:
        BDHError: There is no such file or dataset, it cannot be reached or read, or has no single text column.
    """
    location = location or find(source.path)
    with explained(source):
        if location.kind == "dataset" and ask_hub and not Path(location.name).exists():
            check_hub(source)
        return _open(location, source, streaming, split or source.split, readers)


def check_hub(source: SourceConfig) -> None:
    """Asks the hub for a dataset once. `datasets` itself would ask many times over before it says what is wrong.

    Where the hub cannot be reached, what an earlier run left in the cache is used, unless a revision is named, for the
    cache does not tell which one it is of.

    Raises:
        Exception: The library's own, for a name, a revision or a permission that does not exist.
    """
    if offline():
        return
    try:
        HfApi().dataset_info(source.path, revision=source.revision, timeout=20)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        raise
    except Exception as error:  # refused, timed out, or answered with a failure of its own
        if source.revision is not None or not in_cache(source.path):
            raise ConnectionError(reason([error])) from error
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True


def in_cache(name: str) -> bool:
    """Whether `datasets` has prepared a dataset of this name before."""
    return (cache_folder() / name.replace("/", "___")).is_dir()


def _open(
    location: Location, source: SourceConfig, streaming: bool, split: str, readers: int
) -> Dataset | IterableDataset:
    _check_dataset_path(location, source)
    if location.kind == "saved":
        return only_text(_saved(location, source, streaming, split), source)
    if location.kind == "dataset":
        data = load_dataset(
            location.name, name=source.config, split=split, revision=source.revision, streaming=streaming
        )
        if isinstance(data, IterableDataset):
            data = data.reshard()  # Parquet's row groups are places to go on from
        return only_text(data, source)
    if split != "train":
        raise BDHError(
            f"data: {source.path} has no split {split}; only datasets have splits, files are all train; to split the "
            "files of a folder, name those of each split in its README.md (configs with data_files)"
        )
    files = [file if streaming or is_local(file) else _downloaded(file) for file in location.files]
    if location.kind == "text":
        _check_plain(source)
        parts = parts_of(files, readers) if streaming else whole_files(files)
        return _generated(text_rows, TEXT_ROWS, {"parts": parts}, streaming)
    column = _table_column(location.kind, files, source)
    parts = table_parts(location.kind, files, streaming, readers)
    gen_kwargs = {"kind": location.kind, "parts": parts, "column": column}
    return _generated(chat_values if source.chat else text_values, TABLE_ROWS, gen_kwargs, streaming)


def _check_dataset_path(location: Location, source: SourceConfig) -> None:
    """Refuses a local dataset in whose path `datasets` would take characters for a glob or for chained addresses."""
    special = {"dataset": r"[*?\[\]]|::", "saved": "::"}.get(location.kind)
    if special is not None and (match := re.search(special, location.name)):
        raise BDHError(
            f"data.path {source.path} is the folder of a dataset, which `datasets` cannot read because of the "
            f"{match.group()!r} in its path; rename the folder, or name its files, as in 'FOLDER/*.jsonl'"
        )


def _check_plain(source: SourceConfig) -> None:
    """Refuses settings that plain text cannot have."""
    if source.text_column is not None:
        raise BDHError(f"data.text_column is {source.text_column}, but {source.path} is plain text without columns")
    if source.chat:
        raise BDHError(
            f"data.chat true needs rows of messages, but {source.path} is plain text; give .jsonl or .parquet"
        )


def _downloaded(address: str) -> str:
    """A copy of a remote file in the cache, decompressed; one that has changed there is downloaded again.

    The cache names files by their addresses' hashes. A file of tabs gets a second name, which says so.
    """
    path = Path(datasets.DownloadManager().download_and_extract(address))
    if suffix_of(address) != ".tsv":
        return str(path)
    named = path.with_name(f"{path.name}.tsv")
    with replace_atomically(named) as partial:
        partial.symlink_to(path)
    return str(named)


def _generated(rows: Any, features: Features, gen_kwargs: dict[str, Any], streaming: bool) -> Dataset | IterableDataset:
    """The dataset of the rows that a function generates from keyword arguments, of which lists can be divided."""
    kind = IterableDataset if streaming else Dataset
    return kind.from_generator(rows, features=features, gen_kwargs=gen_kwargs)


def _saved(location: Location, source: SourceConfig, streaming: bool, split: str) -> Dataset | IterableDataset:
    """Loads the output of `save_to_disk`: one dataset, or several by the names of their splits."""
    saved = datasets.load_from_disk(location.name)
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise BDHError(f"data.split {split} is not a split of {source.path}; there are {', '.join(saved)}")
        saved = saved[split]
    elif split != "train":
        raise BDHError(f"data: {source.path} has no split {split}; it was saved as a single one")
    return saved.to_iterable_dataset(num_shards=min(64, max(len(saved), 1))) if streaming else saved


def only_text(data: Dataset | IterableDataset, source: SourceConfig) -> Dataset | IterableDataset:
    """The data with its text column alone, called `text`; of conversations, their messages, as JSON in a stream."""
    name = choose_chat_column(columns(data), source) if source.chat else choose_column(text_columns(data), source)
    data = data.select_columns([name])
    data = data if name == "text" else data.rename_column(name, "text")
    return data.map(_as_json, features=TABLE_ROWS) if source.chat and isinstance(data, IterableDataset) else data


def _as_json(row: dict[str, Any]) -> dict[str, Any]:
    return {"text": as_json(row["text"])}


def _table_column(kind: str, files: list[str], source: SourceConfig) -> str:
    """The column of files to read: the one that is asked for, in whichever file or row it first appears.

    Raises:
        BDHError: There is no such column, or none is asked for and there are none or several.
    """
    samples = sample_columns(kind, files)
    names = list(dict.fromkeys(name for sample in samples for name in sample))
    name = source.text_column
    if name is not None and name not in names and has_column(kind, files, name):
        return name
    if source.chat:
        return choose_chat_column(names, source)
    if name is not None and any(sample.get(name, False) is None for sample in samples):
        return name  # no value of it was seen yet
    texts = [name for name in names if any(sample.get(name) for sample in samples)]
    with_text = [sample for sample in samples if any(sample.values())]
    everywhere = [name for name in texts if all(sample.get(name, False) is not False for sample in with_text)]
    if name is None and not texts and names:
        raise BDHError(
            f"data: {source.path} has no text column in the first {SAMPLE_ROWS} rows of a file, which have "
            f"{', '.join(names)}; if there is one, name it: --data.text_column"
        )
    return choose_column(everywhere if name is None and len(everywhere) == 1 else texts, source)


def choose_column(columns: list[str], source: SourceConfig) -> str:
    """The text column that is asked for, or the only one there is. Raises BDHError."""
    name = source.text_column
    if name is None and len(columns) != 1:
        have = f"has several text columns: {', '.join(columns)}" if columns else "has no text column"
        hint = "; name one: --data.text_column" if columns else ""
        raise BDHError(f"data: {source.path} {have}{hint}")
    if name is not None and name not in columns:
        there = f"it has {', '.join(columns)}" if columns else "none was found"
        raise BDHError(f"data.text_column {name} is not a text column of {source.path}; {there}")
    return name or columns[0]


def choose_chat_column(columns: list[str], source: SourceConfig) -> str:
    """The column of messages that is asked for, or the first there is of those usual. Raises BDHError."""
    usual = [name for name in CHAT_COLUMNS if name in columns]
    name = source.text_column or next(iter(usual), None)
    if name is None or name not in columns:
        wanted = f"column {name}" if name else f"column {' or '.join(CHAT_COLUMNS)}"
        raise BDHError(
            f"data: {source.path} has no {wanted}; it has {', '.join(columns)}; name one: --data.text_column"
        )
    return name


def columns(data: Dataset | IterableDataset) -> list[str]:
    """The names of all columns; of a stream that does not say, those of its first row."""
    return list(data.features or next(data.iter(batch_size=1), {}))


def text_columns(data: Dataset | IterableDataset) -> list[str]:
    """The columns that hold text; of a stream that does not say, those of its first row."""
    if data.features is None:
        first: dict[str, list[Any]] = next(data.iter(batch_size=1), {})
        return [name for name, values in first.items() if isinstance(values[0], str)]
    texts = ("string", "large_string", "string_view")
    return [name for name, kind in data.features.items() if isinstance(kind, Value) and kind.dtype in texts]


@contextmanager
def explained(source: SourceConfig) -> Iterator[None]:
    """Turns what `datasets` and the hub raise into one line."""
    try:
        yield
    except (BDHError, AssertionError, AttributeError, IndexError, NameError):  # said already, or a defect of ours
        raise
    except Exception as error:  # many kinds, most of them no part of an interface; `explain` knows the usual ones
        raise BDHError(explain(error, source)) from error
