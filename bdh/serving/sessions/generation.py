"""Requests that generate text in a session: replies to messages, and continuations."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Literal

from fastapi import Request
from pydantic import Field

from bdh.errors import BDHError
from bdh.inference.outputs import Completion
from bdh.serving.api.completions import DEFAULT_MAX_TOKENS
from bdh.serving.api.errors import bad_request
from bdh.serving.api.request_handler import RequestHandler
from bdh.serving.api.request_schemas import LARGEST, ChatFields, Content, KnownFields, text_of
from bdh.serving.api.response_builder import ChatResponseBuilder, CompletionResponseBuilder, ResponseBuilder
from bdh.serving.api.response_schemas import ChatChoice, ChunkChoice, CompletionChoice
from bdh.serving.auth.authentication import Caller
from bdh.serving.sessions.memory import Kept

if TYPE_CHECKING:
    from bdh.inference.async_session import AsyncSession, Turn
    from bdh.serving.sessions.store import SessionStore

One = Literal[1] | None


class MessageRequest(ChatFields):
    """POST /v1/sessions/{id}/messages."""

    content: Content
    n: One = Field(default=None, description="A session writes one answer at a time.")


class WriteRequest(KnownFields):
    """POST /v1/sessions/{id}/completions."""

    prompt: str | None = None
    max_tokens: Annotated[int, Field(ge=0, le=LARGEST)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    n: One = Field(default=None, description="A session writes one text at a time.")


class SessionHandler(RequestHandler):
    """Handler of a request that generates text in a session.

    Args:
        request: The HTTP request.
        caller: The caller.
        kept: The session.
        body: The parsed body of the request.
        builder: Builds the responses.
        param: The field of the body that has the text.
    """

    def __init__(
        self, request: Request, caller: Caller, kept: Kept, body: KnownFields, builder: ResponseBuilder, param: str
    ):
        super().__init__(request, caller, kept.served, body, builder)
        self.kept = kept
        self.param = param
        self.sessions: SessionStore = request.app.state.sessions
        self.records_activity = bool(body.brain)
        self.log["session"] = kept.id

    def check_text(self, text: str) -> None:
        """Check the length of the new text and the queue. Raises ApiError."""
        self.log_text("prompt", [text])
        self.served.check_length(len(text), self.param)
        self.served.check_queue(self.caller.client)

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Check the new tokens. Raises ApiError."""
        if tokens:
            self.served.check_prompt(tokens, self.param)

    @asynccontextmanager
    async def session(self) -> AsyncGenerator["AsyncSession"]:
        """Take the session for an operation. Raises ApiError."""
        async with self.sessions.taken(self.kept) as session:
            session.client = self.caller.client
            yield session

    async def start_turn(self, turn: "Turn", wants_logprobs: bool) -> None:
        """Report the output of a turn that was started. Raises ApiError."""
        self.prompt_tokens = turn.prompt_tokens
        if wants_logprobs:
            self.builder.add_logprobs(turn.text_request)
        if self.records_activity:
            request = turn.text_request.request
            await self.start_trace(request.prompt, request.state)


class MessageHandler(SessionHandler):
    """Handler of a message to the assistant."""

    builder: ChatResponseBuilder

    def __init__(self, request: Request, caller: Caller, kept: Kept, body: MessageRequest):
        served = kept.served
        builder = ChatResponseBuilder(served.name, served.texts, kept.id, include_usage=body.wants_usage)
        super().__init__(request, caller, kept, body, builder, "content")
        self.body = body

    async def start(self) -> None:
        body, limits = self.body, self.served.limits
        text = text_of(body.content, "content")
        params = body.sampling_params(limits, body.answer_tokens(limits), logprobs=body.wanted_logprobs())
        self.check_text(text)

        async def reserve(tokens: int) -> None:
            self.prepaid_tokens = min(self.kept.prepaid_tokens, tokens)
            await self.meter.reserve(tokens - self.prepaid_tokens + params.max_new_tokens)

        async with self.session() as session:
            turn = await session.send(text, params, wants_deltas=self.stream, check=self.check_tokens, reserve=reserve)
            self.calls.append(turn)
        self.kept.prepaid_tokens = 0
        await self.start_turn(turn, params.logprobs is not None)

    async def opening_choices(self, number: int) -> list[ChunkChoice]:
        return [self.builder.role_choice(0)]


class WriteHandler(SessionHandler):
    """Handler of a text to read and to continue; with `max_tokens` 0 it is only read."""

    builder: CompletionResponseBuilder

    def __init__(self, request: Request, caller: Caller, kept: Kept, body: WriteRequest):
        served = kept.served
        builder = CompletionResponseBuilder(
            served.name,
            served.texts,
            kept.id,
            include_usage=body.wants_usage,
            top_logprobs=bool(body.logprobs),
        )
        super().__init__(request, caller, kept, body, builder, "prompt")
        self.body = body

    async def start(self) -> None:
        body = self.body
        max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        params = body.sampling_params(self.served.limits, max(1, max_tokens), logprobs=body.logprobs)
        text = body.prompt or ""
        self.check_text(text)
        if max_tokens == 0:
            await self.read(text)
            return

        async def reserve(tokens: int) -> None:
            await self.meter.reserve(tokens + params.max_new_tokens)

        async with self.session() as session:
            turn = await session.write(params, text, wants_deltas=self.stream, check=self.check_tokens, reserve=reserve)
            self.calls.append(turn)
        await self.start_turn(turn, params.logprobs is not None)

    async def read(self, text: str) -> None:
        """Read a text without generating. Raises ApiError or BDHError."""
        if self.records_activity:
            raise bad_request("brain is for texts that are written; leave it out, or set max_tokens to 1", "brain")
        self.reads_only = True

        async def reserve(tokens: int) -> None:
            await self.meter.reserve(tokens)
            self.prompt_tokens = tokens  # also if the client disconnects before they are read

        async with self.session() as session:
            try:
                read = await session.read(text, check=self.check_tokens, reserve=reserve)
            except BDHError:  # the engine has refused it
                self.prompt_tokens = 0
                raise
        self.cached_tokens_read = read.cached

    async def opening_choices(self, number: int) -> list[CompletionChoice]:
        return [self.empty_choice()] if self.reads_only else []

    def whole_choices(self, completions: list[Completion]) -> list[CompletionChoice | ChatChoice]:
        return [self.empty_choice()] if self.reads_only else super().whole_choices(completions)

    def empty_choice(self) -> CompletionChoice:
        """Build the choice of a response without generated text."""
        return self.builder.whole_choice(0, "", None, "length")
