"""What clients get: the answers of the OpenAI API, as its OpenAPI description says and as they are written."""

import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from bdh import __version__

FINGERPRINT = f"bdh-{__version__}"


class PromptDetails(BaseModel):
    cached_tokens: int = 0


class CompletionDetails(BaseModel):
    reasoning_tokens: int = 0


class Usage(BaseModel):
    """Tokens of a request; those that a kept state had read already are counted in `cached_tokens` too."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class CompletionLogprobs(BaseModel):
    """Of the tokens of a completion, in nats; the first of an echoed prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionAnswer(BaseModel):
    """What /v1/completions answers, and what each piece of its stream is."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    brain: dict[str, Any] | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatAnswer(BaseModel):
    """What /v1/chat/completions answers."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    service_tier: str | None = None
    brain: dict[str, Any] | None = None


class ChunkDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: ChunkDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatChunk(BaseModel):
    """A piece of the stream that /v1/chat/completions answers with."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    brain: dict[str, Any] | None = None


class ModelCard(BaseModel):
    """A model; `bdh` says what kind of model it is."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    bdh: "ModelFigures"


class ModelFigures(BaseModel):
    n_layer: int
    n_embd: int
    n_head: int
    n_neurons: int = Field(description="Of all heads together.")
    vocab_size: int
    n_parameters: int
    state_bytes: int = Field(description="Of one sequence's synapses, however long it is.")
    slots: int = Field(description="Continuations in work at once.")
    device: str
    dtype: str
    quantization: str | None
    chat_template: bool
    max_prompt_tokens: int
    max_tokens: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    """The JSON of `Usage`."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


class Envelope:
    """What all pieces of one answer have in common."""

    def __init__(self, prefix: Literal["cmpl", "chatcmpl"], model: str):
        self.chat = prefix == "chatcmpl"
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = model

    def whole(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The JSON of a whole answer."""
        return self._around("chat.completion" if self.chat else "text_completion", choices, more)

    def piece(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The JSON of a piece of a stream."""
        return self._around("chat.completion.chunk" if self.chat else "text_completion", choices, more)

    def _around(self, kind: str, choices: Sequence[dict[str, Any]], more: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": list(choices),
            **more,
        }
