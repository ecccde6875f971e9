"""Where each token begins in the text that incremental decoding makes of it."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from bdh.data.tokenizer import IncrementalDecoder, OffsetDecoder, byte_level_symbols, byte_tokenizer

BYTES = byte_tokenizer(end_of_text=False)
WITH_END = byte_tokenizer()
SYMBOLS = byte_level_symbols()


def starts_of(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> list[int]:
    decoder = OffsetDecoder(tokenizer)
    text = "".join([*map(decoder.step, tokens), decoder.end()])
    assert text == decoder.written == tokenizer.decode(tokens)
    return decoder.starts


def plain_starts(data: bytes) -> list[int]:
    """The definition: which character of the text, replacement marks among them, each byte lies in."""
    starts: list[int] = []
    characters = 0
    while data:
        try:
            valid, invalid = data.decode(), 0
        except UnicodeDecodeError as error:  # its bytes are replaced by one mark
            valid, invalid = data[: error.start].decode(), error.end - error.start
        sizes = [len(character.encode()) for character in valid] + [invalid] * (invalid > 0)
        for size in sizes:
            starts += [characters] * size
            characters += 1
        data = data[sum(sizes) :]
    return starts


@pytest.mark.parametrize(
    ("data", "starts"),
    [
        (bytes([97, 226, 34, 98]), [0, 1, 2, 3]),  # half a character before a quotation mark
        ("a€b".encode(), [0, 1, 1, 1, 2]),
        (b"\xe2\x82a", [0, 0, 1]),  # one mark for both bytes
        (b"\xff\xff\xffa", [0, 1, 2, 3]),
        (b"\xed\xa0", [0, 1]),  # no character begins so
        (b"\xe2\xe2\x82\xac\xe2", [0, 1, 1, 1, 2]),
        ("\ufffda".encode(), [0, 0, 0, 1]),  # a mark that was in the text
        (b"a\xf0\x9f", [0, 1, 1]),  # the end comes first
    ],
)
def test_offsets_count_replacement_marks(data: bytes, starts: list[int]) -> None:
    assert plain_starts(data) == starts
    assert starts_of(BYTES, list(data)) == starts


@given(st.binary(max_size=24))
def test_offsets_of_any_bytes(data: bytes) -> None:
    assert starts_of(BYTES, list(data)) == plain_starts(data)
    data = data.replace(b"\xff", b"\xfe")
    assert starts_of(WITH_END, list(data)) == plain_starts(data)


@given(st.lists(st.sampled_from([*b"\xff\xe2\x82\xac\xf0\x9f\xc3", *[0xFF] * 4]), max_size=120))
def test_offsets_in_long_runs_of_invalid_bytes(data: list[int]) -> None:
    assert starts_of(BYTES, data) == plain_starts(bytes(data))


SPECIAL = byte_tokenizer(end_of_text=False)
SPECIAL.add_special_tokens({"pad_token": "<|pad|>"})


@pytest.mark.parametrize("run", [[0xFF], [0xE2, 0x82], [256], [0xF0, 256, 256, 0x9F], [9999]])
@pytest.mark.parametrize("kind", [OffsetDecoder, IncrementalDecoder])
def test_the_work_of_a_step_does_not_grow_with_a_run_without_text(
    run: list[int], kind: type[IncrementalDecoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    decode = kind._decode

    def count(self: IncrementalDecoder, tokens: list[int]) -> str:
        decoded.append(len(tokens))
        return decode(self, tokens)

    monkeypatch.setattr(kind, "_decode", count)
    tokens = [97, *run * 2000, 98]
    decoder = kind(SPECIAL)
    for token in tokens:
        decoder.step(token)
        assert len(decoder.undecided) <= 16
    assert max(decoded, default=0) <= 16 and sum(decoded) < 40 * len(tokens)
    decoder.end()
    assert decoder.written == SPECIAL.decode(tokens, skip_special_tokens=True)
    if isinstance(decoder, OffsetDecoder):
        placed = [start for token, start in zip(tokens, decoder.starts, strict=True) if token < 256]
        assert placed == plain_starts(bytes(token for token in tokens if token < 256))


@given(st.text(st.sampled_from("abé世\U0001f409 "), max_size=12), st.sets(st.integers(0, 40)))
def test_offsets_of_tokens_of_several_bytes(text: str, cuts: set[int]) -> None:
    whole = text.encode()
    borders = sorted({cut for cut in cuts if cut < len(whole)} | {0, len(whole)})
    pieces = [whole[start:end] for start, end in pairwise(borders)]
    vocabulary = {symbol: byte for byte, symbol in enumerate(SYMBOLS)}
    names = ["".join(SYMBOLS[byte] for byte in piece) for piece in pieces]
    for name in names:
        vocabulary.setdefault(name, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    firsts = [sum(map(len, pieces[:number])) for number in range(len(pieces))]
    expected = [plain_starts(whole)[first] for first in firsts]
    assert starts_of(fast, [vocabulary[name] for name in names]) == expected


def test_offsets_of_words_that_a_decoder_puts_spaces_between() -> None:
    names = ["[UNK]", "the", "dragon", "##s", "hatched"]
    tokenizer = Tokenizer(models.WordPiece({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    assert fast.decode([1, 2, 3, 4]) == "the dragons hatched"
    assert starts_of(fast, [1, 2, 3, 4]) == [0, 3, 10, 11]


def test_a_token_without_text_begins_where_the_text_before_it_ends() -> None:
    special = byte_tokenizer()
    special.add_special_tokens({"pad_token": "<|pad|>"})
    decoder = OffsetDecoder(special)
    for token in [256, 97, 256, 98, 256]:
        decoder.step(token)
    decoder.end()
    assert decoder.written == "ab" and decoder.starts == [0, 0, 1, 1, 2]
