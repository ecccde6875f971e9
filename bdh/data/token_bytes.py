"""The bytes of single tokens, for all kinds of vocabularies."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from bdh.data.tokenizer import byte_level_symbols
from bdh.errors import BDHError

BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # of vocabularies that fall back to bytes


def token_bytes(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> tuple[list[bytes], list[bytes]]:
    """The UTF-8 bytes that each id below vocab_size stands for: as the first token of a text, and after others.

    Empty for special tokens and for ids that the tokenizer does not know. A token may be a part of a character.

    Raises:
        BDHError: The decoder does more than to write the tokens' texts one after the other.
    """
    backend = tokenizer.backend_tokenizer
    special = {i for i, added in tokenizer.added_tokens_decoder.items() if added.special}
    special.update(tokenizer.all_special_ids)
    known = sorted((i, token) for token, i in tokenizer.get_vocab().items())
    tokens = {i: token for i, token in known if i < vocab_size and i not in special}
    kinds = _kinds(json.loads(backend.decoder.__getstate__())) if backend.decoder else set()
    if "ByteLevel" in kinds:
        bytes_of = {symbol: byte for byte, symbol in enumerate(byte_level_symbols())}
        forms = {i: (_from_symbols(token, bytes_of),) * 2 for i, token in tokens.items()}
        parts = {}
    else:
        parts = (
            {i: byte for i, token in tokens.items() if (byte := _beyond_ascii(token))}
            if "ByteFallback" in kinds
            else {}
        )
        forms = _decoded(backend, [i for i in tokens if i not in parts])
    _check_decoder(backend, forms)
    forms.update((i, (byte, byte)) for i, byte in parts.items())
    nothing = b"", b""
    return [forms.get(i, nothing)[0] for i in range(vocab_size)], [forms.get(i, nothing)[1] for i in range(vocab_size)]


def _kinds(decoder: Mapping[str, Any]) -> set[str]:
    """The types of a decoder and of those it is a sequence of."""
    return {decoder["type"]}.union(*(_kinds(part) for part in decoder.get("decoders", ())))


def _from_symbols(token: str, bytes_of: Mapping[str, int]) -> bytes:
    """Decodes a token of byte-level symbols; added tokens with other characters are taken literally."""
    return bytes(bytes_of[symbol] for symbol in token) if all(map(bytes_of.__contains__, token)) else token.encode()


def _beyond_ascii(token: str) -> bytes | None:
    """The byte that a token of a vocabulary with byte fallback stands for, if it is no character by itself."""
    match = BYTE_TOKEN.fullmatch(token)
    byte = int(match[1], 16) if match else 0
    return bytes([byte]) if byte >= 0x80 else None


def _decoded(backend: Tokenizer, ids: Sequence[int]) -> dict[int, tuple[bytes, bytes]]:
    """The decoder's text of each token alone, and of each after another token."""
    alone = backend.decode_batch([[i] for i in ids], skip_special_tokens=False)
    before = next((n for n, text in enumerate(alone) if text.strip()), 0)
    pairs = backend.decode_batch([[ids[before], i] for i in ids], skip_special_tokens=False)
    return {
        i: (text.encode(), pair.removeprefix(alone[before]).encode())
        for i, text, pair in zip(ids, alone, pairs, strict=True)
    }


def _check_decoder(backend: Tokenizer, forms: Mapping[int, tuple[bytes, bytes]]) -> None:
    """Decodes every token in random company. Raises BDHError if that is not the tokens' texts one after the other."""
    order = [int(i) for i in np.random.default_rng(0).permutation(sorted(forms))]
    chunks = [order[start : start + 50] for start in range(0, len(order), 50)]
    for ids in (*chunks, *(chunk[::-1] for chunk in chunks)):
        text = forms[ids[0]][0] + b"".join(forms[i][1] for i in ids[1:])
        if backend.decode(ids, skip_special_tokens=False) != text.decode(errors="replace"):
            raise BDHError("regex and json_schema need a tokenizer whose decoder puts tokens together as they are")
