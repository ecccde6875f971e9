"""Streams: shared without overlap or loss, and taken up again exactly, by whoever reads them."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from bdh.data.blocks import Share
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
    (folder / "long.txt").write_text("\n".join(TEXTS))
    return folder


def reader(path: Path, number: int = 0, count: int = 1, shuffle_blocks: int = 8, train_split: float = 1.0) -> Reader:
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


@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "b.parquet", "csv", "long.txt"])
def test_going_on_from_any_position_is_as_if_nothing_had_happened(folder: Path, name: str, lanes: bool) -> None:
    one = reader(folder / name, 0, 1 if name == "long.txt" else 2)
    stream = CarriedLanes(one, 3) if lanes else WindowedBlocks(one)
    count = 120 if lanes else 400  # more than an epoch
    whole = list(itertools.islice(stream.rows(stream.start()), count))
    for stop in (1, 7, 8, 9, 50, 100, count - 20):
        position = json.loads(json.dumps(whole[stop - 1][2]))
        again = itertools.islice(stream.rows(position), 12)
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
    assert validation == [text for text in TEXTS if is_held_out(text, 0.8)]
    assert list(training_texts(config)) == trained
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
    monkeypatch.setattr("bdh.data.parts.PART_BYTES", 20_000)
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS * 20))
    stream = WindowedBlocks(reader(file))
    whole = list(itertools.islice(stream.rows(stream.start()), 12_000))
    begun: list[int] = []
    original = json.loads

    def counted(line: str) -> Any:
        begun.append(len(line))
        return original(line)

    monkeypatch.setattr("bdh.data.parts.json.loads", counted)
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
