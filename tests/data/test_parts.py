"""Files in parts: together they are the file, wherever the cuts fall and whatever it holds."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from bdh.data.parts import json_rows, parts_of, text_rows, whole_files
from bdh.errors import BDHError

PIECES = st.sampled_from(["a", " ", "\n", "é", "שלום", "🐉", "\0", "word " * 20, "x" * 300])


@settings(max_examples=60)
@given(text=st.lists(PIECES, min_size=1, max_size=80).map("".join), size=st.integers(8, 400))
def test_text_in_parts_is_the_text(tmp_path_factory: pytest.TempPathFactory, text: str, size: int) -> None:
    file = tmp_path_factory.mktemp("parts") / "a.txt"
    file.write_bytes(text.encode())
    rows = list(text_rows(parts_of([str(file)], size)))
    assert "".join(row["text"] for row in rows) == text
    assert sum(row["ends"] for row in rows) == len(parts_of([str(file)], size))
    assert [row["ends"] for row in text_rows(whole_files([str(file)]))] == [True]


@settings(max_examples=60)
@given(data=st.binary(min_size=1, max_size=600))
def test_bytes_that_are_no_text_become_replacement_marks(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.mktemp("parts") / "a.txt"
    file.write_bytes(data)
    rows = list(text_rows(whole_files([str(file)])))
    assert "".join(row["text"] for row in rows) == data.decode("utf-8", errors="replace")


def test_rows_are_bounded_and_cut_after_lines_or_before_words(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one line of words\n" * 5000)
    (tmp_path / "b.txt").write_text("word " * 20_000)
    (tmp_path / "c.txt").write_text("x" * 100_000)
    for name, good in (("a.txt", "\n"), ("b.txt", "d")):
        rows = [row["text"] for row in text_rows(whole_files([str(tmp_path / name)]))]
        assert max(map(len, rows)) <= 8192 and all(row.endswith(good) for row in rows[:-1])
    assert [len(row["text"]) for row in text_rows(whole_files([str(tmp_path / "c.txt")]))][:2] == [8192, 8192]


@settings(max_examples=60)
@given(
    texts=st.lists(st.text(max_size=40), min_size=1, max_size=30),
    size=st.integers(1, 300),
    newline=st.booleans(),
)
def test_json_lines_in_parts_are_the_lines(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], size: int, newline: bool
) -> None:
    file = tmp_path_factory.mktemp("parts") / "a.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=bool(len(text) % 2)) for text in texts]
    file.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass") + b"\n" * newline)
    assert [row["text"] for row in json_rows(parts_of([str(file)], size))] == texts


@pytest.mark.parametrize("line", ["this is no JSON", '{"text": "cut', "[1, 2]", "7"])
def test_what_is_not_json_lines_is_named_with_its_place(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(BDHError, match=r"a\.jsonl .* byte 17"):
        list(json_rows(whole_files([str(tmp_path / "a.jsonl")])))


def test_compressed_files_are_read_whole(tmp_path: Path) -> None:
    data = ("dragons and hatchlings\n" * 3000).encode()
    packed = {"gz": gzip.compress(data), "bz2": bz2.compress(data), "xz": lzma.compress(data)}
    packed["zst"] = zstandard.ZstdCompressor().compress(data)
    for suffix, content in packed.items():
        file = tmp_path / f"a.txt.{suffix}"
        file.write_bytes(content)
        parts = parts_of([str(file)], 100)
        assert len(parts) == 1
        assert "".join(row["text"] for row in text_rows(parts)).encode() == data
