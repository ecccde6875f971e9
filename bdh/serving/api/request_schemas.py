"""Requests of the OpenAI API, with additional sampling parameters.

pydantic needs a kilobyte for each error, and a request of a few megabytes could have a million. So lists are validated
up to their first error (`fail_fast`), and objects have a limited number of fields.
"""

import json
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from bdh.data.message_content import ContentError, content_text
from bdh.inference.sampling_params import REALS, SamplingParams, check_depth
from bdh.serving.api.errors import bad_request
from bdh.serving.config import RequestSettings

LARGEST = 2**31 - 1
MAX_SCHEMA_BYTES = 1 << 16
MAX_FIELDS = 100
MAX_ENTRIES = 1 << 14  # of an object or a list without a limit of its own


def limits_of(name: str) -> Any:
    """Return the limits that `SamplingParams` has for a real number."""
    low, high, includes_low = REALS[name]
    return Field(ge=low if includes_low else None, gt=None if includes_low else low, le=high, allow_inf_nan=False)


Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Token = Annotated[int, Field(ge=0, le=LARGEST)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Stop = Annotated[str, Field(min_length=1)]
TokenText = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]


class Strict(BaseModel):
    """Part of a request: no other fields, and no values of other types."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def limit_fields(cls, value: Any) -> Any:
        """Drop fields beyond the limit: one unknown field is enough for the error."""
        return dict(islice(value.items(), MAX_FIELDS)) if isinstance(value, dict) else value


def check_entries(value: Any) -> Any:
    """Raises PydanticCustomError for an object or a list with very many entries, before each of them is validated."""
    if isinstance(value, dict | list) and len(value) > MAX_ENTRIES:
        raise PydanticCustomError("too_long", f"there are {len(value)} entries; {MAX_ENTRIES} are the most")
    return value


Few = BeforeValidator(check_entries)


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # accepted and ignored: chunks are never padded


class JsonSchema(Strict):
    """Schema that the generated text must satisfy."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextFormat(Strict):
    type: Literal["text"]


class JsonFormat(Strict):
    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonFormat | JsonSchemaFormat, Field(discriminator="type")]


class SamplingFields(Strict):
    """Sampling parameters of all requests that generate text. None is the default of the API."""

    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, limits_of("presence_penalty")] | None = None
    frequency_penalty: Annotated[float, limits_of("frequency_penalty")] | None = None
    logit_bias: Annotated[dict[TokenText, Bias] | None, Few] = None
    seed: int | None = None  # any integer; taken modulo 2^63
    stop: Stop | Annotated[list[Stop], Field(max_length=4, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    # not in the OpenAI API
    top_k: int | None = Field(default=None, ge=-1, le=LARGEST)
    min_p: Annotated[float, limits_of("min_p")] | None = None
    typical_p: Annotated[float, limits_of("typical_p")] | None = None
    repetition_penalty: Annotated[float, limits_of("repetition_penalty")] | None = None
    min_tokens: int | None = Field(default=None, ge=0, le=LARGEST)
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[Token] | None, Field(fail_fast=True), Few] = None
    regex: str | None = None
    brain: bool | None = None

    def sampling_params(
        self,
        limits: RequestSettings,
        max_tokens: int,
        *,
        n: int = 1,
        best_of: int | None = None,
        logprobs: int | None = None,
    ) -> SamplingParams:
        """Return the parameters of the engine. Raises ApiError, or BDHError for what `SamplingParams` refuses."""
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options is for streams; leave it out, or set stream to true", "stream_options")
        if max_tokens > limits.max_tokens:
            message = f"max_tokens is {max_tokens}; this server writes {limits.max_tokens} at most"
            raise bad_request(message, "max_tokens")
        fields = {name: getattr(self, name) for name in SAME_IN_ENGINE}
        return SamplingParams(
            max_new_tokens=max_tokens,
            min_new_tokens=self.min_tokens or 0,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(self.top_k or 0, 0),
            top_p=1.0 if self.top_p is None else max(self.top_p, 1e-6),  # 0 selects the likeliest token
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()} or None,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            logprobs=logprobs,
            n=n,
            best_of=best_of,
            seed=None if self.seed is None else self.seed % 2**63,
            json_schema=self.checked_schema(),
            **{name: value for name, value in fields.items() if value is not None},
        )

    def checked_schema(self) -> dict[str, Any] | None:
        """Return the JSON schema of the generated text, if any. Raises ApiError or BDHError for a too large one."""
        schema = self.response_schema()
        check_depth(schema)
        if schema is not None and len(json.dumps(schema)) > MAX_SCHEMA_BYTES:
            message = f"the schema has more than {MAX_SCHEMA_BYTES} bytes; give a smaller one"
            raise bad_request(message, "response_format")
        return schema

    def response_schema(self) -> dict[str, Any] | None:
        match self.response_format:
            case JsonFormat():
                return {"type": "object"}
            case JsonSchemaFormat(json_schema=json_schema):
                return json_schema.schema_ or {}
        return None

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


SAME_IN_ENGINE = (  # fields that SamplingParams has under the same name and with the same default
    "presence_penalty",
    "frequency_penalty",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "ignore_eos",
    "stop_token_ids",
    "regex",
)
CacheControl = Annotated[dict[str, Any] | None, Few]  # ignored: the server manages its prefix cache itself


class KnownFields(SamplingFields):
    """Fields that clients commonly send and that are accepted and ignored."""

    user: str | None = None
    metadata: Annotated[dict[str, str] | None, Few] = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, Few] = None
    cache_control: CacheControl = None
    keep_alive: str | int | float | None = None

    def ignored_fields(self) -> list[str]:
        """Return the names of the ignored fields that the request has, for the log."""
        own = KnownFields.__annotations__
        return [name for name in type(self).model_fields if name in own and getattr(self, name) is not None]


TokenIds = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
PromptText = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[PromptText], Field(min_length=1, fail_fast=True)]
SeveralTokenIds = Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]


def check_prompts(value: Any) -> Any:
    """Check the number of prompts; one prompt may have many tokens."""
    return check_entries(value) if isinstance(value, list) and value and not isinstance(value[0], int) else value


Prompts = Annotated[PromptText | Texts | TokenIds | SeveralTokenIds, BeforeValidator(check_prompts)]


class CompletionRequest(KnownFields):
    """POST /v1/completions."""

    model: str
    prompt: Prompts
    max_tokens: int | None = Field(default=None, ge=0, le=LARGEST)  # 0 only with echo
    n: Count | None = None
    best_of: Count | None = None
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)
    suffix: str | None = None

    def prompts(self) -> list[str | list[int]]:
        """Return all prompts, each as text or as token ids."""
        match self.prompt:
            case str() as text:
                return [text]
            case [int(), *_] as tokens:
                return [tokens]  # type: ignore[list-item]
            case several:
                return list(several)  # type: ignore[arg-type]


class TextPart(Strict):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: dict[str, Any] | None = None  # accepted and ignored
    cache_control: CacheControl = None


class OtherPart(Strict):
    """An image, audio or a file: refused with a message."""

    model_config = ConfigDict(extra="allow")
    type: Literal["image_url", "input_audio", "file"]


class RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: str
    cache_control: CacheControl = None


Part = Annotated[TextPart | RefusalPart | OtherPart, Field(discriminator="type")]
Content = Annotated[str | Annotated[list[Part], Field(min_length=1, fail_fast=True)], Few]


class InstructionMessage(Strict):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None
    cache_control: CacheControl = None


class UserMessage(Strict):
    role: Literal["user"]
    content: Content
    name: str | None = None
    cache_control: CacheControl = None


class AssistantMessage(Strict):
    """Earlier reply of the assistant, with the fields that clients send back."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[Any] | None, Few] = None
    function_call: dict[str, Any] | None = None
    audio: dict[str, Any] | None = None
    annotations: Annotated[list[Any] | None, Few] = None
    parsed: Any = None  # parsed by the client from the content
    reasoning_content: str | None = None
    cache_control: CacheControl = None


class ToolMessage(Strict):
    """Message about a tool call: refused with a message."""

    model_config = ConfigDict(extra="allow")
    role: Literal["tool", "function"]


ChatMessage = Annotated[InstructionMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]
ChatMessages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True), Few]


class ChatFields(KnownFields):
    """Fields of requests for the reply in a chat, stateless or in a session."""

    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    def answer_tokens(self, limits: RequestSettings) -> int:
        """Return the maximum number of tokens of the reply."""
        default = min(limits.default_max_tokens, limits.max_tokens)
        return self.max_completion_tokens or self.max_tokens or default

    def wanted_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs; set logprobs to true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class ChatRequest(ChatFields):
    """POST /v1/chat/completions."""

    model: str
    messages: ChatMessages
    n: Count | None = None
    # Ignored, or refused by `plain_messages`.
    modalities: Annotated[list[str] | None, Field(fail_fast=True), Few] = None
    parallel_tool_calls: bool | None = None
    tools: Annotated[list[Any] | None, Few] = None
    tool_choice: str | dict[str, Any] | None = None
    functions: Annotated[list[Any] | None, Few] = None
    function_call: str | dict[str, Any] | None = None
    verbosity: str | None = None
    prediction: dict[str, Any] | None = None
    audio: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None

    def ignored_fields(self) -> list[str]:
        in_request = [name for name in IGNORED_IN_CHATS if getattr(self, name) is not None]
        in_messages = {name: None for message in self.messages for name in ignored_in(message)}
        return [*super().ignored_fields(), *in_request, *in_messages]

    def plain_messages(self) -> list[dict[str, str]]:
        """Return the messages as the chat template takes them. Raises ApiError for what is not supported."""
        if (self.tools and self.tool_choice != "none") or (self.functions and self.function_call != "none"):
            raise bad_request("tools are not supported here: the model knows no tool calls; leave tools out", "tools")
        if self.audio is not None or set(self.modalities or ["text"]) != {"text"}:
            raise bad_request("this server writes text only; leave audio and modalities out", "modalities")
        if self.web_search_options is not None:
            raise bad_request("this server cannot search the web; leave web_search_options out", "web_search_options")
        return [plain_message(message, f"messages.{number}") for number, message in enumerate(self.messages)]


IGNORED_IN_CHATS = ("parallel_tool_calls", "verbosity", "prediction")
IGNORED_IN_MESSAGES = ("name", "reasoning_content", "cache_control")


def ignored_in(message: ChatMessage) -> list[str]:
    """Return the names of the ignored fields of a message, as "messages[].name"."""
    names = [f"messages[].{name}" for name in IGNORED_IN_MESSAGES if getattr(message, name, None) is not None]
    content = getattr(message, "content", None)
    if isinstance(content, list) and any(getattr(part, "cache_control", None) is not None for part in content):
        names.append("messages[].content[].cache_control")
    return names


def plain_message(message: ChatMessage, param: str) -> dict[str, str]:
    """Return the role and text of a message. Raises ApiError."""
    if isinstance(message, ToolMessage) or (
        isinstance(message, AssistantMessage) and (message.tool_calls or message.function_call)
    ):
        raise bad_request(f"{param} is of a tool call, which are not supported here; leave it out", param)
    if isinstance(message, AssistantMessage) and message.content is None and message.refusal is not None:
        return {"role": message.role, "content": message.refusal}
    if message.content is None:
        raise bad_request(f"{param} has no content; give text", f"{param}.content")
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": text_of(message.content, f"{param}.content")}


def text_of(content: Content, name: str) -> str:
    """Return the text of a message's content. Raises ApiError for images and other content."""
    if isinstance(content, str):
        return content
    try:
        return content_text(((part.type, _text_of_part(part)) for part in content), name)
    except ContentError as error:
        raise bad_request(str(error), error.name) from error


def _text_of_part(part: Part) -> str | None:
    match part:
        case TextPart():
            return part.text
        case RefusalPart():
            return part.refusal
    return None
