"""Text as tokens come: whole characters, nothing of a stop string, and what was cut off."""

import tracemalloc
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from bdh.data.tokenizer import IncrementalDecoder, byte_level_symbols, byte_tokenizer
from bdh.inference.detokenizer import Detokenizer

BYTES = byte_tokenizer()
SYMBOLS = byte_level_symbols()
FEW = st.text(st.sampled_from("abé世\U0001f409 \n"), max_size=24)  # few, so that stop strings come often
STOPS = st.lists(st.text(st.sampled_from("abé世\U0001f409 \n"), min_size=1, max_size=5), max_size=4)


def cut_plainly(text: str, stop: list[str]) -> str:
    """The definition: the text before the stop string that is complete first, of several the longest."""
    for end in range(len(text) + 1):
        if starts := [end - len(word) for word in stop if text[:end].endswith(word)]:
            return text[: min(starts)]
    return text


def tokenizer_of(pieces: list[bytes]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose tokens from 256 on are these."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(SYMBOLS)}
    for piece in pieces:
        vocabulary.setdefault("".join(SYMBOLS[byte] for byte in piece), len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


@st.composite
def split_texts(draw: st.DrawFn) -> tuple[str, PreTrainedTokenizerFast, list[int]]:
    """A text, and tokens that it is made of: any bytes of it that lie together, parts of characters too."""
    text = draw(FEW)
    whole = text.encode()
    cuts = sorted(draw(st.sets(st.integers(0, len(whole)))) | {0, len(whole)})
    pieces = [whole[start:end] for start, end in pairwise(cuts)]
    tokenizer = tokenizer_of(pieces)
    names = ["".join(SYMBOLS[byte] for byte in piece) for piece in pieces]
    return text, tokenizer, tokenizer.convert_tokens_to_ids(names)


@given(split_texts(), STOPS)
def test_what_comes_out_is_the_text_before_the_first_stop_string(
    made: tuple[str, PreTrainedTokenizerFast, list[int]], stop: list[str]
) -> None:
    text, tokenizer, tokens = made
    continuation = Detokenizer(tokenizer, stop)
    out = ""
    for token in tokens:
        out += continuation.step(token)
        if continuation.stopped:
            break
        decoded = continuation.decoder.written
        held = decoded[len(out) :]
        assert decoded.startswith(out)
        assert held == "" or any(word.startswith(held) and word != held for word in stop)
    else:
        out += continuation.end()
    assert out == cut_plainly(text, stop)
    assert continuation.stopped == (out != text)
    assert continuation.step(97) + continuation.end() == "" or not continuation.stopped


@given(split_texts(), STOPS, st.integers(0, 30))
def test_what_a_cut_leaves_are_the_tokens_before_it(
    made: tuple[str, PreTrainedTokenizerFast, list[int]], stop: list[str], length: int
) -> None:
    _, tokenizer, tokens = made
    continuation = Detokenizer(tokenizer, stop)
    out = "".join(continuation.step(token) for token in tokens) + continuation.end()
    shown = out[:length]
    kept, rest = continuation.split_at(len(shown))
    assert kept == tokens[: len(kept)]
    assert tokenizer.decode(kept) + rest == shown
    longer = tokenizer.decode(tokens[: len(kept) + 1])
    assert rest == "" or len(longer) > len(shown) or longer.endswith("\ufffd")


@given(st.binary(max_size=24), STOPS)
def test_bytes_that_are_no_text_become_marks(data: bytes, stop: list[str]) -> None:
    continuation = Detokenizer(byte_tokenizer(end_of_text=False), stop)
    pieces = []
    for byte in data:
        pieces.append(continuation.step(byte))
        if continuation.stopped:
            break
    pieces.append(continuation.end())
    assert "".join(pieces) == cut_plainly(data.decode(errors="replace"), stop)


def test_half_a_character_waits_for_the_end() -> None:
    continuation = Detokenizer(BYTES)
    assert [continuation.step(byte) for byte in "é世".encode()[:-1]] == ["", "é", "", ""]
    assert continuation.end() == "\ufffd"


def test_a_stop_string_of_marks_is_found_at_the_end() -> None:
    continuation = Detokenizer(BYTES, ["\ufffd"])
    assert [continuation.step(byte) for byte in b"a\xe4"] == ["a", ""]
    assert continuation.end() == "" and continuation.stopped and continuation.split_at(1) == ([97], "")


def test_white_space_at_the_beginning_is_left_out_if_asked_for() -> None:
    continuation = Detokenizer(BYTES, ["\n\nU"], strip=True)
    assert [continuation.step(byte) for byte in b" \n hi\n\nU"] == ["", "", "", "h", "i", "", "", ""]
    assert (
        continuation.stopped
        and continuation.split_at(2) == (list(b" \n hi"), "")
        and continuation.split_at(0) == ([], "")
    )


def test_a_text_of_white_space_alone_is_kept() -> None:
    continuation = Detokenizer(BYTES, ["\n\nU"], strip=True)
    assert [continuation.step(byte) for byte in b" \n "] == ["", "", ""]
    assert continuation.end() == " \n " and continuation.split_at(3) == (list(b" \n "), "")
    stopped = Detokenizer(BYTES, ["\n\nU"], strip=True)
    assert [stopped.step(byte) for byte in b"  \n\nU"] == ["", "", "", "", "  "]
    assert stopped.stopped and stopped.end() == "" and stopped.split_at(2) == (list(b"  "), "")


def test_a_step_does_not_get_slower() -> None:
    """No step takes all that was written into its hands, which would show as memory of that size."""
    continuation = Detokenizer(BYTES, ["\n\nUser:"])
    for byte in b"abcdefghij" * 20_000:
        continuation.step(byte)
    written = len(continuation.decoder.written)
    tracemalloc.start()
    for byte in b"abcdefghij":
        continuation.step(byte)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert written == 200_000 and most < 20_000
    assert continuation.split_at(200_005) == (list(b"abcdefghij" * 20_000 + b"abcde"), "")


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """In the manner of sentencepiece: characters it does not know are rows of byte tokens."""
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "世"]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False)


FALLBACK = byte_fallback_tokenizer()


@given(st.lists(st.integers(0, len(FALLBACK) - 1), max_size=12))
def test_a_decoder_that_takes_text_back_does_not_stop_a_stream(tokens: list[int]) -> None:
    """The library's raises where a row of byte tokens turns out to be no text after some of it was handed on."""
    decoder = IncrementalDecoder(FALLBACK)
    text = "".join(decoder.step(token) for token in tokens)
    assert "\ufffd" not in text or "\ufffd" in FALLBACK.decode(tokens, skip_special_tokens=True)
    text += decoder.end()
    whole = FALLBACK.decode(tokens, skip_special_tokens=True)
    assert text == whole or "\ufffd" in whole
    assert decoder.written == text and decoder.tokens == tokens
