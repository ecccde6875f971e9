"""The byte tokenizer: ids are the bytes, nothing is lost."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bdh.data.tokenizer import (
    byte_level_symbols,
    byte_tokenizer,
    is_tokenizer,
    load_export_tokenizer,
    load_tokenizer,
    same_tokenizer,
    save_tokenizer,
)
from bdh.data.vocabulary import train_tokenizer

TOKENIZER = byte_tokenizer()
PLAIN = byte_tokenizer(end_of_text=False)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, PLAIN], ids=["end of text", "plain"])
@given(any_text)
def test_ids_are_the_bytes_and_decoding_gives_the_text_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text", ["", " ", "\r\n\t\0", "<s></s><unk>", "Ġ Ċ Ā", "e\u0301 é", "👩‍👩‍👧", "שלום مرحبا", "ÿ þ"]
)
def test_corners(text: str) -> None:
    for tokenizer in (TOKENIZER, PLAIN):
        assert tokenizer(text).input_ids == list(text.encode()) and tokenizer.decode(list(text.encode())) == text


@pytest.mark.parametrize(
    ("tokenizer", "special"), [(TOKENIZER, ["<|endoftext|>"]), (PLAIN, [])], ids=["end of text", "plain"]
)
def test_the_vocabulary_is_256_and_nothing_else(
    tokenizer: PreTrainedTokenizerFast, special: list[str], tmp_path: Path
) -> None:
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert len(tokenizer) == tokenizer.vocab_size == len(tokenizer.get_vocab()) == 256
    assert len(set(byte_level_symbols())) == 256
    end = 255 if special else None
    tokenizer.save_pretrained(str(tmp_path))
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    for one in (tokenizer, again, load_tokenizer(str(tmp_path))):
        assert one.all_special_tokens == special and one.eos_token_id == one.bos_token_id == end
        assert one("a\x00é").input_ids == [97, 0, 195, 169] and len(one) == 256


def test_bytes_that_are_no_utf8_decode_to_replacement_marks() -> None:
    assert PLAIN.decode([0xFF, 0x41]) == "\ufffdA"
    assert TOKENIZER.decode([0xFE, 0x41]) == "\ufffdA"


def test_the_end_of_a_text_is_a_token_and_no_byte() -> None:
    assert TOKENIZER.decode([0x41, 0xFF, 0x42]) == "A<|endoftext|>B"
    assert TOKENIZER.decode([0x41, 0xFF, 0x42], skip_special_tokens=True) == "AB"
    assert TOKENIZER("A<|endoftext|>").input_ids == [0x41, 0xFF]  # as tokenizers of transformers take it
    assert train_tokenizer("bytes", (), 0).eos_token_id == 0xFF


def test_bytes_are_also_those_of_earlier_versions(tmp_path: Path) -> None:
    """Their models have no end-of-text token, and keep the tokenizer that they were saved with."""
    save_tokenizer(PLAIN, tmp_path / "plain")
    old, new, chat = load_tokenizer(str(tmp_path / "plain")), load_tokenizer("bytes"), train_tokenizer("bytes", (), 0)
    assert same_tokenizer(old, PLAIN) and same_tokenizer(new, TOKENIZER) and not same_tokenizer(old, new)
    for name in (None, "bytes"):
        assert is_tokenizer(old, name) and is_tokenizer(new, name) and not is_tokenizer(chat, name)
    assert is_tokenizer(old, str(tmp_path / "plain")) and not is_tokenizer(new, str(tmp_path / "plain"))


@pytest.mark.parametrize("load", [lambda folder: load_tokenizer(str(folder)), load_export_tokenizer])
def test_a_vocabulary_need_not_have_every_letter(
    load: Callable[[Path], PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    """One of symbols, without a token for what is unknown."""
    backend = Tokenizer(models.WordLevel({"x": 0, "y": 1}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    assert load(tmp_path)("x y").input_ids == [0, 1]
