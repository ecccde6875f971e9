"""What clients send: the requests of the OpenAI API, and what a BDH can add to them.

Each mistake takes pydantic a kilobyte, and a request of a few megabytes has room for a million: lists are read up to
their first one (`fail_fast`), and objects have few fields.
"""

import json
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from bdh.data.message_content import ContentError, content_text
from bdh.inference.params import SamplingParams, check_depth
from bdh.serving.api.errors import bad_request
from bdh.serving.config import RequestSettings

LARGEST = 2**31 - 1
MOST_SCHEMA_BYTES = 1 << 16
EVERYTHING = 0  # a top_k
MOST_FIELDS = 100
MOST_ENTRIES = 1 << 14  # of an object or a list that may have any

Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Token = Annotated[int, Field(ge=0, le=LARGEST)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Stop = Annotated[str, Field(min_length=1)]
TokenText = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]


class Strict(BaseModel):
    """A part of a request: no other fields, and no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def beginning(cls, value: Any) -> Any:
        """Not more fields than there could be; one too many is enough to say so."""
        return dict(islice(value.items(), MOST_FIELDS)) if isinstance(value, dict) else value


def few(value: Any) -> Any:
    """Raises PydanticCustomError for an object or a list with very many entries, before each of them is checked."""
    if isinstance(value, dict | list) and len(value) > MOST_ENTRIES:
        raise PydanticCustomError("too_long", f"there are {len(value)} entries; {MOST_ENTRIES} are the most")
    return value


Few = BeforeValidator(few)


class StreamOptions(Strict):
    """What a stream tells besides the text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # known and not needed: nothing here is padded


class JsonSchema(Strict):
    """A schema that an answer is to satisfy."""

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
    """How tokens are chosen: fields of all requests that write text. None is what is usual."""

    temperature: Temperature | None = None
    top_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenText, Bias] | None, Few] = None
    seed: int | None = None  # as clients have it; those that are the same modulo 2^63 are the same
    stop: Stop | Annotated[list[Stop], Field(max_length=4, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    # of this server
    top_k: int | None = Field(default=None, ge=-1, le=LARGEST)
    min_p: Share | None = None
    typical_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
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
        """The engine's params. Raises ApiError, or BDHError for what only SamplingParams sees."""
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options is for streams; leave it out, or set stream to true", "stream_options")
        if max_tokens > limits.max_tokens:
            raise bad_request(
                f"max_tokens is {max_tokens}; this server writes {limits.max_tokens} at most", "max_tokens"
            )
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_new_tokens=max_tokens,
            min_new_tokens=self.min_tokens or 0,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(self.top_k or EVERYTHING, EVERYTHING),
            top_p=1.0 if self.top_p is None else max(self.top_p, 1e-6),  # 0 is the likeliest alone
            min_p=self.min_p or 0.0,
            typical_p=1.0 if self.typical_p is None else self.typical_p,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()} or None,
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            n=n,
            best_of=best_of,
            seed=None if self.seed is None else self.seed % 2**63,
            regex=self.regex,
            json_schema=self.checked_schema(),
        )

    def checked_schema(self) -> dict[str, Any] | None:
        """The schema of the answer, if there is one. Raises ApiError for one that would take long to follow."""
        schema = self.schema_of_answer()
        check_depth(schema)
        if schema is not None and len(json.dumps(schema)) > MOST_SCHEMA_BYTES:
            words = f"the schema has more than {MOST_SCHEMA_BYTES} bytes; give a smaller one"
            raise bad_request(words, "response_format")
        return schema

    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema that the whole text must satisfy, if one is asked for."""
        match self.response_format:
            case JsonFormat():
                return {"type": "object"}
            case JsonSchemaFormat(json_schema=named):
                return {} if named.schema_ is None else named.schema_
        return None

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


CacheControl = Annotated[dict[str, Any] | None, Few]  # beginnings of prompts are kept as the server sees fit


class KnownFields(SamplingFields):
    """Fields that clients send as a matter of course, and that change nothing here."""

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
        """The names of the fields that the request has and that change nothing here, for the log."""
        own = KnownFields.__annotations__
        return [name for name in type(self).model_fields if name in own and getattr(self, name) is not None]


TokenIds = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
PromptText = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[PromptText], Field(min_length=1, fail_fast=True)]
SeveralTokenIds = Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]


def few_prompts(value: Any) -> Any:
    """As `few`, where the entries are prompts; one prompt may have many tokens."""
    return few(value) if isinstance(value, list) and value and not isinstance(value[0], int) else value


Prompts = Annotated[PromptText | Texts | TokenIds | SeveralTokenIds, BeforeValidator(few_prompts)]


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
        """Each prompt, as text or as token ids."""
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
    prompt_cache_breakpoint: dict[str, Any] | None = None  # known and not needed
    cache_control: CacheControl = None


class OtherPart(Strict):
    """A picture, a sound, a file: known, and refused in words."""

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
    """An earlier answer; the fields after its name are what clients send back of what they were given."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[Any] | None, Few] = None
    function_call: dict[str, Any] | None = None
    audio: dict[str, Any] | None = None
    annotations: Annotated[list[Any] | None, Few] = None
    parsed: Any = None  # what a client made of the content
    reasoning_content: str | None = None
    cache_control: CacheControl = None


class ToolMessage(Strict):
    """Known, and refused in words."""

    model_config = ConfigDict(extra="allow")
    role: Literal["tool", "function"]


ChatMessage = Annotated[InstructionMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]
ChatMessages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True), Few]


class ChatFields(KnownFields):
    """Fields of a chat's answer, whoever keeps the conversation."""

    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    def answer_tokens(self, limits: RequestSettings) -> int:
        """How many tokens an answer may have."""
        usual = min(limits.default_max_tokens, limits.max_tokens)
        return self.max_completion_tokens or self.max_tokens or usual

    def wanted_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs; set logprobs to true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class ChatRequest(ChatFields):
    """POST /v1/chat/completions."""

    model: str
    messages: ChatMessages
    n: Count | None = None
    # Known, and either not needed or refused in words by `checked`.
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
        others = [name for name in IGNORED_IN_CHATS if getattr(self, name) is not None]
        of_messages = {name: None for message in self.messages for name in ignored_in(message)}
        return [*super().ignored_fields(), *others, *of_messages]

    def plain_messages(self) -> list[dict[str, str]]:
        """The messages as the chat template takes them. Raises ApiError for what a BDH has no words for."""
        if (self.tools and self.tool_choice != "none") or (self.functions and self.function_call != "none"):
            raise bad_request("tools are not supported here: the model knows no tool calls; leave tools out", "tools")
        if self.audio is not None or set(self.modalities or ["text"]) != {"text"}:
            raise bad_request("this server writes text only; leave audio and modalities out", "modalities")
        if self.web_search_options is not None:
            raise bad_request("this server cannot search the web; leave web_search_options out", "web_search_options")
        return [plain_message(message, f"messages.{number}") for number, message in enumerate(self.messages)]


IGNORED_IN_CHATS = ("parallel_tool_calls", "verbosity", "prediction")
IGNORED_IN_MESSAGES = ("name", "reasoning_content", "cache_control")


def ignored_in(message: InstructionMessage | UserMessage | AssistantMessage | ToolMessage) -> list[str]:
    """The names of the fields of a message that change nothing here, as "messages[].name"."""
    found = [f"messages[].{name}" for name in IGNORED_IN_MESSAGES if getattr(message, name, None) is not None]
    content = getattr(message, "content", None)
    if isinstance(content, list) and any(getattr(part, "cache_control", None) is not None for part in content):
        found.append("messages[].content[].cache_control")
    return found


def plain_message(
    message: InstructionMessage | UserMessage | AssistantMessage | ToolMessage, where: str
) -> dict[str, str]:
    """One message with its role and text. Raises ApiError."""
    if isinstance(message, ToolMessage) or (
        isinstance(message, AssistantMessage) and (message.tool_calls or message.function_call)
    ):
        raise bad_request(f"{where} is of a tool call, which are not supported here; leave it out", where)
    if isinstance(message, AssistantMessage) and message.content is None and message.refusal is not None:
        return {"role": message.role, "content": message.refusal}
    if message.content is None:
        raise bad_request(f"{where} has no content; give text", f"{where}.content")
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": text_of(message.content, f"{where}.content")}


def text_of(content: Content, name: str) -> str:
    """The text of a message's content. Raises ApiError for pictures and the like."""
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
