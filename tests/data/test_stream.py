"""Streams: shared without overlap or loss, and taken up again exactly, by whoever reads them."""

import gzip
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from bdh.data.blocks import PackedBlocks, Share
from bdh.data.encoding import Encoder
from bdh.data.loader import open_data, training_texts
from bdh.data.settings import DataConfig, SourceConfig
from bdh.data.stream import CarriedLanes, Reader, StreamSettings, WindowedBlocks, is_held_out
from bdh.data.tokenizer import byte_tokenizer
from bdh.data.vocabulary import train_tokenizer
from bdh.errors import BDHError

BYTES = byte_tokenizer()
SPECIAL = train_tokenizer("bytes", (), 0)  # bytes, and an end-of-text token
TEXTS = [f"Document {n}: " + " ".join(f"w{n * k % 89}" for k in range(n % 40)) for n in range(700)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same texts in one JSON-lines file, in a Parquet file of 14 row groups, and in 6 CSV files."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    pandas.DataFrame({"text": TEXTS}).to_parquet(folder / "b.parquet", row_group_size=50)
    for n in range(6):
        (folder / "csv").mkdir(exist_ok=True)
        pandas.DataFrame({"text": TEXTS[n::6]}).to_csv(folder / "csv" / f"{n}.csv", index=False)
    (folder / "short.txt").write_text("\n".join(TEXTS))
    (folder / "long.txt").write_text("\n".join(TEXTS * 8))
    return folder


def reader(path: Path, number: int = 0, count: int = 1, shuffle_blocks: int = 8, train_split: float = 1.0) -> Reader:
    """One of `count` readers of a file."""
    source = SourceConfig(str(path))
    settings = StreamSettings(source, Encoder(SPECIAL), 24, shuffle_blocks, train_split, seed=5, stream=1)
    return Reader(settings, number, count)


def epochs(reader: Reader, count: int) -> list[list[str]]:
    """The documents of some epochs."""
    found: list[list[str]] = [[] for _ in range(count)]
    for batch in reader.batches(reader.start()):
        if batch.before["epoch"] >= count:
            break
        found[batch.before["epoch"]] += [SPECIAL.decode(ids[:-1].tolist()) for ids in batch.tokens]
    return found


@pytest.mark.parametrize("name", ["a.jsonl", "b.parquet", "csv"])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_readers_share_every_epoch_without_overlap_or_loss(folder: Path, name: str, count: int) -> None:
    shares = [epochs(reader(folder / name, number, count), 2) for number in range(count)]
    for epoch in (0, 1):
        assert Counter(text for share in shares for text in share[epoch]) == Counter(TEXTS)
        assert all(share[epoch] for share in shares)
    assert max(len(share[0]) for share in shares) < 2.1 * min(len(share[0]) for share in shares)
    if name != "a.jsonl" and count == 1:  # several shards, in another order
        assert [share[0] for share in shares] != [share[1] for share in shares]


@pytest.mark.parametrize("kind", ["windows", "in order", "lanes"])
@pytest.mark.parametrize("name", ["a.jsonl", "b.parquet", "csv", "short.txt"])
def test_going_on_from_any_position_is_as_if_nothing_had_happened(folder: Path, name: str, kind: str) -> None:
    one = reader(folder / name, 0, 2, shuffle_blocks=1 if kind == "in order" else 8)
    stream = CarriedLanes(one, 3) if kind == "lanes" else WindowedBlocks(one)
    count = 1200 if kind == "lanes" else 3600  # two epochs and more
    whole = list(itertools.islice(stream.rows(stream.start()), count))
    assert whole[-1][2]["reader"]["epoch"] >= 2
    for stop, length in ((1, 12), (7, 12), (8, 12), (9, 12), (50, 12), (700, count), (count - 20, 12)):
        position = json.loads(json.dumps(whole[stop - 1][2]))
        again = itertools.islice(stream.rows(position), length)
        for (row, fresh, _), (row_again, fresh_again, _) in zip(whole[stop:], again, strict=False):
            assert np.array_equal(row, row_again) and fresh == fresh_again


def test_a_window_holds_each_block_once_and_windows_join_without_a_gap(folder: Path) -> None:
    stream = WindowedBlocks(reader(folder / "a.jsonl"))
    one = reader(folder / "a.jsonl")
    text = np.concatenate([ids for batch in itertools.islice(one.batches(one.start()), 30) for ids in batch.tokens])
    rows = [row.tolist() for row, _, _ in itertools.islice(stream.rows(stream.start()), 24)]
    for window in range(3):
        expected = [text[k * 24 : k * 24 + 25].tolist() for k in range(window * 8, window * 8 + 8)]
        found = rows[window * 8 : window * 8 + 8]
        assert sorted(found) == sorted(expected) and found != expected


def test_lanes_read_whole_documents_one_after_another(folder: Path) -> None:
    stream = CarriedLanes(reader(folder / "a.jsonl"), 3)
    rows = [row for row, _, _ in itertools.islice(stream.rows(stream.start()), 60)]
    lanes = [np.concatenate([row[i, :-1] for row in rows]) for i in range(3)]
    assert all((a[:, -1] == b[:, 0]).all() for a, b in itertools.pairwise(rows))
    documents = [text for lane in lanes for text in SPECIAL.decode(lane.tolist()).split("<|endoftext|>")[:-1]]
    assert len(documents) > 30 and len(set(documents)) == len(documents)
    assert set(documents) <= set(TEXTS)


def test_what_is_held_out_is_never_trained_on(folder: Path) -> None:
    config = DataConfig(path=str(folder / "a.jsonl"), streaming=True, train_split=0.8, block_size=24, num_workers=0)
    data = open_data(config, SPECIAL, 4, seed=1)
    validation = SPECIAL.decode(data.validation.read(0, len(data.validation)).tolist()).split("<|endoftext|>")[:-1]
    trained = [text for share in epochs(reader(folder / "a.jsonl", train_split=0.8), 1) for text in share]
    assert Counter(validation + trained) == Counter(TEXTS)
    assert sorted(validation) == sorted(text for text in TEXTS if is_held_out(text, 0.8))
    assert sorted(training_texts(config)) == sorted(trained)
    assert data.validation_bytes_per_token == pytest.approx(
        sum(len(text.encode()) for text in validation) / len(data.validation)
    )


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("carry", [False, True])
def test_processes_read_what_one_would_and_resume(folder: Path, workers: int, carry: bool) -> None:
    config = DataConfig(
        path=str(folder / "b.parquet"), streaming=True, block_size=24, num_workers=workers, shuffle_blocks=8
    )

    def make() -> Any:
        return open_data(config, SPECIAL, 6, seed=3, carry_state=carry)

    whole = make()
    states, expected = [], []
    for _ in range(40):
        states.append(json.loads(json.dumps(whole.source.state_dict())))
        expected.append(whole.next_batch())
    whole.close()
    for stop in (0, 1, 13, 38):
        again = make()
        again.source.load_state_dict(states[stop])
        for batch in expected[stop : stop + 3]:
            found = again.next_batch()
            assert found.tokens.equal(batch.tokens) and found.fresh.equal(batch.fresh)
        again.close()


def test_mixed_streams_resume(folder: Path) -> None:
    mixture = [SourceConfig(str(folder / "a.jsonl")), SourceConfig(str(folder / "csv"), weight=2.0)]
    config = DataConfig(mixture=mixture, streaming=True, block_size=24, shuffle_blocks=8)
    whole = open_data(config, SPECIAL, 6, seed=3)
    for _ in range(11):
        whole.next_batch()
    state = json.loads(json.dumps(whole.source.state_dict()))
    expected = [whole.next_batch().tokens for _ in range(5)]
    whole.close()
    again = open_data(config, SPECIAL, 6, seed=3)
    again.source.load_state_dict(state)
    assert all(again.next_batch().tokens.equal(tokens) for tokens in expected)
    again.close()


def test_resuming_does_not_read_from_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS * 20))
    stream = WindowedBlocks(reader(file))
    whole = list(itertools.islice(stream.rows(stream.start()), 12_000))
    begun: list[int] = []
    original = json.loads

    def counted(line: str) -> Any:
        begun.append(len(line))
        return original(line)

    monkeypatch.setattr("bdh.data.json_files.json.loads", counted)
    rows = [row for row, _, _ in itertools.islice(stream.rows(whole[9999][2]), 10)]
    assert all(np.array_equal(row, expected[0]) for row, expected in zip(rows, whole[10_000:], strict=False))
    assert 0 < sum(begun) < file.stat().st_size / 20  # two or three parts of seventy


def test_other_numbers_of_readers_are_refused(folder: Path) -> None:
    config = DataConfig(path=str(folder / "csv"), streaming=True, block_size=24, num_workers=2)
    data = open_data(config, SPECIAL, 6, seed=3)
    state = data.source.state_dict()
    config.num_workers = 3
    with pytest.raises(BDHError, match=r"read by 2 readers in each process, now there are 3; keep data\.num_workers"):
        open_data(config, SPECIAL, 6, seed=3).source.load_state_dict(state)


def test_counts_of_what_was_skipped(tmp_path: Path) -> None:
    texts = [text for n in range(40) for text in (f"one {n}", "", None, f"two {n} \ufffd", " " * n)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text, "n": n}) for n, text in enumerate(texts)))
    for streaming in (False, True):
        config = DataConfig(
            path=str(tmp_path / "a.jsonl"), text_column="text", streaming=streaming, block_size=4, num_workers=0,
            train_split=0.5, shuffle_blocks=1,
        )  # fmt: skip
        data = open_data(config, BYTES, 2, seed=1)
        for _ in range(30):
            data.next_batch()
        lines = data.remarks + data.source.remarks()
        assert any("empty documents are skipped" in line for line in lines), lines
        assert any("not UTF-8" in line for line in lines)
        data.close()


def test_a_failure_in_a_process_is_one_line(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "no JSON"]))
    config = DataConfig(path=str(tmp_path / "a.jsonl"), streaming=True, train_split=0.99, block_size=8, num_workers=1)
    (tmp_path / "a.jsonl").write_text("\n".join([*lines * 3, "no JSON"]))
    with pytest.raises(BDHError, match=r"not JSON lines at byte \d+") as caught:
        data = open_data(config, SPECIAL, 64, seed=3)
        for _ in range(10_000):
            data.next_batch()
    assert "\n" not in str(caught.value)


def test_ranks_of_a_still_text_share_each_batch(folder: Path) -> None:
    config = DataConfig(path=str(folder / "a.jsonl"), block_size=24)
    alone = open_data(config, SPECIAL, 8, seed=3)
    ranks = [open_data(config, SPECIAL, 8, seed=3, share=Share(rank, 4)) for rank in range(4)]
    for _ in range(20):
        rows = np.concatenate([rank.next_batch().tokens.numpy() for rank in ranks])
        assert np.array_equal(rows, alone.next_batch().tokens.numpy())
    with pytest.raises(BDHError, match="must be a multiple of the 3 processes"):
        open_data(config, SPECIAL, 8, seed=3, share=Share(0, 3))


@pytest.mark.parametrize("name", ["a.jsonl", "big.jsonl", "long.txt"])
@pytest.mark.parametrize("count", [2, 3])
def test_readers_get_equal_shares_of_one_file(folder: Path, name: str, count: int) -> None:
    """A reader with less text would come round to it again while the others are still at the first."""
    if name == "big.jsonl":
        (folder / name).write_text("\n".join(json.dumps({"text": text}) for text in TEXTS * 3))
    sizes = []
    for number in range(count):
        one = reader(folder / name, number, count)
        batches = itertools.takewhile(lambda batch: batch.before["epoch"] == 0, one.batches(one.start()))
        sizes.append(sum(len(ids) for batch in batches for ids in batch.tokens))
    assert max(sizes) < 1.2 * min(sizes)


def test_readers_of_plain_text_read_on_without_jumps(folder: Path) -> None:
    text = (folder / "long.txt").read_text()
    for number in range(2):
        one = reader(folder / "long.txt", number, 2, train_split=0.8)
        batches = itertools.takewhile(lambda batch: batch.before["epoch"] == 0, one.batches(one.start()))
        read = SPECIAL.decode(np.concatenate([ids for batch in batches for ids in batch.tokens]).tolist())
        parts = read.split("<|endoftext|>")[:-1]
        assert len(parts) > 3 and all(part in text for part in parts)


def test_a_long_document_of_a_lane_is_cut_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdh.data.stream.LONGEST", 3000)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\n".join(TEXTS).encode()))
    stream = CarriedLanes(reader(tmp_path / "a.txt.gz"), 2)
    rows = [row for row, _, _ in itertools.islice(stream.rows(stream.start()), 1500)]
    for i in range(2):
        lane = SPECIAL.decode(np.concatenate([row[i, :-1] for row in rows]).tolist())
        parts = lane.split("<|endoftext|>")
        assert len(parts) > 1 and all(part in "\n".join(TEXTS) for part in parts)


def test_bytes_of_a_validation_text_that_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdh.data.loader.VALIDATION_TOKENS", 500)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    words = train_tokenizer("wordpiece", TEXTS, 300)
    config = DataConfig(path=str(tmp_path / "a.jsonl"), streaming=True, train_split=0.5, block_size=24, num_workers=0)
    data = open_data(config, words, 4, seed=1)
    held = [text for text in TEXTS if is_held_out(text, 0.5)]
    real = sum(len(t.encode()) for t in held) / sum(len(ids) + 1 for ids in Encoder(words)(held))
    assert len(data.validation) == 500
    assert data.validation_bytes_per_token == pytest.approx(real, rel=0.1)


def test_a_tokenizer_learns_from_the_training_part_only(tmp_path: Path) -> None:
    texts = ["short"] * 90 + ["long " * 1000] * 10
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    read = "".join(training_texts(DataConfig(path=str(tmp_path / "a.jsonl"), train_split=0.8)))
    assert len(read) == int(0.8 * sum(map(len, texts)))
    assert "".join(texts).startswith(read)


def test_a_document_cut_between_training_and_validation_ends_in_both(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    data = open_data(DataConfig(path=str(tmp_path / "a.txt"), block_size=24), SPECIAL, 4, seed=1)
    assert isinstance(data.source, PackedBlocks)
    assert data.source.tokens.read(len(data.source.tokens) - 1, 1)[0] == SPECIAL.eos_token_id
