"""Documents to token ids: exact, in bounded memory, whatever the document holds."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from bdh.data.tokenizer import END_OF_TEXT_BYTE, byte_level_symbols, vocabulary_size

DOCUMENT_BREAK = "\n\n"  # between documents, where the tokenizer has no end-of-text token
PIECE = 8192  # characters encoded at a time, at the most: an encoding takes a hundred times its text
BATCH = 1 << 20  # characters in one call of the tokenizer


class Encoder:
    """Turns documents into token ids. It can be pickled, and sent to other processes.

    A document that spells a special token gets the token's characters, never the token itself.

    Attributes:
        dtype: Of the ids: the smallest unsigned type that the vocabulary fits.
        ending: What stands after a document: the end-of-text token, or an empty line where the tokenizer has none.
        end_of_text: The id of that token, or None.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.dtype = np.min_scalar_type(vocabulary_size(tokenizer) - 1)
        self.end_of_text: int | None = tokenizer.eos_token_id
        self.is_bytes = is_bytes(tokenizer)
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True
        if self.end_of_text is None:
            self.ending = self([DOCUMENT_BREAK])[0]
        else:
            self.ending = np.array([self.end_of_text], dtype=self.dtype)

    @property
    def key(self) -> list[Any]:
        """The settings that, with a text, determine its tokens."""
        return [self.backend.to_str(), self.end_of_text]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.backend.encode_special_tokens = True  # a pickled tokenizer forgets it

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, (tokens,), without special tokens and without the ending."""
        if self.is_bytes:
            return [np.frombuffer(encode_utf8(text), dtype=np.uint8).astype(self.dtype) for text in texts]
        parts: list[list[np.ndarray]] = [[] for _ in texts]
        for batch in self._batches(texts):
            encoded = self.backend.encode_batch_fast([piece for _, piece in batch], add_special_tokens=False)
            for (i, _), piece in zip(batch, encoded, strict=True):
                parts[i].append(np.array(piece.ids, dtype=self.dtype))
        empty = np.empty(0, dtype=self.dtype)
        return [ids[0] if len(ids) == 1 else np.concatenate(ids) if ids else empty for ids in parts]

    def _batches(self, texts: list[str]) -> Iterator[list[tuple[int, str]]]:
        """(number of the text, piece of it), up to BATCH characters at a time."""
        batch: list[tuple[int, str]] = []
        size = 0
        for i, text in enumerate(texts):
            for piece in pieces(clean(text)):
                batch.append((i, piece))
                size += len(piece)
                if size >= BATCH:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of at most PIECE characters, cut before a word where tokens end anyway."""
    begin = 0
    while len(text) - begin > PIECE:
        cut = _word_boundary(text, begin + PIECE // 2, begin + PIECE)
        yield text[begin:cut]
        begin = cut
    if begin < len(text):
        yield text[begin:]


def _word_boundary(text: str, low: int, high: int) -> int:
    """The last single blank or line end between two words in a range; the end of the range if there is none."""
    place = high
    while (place := max(text.rfind(" ", low, place), text.rfind("\n", low, place))) > low:
        if not text[place - 1].isspace() and not text[place + 1].isspace():
            return place
    return high


def clean(text: str) -> str:
    """The text with halves of surrogate pairs, which are no characters, replaced by U+FFFD."""
    return text if text.isascii() else encode_utf8(text).decode("utf-8")


def encode_utf8(text: str) -> bytes:
    """The bytes of a text; halves of surrogate pairs become U+FFFD."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")


def is_bytes(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether ids are the UTF-8 bytes of the text, and all other tokens are special.

    A token may be special that has the id of the byte 0xFF, which is in no text.
    """
    model = tokenizer.backend_tokenizer.model
    if not isinstance(model, models.BPE) or tokenizer.backend_tokenizer.normalizer is not None:
        return False
    vocabulary = tokenizer.get_vocab()
    special = {added.content for added in tokenizer.added_tokens_decoder.values() if added.special}
    plain = {token: i for token, i in vocabulary.items() if token not in special}
    symbols = {symbol: byte for byte, symbol in enumerate(byte_level_symbols())}
    needed = {symbol: byte for symbol, byte in symbols.items() if byte != END_OF_TEXT_BYTE}
    return plain in (symbols, needed)
