"""POST /v1/chat/completions: the assistant answers."""

from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from bdh.inference.outputs import TextRequest
from bdh.serving.api.choices import ChatDialect, Choices
from bdh.serving.api.errors import bad_request
from bdh.serving.api.generation import Writing
from bdh.serving.api.logprobs import LogprobWriter
from bdh.serving.api.openapi import streamed
from bdh.serving.api.request_body import JSONBodyRoute
from bdh.serving.api.request_handler import answered, as_events
from bdh.serving.api.request_schemas import ChatRequest
from bdh.serving.api.response_schemas import ChatAnswer, ChatChunk, Envelope
from bdh.serving.auth.authentication import Caller, current_caller
from bdh.serving.model_registry import ServedModel

if TYPE_CHECKING:
    from bdh.serving.server import Server

router = APIRouter(route_class=JSONBodyRoute)


@router.post("/v1/chat/completions", response_model=ChatAnswer, responses=streamed(ChatChunk), tags=["OpenAI"])
async def chat_completions(
    body: ChatRequest, request: Request, caller: Annotated[Caller, Depends(current_caller)]
) -> Response:
    """Answers a conversation."""
    server: Server = request.app.state.server
    served = server.models.get(body.model)
    work = ChatWork(server, served, body, Writing(server, served, caller, request))
    return await answered(work, request)


class ChatWork:
    """One request to answer a conversation."""

    def __init__(self, server: "Server", served: ServedModel, body: ChatRequest, writing: Writing):
        self.server = server
        self.served = served
        self.body = body
        self.writing = writing
        self.envelope = Envelope("chatcmpl", served.name)

    @property
    def streamed(self) -> bool:
        return bool(self.body.stream)

    async def begin(self) -> None:
        """Checks the request and gives it to the engine. Raises ApiError or BDHError."""
        body, limits = self.body, self.served.limits
        messages = body.plain_messages()
        n = body.n or 1
        if body.brain and n > 1:
            raise bad_request("brain is for one text at a time; leave n out", "brain")
        params = body.sampling(limits, body.answer_tokens(limits), n=n, logprobs=body.wanted_logprobs())
        self.writing.check_count(n)
        self.served.check_length(sum(len(message["content"]) for message in messages), "messages")
        asked = await self.served.llm.chat_request(messages, params, self.writing.caller.client)
        self.served.check_prompt(asked.request.prompt, "messages")
        await self.writing.begin([asked], wants_deltas=bool(body.stream))
        self.choices = chat_choices(self.served, asked)
        if body.brain:
            prompt = list(asked.request.prompt)
            await self.writing.look(prompt, None)

    async def answer(self) -> Callable[[], dict[str, Any]]:
        """What makes the JSON of the whole answer. Raises ApiError, BDHError or RuntimeError."""
        [completion] = await self.writing.completions()
        found = completion.raise_for_error().choices
        if self.server.config.logging.prompts:
            self.writing.log["answer"] = [one.text for one in found]
        brain = await self.writing.observed_whole(found[0].tokens)
        return lambda: self.envelope.whole(
            [self.choices.whole(one) for one in found], usage=self.writing.usage(), service_tier=None, **brain
        )

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer as a stream of events."""
        pieces = chat_events(self.envelope, self.choices, self.body.n or 1, self.writing)
        async for event in as_events(pieces, self.envelope, self.writing.usage if self.body.wants_usage else None):
            yield event


def chat_choices(served: ServedModel, asked: TextRequest) -> Choices:
    """What makes choices of an answer's continuations."""
    params = asked.request.params
    dialect = ChatDialect(served.texts)
    if params.logprobs is None:
        return Choices(dialect, None)
    return Choices(dialect, [LogprobWriter(served.texts, asked.request.ends, asked.strip) for _ in range(params.n)])


async def chat_events(envelope: Envelope, choices: Choices, n: int, writing: Writing) -> AsyncGenerator[dict[str, Any]]:
    """The chunks of an answer's stream, from the roles to the last pieces."""
    for opening in choices.openings(n):
        yield envelope.piece([opening])
    if writing.watch is not None:
        yield envelope.piece([], brain=await writing.watch.prompt())
    async for _, deltas in writing.pieces():
        brain = await writing.observed(deltas)
        for piece in choices.pieces(deltas):
            yield envelope.piece([piece], **brain)
