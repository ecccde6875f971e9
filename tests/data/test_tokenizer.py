"""The byte tokenizer: ids are the bytes, nothing is lost."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bdh.data.tokenizer import byte_level_symbols, byte_tokenizer, load_export_tokenizer, load_tokenizer

TOKENIZER = byte_tokenizer()
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@given(any_text)
def test_ids_are_the_bytes_and_decoding_gives_the_text_back(text: str) -> None:
    ids = TOKENIZER(text).input_ids
    assert ids == list(text.encode("utf-8"))
    assert TOKENIZER.decode(ids) == text


@pytest.mark.parametrize("text", ["", " ", "\r\n\t\0", "<s></s><unk>", "Ġ Ċ Ā", "e\u0301 é", "👩‍👩‍👧", "שלום مرحبا"])
def test_corners(text: str) -> None:
    assert TOKENIZER(text).input_ids == list(text.encode()) and TOKENIZER.decode(list(text.encode())) == text


def test_the_vocabulary_is_256_and_nothing_else(tmp_path: object) -> None:
    assert isinstance(TOKENIZER, PreTrainedTokenizerFast)
    assert len(TOKENIZER) == TOKENIZER.vocab_size == 256
    assert len(set(byte_level_symbols())) == 256
    assert not TOKENIZER.all_special_tokens
    TOKENIZER.save_pretrained(str(tmp_path))
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    assert again("a\x00é").input_ids == [97, 0, 195, 169] and len(again) == 256


def test_bytes_that_are_no_utf8_decode_to_replacement_marks() -> None:
    assert TOKENIZER.decode([0xFF, 0x41]) == "\ufffdA"


@pytest.mark.parametrize("load", [lambda folder: load_tokenizer(str(folder)), load_export_tokenizer])
def test_a_vocabulary_need_not_have_every_letter(
    load: Callable[[Path], PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    """One of symbols, without a token for what is unknown."""
    backend = Tokenizer(models.WordLevel({"x": 0, "y": 1}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    assert load(tmp_path)("x y").input_ids == [0, 1]
