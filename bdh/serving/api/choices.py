"""Continuations as choices of an answer: in the dialect of completions, and in that of chats."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from bdh.inference.outputs import Choice, Delta
from bdh.serving.api.logprobs import LogprobWriter, ScoredToken, TokenTexts, chat_logprobs, completion_logprobs

Scored = list[ScoredToken]


class Dialect(Protocol):
    """How a choice is written, whole and in pieces."""

    def whole(self, index: int, text: str, scored: Scored | None, finish_reason: str) -> dict[str, Any]:
        """A whole choice."""

    def piece(self, index: int, text: str, scored: Scored | None, finish_reason: str | None) -> dict[str, Any]:
        """A piece of one, in a stream."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """What comes before the first piece, if something does."""


class CompletionDialect:
    """Choices of /v1/completions."""

    def __init__(self, texts: TokenTexts, wants_top: bool):
        self.texts = texts
        self.wants_top = wants_top

    def whole(self, index: int, text: str, scored: Scored | None, finish_reason: str) -> dict[str, Any]:
        return self.piece(index, text, scored, finish_reason)

    def piece(self, index: int, text: str, scored: Scored | None, finish_reason: str | None) -> dict[str, Any]:
        logprobs = None if scored is None else completion_logprobs(self.texts, scored, self.wants_top)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def opening(self, index: int) -> dict[str, Any] | None:
        return None


class ChatDialect:
    """Choices of /v1/chat/completions."""

    def __init__(self, texts: TokenTexts):
        self.texts = texts

    def whole(self, index: int, text: str, scored: Scored | None, finish_reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        logprobs = None if scored is None else chat_logprobs(self.texts, scored)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}

    def piece(self, index: int, text: str, scored: Scored | None, finish_reason: str | None) -> dict[str, Any]:
        delta = {"content": text} if text or finish_reason is None else {}
        logprobs = None if scored is None else chat_logprobs(self.texts, scored)
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


class Choices:
    """The continuations of one prompt, turned into choices.

    Args:
        dialect: How they are written.
        writers: For the log-probabilities of each continuation; None where they are not asked for.
        first_index: Of the first.
    """

    def __init__(self, dialect: Dialect, writers: Sequence[LogprobWriter] | None, first_index: int = 0):
        self.dialect = dialect
        self.writers = writers
        self.first_index = first_index

    def openings(self, count: int) -> list[dict[str, Any]]:
        found = (self.dialect.opening(self.first_index + index) for index in range(count))
        return [opening for opening in found if opening is not None]

    def whole(self, choice: Choice, before: str = "", scored_before: Scored | None = None) -> dict[str, Any]:
        """A whole choice, after an echoed prompt."""
        delta = Delta(choice.text, choice.index, choice.finish_reason, choice.tokens, choice.logprobs)
        scored = self._scored(delta)
        if scored is not None:
            scored = [*(scored_before or ()), *scored]
        index = self.first_index + choice.index
        return self.dialect.whole(index, before + choice.text, scored, choice.finish_reason)

    def pieces(self, deltas: Iterable[Delta]) -> list[dict[str, Any]]:
        """Pieces of choices; what has come of one continuation meanwhile is one piece."""
        return [
            self.dialect.piece(self.first_index + delta.index, delta.text, self._scored(delta), delta.finish_reason)
            for delta in joined(deltas)
        ]

    def _scored(self, delta: Delta) -> Scored | None:
        return None if self.writers is None else self.writers[delta.index].take(delta)


def joined(deltas: Iterable[Delta]) -> list[Delta]:
    """The same, those of one continuation as one."""
    found: dict[int, Delta] = {}
    for delta in deltas:
        before = found.get(delta.index)
        if before is not None:
            logprobs = None if delta.logprobs is None else [*(before.logprobs or ()), *delta.logprobs]
            tokens = [*before.tokens, *delta.tokens]
            delta = Delta(before.text + delta.text, delta.index, delta.finish_reason, tokens, logprobs)
        found[delta.index] = delta
    return list(found.values())
