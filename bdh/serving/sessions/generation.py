"""What is said and written in sessions, as one HTTP request asks for it: the answers of chats and of completions."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from bdh.errors import BDHError
from bdh.serving.api.chat_completions import chat_choices, chat_events
from bdh.serving.api.choices import Choices, CompletionDialect
from bdh.serving.api.completions import USUAL_MAX_TOKENS
from bdh.serving.api.errors import bad_request
from bdh.serving.api.generation import Writing
from bdh.serving.api.logprobs import LogprobWriter
from bdh.serving.api.request_handler import as_events
from bdh.serving.api.request_schemas import LARGEST, ChatFields, Content, KnownFields, text_of
from bdh.serving.api.response_schemas import Envelope, usage
from bdh.serving.sessions.memory import Kept

if TYPE_CHECKING:
    from bdh.inference.async_session import AsyncSession, Turn
    from bdh.serving.server import Server

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


class SessionEnvelope(Envelope):
    """What all pieces of one answer have in common, its session among it."""

    def __init__(self, prefix: Literal["cmpl", "chatcmpl"], kept: Kept):
        super().__init__(prefix, kept.served.name)
        self.session = kept.id

    def whole(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return super().whole(choices, **more, session=self.session)

    def piece(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return super().piece(choices, **more, session=self.session)


class SessionWork:
    """One request to have something written in a session.

    Args:
        server: Whose.
        kept: The session.
        body: How tokens are chosen, and how the answer is to come.
        writing: Counts the work.
        envelope: For the answer.
    """

    def __init__(
        self,
        server: "Server",
        kept: Kept,
        body: KnownFields,
        writing: Writing,
        envelope: Envelope,
    ):
        self.server = server
        self.kept = kept
        self.served = kept.served
        self.body = body
        self.writing = writing
        self.envelope = envelope
        self.choices: Choices | None = None  # None: there is nothing to write
        self.cached_tokens = 0  # of what was only read
        writing.log["session"] = kept.id

    async def begin(self) -> None:
        """Checks the request and gives it to the engine. Raises ApiError or BDHError."""
        raise NotImplementedError

    async def began(self, turn: "Turn", choices: Choices) -> None:
        """Records the turn that was begun, and the activity of neurons if it is asked for."""
        self.choices = choices
        self.writing.prompt_tokens = turn.prompt_tokens
        if self.body.brain:
            request = turn.text_request.request
            await self.writing.look(list(request.prompt), request.state)

    @asynccontextmanager
    async def taken(self) -> AsyncGenerator["AsyncSession"]:
        """The session, for this request's caller to begin something with. Raises ApiError."""
        async with self.server.sessions.taken(self.kept) as session:
            session.client = self.writing.caller.client
            yield session

    def check(self, param: str) -> Callable[[Sequence[int]], None]:
        """What refuses too long a text."""
        return lambda tokens: self.served.check_prompt(tokens, param) if tokens else None

    def log_prompt(self, text: str) -> None:
        if self.server.config.logging.prompts:
            self.writing.log["prompt"] = [text]

    @property
    def streamed(self) -> bool:
        return bool(self.body.stream)

    async def answer(self) -> Callable[[], dict[str, Any]]:
        """What makes the JSON of the whole answer. Raises ApiError, BDHError or RuntimeError."""
        choices = self.choices
        if choices is None:
            return lambda: self.envelope.whole([NOTHING], usage=self.usage())
        [completion] = await self.writing.completions()
        [choice] = completion.raise_for_error().choices
        if self.server.config.logging.prompts:
            self.writing.log["answer"] = [choice.text]
        more: dict[str, Any] = {"service_tier": None} if self.envelope.chat else {}
        more |= await self.writing.observed_whole(choice.tokens)
        return lambda: self.envelope.whole([choices.whole(choice)], usage=self.usage(), **more)

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer as a stream of events."""
        async for event in as_events(self.pieces(), self.envelope, self.usage if self.body.wants_usage else None):
            yield event

    async def pieces(self) -> AsyncGenerator[dict[str, Any]]:
        if self.choices is None:
            yield self.envelope.piece([NOTHING])
            return
        async for piece in chat_events(self.envelope, self.choices, 1, self.writing):
            yield piece

    def usage(self) -> dict[str, Any]:
        """Tokens that this request had read and written; what the session knew before costs nothing."""
        if self.choices is None:
            return usage(self.writing.prompt_tokens, 0, self.cached_tokens)
        return self.writing.usage()


NOTHING = {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}  # what is written where none is wanted


class MessageWork(SessionWork):
    """One message, and the assistant's answer."""

    body: MessageRequest

    def __init__(self, server: "Server", kept: Kept, body: MessageRequest, writing: Writing):
        super().__init__(server, kept, body, writing, SessionEnvelope("chatcmpl", kept))

    async def begin(self) -> None:
        body, limits = self.body, self.served.limits
        text = text_of(body.content, "content")
        params = body.sampling(limits, body.answer_tokens(limits), logprobs=body.wanted_logprobs())
        self.log_prompt(text)
        self.served.check_length(len(text), "content")
        self.writing.check_queue()

        async def reserve(read: int) -> None:
            self.writing.prepaid_tokens = min(self.kept.prepaid_tokens, read)
            await self.writing.meter.reserve(read - self.writing.prepaid_tokens + params.max_new_tokens)

        async with self.taken() as session:
            turn = await session.send(
                text, params, wants_deltas=bool(body.stream), check=self.check("content"), reserve=reserve
            )
            self.writing.calls.append(turn)
        self.kept.prepaid_tokens = 0
        await self.began(turn, chat_choices(self.served, turn.text_request))


class WriteWork(SessionWork):
    """A text to read, and what the model writes on from there."""

    body: WriteRequest

    def __init__(self, server: "Server", kept: Kept, body: WriteRequest, writing: Writing):
        super().__init__(server, kept, body, writing, SessionEnvelope("cmpl", kept))

    async def begin(self) -> None:
        body = self.body
        max_tokens = USUAL_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        params = body.sampling(self.served.limits, max(1, max_tokens), logprobs=body.logprobs)
        text = body.prompt or ""
        self.log_prompt(text)
        self.served.check_length(len(text), "prompt")
        self.writing.check_queue()
        if max_tokens == 0:
            await self.read(text)
            return

        async def reserve(read: int) -> None:
            await self.writing.meter.reserve(read + params.max_new_tokens)

        async with self.taken() as session:
            turn = await session.write(
                params, text, wants_deltas=bool(body.stream), check=self.check("prompt"), reserve=reserve
            )
            self.writing.calls.append(turn)
        texts, ends = self.served.texts, turn.text_request.request.ends
        writers = None if body.logprobs is None else [LogprobWriter(texts, ends, tells_end=True)]
        await self.began(turn, Choices(CompletionDialect(texts, bool(body.logprobs)), writers))

    async def read(self, text: str) -> None:
        """Has the text read, and nothing written."""
        if self.body.brain:
            raise bad_request("brain is for texts that are written; leave it out, or set max_tokens to 1", "brain")

        async def reserve(read: int) -> None:
            await self.writing.meter.reserve(read)
            self.writing.prompt_tokens = read  # also if the client disconnects before they are read

        async with self.taken() as session:
            try:
                read = await session.read(text, check=self.check("prompt"), reserve=reserve)
            except BDHError:  # the engine has not taken it
                self.writing.prompt_tokens = 0
                raise
        self.cached_tokens = read.cached
