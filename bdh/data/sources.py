"""Texts from anywhere, read by `datasets`: files, folders, globs, addresses, and datasets of the Hugging Face hub.

Every source comes out the same: a `Dataset`, or an `IterableDataset` when streaming, with the columns `text` (str or
None) and, for plain text read in pieces, `ends` (whether the document ends with the row).
"""

import glob
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value, load_dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from bdh.data.chat import CHAT_COLUMNS
from bdh.data.failures import cache_folder, explain, offline, reason
from bdh.data.parts import (
    COMPRESSIONS,
    TEXT_SUFFIXES,
    Part,
    is_compressed,
    is_local,
    json_chats,
    json_columns,
    json_rows,
    parts_of,
    text_rows,
    whole_files,
)
from bdh.data.settings import SourceConfig
from bdh.errors import BDHError

datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it then raises, which is said in our words
huggingface_hub.logging.set_verbosity_error()
if not sys.stderr.isatty():
    datasets.disable_progress_bars()

KINDS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
LINES = frozenset({".jsonl", ".ndjson"})
JSON_ROWS = Features({"text": Value("large_string")})
TEXT_ROWS = Features({"text": Value("large_string"), "ends": Value("bool"), "key": Value("string")})


@dataclass(frozen=True)
class Place:
    """What a path turned out to be.

    Attributes:
        kind: text, json, csv, parquet, arrow: `files` of that format; dataset: a folder or a name for `load_dataset`;
            saved: a folder that `save_to_disk` wrote.
        files: Paths or addresses, in the order of their names.
        name: Of a dataset: the folder, or the name on the hub.
    """

    kind: str
    files: tuple[str, ...] = ()
    name: str = ""


def open_source(
    source: SourceConfig, streaming: bool, split: str | None = None, ask_hub: bool = True, readers: int = 1
) -> Dataset | IterableDataset:
    """The rows of a source, with the columns `text` and perhaps `ends` and `key` (see `text_rows`).

    Args:
        source: What to read.
        streaming: Whether to read lazily.
        split: Another split than `source.split`.
        ask_hub: Whether to find out first if the hub can be reached; not for who opens a source once more.
        readers: How many will share a stream.

    Raises:
        BDHError: There is no such file or dataset, it cannot be reached or read, or has no single text column.
    """
    place = find(source.path)
    with explained(source):
        if place.kind == "dataset" and ask_hub and not Path(place.name).exists():
            check_hub(source)
        return _open(place, source, streaming, split or source.split, readers)


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


def _open(place: Place, source: SourceConfig, streaming: bool, split: str, readers: int) -> Dataset | IterableDataset:
    if place.kind not in ("dataset", "saved") and split != "train":
        raise BDHError(f"data: {source.path} has no split {split}; only datasets have splits, files are all train")
    files = list(place.files)
    if place.kind == "text" and source.text_column is not None:
        raise BDHError(f"data.text_column is {source.text_column}, but {source.path} is plain text without columns")
    if place.kind == "text" and source.chat:
        raise BDHError(
            f"data.chat true needs rows of messages, but {source.path} is plain text; give .jsonl or .parquet"
        )
    if place.kind == "text":
        return _generated(text_rows, TEXT_ROWS, {"parts": _parts(files, streaming, readers)}, streaming)
    if place.kind == "json" and all(suffix_of(file) in LINES and (streaming or is_local(file)) for file in files):
        parts = _parts(files, streaming, readers)
        if source.chat:
            column = choose_chat_column(json_columns(parts, object), source)
            return _generated(json_chats, JSON_ROWS, {"parts": parts, "column": column}, streaming)
        column = choose_column(json_columns(parts), source)
        return _generated(json_rows, JSON_ROWS, {"parts": parts, "column": column}, streaming)
    if place.kind == "saved":
        return only_text(_saved(place, source, streaming, split), source)
    if place.kind == "dataset":
        data = load_dataset(place.name, name=source.config, split=split, revision=source.revision, streaming=streaming)
    else:
        names = {"train": [glob.escape(file) if is_local(file) else file for file in files]}
        data = load_dataset(
            place.kind, data_files=names, split="train", streaming=streaming, **reading(place.kind, files)
        )
    if isinstance(data, IterableDataset):
        data = data.reshard()  # Parquet's row groups are places to go on from
    return only_text(data, source)


def _parts(files: list[str], streaming: bool, readers: int) -> list[Part]:
    return parts_of(files, readers) if streaming else whole_files(files)


def _generated(rows: Any, features: Features, given: dict[str, Any], streaming: bool) -> Dataset | IterableDataset:
    kind = IterableDataset if streaming else Dataset
    return kind.from_generator(rows, features=features, gen_kwargs=given)


def _saved(place: Place, source: SourceConfig, streaming: bool, split: str) -> Dataset | IterableDataset:
    """What `save_to_disk` wrote: one dataset, or several by the names of their splits."""
    saved = datasets.load_from_disk(place.name)
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise BDHError(f"data.split {split} is not a split of {source.path}; there are {', '.join(saved)}")
        saved = saved[split]
    elif split != "train":
        raise BDHError(f"data: {source.path} has no split {split}; it was saved as a single one")
    return saved.to_iterable_dataset(num_shards=min(64, max(len(saved), 1))) if streaming else saved


def reading(kind: str, files: list[str]) -> dict[str, Any]:
    """How `datasets` is to read a format: bytes that are not UTF-8 become U+FFFD instead of ending the run."""
    if kind == "json":
        return {
            "encoding": "utf8",
            "encoding_errors": "replace",
        }  # the library decodes leniently only what is not "utf-8"
    if kind == "csv":
        return {"encoding_errors": "replace", **({"sep": "\t"} if suffix_of(files[0]) == ".tsv" else {})}
    return {}


def only_text(data: Dataset | IterableDataset, source: SourceConfig) -> Dataset | IterableDataset:
    """The data with its text column alone, called `text`; of conversations, their messages, as JSON in a stream."""
    name = choose_chat_column(columns(data), source) if source.chat else choose_column(text_columns(data), source)
    data = data.select_columns([name])
    data = data if name == "text" else data.rename_column(name, "text")
    return data.map(_as_json, features=JSON_ROWS) if source.chat and isinstance(data, IterableDataset) else data


def _as_json(row: dict[str, Any]) -> dict[str, Any]:
    return {"text": None if row["text"] is None else json.dumps(row["text"])}


def choose_column(columns: list[str], source: SourceConfig) -> str:
    """The text column that is asked for, or the only one there is. Raises BDHError."""
    name = source.text_column
    if name is None and len(columns) != 1:
        have = f"has several text columns: {', '.join(columns)}" if columns else "has no text column"
        hint = "; name one: --data.text_column" if columns else ""
        raise BDHError(f"data: {source.path} {have}{hint}")
    if name is not None and name not in columns:
        there = f"it has {', '.join(columns)}" if columns else "it has none"
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
    texts = ("string", "large_string")
    return [name for name, kind in data.features.items() if isinstance(kind, Value) and kind.dtype in texts]


# ---------------------------------------------------------------------------------------------------- finding


def find(path: str) -> Place:
    """What a path is: files and their format, a dataset's folder, or else a name on the hub. Raises BDHError."""
    if not path:
        raise BDHError("data.path is empty; it must name a file, a folder, a dataset, or be left out")
    if not is_local(path):
        kind = kind_of(path)
        if kind is None:
            raise BDHError(f"data.path {path} ends in none of the known formats: {known_suffixes()}")
        return Place(kind, (path,))
    local = Path(path).expanduser()
    try:
        if local.is_file() and kind_of(path) is None and is_text(local):
            return Place("text", (str(local),))
        if local.is_file():
            return of_one_kind(path, [str(local)])
        if local.is_dir():
            return in_folder(local)
    except OSError as error:
        raise BDHError(f"data.path {path} cannot be read: {error.strerror}") from error
    if glob.has_magic(path):
        found = sorted(name for name in glob.glob(str(local), recursive=True) if Path(name).is_file())  # noqa: PTH207
        if not found:
            raise BDHError(f"data.path {path} matches no file")
        return of_one_kind(path, found)
    if is_hub_name(path):
        return Place("dataset", name=path)
    raise BDHError(f"data.path {path} does not exist")


def is_hub_name(path: str) -> bool:
    """Whether a path that is not on this disk can be the name of a dataset: NAME or OWNER/NAME, and no file's."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) is not None and path[0] not in "./~" and kind_of(path) is None


def in_folder(folder: Path) -> Place:
    """A saved dataset, a dataset with its card or with files of one format, or text files."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return Place("saved", name=str(folder))
    card = folder / "README.md"
    front = _front_matter(card)
    if re.search(r"^(configs|dataset_info):", front, re.MULTILINE):
        return Place("dataset", name=str(folder))
    files = sorted(str(file) for file in folder.rglob("*") if file.is_file() and not hidden(file, folder))
    files = [file for file in files if not (front and Path(file) == card)]
    kinds = {kind_of(file) for file in files if Path(file) != card} - {None}
    if kinds - {"text"}:
        if len(kinds) > 1:
            raise BDHError(
                f"data.path {folder} holds files of several formats ({', '.join(sorted(map(str, kinds)))}); name one "
                f"by a glob, as in '{folder}/*.jsonl'"
            )
        return Place("dataset", name=str(folder))
    texts = [file for file in files if kind_of(file) == "text"]
    if not texts:
        raise BDHError(f"data.path {folder} holds no text; looked for files ending in {known_suffixes()}")
    return of_one_kind(str(folder), texts)


def is_text(file: Path) -> bool:
    """Whether a file of an unknown format begins like text: UTF-8 without control characters."""
    with file.open("rb") as stream:
        head = stream.read(4096)
    text = head.decode("utf-8", errors="ignore")
    return len(text.encode()) > len(head) - 4 and not set(text) & set(map(chr, [*range(9), *range(14, 27)]))


def _front_matter(card: Path) -> str:
    """What stands between the first two lines of dashes of a dataset's card; nothing where it is no card."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return text.split("\n---", 1)[0].removeprefix("---") if text.startswith("---\n") else ""


def hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def of_one_kind(path: str, files: list[str]) -> Place:
    """Files that must all be of one known format, and not all empty."""
    kinds = {kind_of(file) for file in files}
    if None in kinds:
        strange = next(file for file in files if kind_of(file) is None)
        raise BDHError(f"data.path {strange} is of no known format; known are {known_suffixes()}")
    if len(kinds) > 1:
        raise BDHError(f"data.path {path} matches files of several formats: {', '.join(sorted(map(str, kinds)))}")
    full = [file for file in files if Path(file).stat().st_size]
    if not full:
        raise BDHError(f"data.path {path} is empty")
    return Place(str(kinds.pop()), tuple(full))


def kind_of(file: str) -> str | None:
    """The format of a file by its name, what it is compressed with left out; None for an unknown one."""
    suffix = suffix_of(file)
    return "text" if suffix in TEXT_SUFFIXES else KINDS.get(suffix)


def suffix_of(file: str) -> str:
    name = Path(file.split("?")[0])
    return (name.with_suffix("") if is_compressed(str(name)) else name).suffix.lower()


def known_suffixes() -> str:
    return f"{' '.join(sorted([*KINDS, *TEXT_SUFFIXES]))} (and these with {' '.join(sorted(COMPRESSIONS))})"


@contextmanager
def explained(source: SourceConfig) -> Iterator[None]:
    """Turns what `datasets` and the hub raise into one line."""
    try:
        yield
    except (BDHError, AssertionError, AttributeError, IndexError, NameError):  # said already, or a defect of ours
        raise
    except Exception as error:  # many kinds, most of them no part of an interface; `explain` knows the usual ones
        raise BDHError(explain(error, source)) from error
