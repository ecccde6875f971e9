"""Log-probabilities of tokens in responses, with the text and bytes of each token."""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from bdh.errors import BDHError
from bdh.inference.outputs import Delta, TokenLogprob
from bdh.serving.api.response_schemas import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TokenTexts:
    """Text and bytes of each token of a vocabulary."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", vocab_size: int):
        from bdh.data.chat_format import special_ids
        from bdh.data.token_bytes import token_bytes

        self.tokenizer = tokenizer
        self.special = special_ids(tokenizer)
        self.vocab_size = vocab_size
        try:
            self._bytes: list[bytes] | None = token_bytes(tokenizer, vocab_size)[1]
        except BDHError:  # the decoder does more than concatenate texts
            self._bytes = None
        self.text = lru_cache(maxsize=1 << 16)(self._text)

    @cached_property
    def longest(self) -> int:
        """Largest number of characters that one token stands for; 0 if unknown."""
        from tokenizers.models import BPE

        backend = self.tokenizer.backend_tokenizer
        model = backend.model
        is_lossless = isinstance(model, BPE) and backend.normalizer is None and model.unk_token is None
        return max(map(len, self._bytes)) if self._bytes and is_lossless else 0

    def bytes(self, token: int) -> bytes:
        """Return the bytes of a token; for a special token, the bytes of its name."""
        if token not in self.special and self._bytes is not None and self._bytes[token]:
            return self._bytes[token]
        return (self.tokenizer.convert_ids_to_tokens(token) or "").encode("utf-8", "replace")

    def _text(self, token: int) -> str:
        """Return the text of a token; for a part of a character its bytes, in the notation of OpenAI."""
        raw = self.bytes(token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def top_logprob(self, token: int, logprob: float, part: str | None = None) -> TopLogprob:
        """Build the entry of a token in the log-probabilities of a chat.

        Args:
            token: The token.
            logprob: Its log-probability.
            part: The part of its text that belongs to the response, if not all of it does.
        """
        if part is not None:
            return TopLogprob(token=part, logprob=logprob, bytes=list(part.encode()))
        content = None if token in self.special else list(self.bytes(token))  # special tokens are not text
        return TopLogprob(token=self.text(token), logprob=logprob, bytes=content)


@dataclass(frozen=True)
class ScoredToken:
    """Token of a text with its log-probability.

    Attributes:
        offset: Position in the text, in characters.
        logprob: Its log-probability; NaN for the first token of a text.
        text: The part of the token that belongs to the text, if not all of it does.
    """

    offset: int
    logprob: TokenLogprob
    text: str | None = None


class LogprobWriter:
    """Reports the log-probabilities of one continuation's tokens together with its text.

    The reported tokens agree with the text: tokens of a stop string and of stripped white space are omitted, and of a
    token that crosses either border only the part inside is reported.

    Args:
        texts: Texts of the vocabulary.
        ends: Tokens that end a text.
        strip: Whether white space before the text is stripped.
        offset: Characters before the continuation, for the offsets of completions.
        report_end: Whether an end token is reported too.
    """

    def __init__(
        self,
        texts: TokenTexts,
        ends: frozenset[int],
        strip: bool = False,
        offset: int = 0,
        report_end: bool = False,
    ):
        from bdh.data.tokenizer import OffsetDecoder

        self.texts = texts
        self.ends = ends
        self.strip = strip
        self.offset = offset
        self.report_end = report_end
        self.decoder = OffsetDecoder(texts.tokenizer)
        self.pending: deque[tuple[int, TokenLogprob]] = deque()  # with their indices in the decoder
        self.emitted = 0  # characters of the text so far
        self.stripped = 0  # characters before the text

    def take(self, delta: Delta) -> list[ScoredToken]:
        """Add a delta; return the unreported tokens that belong to the text so far."""
        for scored in delta.logprobs or ():
            is_end = scored.token in self.ends
            if self.report_end or not is_end:
                self.pending.append((len(self.decoder.tokens), scored))
            if not is_end:
                self.decoder.step(scored.token)
        finished = delta.finish_reason is not None
        if finished:
            self.decoder.end()
        if self.strip and delta.text and not self.emitted and not delta.text[0].isspace():
            written = self.decoder.written
            self.stripped = len(written) - len(written.lstrip())
        self.emitted += len(delta.text)
        return self._settled(finished)

    def _settled(self, finished: bool) -> list[ScoredToken]:
        """Remove and return the pending tokens that are inside the emitted text."""
        starts, length = self.decoder.starts, self.decoder.length
        end_of_text = self.stripped + self.emitted
        complete = finished and length <= end_of_text  # the last tokens may be special ones, without text
        settled = []
        while self.pending:
            index, token = self.pending[0]
            start = starts[index] if index < len(starts) else length
            end = starts[index + 1] if index + 1 < len(starts) else length
            if not complete and (start >= end_of_text or (end > end_of_text and not finished)):
                break
            self.pending.popleft()
            if start < self.stripped and end <= self.stripped and token.token not in self.texts.special:
                continue
            inside = max(start, self.stripped), min(end, end_of_text)
            part = self.decoder.written[slice(*inside)] if inside != (start, end) and start < end else None
            settled.append(ScoredToken(max(0, start - self.stripped) + self.offset, token, part))
        return settled


def chat_logprobs(texts: TokenTexts, scored: Iterable[ScoredToken]) -> ChatLogprobs:
    """Build the log-probabilities of a chat."""
    content = []
    for token in scored:
        entry = texts.top_logprob(token.logprob.token, token.logprob.logprob, token.text)
        top = [texts.top_logprob(*pair) for pair in token.logprob.top]
        content.append(ChatLogprob(token=entry.token, logprob=entry.logprob, bytes=entry.bytes, top_logprobs=top))
    return ChatLogprobs(content=content, refusal=None)


def completion_logprobs(texts: TokenTexts, scored: Sequence[ScoredToken], wants_top: bool) -> CompletionLogprobs:
    """Build the log-probabilities of a completion. The first token of an echoed prompt has none."""
    logprobs = [token.logprob for token in scored]
    return CompletionLogprobs(
        tokens=[texts.text(token.logprob.token) if token.text is None else token.text for token in scored],
        token_logprobs=[None if math.isnan(token.logprob) else token.logprob for token in logprobs],
        top_logprobs=[_top(texts, token) for token in logprobs] if wants_top else None,
        text_offset=[token.offset for token in scored],
    )


def _top(texts: TokenTexts, scored: TokenLogprob) -> dict[str, float] | None:
    """Return the log-probabilities of the likeliest tokens and of the sampled one by their texts."""
    if math.isnan(scored.logprob):
        return None
    return {texts.text(token): logprob for token, logprob in (*scored.top, (scored.token, scored.logprob))}
