"""Documents to ids: the tokenizer's own, in pieces, for anything a document may hold."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from bdh.data.corpora import pydoc
from bdh.data.encoding import Encoder, clean, is_bytes, pieces
from bdh.data.tokenizer import byte_tokenizer
from bdh.data.vocabulary import train_tokenizer

BYTES = byte_tokenizer()
BPE = train_tokenizer("bpe", pydoc()[:60], 600)
SPECIAL = train_tokenizer("bytes", (), 0)

ODD = [
    "",
    "\0\0",
    "\ufeff x",
    "🐉" * 50,
    "שלום עולם",
    "a\r\nb",
    "<|endoftext|>",
    " " * 100,
    "\ud83d",
    "x\udc00y",
    "e\u0301",
]


@pytest.mark.parametrize("tokenizer", [BYTES, BPE, SPECIAL], ids=["bytes", "bpe", "special"])
@pytest.mark.parametrize("text", ODD)
def test_odd_texts_come_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = Encoder(tokenizer)([text])[0]
    assert tokenizer.decode(ids.tolist()) == clean(text)
    assert not set(ids.tolist()) & set(tokenizer.all_special_ids)  # spelled, never meant


@given(texts=st.lists(st.text(), max_size=4))
@settings(max_examples=100)
def test_bytes_are_what_the_library_makes_of_them(texts: list[str]) -> None:
    encoder = Encoder(BYTES)
    assert encoder.is_bytes
    fast = [ids.tolist() for ids in encoder(texts)]
    encoder.is_bytes = False
    assert fast == [ids.tolist() for ids in encoder(texts)] == [list(text.encode()) for text in texts]


def test_special_tokens_follow_the_bytes() -> None:
    assert is_bytes(SPECIAL) and not is_bytes(BPE)
    assert Encoder(SPECIAL).dtype == np.uint16
    assert Encoder(SPECIAL).ending.tolist() == [SPECIAL.eos_token_id]
    assert Encoder(BYTES).ending.tolist() == [10, 10]


def test_long_documents_are_encoded_as_in_one_piece() -> None:
    text = "\n\n".join(pydoc()[:12])
    assert len(text) > 3 * 8192
    whole = BPE.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert Encoder(BPE)([text])[0].tolist() == whole


@given(st.text(alphabet="ab \n", max_size=60))
def test_pieces_are_the_text(text: str) -> None:
    long = text * 700
    assert "".join(pieces(long)) == long
    assert all(0 < len(piece) <= 8192 for piece in pieces(long))


def test_one_word_of_ten_million_characters() -> None:
    ids = Encoder(BPE)(["a" * 10_000_000])[0]
    assert BPE.decode(ids[:1000].tolist()).strip("a") == ""


def test_it_can_be_sent_to_another_process() -> None:
    encoder = pickle.loads(pickle.dumps(Encoder(BPE)))
    assert encoder(["a dragon <|endoftext|>"])[0].tolist() == Encoder(BPE)(["a dragon <|endoftext|>"])[0].tolist()
