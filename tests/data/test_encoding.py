"""Documents to ids: the tokenizer's own, in pieces, for anything a document may hold."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from bdh.data.corpora import pydoc
from bdh.data.encoding import Encoder, clean, is_bytes, pieces
from bdh.data.loader import read_text
from bdh.data.prepare import cut, prepare_texts
from bdh.data.settings import DataConfig
from bdh.data.tokenizer import byte_tokenizer
from bdh.data.vocabulary import train_tokenizer

BYTES = byte_tokenizer()
PLAIN = byte_tokenizer(end_of_text=False)
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


@pytest.mark.parametrize("tokenizer", [BYTES, PLAIN, BPE, SPECIAL], ids=["bytes", "plain", "bpe", "special"])
@pytest.mark.parametrize("text", ODD)
def test_odd_texts_come_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = Encoder(tokenizer)([text])[0]
    assert tokenizer.decode(ids.tolist()) == clean(text)
    assert not set(ids.tolist()) & set(tokenizer.all_special_ids)  # spelled, never meant


@pytest.mark.parametrize("tokenizer", [BYTES, PLAIN, SPECIAL], ids=["bytes", "plain", "special"])
@given(texts=st.lists(st.text(), max_size=4))
@settings(max_examples=100)
def test_bytes_are_what_the_library_makes_of_them(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    encoder = Encoder(tokenizer)
    assert encoder.is_bytes
    fast = [ids.tolist() for ids in encoder(texts)]
    encoder.is_bytes = False
    assert fast == [ids.tolist() for ids in encoder(texts)] == [list(text.encode()) for text in texts]


def test_special_tokens_follow_the_bytes() -> None:
    assert is_bytes(SPECIAL) and not is_bytes(BPE)
    assert Encoder(SPECIAL).dtype == np.uint16
    assert Encoder(SPECIAL).ending.tolist() == [SPECIAL.eos_token_id]
    assert Encoder(BYTES).ending.tolist() == [255] and Encoder(BYTES).dtype == np.uint8
    assert is_bytes(BYTES) and is_bytes(PLAIN) and Encoder(PLAIN).ending.tolist() == [10, 10]


def test_a_token_that_is_no_byte_and_not_special_makes_another_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["dragon"])
    assert not is_bytes(tokenizer)
    assert Encoder(tokenizer)(["a dragon"])[0].tolist() == [97, 32, 256]


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


def test_bytes_that_are_not_utf8_never_become_the_end_of_a_text(tmp_path: Path) -> None:
    """The byte 0xFF among them: in the text it becomes U+FFFD, as every other such byte; U+00FF keeps its two bytes."""
    (tmp_path / "latin.txt").write_bytes(b"na\xefve \xff<|endoftext|>\xff\n" + "ÿ\n".encode())
    notices: list[str] = []
    _, tokens, size = read_text(DataConfig(path=str(tmp_path / "latin.txt")), BYTES, notify=notices.append)
    text = "na\ufffdve \ufffd<|endoftext|>\ufffd\nÿ\n".encode()
    assert tokens.read(0, len(tokens)).tolist() == [*text, 255] and size == len(text)
    assert any("not UTF-8" in line for line in notices)


def test_tokens_of_earlier_versions_are_found_in_the_cache(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "document {n}"}}\n' for n in range(9)))
    config = DataConfig(path=str(tmp_path / "a.jsonl"))
    said: list[str] = []
    for tokenizer in (PLAIN, BYTES, PLAIN, BYTES):
        _, tokens, size = read_text(config, tokenizer, said.append)
        assert len(tokens) == (9 * 10 + 8 * 2 if tokenizer is PLAIN else 9 * 11)
        assert size == (len(tokens) if tokenizer is PLAIN else 90)
    assert ["found" in line for line in said] == [False, False, True, True]


@pytest.mark.parametrize("tokenizer", [BYTES, PLAIN, SPECIAL], ids=["bytes", "plain", "special"])
def test_bytes_of_the_validation_part_are_counted_wherever_it_begins(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer)
    prepared = prepare_texts(["ab", "c é", "🐉"], encoder)
    ids = prepared.tokens.read(0, len(prepared.tokens)).tolist()
    for place in range(len(ids)):
        train, rest, size = cut(prepared, (place + 0.5) / len(ids), tokenizer, encoder)
        assert rest.read(0, len(rest)).tolist() == ids[place:] and len(train.tokens) in (place, place + 1)
        assert size == sum(token != encoder.end_of_text for token in ids[place:])
