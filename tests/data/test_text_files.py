"""Files in parts: together they are the file, wherever the cuts fall and whatever it holds."""

import bz2
import gzip
import json
import lzma
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from bdh.data.tables import text_values
from bdh.data.text_files import Part, parts_of, text_rows, whole_files
from bdh.errors import BDHError


def in_parts(file: Path, size: int) -> list[Part]:
    """Parts far smaller than those of a run."""
    total = file.stat().st_size
    bounds = [*range(0, total, size), total]
    return [(str(file), begin, end, "") for begin, end in pairwise(bounds)]


PIECES = st.sampled_from(["a", " ", "\n", "é", "שלום", "🐉", "\0", "word " * 20, "x" * 300])


@settings(max_examples=60)
@given(text=st.lists(PIECES, min_size=1, max_size=80).map("".join), size=st.integers(8, 400))
def test_text_in_parts_is_the_text(tmp_path_factory: pytest.TempPathFactory, text: str, size: int) -> None:
    file = tmp_path_factory.mktemp("parts") / "a.txt"
    file.write_bytes(text.encode())
    parts = in_parts(file, size)
    rows = list(text_rows(parts))
    assert "".join(row["text"] for row in rows) == text
    assert sum(row["ends"] for row in rows) == len(parts)
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
    assert [row["text"] for row in text_values("json", in_parts(file, size), "text")] == texts


@pytest.mark.parametrize("line", ["this is no JSON", '{"text": "cut', "[1, 2]", "7"])
def test_what_is_not_json_lines_is_named_with_its_place(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(BDHError, match=r"a\.jsonl .* byte 17"):
        list(text_values("json", whole_files([str(tmp_path / "a.jsonl")]), "text"))


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


def test_parts_are_equal_and_enough_for_all(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 1_000_003)
    (tmp_path / "b.txt").write_bytes(b"x" * 10)
    for readers in (1, 2, 30):
        parts = parts_of([str(tmp_path / name) for name in ("a.txt", "b.txt")], readers)
        sizes = [end - begin for _, begin, end, _ in parts]
        assert sum(sizes) == 1_000_013 and sizes[-1] == 10
        assert max(sizes[:-1]) - min(sizes[:-1]) <= 1 and len(sizes) >= min(8 * readers, 100)


def test_a_value_that_is_no_text_is_named(tmp_path: Path) -> None:
    for row in ({"text": 5}, {"text": ["a"]}):
        (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}) + "\n" + json.dumps(row))
        with pytest.raises(BDHError, match="at byte 14 where a text should be, under text"):
            list(text_values("json", whole_files([str(tmp_path / "a.jsonl")]), "text"))
    (tmp_path / "a.jsonl").write_text('{"other": 1}\n"bare"\n{"text": "\\ud800"}')
    assert [row["text"] for row in text_values("json", whole_files([str(tmp_path / "a.jsonl")]), "text")] == [
        None,
        "bare",
        "\ud800",
    ]
