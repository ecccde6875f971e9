"""Builds the responses of a request from the output of the engine: whole, or chunk by chunk."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bdh import __version__
from bdh.inference.outputs import Choice, Delta, TextRequest
from bdh.serving.api.logprobs import LogprobWriter, ScoredToken, TokenTexts, chat_logprobs, completion_logprobs
from bdh.serving.api.response_schemas import (
    ChatChoice,
    ChatChunk,
    ChatResponse,
    ChunkChoice,
    ChunkDelta,
    CompletionChoice,
    CompletionResponse,
    FinishReason,
    ResponseMessage,
    TokenUsage,
)

FINGERPRINT = f"bdh-{__version__}"
Scored = Sequence[ScoredToken]


@dataclass
class Echo:
    """A prompt that is part of the response."""

    text: str = ""
    scored: list[ScoredToken] = field(default_factory=list)


class ResponseBuilder(ABC):
    """Builds the response models of one HTTP request.

    Args:
        model: Name of the model.
        texts: Texts of its tokens.
        session: Id of the session that the response belongs to, if any.
        include_usage: Whether the chunks of a stream have the field `usage`.

    Attributes:
        logprobs: A writer for each choice whose log-probabilities are requested, by the index of the choice.
    """

    id_prefix: str
    reports_end_tokens = False

    def __init__(self, model: str, texts: TokenTexts, session: str | None = None, include_usage: bool = False):
        self.texts = texts
        self.logprobs: dict[int, LogprobWriter] = {}
        self.fields: dict[str, Any] = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }
        if session is not None:
            self.fields["session"] = session
        self.chunk_fields = {**self.fields, "usage": None} if include_usage else self.fields

    @abstractmethod
    def response(self, choices: list[Any], usage: TokenUsage, **fields: Any) -> ChatResponse | CompletionResponse:
        """Build the whole response."""

    @abstractmethod
    def chunk(self, choices: list[Any], **fields: Any) -> ChatChunk | CompletionResponse:
        """Build a chunk of the stream."""

    @abstractmethod
    def whole_choice(
        self, index: int, text: str, scored: Scored | None, finish_reason: FinishReason
    ) -> ChatChoice | CompletionChoice: ...

    @abstractmethod
    def chunk_choice(
        self, index: int, text: str, scored: Scored | None, finish_reason: FinishReason | None
    ) -> ChunkChoice | CompletionChoice: ...

    def add_logprobs(self, text_request: TextRequest, first_index: int = 0, offset: int = 0) -> None:
        """Report the log-probabilities of the continuations of a prompt.

        Args:
            text_request: The request.
            first_index: Index of the first of its choices.
            offset: Characters of the echoed prompt.
        """
        request = text_request.request
        for index in range(first_index, first_index + request.params.n):
            self.logprobs[index] = LogprobWriter(
                self.texts, request.ends, text_request.strip, offset, self.reports_end_tokens
            )

    def choice(self, choice: Choice, first_index: int = 0, echo: Echo | None = None) -> ChatChoice | CompletionChoice:
        """Build a choice of the whole response, after the echoed prompt."""
        index, echo = first_index + choice.index, echo or Echo()
        delta = Delta(choice.text, choice.index, choice.finish_reason, choice.tokens, choice.logprobs)
        scored = self._scored(index, delta)
        if scored is not None:
            scored = [*echo.scored, *scored]
        return self.whole_choice(index, echo.text + choice.text, scored, choice.finish_reason)

    def chunk_choices(self, deltas: Iterable[Delta], first_index: int = 0) -> list[ChunkChoice | CompletionChoice]:
        """Build the choices of chunks; deltas of the same continuation are merged."""
        return [
            self.chunk_choice(
                first_index + delta.index,
                delta.text,
                self._scored(first_index + delta.index, delta),
                delta.finish_reason,
            )
            for delta in merged(deltas)
        ]

    def _scored(self, index: int, delta: Delta) -> list[ScoredToken] | None:
        return self.logprobs[index].take(delta) if index in self.logprobs else None


class CompletionResponseBuilder(ResponseBuilder):
    """Builds responses of completions.

    Args:
        top_logprobs: Whether the likeliest tokens are reported too.
    """

    id_prefix = "cmpl"
    reports_end_tokens = True  # clients that ask for one token after an echoed prompt rely on it

    def __init__(self, *args: Any, top_logprobs: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.top_logprobs = top_logprobs

    def response(self, choices: list[Any], usage: TokenUsage, **fields: Any) -> CompletionResponse:
        return CompletionResponse(object="text_completion", choices=choices, usage=usage, **self.fields, **fields)

    def chunk(self, choices: list[Any], **fields: Any) -> CompletionResponse:
        return CompletionResponse(object="text_completion", choices=choices, **{**self.chunk_fields, **fields})

    def whole_choice(
        self, index: int, text: str, scored: Scored | None, finish_reason: FinishReason
    ) -> CompletionChoice:
        return self.chunk_choice(index, text, scored, finish_reason)

    def chunk_choice(
        self, index: int, text: str, scored: Scored | None, finish_reason: FinishReason | None
    ) -> CompletionChoice:
        logprobs = None if scored is None else completion_logprobs(self.texts, scored, self.top_logprobs)
        return CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=finish_reason)


class ChatResponseBuilder(ResponseBuilder):
    """Builds responses of chats."""

    id_prefix = "chatcmpl"

    def response(self, choices: list[Any], usage: TokenUsage, **fields: Any) -> ChatResponse:
        return ChatResponse(
            object="chat.completion", choices=choices, usage=usage, service_tier=None, **self.fields, **fields
        )

    def chunk(self, choices: list[Any], **fields: Any) -> ChatChunk:
        return ChatChunk(object="chat.completion.chunk", choices=choices, **{**self.chunk_fields, **fields})

    def whole_choice(self, index: int, text: str, scored: Scored | None, finish_reason: FinishReason) -> ChatChoice:
        message = ResponseMessage(role="assistant", content=text, refusal=None)
        logprobs = None if scored is None else chat_logprobs(self.texts, scored)
        return ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=finish_reason)

    def chunk_choice(
        self, index: int, text: str, scored: Scored | None, finish_reason: FinishReason | None
    ) -> ChunkChoice:
        delta = ChunkDelta(content=text) if text or finish_reason is None else ChunkDelta()
        logprobs = None if scored is None else chat_logprobs(self.texts, scored)
        return ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)

    def role_choice(self, index: int) -> ChunkChoice:
        """Build the first choice of a stream, which has the role of the assistant."""
        delta = ChunkDelta(role="assistant", content="")
        return ChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """Merge the deltas of each continuation into one."""
    by_index: dict[int, Delta] = {}
    for delta in deltas:
        previous = by_index.get(delta.index)
        if previous is not None:
            logprobs = None if delta.logprobs is None else [*(previous.logprobs or ()), *delta.logprobs]
            tokens = [*previous.tokens, *delta.tokens]
            delta = Delta(previous.text + delta.text, delta.index, delta.finish_reason, tokens, logprobs)
        by_index[delta.index] = delta
    return list(by_index.values())
