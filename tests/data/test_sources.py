"""Texts from files, folders, globs, addresses and datasets, read by `datasets` as it is."""

import gzip
import json
from pathlib import Path
from typing import Any

import pandas
import pytest
import zstandard
from datasets import Dataset, DatasetDict

from bdh.data.settings import SourceConfig
from bdh.data.sources import open_source
from bdh.errors import BDHError

TEXTS = [f"Dragon {n} hatches.\nIt says “grr” {n} times." for n in range(25)]


def rows(path: object, streaming: bool = False, **settings: Any) -> list[dict[str, Any]]:
    return list(open_source(SourceConfig(str(path), **settings), streaming))


def texts(path: object, streaming: bool = False, **settings: Any) -> list[str]:
    return [row["text"] for row in rows(path, streaming, **settings)]


def write(file: Path, column: str = "text", **more: Any) -> Path:
    """The texts in the format that the file's name asks for."""
    table = pandas.DataFrame({column: TEXTS, **more})
    file.parent.mkdir(parents=True, exist_ok=True)
    kind = file.name.split(".")[1]
    if kind == "parquet":
        table.to_parquet(file, row_group_size=10)
        return file
    lines = "\n".join(json.dumps(row) for row in table.to_dict("records"))
    content = {
        "jsonl": lines,
        "json": json.dumps(table.to_dict("records")),
        "csv": table.to_csv(index=False),
        "tsv": table.to_csv(index=False, sep="\t"),
        "txt": "\n".join(TEXTS),
    }[kind].encode()
    packed = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    file.write_bytes(packed.get(file.suffix, lambda data: data)(content))
    return file


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz", "csv.gz", "jsonl.zst"])
def test_every_format_gives_the_same_texts(tmp_path: Path, name: str, streaming: bool) -> None:
    file = write(tmp_path / f"a.{name}", number=range(25))
    assert texts(file, streaming) == TEXTS


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["txt", "txt.gz"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str, streaming: bool) -> None:
    found = rows(write(tmp_path / f"a.{name}"), streaming)
    assert "".join(row["text"] for row in found) == "\n".join(TEXTS)
    assert [row["ends"] for row in found] == [True]


def test_folders_and_globs(tmp_path: Path) -> None:
    for name, text in {"b.txt": "second", "a.md": "first", "sub/c.py": "third", "image.png": "\0", "e.txt": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert texts(tmp_path) == ["first", "second", "third"]
    assert texts(f"{tmp_path}/**/*.py") == ["third"]
    for n in (1, 2):
        write(tmp_path / "lines" / f"part{n}.jsonl")
    assert texts(tmp_path / "lines") == texts(f"{tmp_path}/lines/*.jsonl") == TEXTS * 2


def test_what_a_file_holds_is_not_changed(tmp_path: Path) -> None:
    odd = "line\r\nünïcode\0 שלום 🐉\x1b\n\n"
    (tmp_path / "a.txt").write_bytes(odd.encode())
    assert texts(tmp_path / "a.txt") == texts(tmp_path / "a.txt", True) == [odd]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": odd}) + "\n" + json.dumps({"text": None}))
    assert texts(tmp_path / "a.jsonl") == texts(tmp_path / "a.jsonl", True) == [odd, None]
    (tmp_path / "b[1].jsonl").write_bytes(b'\xef\xbb\xbf{"text": null}\n{"text": "a"}\n')
    assert texts(tmp_path / "b[1].jsonl") == texts(tmp_path / "b[1].jsonl", True) == [None, "a"]
    write(tmp_path / "c[1].csv")
    assert texts(tmp_path / "c[1].csv") == TEXTS


@pytest.mark.parametrize("streaming", [False, True])
def test_bytes_that_are_not_utf8_are_replaced(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9 au lait"}\n')
    (tmp_path / "a.csv").write_bytes(b"text,n\ncaf\xe9 au lait,1\n")
    for name in ("a.txt", "a.jsonl", "a.csv"):
        assert texts(tmp_path / name, streaming) == ["caf\ufffd au lait"]


def test_a_line_of_twenty_megabytes(tmp_path: Path) -> None:
    line = "x" * 20_000_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": line}) + "\n" + json.dumps({"text": "short"}))
    assert texts(tmp_path / "a.jsonl") == texts(tmp_path / "a.jsonl", True) == [line, "short"]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_text_column_is_found_or_asked_for(tmp_path: Path, streaming: bool) -> None:
    assert texts(write(tmp_path / "a.jsonl", "story", n=1), streaming) == TEXTS
    two = write(tmp_path / "b.jsonl", "story", title="x")
    with pytest.raises(BDHError, match=r"several text columns: story, title; name one: --data\.text_column"):
        rows(two, streaming)
    assert texts(two, streaming, text_column="story") == TEXTS
    with pytest.raises(BDHError, match=r"data\.text_column body is not a text column of .*; it has story, title"):
        rows(two, streaming, text_column="body")
    pandas.DataFrame({"n": [1, 2]}).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(BDHError, match="has no text column"):
        rows(tmp_path / "c.parquet", streaming)


CARD = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: small/train.parquet}
  - {split: validation, path: small/validation.parquet}
- config_name: large
  data_files: large/*.parquet
---
A dataset with a card.
"""


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_folder_with_a_card_and_configurations(tmp_path: Path, streaming: bool) -> None:
    folder = tmp_path / "set"
    for name in ("small/train", "small/validation", "large/one"):
        write(folder / f"{name}.parquet")
    (folder / "README.md").write_text(CARD)
    assert texts(folder, streaming, config="small") == TEXTS
    validation = open_source(SourceConfig(str(folder), config="small"), streaming, split="validation")
    assert len(list(validation)) == 25
    with pytest.raises(BDHError, match=r"choose one with --data\.config: small, large"):
        rows(folder, streaming)
    with pytest.raises(BDHError, match=r"data\.config medium is not a configuration of .*; there are small, large"):
        rows(folder, streaming, config="medium")
    with pytest.raises(BDHError, match=r"data\.split test is not a split of .*; there are train, validation"):
        rows(folder, streaming, config="small", split="test")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_saved_to_disk(tmp_path: Path, streaming: bool) -> None:
    Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved", streaming) == TEXTS
    DatasetDict({"train": Dataset.from_dict({"text": TEXTS})}).save_to_disk(tmp_path / "several")
    assert texts(tmp_path / "several", streaming) == TEXTS
    with pytest.raises(BDHError, match=r"data\.split dev is not a split of .*; there are train"):
        open_source(SourceConfig(str(tmp_path / "several")), streaming, split="dev")


def test_a_card_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nAbout the texts.\n")
    (tmp_path / "a.txt").write_text("the text")
    assert texts(tmp_path) == ["the text"]


@pytest.mark.parametrize("streaming", [False, True])
def test_an_address(serve: tuple[Path, str], streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    folder, address = serve
    for name in ("a.jsonl", "b.parquet", "c.txt", "d.jsonl.gz", "e.csv", "f.tsv"):
        write(folder / name, number=list(range(len(TEXTS))))
        expected = ["\n".join(TEXTS)] if name == "c.txt" else TEXTS
        assert texts(f"{address}/{name}", streaming) == expected
    for name, message in (("gone.jsonl", "cannot be re"), ("strange.bin", "none of the known formats")):
        with pytest.raises(BDHError, match=message):
            rows(f"{address}/{name}", streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "does not exist"),
        ("./owner/name", None, "does not exist"),
        ("empty.jsonl", b"", "is empty"),
        ("no.jsonl", b"this is no JSON\n", "cannot be read|not JSON lines"),
        ("no.parquet", b"PAR1 no parquet", "cannot be read"),
        ("no.csv", b'text\n"never closed\n' + b"x\n" * 10, "cannot be read|has no text"),
        ("torn.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 1000, mtime=0)[:40], "cannot be read"),
        ("a.pt", b"\x80\x02}q\x00\0\0", "is of no known format"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, name: str, content: bytes | None, message: str, streaming: bool
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    path = name if name.startswith(".") else str(tmp_path / name)
    with pytest.raises(BDHError, match=message) as caught:
        texts(path, streaming)
    assert "\n" not in str(caught.value)


def test_several_formats_are_not_guessed_at(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    write(tmp_path / "b.csv")
    with pytest.raises(BDHError, match=r"several formats \(csv, json\); name one by a glob"):
        rows(tmp_path)
    with pytest.raises(BDHError, match="matches files of several formats: csv, json"):
        rows(f"{tmp_path}/*")
    with pytest.raises(BDHError, match="matches no file"):
        rows(f"{tmp_path}/*.parquet")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"x")
    with pytest.raises(BDHError, match=r"holds no text; looked for files ending in .*\.txt"):
        rows(tmp_path / "pictures")
    with pytest.raises(BDHError, match="has no split validation; only datasets have splits"):
        open_source(SourceConfig(str(tmp_path / "a.jsonl")), False, split="validation")
