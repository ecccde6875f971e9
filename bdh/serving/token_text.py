"""What single tokens are in the answers: text and bytes of each, and log-probabilities in both dialects."""

from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from bdh.errors import BDHError
from bdh.inference.answer import Delta, TokenLogprob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TokenTexts:
    """The text and bytes of each token of a vocabulary."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", vocab_size: int):
        from bdh.data.chat_format import special_ids
        from bdh.data.token_bytes import token_bytes

        self.tokenizer = tokenizer
        self.special = special_ids(tokenizer)
        self.vocab_size = vocab_size
        try:
            self._bytes: list[bytes] | None = token_bytes(tokenizer, vocab_size)[1]
        except BDHError:  # a decoder that does more than to join texts
            self._bytes = None
        self.text = lru_cache(maxsize=1 << 16)(self._text)

    @cached_property
    def longest(self) -> int:
        """The most characters that one token can stand for; 0 where that is not known."""
        from tokenizers.models import BPE

        backend = self.tokenizer.backend_tokenizer
        model = backend.model
        nothing_is_lost = isinstance(model, BPE) and backend.normalizer is None and model.unk_token is None
        return max(map(len, self._bytes)) if self._bytes and nothing_is_lost else 0

    def bytes(self, token: int) -> bytes:
        """The bytes of a token; of a special one, those of its name."""
        if token not in self.special and self._bytes is not None and self._bytes[token]:
            return self._bytes[token]
        return (self.tokenizer.convert_ids_to_tokens(token) or "").encode("utf-8", "replace")

    def _text(self, token: int) -> str:
        """The text of a token; of a part of a character, its bytes, as OpenAI writes them."""
        raw = self.bytes(token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def one(self, token: int, logprob: float) -> dict[str, Any]:
        """A token with its log-probability, as the chat dialect has it."""
        return {"token": self.text(token), "logprob": logprob, "bytes": list(self.bytes(token))}


class LogprobWriter:
    """The log-probabilities of one continuation, for as much of its text as is handed on.

    Tokens of a stop string are none of the answer's; what is not known yet to be the answer's is held back, as its text
    is.

    Args:
        texts: Of the vocabulary.
        ends: Tokens that end a text.
        strip: Whether white space at the beginning of the text is left out.
        offset: Characters before the continuation, for the completion dialect's offsets.
        tells_end: Whether an end token is told too, as completions do: who asks for one token after an echoed prompt
            counts on its being there, and drops it.
    """

    def __init__(
        self,
        texts: TokenTexts,
        ends: frozenset[int],
        strip: bool = False,
        offset: int = 0,
        tells_end: bool = False,
    ):
        from bdh.data.tokenizer import IncrementalDecoder

        self.texts = texts
        self.ends = ends
        self.strip = strip
        self.offset = offset
        self.tells_end = tells_end
        self.decoder = IncrementalDecoder(texts.tokenizer)
        self.waiting: list[tuple[int, TokenLogprob]] = []  # where each begins in the text, and it
        self.handed_on = 0  # characters
        self.left_out = 0

    def take(self, delta: Delta) -> list[tuple[int, TokenLogprob]]:
        """The tokens that belong to the text so far and have not been told, each with its offset."""
        for scored in delta.logprobs or ():
            start = self.decoder.length
            if scored.token not in self.ends:
                text = self.decoder.step(scored.token)
                if self.strip and self.left_out == start:
                    self.left_out += len(text) - len(text.lstrip())
            elif not self.tells_end:
                continue
            self.waiting.append((max(0, start - self.left_out), scored))
        self.handed_on += len(delta.text)
        cut_off = self.decoder.length - self.left_out > self.handed_on  # by a stop string, or not known yet
        whole = delta.finish_reason is not None and not cut_off  # the last tokens may be special ones, without text
        settled = [pair for pair in self.waiting if whole or pair[0] < self.handed_on]
        self.waiting = self.waiting[len(settled) :]
        return [(start + self.offset, scored) for start, scored in settled]


def chat_logprobs(texts: TokenTexts, scored: Iterable[tuple[int, TokenLogprob]]) -> dict[str, Any]:
    """Log-probabilities as chats tell them."""
    content = [
        {
            **texts.one(one.token, one.logprob),
            "top_logprobs": [texts.one(token, logprob) for token, logprob in one.top],
        }
        for _, one in scored
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    texts: TokenTexts, scored: Sequence[tuple[int, TokenLogprob]], wants_top: bool
) -> dict[str, Any]:
    """Log-probabilities as completions tell them; NaN stands for the first token of a text, which has none."""
    return {
        "tokens": [texts.text(one.token) for _, one in scored],
        "token_logprobs": [None if one.logprob != one.logprob else one.logprob for _, one in scored],
        "top_logprobs": [_top(texts, one) for _, one in scored] if wants_top else None,
        "text_offset": [start for start, _ in scored],
    }


def _top(texts: TokenTexts, one: TokenLogprob) -> dict[str, float] | None:
    """The likeliest tokens, and the one that was taken; None where there is nothing to tell."""
    if one.logprob != one.logprob:
        return None
    return {texts.text(token): logprob for token, logprob in [*one.top, (one.token, one.logprob)]}
