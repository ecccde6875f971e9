"""Files of one source that differ: in names, columns, types, and in where the text first appears. All are read."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pytest
from pyarrow import parquet

from bdh.data.chat import messages_of
from bdh.data.loader import open_data, read_text
from bdh.data.settings import DataConfig, SourceConfig
from bdh.data.sources import open_source
from bdh.data.tokenizer import byte_tokenizer
from bdh.errors import BDHError

TALK = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Seven."}]
BOTH = pytest.mark.parametrize("streaming", [False, True])


def texts(path: object, streaming: bool = False, **settings: Any) -> list[str | None]:
    return [row["text"] for row in open_source(SourceConfig(str(path), **settings), streaming)]


def lines(file: Path, *rows: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def table(file: Path, **columns: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), file)
    return file


@BOTH
def test_all_files_of_a_folder_are_read_whatever_their_names(tmp_path: Path, streaming: bool) -> None:
    names = ["dev.jsonl", "test-a.jsonl", "train-books.jsonl", "validation/b.jsonl", "wiki.jsonl"]
    for name in names:
        lines(tmp_path / name, {"text": name})
    assert texts(tmp_path, streaming) == names
    assert texts(f"{tmp_path}/*.jsonl", streaming) == [name for name in names if "/" not in name]
    assert texts(tmp_path / "test-a.jsonl", streaming) == ["test-a.jsonl"]


@BOTH
def test_only_the_column_asked_for_is_read_from_files_whose_columns_differ(tmp_path: Path, streaming: bool) -> None:
    lines(tmp_path / "json" / "a.jsonl", {"text": "a"})
    lines(tmp_path / "json" / "b.jsonl", {"text": "b", "extra": [{"n": 1}]}, {"text": "c", "extra": "x"})
    table(tmp_path / "parquet" / "a.parquet", text=["a"])
    table(tmp_path / "parquet" / "b.parquet", extra=[1, 2], text=["b", "c"])
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "a.csv").write_text("text\na\n")
    (tmp_path / "csv" / "b.tsv").write_text("extra\ttext\n1\tb\n2\tc\n")
    for kind in ("json", "parquet", "csv"):
        assert texts(tmp_path / kind, streaming) == ["a", "b", "c"]


@BOTH
def test_the_column_that_every_file_has_is_the_text(tmp_path: Path, streaming: bool) -> None:
    table(tmp_path / "a.parquet", text=["a"])
    table(tmp_path / "b.parquet", text=["b"], title=["t"])
    table(tmp_path / "c.parquet", n=[1, 2])
    assert texts(tmp_path, streaming) == ["a", "b", None, None]  # rows without it are counted as empty
    assert texts(tmp_path, streaming, text_column="title") == [None, "t", None, None]


@BOTH
def test_parts_without_rows_or_text_and_marker_files(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "_SUCCESS").touch()
    table(tmp_path / "part-0.parquet", text=pa.array([], pa.string()))
    table(tmp_path / "part-1.parquet", text=[None, None])
    table(tmp_path / "part-2.parquet", text=pa.array(["a"], pa.string_view()))
    table(tmp_path / "part-3.parquet", text=pa.array(["b", "b"]).dictionary_encode())
    table(tmp_path / "part-4.parquet", text=pa.array(["c"], pa.large_string()))
    assert texts(tmp_path, streaming) == texts(f"{tmp_path}/*", streaming) == [None, None, "a", "b", "b", "c"]
    with pytest.raises(BDHError, match=r"has no rows|holds no text: no rows"):
        read_text(DataConfig(path=str(tmp_path / "part-0.parquet"), streaming=streaming), byte_tokenizer())


@BOTH
def test_a_text_column_may_first_appear_late(tmp_path: Path, streaming: bool) -> None:
    late = [*({"id": n} for n in range(120)), {"id": 120, "Text ü": "late"}]
    lines(tmp_path / "a.jsonl", *late)
    assert texts(tmp_path / "a.jsonl", streaming, text_column="Text ü") == [None] * 120 + ["late"]
    table(tmp_path / "b.parquet", text=[None] * 120 + ["late"], id=range(121))
    assert texts(tmp_path / "b.parquet", streaming) == [None] * 120 + ["late"]
    (tmp_path / "c.csv").write_text("id,text\n" + "1,\n" * 120 + "1,late\n")
    assert texts(tmp_path / "c.csv", streaming, text_column="text") == [""] * 120 + ["late"]
    with pytest.raises(BDHError, match=r"no text column in the first 100 rows of a file, which have id; if .* name it"):
        texts(tmp_path / "a.jsonl", streaming)
    with pytest.raises(BDHError, match=r"data\.text_column txt is not a text column of .*a\.jsonl"):
        texts(tmp_path / "a.jsonl", streaming, text_column="txt")


@BOTH
def test_all_of_a_csv_file_is_text(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "a.csv").write_text('n,text\n1,NA\n2,1984\n3,"two\nlines"\n')
    assert texts(tmp_path / "a.csv", streaming) == ["NA", "1984", "two\nlines"]


@BOTH
def test_json_files_are_arrays_or_lines_or_objects_one_after_another(tmp_path: Path, streaming: bool) -> None:
    rows = [{"text": "a", "n": 1}, {"text": "b"}]
    forms = {
        "array": json.dumps(rows),
        "indented": json.dumps(rows, indent=2),
        "lines": "\n".join(map(json.dumps, rows)),
        "objects": "\n".join(json.dumps(row, indent=2) for row in rows),
        "texts": json.dumps(["a", "b"]),
        "marked": "\ufeff" + json.dumps(rows),
    }
    for name, form in forms.items():
        (tmp_path / f"{name}.json").write_text(form, encoding="utf-8")
        assert texts(tmp_path / f"{name}.json", streaming) == ["a", "b"], name
    (tmp_path / "torn.json").write_text(json.dumps(rows)[:-4])
    with pytest.raises(BDHError, match=r"torn\.json is not JSON at character 0"):
        texts(tmp_path / "torn.json", streaming)


@pytest.mark.parametrize(
    ("rows", "long"),
    [
        ("Hello, world\nx\n", 1),  # from the first row, pandas takes the table for a wider one
        ("x\n\n" * 3 + "Hello, world\n", 4),
        ("x\n" * 2500 + "Hello, world\nx\n", 2501),
        ("x,\n" * 2500 + "Hello, world\n", 2501),
        ("x,,y\nz\n", 1),
        ("x,\ny,\n", None),  # no text is lost
        ('"Hello, world"\nx\n', None),
    ],
)
def test_csv_rows_longer_than_the_header_are_an_error(tmp_path: Path, rows: str, long: int | None) -> None:
    (tmp_path / "a.csv").write_text("text\n" + rows)
    if long is None:
        assert len(texts(tmp_path / "a.csv", False)) == 2
        return
    with pytest.raises(BDHError, match=rf"a\.csv has more fields in row {long} than its header; ") as caught:
        texts(tmp_path / "a.csv", False)
    assert "\n" not in str(caught.value)


@BOTH
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_conversations_in_every_form_in_one_folder(tmp_path: Path, kind: str, streaming: bool) -> None:
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in TALK]
    forms: list[Any] = [
        TALK,
        [{**message, "name": "b", "weight": 1} for message in TALK],
        parts,
        json.dumps(TALK),
        [json.dumps(message) for message in TALK],
    ]
    for number, form in enumerate(forms):
        if kind == "jsonl":
            lines(tmp_path / f"{number}.jsonl", *[{"messages": form}] * 2)
        else:
            pandas.DataFrame({"messages": [form] * 2, str(number): 1}).to_parquet(tmp_path / f"{number}.parquet")
    found = texts(tmp_path, streaming, chat=True)
    assert [messages_of(value) for value in found] == [TALK] * 10


def test_contents_of_parts_are_read_as_the_server_reads_them() -> None:
    answer = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No", "text": None}, {"text": "."}]}
    assert messages_of([TALK[0], answer])[1]["content"] == "No."
    assert messages_of(json.dumps(json.dumps(TALK))) == TALK
    for content, problem in (
        ([{"type": "image_url", "image_url": {"url": "x"}}], "messages[0].content.0 is image_url; only text is read"),
        ([], "messages[0].content.0 is not text"),
    ):
        with pytest.raises(BDHError, match=re.escape(problem)):
            messages_of([{"role": "user", "content": content}, TALK[1]])


@BOTH
def test_local_paths_are_no_globs_and_no_addresses(tmp_path: Path, streaming: bool) -> None:
    folder = tmp_path / "glob[x]f*"
    first = lines(folder / "a?b::c.jsonl", {"text": "first"})
    (folder / "z.jsonl.gz").write_bytes(gzip.compress(b'{"text": "second"}\n'))
    assert texts(folder, streaming) == ["first", "second"]
    assert texts(first, streaming) == texts(f"{folder}/*.jsonl", streaming) == ["first"]
    (tmp_path / "what?.txt").write_text("plain")
    assert texts(tmp_path / "what?.txt", streaming) == ["plain"]
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: '*.jsonl'\n---\n")
    with pytest.raises(BDHError, match=r"cannot read because of the '\[' in its path; rename the folder"):
        texts(folder, streaming)


def test_what_is_read_and_what_is_not_is_said(tmp_path: Path) -> None:
    for name in ("train-books.jsonl", "wiki.jsonl"):
        lines(tmp_path / name, *[{"text": f"{name} {n}"} for n in range(30)])
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    lines(tmp_path / ".old" / "a.jsonl", {"text": "old"})
    said: list[str] = []
    config = DataConfig(path=str(tmp_path), block_size=8)
    data = open_data(config, byte_tokenizer(), 2, 1, say=said.append)
    assert data.train_tokens == 928
    assert data.remarks == [f"{tmp_path}: 2 files hidden or of no known format are not read: picture.png, .old/a.jsonl"]
    assert said[0] == f"{tmp_path} (train): 2 files, 60 rows, 1,030 tokens tokenized"
    config.streaming = True
    said.clear()
    data = open_data(config, byte_tokenizer(), 2, 1, say=said.append)
    data.close()
    assert len(data.remarks) == 1 and said[0] == f"{tmp_path}: 2 files, reading the validation text"
    (tmp_path / "log.1").write_text("a line\n" * 9)
    said.clear()
    read = DataConfig(path=str(tmp_path / "log.1"))
    remarks: list[str] = []
    read_text(read, byte_tokenizer(), said.append, remarks.append)
    assert said[0].endswith("(train): 64 tokens tokenized")
    assert remarks == [f"{tmp_path}/log.1 has no suffix of a known format and is read as plain text"]


@pytest.mark.parametrize("rows", [[{"messages": []}] * 40, [{"messages": TALK[:1]}] * 40])
def test_a_text_of_which_nothing_can_be_used_is_refused_for_that_reason(tmp_path: Path, rows: list[Any]) -> None:
    lines(tmp_path / "a.jsonl", *rows)
    lines(tmp_path / "b.jsonl", *[{"text": ""}] * 40)
    for streaming in (False, True):
        chats = DataConfig(path=str(tmp_path / "a.jsonl"), chat=True, block_size=8, streaming=streaming, num_workers=0)
        with pytest.raises(BDHError, match=r"holds no conversation that can be used; .*(there are no|says nothing)"):
            open_data(chats, byte_tokenizer(), 2, 1)
        empty = DataConfig(path=str(tmp_path / "b.jsonl"), text_column="text", block_size=8, streaming=streaming)
        with pytest.raises(BDHError, match=r"holds no text under data\.text_column text: all 40 rows are empty"):
            open_data(empty, byte_tokenizer(), 2, 1)


def test_a_cache_that_cannot_be_written_is_named_with_the_setting_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.write_text("a file, in which there can be no folder")
    for name, folder in (
        ("huggingface_hub.constants.HF_HOME", home),
        ("datasets.config.HF_DATASETS_CACHE", home / "d"),
    ):
        monkeypatch.setattr(name, str(folder))
    file = lines(tmp_path / "a.jsonl", {"text": "a"})
    for streaming in (False, True):
        with pytest.raises(
            BDHError, match=r"home must be writable \(.*: Not a directory\), or set HF_HOME to a folder"
        ):
            texts(file, streaming)
