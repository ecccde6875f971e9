"""Resolves `data.path`: a file, a folder, a glob, an address, or a dataset of the Hugging Face hub."""

import glob
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bdh.data.text_files import COMPRESSIONS, TEXT_SUFFIXES, is_compressed, is_local
from bdh.errors import BDHError

KINDS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
SHOWN = 3  # names of unread files in a remark


@dataclass(frozen=True)
class Location:
    """The files or the dataset that a path refers to.

    Attributes:
        kind: text, json, csv, parquet, arrow: `files` of that format; dataset: a folder with a dataset card, or a name,
            for `load_dataset`; saved: a folder that `save_to_disk` wrote.
        files: Paths or addresses, in the order of their names.
        name: Of a dataset: the folder, or the name on the hub.
        remarks: Lines about files that are not read.
    """

    kind: str
    files: tuple[str, ...] = ()
    name: str = ""
    remarks: tuple[str, ...] = ()

    def size(self, path: str) -> str:
        """The number of files; empty for a dataset, which `datasets` reads, and where the path is the only file's."""
        named = self.files == (str(Path(path).expanduser()),) or not is_local(path)
        return "" if named or not self.files else counted(len(self.files), "file")


def counted(count: int, noun: str) -> str:
    """A number and its noun, as in "1 file" or "2 files"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def find(path: str) -> Location:
    """The files or the dataset that a path refers to. A path that exists on this disk is never a glob or a name.

    Raises:
        BDHError: There is nothing at the path, or nothing of a known format, or files of several formats.
    """
    if not path:
        raise BDHError("data.path is empty; it must name a file, a folder, a dataset, or be left out")
    if not is_local(path):
        kind = kind_of(path)
        if kind is None:
            raise BDHError(f"data.path {path} ends in none of the known formats: {known_suffixes()}")
        return Location(kind, (path,))
    local = Path(path).expanduser()
    try:
        if local.is_file() and kind_of(path) is None and is_text(local):
            remark = f"{path} has no suffix of a known format and is read as plain text"
            return Location("text", (str(local),), remarks=(remark,))
        if local.is_file():
            return of_one_kind(path, [str(local)])
        if local.is_dir():
            return in_folder(local)
        if glob.has_magic(path):
            return matching(path, local)
    except OSError as error:
        raise BDHError(f"data.path {path} cannot be read: {error.strerror}") from error
    if is_hub_name(path):
        return Location("dataset", name=path)
    raise BDHError(f"data.path {path} does not exist")


def matching(path: str, local: Path) -> Location:
    """The files that a glob matches."""
    names = sorted(name for name in glob.glob(glob_pattern(local), recursive=True) if Path(name).is_file())  # noqa: PTH207
    if not names:
        raise BDHError(f"data.path {path} matches no file")
    return of_one_kind(path, names)


def glob_pattern(local: Path) -> str:
    """A pattern in which the folders that exist by these names are literal, whatever characters are in their names."""
    literal = Path()
    for number, part in enumerate(local.parts):
        if not (literal / part).exists():
            return os.path.join(glob.escape(str(literal)), *local.parts[number:])  # noqa: PTH118
        literal /= part
    return glob.escape(str(literal))


def is_hub_name(path: str) -> bool:
    """Whether a path that is not on this disk can be the name of a dataset: NAME or OWNER/NAME, and no file's."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) is not None and path[0] not in "./~" and kind_of(path) is None


def in_folder(folder: Path) -> Location:
    """A saved dataset, a dataset with a card that describes it, or all files of the one known format in a folder."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return Location("saved", name=str(folder))
    card = folder / "README.md"
    front = _front_matter(card)
    if re.search(r"^(configs|dataset_info):", front, re.MULTILINE):
        return Location("dataset", name=str(folder))
    names = sorted(str(file) for file in folder.rglob("*") if file.is_file() and file.stat().st_size)
    files = [name for name in names if not hidden(Path(name), folder) and not (front and Path(name) == card)]
    kinds = {kind_of(file) for file in files if Path(file) != card} - {None}
    if len(kinds) > 1:
        raise BDHError(
            f"data.path {folder} holds files of several formats ({', '.join(sorted(map(str, kinds)))}); name one "
            f"by a glob, as in '{folder}/*.jsonl'"
        )
    kind = kinds.pop() if kinds else "text"  # a card alone is a text
    chosen = [file for file in files if kind_of(file) == kind]
    if not chosen:
        raise BDHError(f"data.path {folder} holds no text; looked for files ending in {known_suffixes()}")
    unread = [file for file in names if kind_of(file) != kind and not hidden(Path(file), folder) and Path(file) != card]
    unread += [file for file in names if kind_of(file) == kind and hidden(Path(file), folder)]
    return of_one_kind(str(folder), chosen, _unread(folder, unread))


def _unread(folder: Path, files: Iterable[str]) -> tuple[str, ...]:
    """A remark about files of a folder that are not read."""
    names = [str(Path(file).relative_to(folder)) for file in files]
    if not names:
        return ()
    listed = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
    are = "is" if len(names) == 1 else "are"
    return (f"{folder}: {counted(len(names), 'file')} hidden or of no known format {are} not read: {listed}",)


def is_text(file: Path) -> bool:
    """Whether a file of an unknown format begins like text: UTF-8 without control characters."""
    with file.open("rb") as stream:
        head = stream.read(4096)
    text = head.decode("utf-8", errors="ignore")
    return len(text.encode()) > len(head) - 4 and not set(text) & set(map(chr, [*range(9), *range(14, 27)]))


def _front_matter(card: Path) -> str:
    """The YAML between the first two lines of dashes of a dataset's card; empty if the file is no card."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return text.split("\n---", 1)[0].removeprefix("---") if text.startswith("---\n") else ""


def hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def of_one_kind(path: str, files: list[str], remarks: tuple[str, ...] = ()) -> Location:
    """Files that must all be of one known format, without those that are empty. Raises BDHError."""
    full = [file for file in files if Path(file).stat().st_size]
    if not full:
        raise BDHError(f"data.path {path} is empty")
    kinds = {kind_of(file) for file in full}
    if None in kinds:
        strange = next(file for file in full if kind_of(file) is None)
        raise BDHError(f"data.path {strange} is of no known format; known are {known_suffixes()}")
    if len(kinds) > 1:
        raise BDHError(f"data.path {path} matches files of several formats: {', '.join(sorted(map(str, kinds)))}")
    return Location(str(kinds.pop()), tuple(full), remarks=remarks)


def kind_of(file: str) -> str | None:
    """The format of a file by its name, without the suffix of a compression; None for an unknown one."""
    suffix = suffix_of(file)
    return "text" if suffix in TEXT_SUFFIXES else KINDS.get(suffix)


def suffix_of(file: str) -> str:
    """The suffix of the format, in lower case. Of an address, the query is no part of the name."""
    name = Path(file if is_local(file) else file.split("?")[0])
    return (name.with_suffix("") if is_compressed(str(name)) else name).suffix.lower()


def known_suffixes() -> str:
    return f"{' '.join(sorted([*KINDS, *TEXT_SUFFIXES]))} (and these with {' '.join(sorted(COMPRESSIONS))})"
