"""Blocks: every token once an epoch, shared without overlap or loss, and taken up again exactly."""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdh.data.blocks import (
    BlockSource,
    Lanes,
    Mixture,
    PackedBlocks,
    Share,
    ValidationWindows,
    document_ids,
    inputs_and_targets,
)
from bdh.data.tokens import Documents, Tokens


def numbered(count: int) -> Tokens:
    """Tokens that are their own places, in two arrays."""
    text = np.arange(count, dtype=np.uint32)
    return Tokens([text[: count // 3], text[count // 3 :]])


@settings(max_examples=40)
@given(
    count=st.integers(20, 300),
    T=st.integers(1, 12),
    world=st.integers(1, 4),
    rows=st.integers(1, 3),
    seed=st.integers(0, 2**62),
)
def test_an_epoch_predicts_every_token_once_whoever_shares_it(
    count: int, T: int, world: int, rows: int, seed: int
) -> None:
    shared = [PackedBlocks(numbered(count), T, seed, Share(rank, world)) for rank in range(world)]
    alone = PackedBlocks(numbered(count), T, seed)
    per_epoch = count // T
    seen: list[list[int]] = []
    while len(seen) < 2 * per_epoch:
        taken = np.concatenate([source.take(rows)[0] for source in shared])
        assert np.array_equal(taken, alone.take(rows * world)[0])  # the same rows, however many share them
        seen += taken.tolist()
    for epoch in (0, 1):
        blocks = seen[epoch * per_epoch : (epoch + 1) * per_epoch]
        targets = Counter(token for block in blocks for token in block[1:])
        assert max(targets.values()) == 1
        assert sum(targets.values()) == per_epoch * T  # all but what does not fill a block
        assert all((b - a) % count == 1 for block in blocks for a, b in pairwise(block))
    if per_epoch > 4 and T > 1:
        assert seen[:per_epoch] != seen[per_epoch : 2 * per_epoch]  # another order, other cuts


def test_what_an_epoch_leaves_over_comes_in_another() -> None:
    source = PackedBlocks(numbered(107), 10, 3)
    seen = {token for _ in range(30) for row in source.take(10)[0].tolist() for token in row[1:]}
    assert seen == set(range(107))


@pytest.mark.parametrize("kind", ["packed", "lanes", "mixture"])
@given(stop=st.integers(0, 30), seed=st.integers(0, 1000))
@settings(max_examples=15)
def test_going_on_from_a_position_is_as_if_nothing_had_happened(kind: str, stop: int, seed: int) -> None:
    def make() -> BlockSource:
        if kind == "lanes":
            return Lanes(Documents(numbered(130), np.array([0, 40, 90])), 6, 4, seed)
        if kind == "mixture":
            parts = [PackedBlocks(numbered(n), 6, seed, stream=n) for n in (50, 70)]
            return Mixture(parts, [1.0, 3.0], seed)
        return PackedBlocks(numbered(130), 6, seed)

    whole, begun, resumed = make(), make(), make()
    expected = [whole.take(4) for _ in range(stop + 12)]
    for _ in range(stop):
        begun.take(4)
    resumed.load_state_dict(begun.state_dict())
    for rows, fresh in expected[stop:]:
        again = resumed.take(4)
        assert np.array_equal(again[0], rows) and np.array_equal(again[1], fresh)


@pytest.mark.parametrize("world", [1, 2])
def test_lanes_go_on_where_they_stopped(world: int) -> None:
    starts = np.array([0, 30, 50, 100])
    shared = [Lanes(Documents(numbered(131), starts), 5, 4, 7, Share(rank, world)) for rank in range(world)]
    steps = shared[0].per_epoch
    assert steps == (131 // 4 - 1) // 5
    for _ in range(2):  # epochs
        rows = np.empty((4, 0), dtype=np.int64)
        for step in range(steps):
            taken = [source.take(4 // world) for source in shared]
            assert all((fresh == (step == 0)).all() for _, fresh in taken)
            blocks = np.concatenate([block for block, _ in taken])
            assert step == 0 or (rows[:, -1] == blocks[:, 0]).all()
            rows = np.concatenate([rows[:, :-1] if step else rows, blocks], axis=1)
        pieces = [text for lane in rows for text in np.split(lane, np.flatnonzero(np.isin(lane, starts)))]
        assert all((np.diff(piece) == 1).all() for piece in pieces)  # within a document, the text as it stands
        tokens = [token for lane in rows[:, :-1].tolist() for token in lane]
        assert len(tokens) == len(set(tokens))


def test_a_mixture_takes_each_source_by_its_weight() -> None:
    parts = [PackedBlocks(Tokens([np.full(1000, value, dtype=np.uint8)]), 4, 1, stream=value) for value in (1, 2)]
    mixture = Mixture(parts, [1.0, 3.0], seed=5)
    values = np.concatenate([mixture.take(50)[0][:, 0] for _ in range(100)])
    assert abs((values == 2).mean() - 0.75) < 0.03


@given(world=st.sampled_from([2, 3, 6]), seed=st.integers(0, 1000))
@settings(max_examples=10)
def test_the_rows_of_a_step_are_the_same_however_many_processes_share_them(world: int, seed: int) -> None:
    def shared(rank: int, world: int) -> Mixture:
        share = Share(rank, world)
        return Mixture(
            [PackedBlocks(numbered(n), 6, seed, share, stream=n) for n in (50, 70, 200)], [1.0, 3.0, 0.1], seed, share
        )

    alone, together = shared(0, 1), [shared(rank, world) for rank in range(world)]
    for _ in range(20):
        rows = np.concatenate([mixture.take(6 // world)[0] for mixture in together])
        assert np.array_equal(rows, alone.take(6)[0])
    assert all(mixture.state_dict() == alone.state_dict() for mixture in together)


def test_documents_are_numbered_from_the_one_gone_on_with() -> None:
    inputs = torch.tensor([[5, 9, 1, 9, 9], [9, 1, 2, 3, 4]])
    assert document_ids(inputs, 9).tolist() == [[0, 1, 1, 2, 3], [1, 1, 1, 1, 1]]


def test_validation_windows_cover_the_text_in_order() -> None:
    windows = ValidationWindows(numbered(42), 4)
    rows = torch.cat(list(windows.batches(3)))
    assert len(windows) == 10
    assert rows[:, 1:].flatten().tolist() == list(range(1, 41))
    some = torch.cat(list(ValidationWindows(numbered(42), 4, limit=3).batches(8)))
    assert some[:, 0].tolist() == [0, 16, 36]


def test_validation_lanes_go_on_from_batch_to_batch() -> None:
    batches = list(ValidationWindows(numbered(42), 4).lanes(3))
    assert [len(batch) for batch in batches] == [3, 3, 3]
    for before, after in pairwise(batches):
        assert (before[:, -1] == after[:, 0]).all()
    assert sorted(torch.cat(batches)[:, 1:].flatten().tolist()) == sorted(set(range(1, 37)))


def test_a_sample_is_of_windows_in_which_something_is_predicted() -> None:
    ids = ~np.arange(401, dtype=np.int32)
    ids[[9, 10, 100, 250, 399]] *= -1
    ids[[9, 10, 100, 250, 399]] -= 1
    windows = ValidationWindows(Tokens([ids[:57], ids[57:]]), 4, limit=3)
    assert windows.starts.tolist() == [8, 96, 396]  # of 8, 96, 248 and 396
    assert ValidationWindows(Tokens([ids]), 4, limit=9).starts.tolist() == [8, 96, 248, 396]
    assert ValidationWindows(Tokens([ids[:9]]), 4, limit=1).starts.tolist() == [0]  # nothing is predicted


@pytest.mark.parametrize("count", [42, 41, 44])
@pytest.mark.parametrize("size", [1, 3, 4, 20])
def test_windows_of_a_whole_text_predict_every_token_once(count: int, size: int) -> None:
    windows = ValidationWindows(numbered(count), 4, whole=True)
    everything = list(range(1, count))
    assert len(windows) == -(-(count - 1) // 4)
    assert targets(windows.batches(size)) == everything
    assert targets(windows.lanes(size)) == everything
    shared = [list(windows.batches(size, Share(rank, 3))) for rank in range(3)]
    assert sorted(token for batches in shared for token in targets(batches)) == everything
    assert len({len(batches) for batches in shared}) == 1


def test_the_last_lane_goes_on_to_the_end_of_a_whole_text() -> None:
    batches = list(ValidationWindows(numbered(42), 4, whole=True).lanes(4))
    assert [batch.shape for batch in batches] == [(4, 5)] * 4 + [(4, 2)]
    for before, after in pairwise(batches):
        assert before[-1, -1] == after[-1, 0]


def targets(batches: Iterable[torch.Tensor]) -> list[int]:
    """The tokens that are predicted, in ascending order."""
    rows = [inputs_and_targets(batch)[1].flatten() for batch in batches]
    return sorted(token for row in rows for token in row.tolist() if token >= 0)
