"""How a request that writes text is answered, whatever its dialect: whole, or as a stream."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import Response

from bdh.serving.api.generation import Writing
from bdh.serving.api.request_schemas import KnownFields
from bdh.serving.api.response_schemas import Envelope
from bdh.serving.api.sse import DONE, EventStream, JSONAnswer, as_event, until_gone

LARGE = 200  # tokens whose log-probabilities are sooner put into JSON beside the event loop


class Work(Protocol):
    """A request that writes."""

    writing: Writing

    @property
    def body(self) -> KnownFields:
        """The request."""

    @property
    def streamed(self) -> bool:
        """Whether the answer is to come in pieces."""

    async def begin(self) -> None:
        """Checks the request and gives it to the engine. Raises ApiError or BDHError."""

    async def answer(self) -> Callable[[], dict[str, Any]]:
        """What makes the JSON of the whole answer, once it is there. Raises ApiError, BDHError or RuntimeError."""

    def events(self) -> AsyncGenerator[bytes]:
        """The answer as a stream of events. Raises likewise."""


async def as_events(
    pieces: AsyncGenerator[dict[str, Any]], envelope: Envelope, usage: Callable[[], dict[str, Any]] | None
) -> AsyncGenerator[bytes]:
    """A stream of pieces as events, to [DONE]; if the usage is asked for, the last one before tells it."""
    async for piece in pieces:
        yield as_event(piece if usage is None else {**piece, "usage": None})
    if usage is not None:
        yield as_event(envelope.piece([], usage=usage()))
    yield DONE


async def answered(work: Work, request: Request) -> Response:
    """The answer to a request. Raises as the work, and as `until_gone`."""
    if ignored := work.body.ignored_fields():
        work.writing.log["ignored"] = ",".join(ignored)
    try:
        await until_gone(request, work.begin())
        if work.streamed:
            return EventStream(work.events(), work.writing.end, request)
        make = await until_gone(request, work.answer())
        if work.writing.completion_tokens + work.writing.prompt_tokens > LARGE:
            answer = await asyncio.to_thread(lambda: JSONAnswer(make()))
        else:
            answer = JSONAnswer(make())
    except BaseException:
        await work.writing.end()
        raise
    await work.writing.end()
    return answer
