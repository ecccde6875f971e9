"""What single tokens are in the answers: text and bytes of each, and log-probabilities in both dialects."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from bdh.errors import BDHError
from bdh.inference.outputs import Delta, TokenLogprob

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

    def one(self, token: int, logprob: float, part: str | None = None) -> dict[str, Any]:
        """A token with its log-probability, as the chat dialect has it.

        Args:
            token: The token.
            logprob: Its log-probability.
            part: The part of its text that belongs to the answer, if that is not all of it.
        """
        if part is not None:
            return {"token": part, "logprob": logprob, "bytes": list(part.encode())}
        special = token in self.special  # is no text, so there are no bytes of it in the answer
        return {"token": self.text(token), "logprob": logprob, "bytes": None if special else list(self.bytes(token))}


@dataclass(frozen=True)
class ScoredToken:
    """A token in a text, with its log-probabilities.

    Attributes:
        offset: Where it begins in the text, in characters.
        logprob: Of the token; NaN for the first token of a text, which has none.
        text: The part of the token that belongs to the text, if that is not all of it.
    """

    offset: int
    logprob: TokenLogprob
    text: str | None = None


class LogprobWriter:
    """The log-probabilities of the tokens that one continuation's text consists of, as the text is handed on.

    The tokens agree with the text: those of a stop string, and of the white space that is left out at the beginning,
    are not reported; of a token that reaches across either border, the part inside is.

    Args:
        texts: Of the vocabulary.
        ends: Tokens that end a text.
        strip: Whether white space before the text is left out.
        offset: Characters before the continuation, for the completion dialect's offsets.
        tells_end: Whether an end token is reported too, as completions do: who asks for one token after an echoed
            prompt counts on its being there, and drops it.
    """

    def __init__(
        self,
        texts: TokenTexts,
        ends: frozenset[int],
        strip: bool = False,
        offset: int = 0,
        tells_end: bool = False,
    ):
        from bdh.data.tokenizer import OffsetDecoder

        self.texts = texts
        self.ends = ends
        self.strip = strip
        self.offset = offset
        self.tells_end = tells_end
        self.decoder = OffsetDecoder(texts.tokenizer)
        self.waiting: deque[tuple[int, TokenLogprob]] = deque()  # each with its number in the decoder
        self.handed_on = 0  # characters
        self.dropped = 0  # characters before the text

    def take(self, delta: Delta) -> list[ScoredToken]:
        """The tokens that belong to the text so far and have not been reported."""
        for scored in delta.logprobs or ():
            is_end = scored.token in self.ends
            if self.tells_end or not is_end:
                self.waiting.append((len(self.decoder.tokens), scored))
            if not is_end:
                self.decoder.step(scored.token)
        finished = delta.finish_reason is not None
        if finished:
            self.decoder.end()
        if self.strip and delta.text and not self.handed_on and not delta.text[0].isspace():
            written = self.decoder.written
            self.dropped = len(written) - len(written.lstrip())
        self.handed_on += len(delta.text)
        return self._settled(finished)

    def _settled(self, finished: bool) -> list[ScoredToken]:
        """Takes the tokens out of the line that are inside the text that was handed on."""
        starts, length = self.decoder.starts, self.decoder.length
        end_of_text = self.dropped + self.handed_on
        whole = finished and length <= end_of_text  # the last tokens may be special ones, without text
        settled = []
        while self.waiting:
            number, scored = self.waiting[0]
            start = starts[number] if number < len(starts) else length
            end = starts[number + 1] if number + 1 < len(starts) else length
            if not whole and (start >= end_of_text or (end > end_of_text and not finished)):
                break
            self.waiting.popleft()
            if start < self.dropped and end <= self.dropped and scored.token not in self.texts.special:
                continue
            inside = max(start, self.dropped), min(end, end_of_text)
            cut = self.decoder.written[slice(*inside)] if inside != (start, end) and start < end else None
            settled.append(ScoredToken(max(0, start - self.dropped) + self.offset, scored, cut))
        return settled


def chat_logprobs(texts: TokenTexts, scored: Iterable[ScoredToken]) -> dict[str, Any]:
    """Log-probabilities as chats report them."""
    content = [
        {
            **texts.one(one.logprob.token, one.logprob.logprob, one.text),
            "top_logprobs": [texts.one(token, logprob) for token, logprob in one.logprob.top],
        }
        for one in scored
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(texts: TokenTexts, scored: Sequence[ScoredToken], wants_top: bool) -> dict[str, Any]:
    """Log-probabilities as completions report them."""
    logprobs = [one.logprob for one in scored]
    return {
        "tokens": [texts.text(one.logprob.token) if one.text is None else one.text for one in scored],
        "token_logprobs": [None if one.logprob != one.logprob else one.logprob for one in logprobs],
        "top_logprobs": [_top(texts, one) for one in logprobs] if wants_top else None,
        "text_offset": [one.offset for one in scored],
    }


def _top(texts: TokenTexts, one: TokenLogprob) -> dict[str, float] | None:
    """The likeliest tokens, and the one that was taken; None where there is nothing to tell."""
    if one.logprob != one.logprob:
        return None
    return {texts.text(token): logprob for token, logprob in [*one.top, (one.token, one.logprob)]}
