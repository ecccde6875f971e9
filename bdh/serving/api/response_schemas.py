"""Responses of the OpenAI API: pydantic models that document the API and produce its JSON."""

from typing import Any, Literal

from pydantic import BaseModel, Field
from pydantic_core import PydanticSerializationError
from starlette.responses import Response

from bdh.json_text import to_json
from bdh.serving.activity.schemas import BrainChunk, BrainReference
from bdh.serving.api.errors import ApiError

FinishReason = Literal["stop", "length"]


def json_bytes(model: BaseModel) -> bytes:
    """Encode a response as JSON in ASCII, without the fields that were not set."""
    try:
        return model.model_dump_json(exclude_unset=True, by_alias=True, ensure_ascii=True).encode()
    except PydanticSerializationError:  # half of a surrogate pair, in text from the client
        return to_json(model.model_dump(exclude_unset=True, by_alias=True), separators=(",", ":")).encode("ascii")


class ModelResponse(Response):
    """JSON response with a pydantic model as its content."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json_bytes(content)


def error_response(error: ApiError) -> ModelResponse:
    return ModelResponse(error.response_model(), error.status, error.headers)


class PromptTokensDetails(BaseModel):
    cached_tokens: int = 0


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int = 0


class TokenUsage(BaseModel):
    """Tokens of a request; those that a kept state had read already are counted in `cached_tokens` too."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class CompletionLogprobs(BaseModel):
    """Log-probabilities of the tokens of a completion, in nats; the first token of an echoed prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None = None


class ResponseMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ResponseMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChunkDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: ChunkDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class GenerationResponse(BaseModel):
    """Fields that all responses with generated text have."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    session: str | None = Field(default=None, description="Id of the session, in responses of /v1/sessions.")


class CompletionResponse(GenerationResponse):
    """Response of /v1/completions, and each chunk of its stream."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: TokenUsage | None = None
    brain: BrainChunk | BrainReference | None = None


class ChatResponse(GenerationResponse):
    """Response of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: TokenUsage
    service_tier: str | None = None
    brain: BrainReference | None = None


class ChatChunk(GenerationResponse):
    """Chunk of the stream of /v1/chat/completions."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    usage: TokenUsage | None = None
    brain: BrainChunk | None = None
