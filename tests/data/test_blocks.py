"""The split, the training batches and the validation windows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdh.data.blocks import RandomBlocks, ValidationWindows, split_tokens, tokenize
from bdh.data.corpora import Corpus
from bdh.data.tokenizer import byte_tokenizer
from bdh.errors import BDHError

TOKENIZER = byte_tokenizer()


def test_the_split_is_by_position_and_loses_nothing() -> None:
    text = "".join(f"line {i} of ünïcode\n" for i in range(200))
    split = split_tokens(Corpus("x", text), TOKENIZER, 0.8, 16)
    assert split.train.dtype == np.uint8
    joined = np.concatenate([split.train, split.validation]).tobytes().decode()
    assert joined == text
    assert len(split.train.tobytes().decode()) == int(len(text) * 0.8)
    assert split.validation_bytes_per_token == 1.0


@pytest.mark.parametrize(("share", "part"), [(0.99, "validation"), (0.01, "training")])
def test_a_block_longer_than_the_text_is_refused(share: float, part: str) -> None:
    with pytest.raises(
        BDHError, match=f"data.block_size is 50, but the {part} part of x has .* tokens; use a block of at most"
    ):
        split_tokens(Corpus("x", "a" * 1000), TOKENIZER, share, 50)


@given(
    seed=st.integers(0, 2**63 - 1),
    T=st.integers(1, 20),
    B=st.integers(1, 8),
    skip=st.integers(0, 50),
    length=st.integers(22, 200),
)
def test_a_batch_depends_on_its_number_alone(seed: int, T: int, B: int, skip: int, length: int) -> None:
    tokens = np.arange(length, dtype=np.uint8)
    blocks = RandomBlocks(tokens, T, B, seed)
    for _ in range(skip):
        blocks.next_batch()
    resumed = RandomBlocks(tokens, T, B, seed)
    resumed.load_state_dict(blocks.state_dict())
    batch = blocks.next_batch()
    assert batch.shape == (B, T + 1) and batch.equal(resumed.next_batch())
    assert (batch.diff(dim=1) == 1).all()  # each block is a piece of the text


def test_every_place_of_the_text_is_drawn_the_last_included() -> None:
    blocks = RandomBlocks(np.arange(10, dtype=np.uint8), 4, 64, seed=1)
    starts = {int(start) for _ in range(20) for start in blocks.next_batch()[:, 0]}
    assert starts == {0, 1, 2, 3, 4, 5}


def test_another_seed_and_another_batch_differ() -> None:
    tokens = np.arange(200, dtype=np.uint8)
    a, b = RandomBlocks(tokens, 4, 8, seed=1), RandomBlocks(tokens, 4, 8, seed=2)
    first = a.next_batch()
    assert not first.equal(b.next_batch()) and not first.equal(a.next_batch())


@given(length=st.integers(2, 300), T=st.integers(1, 40), size=st.integers(1, 7))
def test_windows_predict_every_token_once(length: int, T: int, size: int) -> None:
    T = min(T, length - 1)
    tokens = np.arange(length, dtype=np.uint16)
    windows = ValidationWindows(tokens, T)
    targets = [t for batch in windows.batches(size) for row in batch[:, 1:].tolist() for t in row]
    assert targets == list(range(1, 1 + (length - 1) // T * T))


def test_a_sample_of_windows_is_fixed_and_spread() -> None:
    tokens = np.arange(1001, dtype=np.uint16)
    windows = ValidationWindows(tokens, 10, limit=5)
    assert windows.starts.tolist() == [0, 240, 490, 740, 990]
    assert len(ValidationWindows(tokens, 10, limit=500)) == 100


def test_wide_vocabularies_get_wider_integers() -> None:
    assert tokenize("abc", TOKENIZER).dtype == np.uint8
    assert tokenize("", TOKENIZER).shape == (0,)
