"""Tokens in several arrays read as one, and documents in another order, against plain NumPy."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bdh.data.tokens import Documents, InOrder, Tokens

lists = st.lists(st.lists(st.integers(0, 255), max_size=9), min_size=1, max_size=6).filter(any)


def arrays(parts: list[list[int]]) -> list[np.ndarray]:
    return [np.array(part, dtype=np.uint8) for part in parts]


@given(parts=lists, data=st.data())
def test_reads_are_those_of_the_whole(parts: list[list[int]], data: st.DataObject) -> None:
    tokens, whole = Tokens(arrays(parts)), np.concatenate(arrays(parts))
    start = data.draw(st.integers(0, len(whole) - 1))
    count = data.draw(st.integers(1, len(whole) + 3))
    assert len(tokens) == len(whole)
    assert tokens.read(start, count).tolist() == whole[start : start + count].tolist()
    ring = np.tile(whole, 3 + count // len(whole))
    place = data.draw(st.integers(0, 2 * len(whole)))
    assert tokens.read_around(place, count).tolist() == ring[place % len(whole) :][:count].tolist()
    stop = data.draw(st.integers(start, len(whole)))
    part = tokens.slice(start, stop)
    assert part.read(0, len(part)).tolist() == whole[start:stop].tolist()


@given(parts=lists, data=st.data())
def test_documents_are_read_in_any_order(parts: list[list[int]], data: st.DataObject) -> None:
    parts = [part for part in parts if part]
    starts = np.cumsum([0, *map(len, parts)])[:-1]
    order = data.draw(st.permutations(range(len(parts))))
    text = InOrder(Documents(Tokens(arrays(parts)), starts), np.array(order))
    whole = np.concatenate([arrays(parts)[i] for i in order])
    start, count = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(1, len(whole)))
    assert len(text) == len(whole)
    assert text.read(start, count).tolist() == whole[start : start + count].tolist()


def test_a_slice_keeps_where_documents_begin() -> None:
    documents = Documents(Tokens([np.arange(20, dtype=np.uint8)]), np.array([0, 5, 9, 15]))
    part = documents.slice(7, 16)
    assert part.starts.tolist() == [0, 2, 8]
    assert part.tokens.read(0, 9).tolist() == list(range(7, 16))


def test_the_checksum_tells_texts_apart() -> None:
    text = np.random.default_rng(0).integers(0, 255, 100_000).astype(np.uint8)
    changed = text.copy()
    changed[50_000] += 1
    parts = Tokens([text[:777], text[777:]])
    assert Tokens([text]).checksum() == parts.checksum()
    assert len({t.checksum() for t in (Tokens([text]), Tokens([changed]), Tokens([text[:-1]]))}) == 3
