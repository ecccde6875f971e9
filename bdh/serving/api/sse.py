"""Answers over HTTP: JSON, or server-sent events; ended when the client goes away or the time is up."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bdh.errors import BDHError, ModelClosed, PromptTooLong, QueueFull
from bdh.json_text import to_json
from bdh.serving.api.errors import (
    ApiError,
    TooManyRequests,
    bad_request,
    engine_failed,
    engine_refused,
    timed_out,
    unavailable,
)

if TYPE_CHECKING:
    from bdh.serving.server import Server

log = logging.getLogger(__name__)
T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
LAST_WORDS_SECONDS = 2.0  # for a client that is slow to take them


def as_json(body: Any) -> bytes:
    """JSON in ASCII: whatever came from a client, half a surrogate pair too, can be said back to it."""
    return to_json(body, separators=(",", ":")).encode("ascii")


def as_event(body: Any) -> bytes:
    return b"data: " + as_json(body) + b"\n\n"


class JSONAnswer(Response):
    """A JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return as_json(content)


def error_answer(error: ApiError) -> JSONAnswer:
    return JSONAnswer(error.body(), error.status, error.headers)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an exception."""
    match error:
        case ApiError():
            return error
        case QueueFull():
            return TooManyRequests(str(error), 1, "queue_full")
        case ModelClosed():
            return unavailable("the server ends before the answer is complete; try again", "draining")
        case PromptTooLong():
            return bad_request(str(error), code="context_length_exceeded")
        case BDHError():
            return engine_refused(error)
        case RuntimeError() if "the engine failed" in str(error):
            log.error("the engine failed", exc_info=error)
            return engine_failed("the engine failed; try again in a moment")
    log.error("a mistake in the server", exc_info=error)
    return ApiError(500, "something went wrong in the server; its log tells more", "server_error", reason="internal")


class ClientGone(Exception):  # noqa: N818
    """Nobody waits for the answer any more."""


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Patience:
    """How long a request may take: until its time is up, or the server ends.

    Args:
        seconds: From now on.
        ending: Is set when the server will not wait any longer.
    """

    def __init__(self, seconds: float, ending: asyncio.Event):
        self.seconds = seconds
        self.ending = ending
        self.deadline = time.monotonic() + seconds

    async def wait(self, work: "asyncio.Future[Any]", receive: Receive) -> None:
        """Waits for the work to be done, which is cancelled if it is not to be.

        Raises:
            ClientGone: Nobody waits for it any more.
            ApiError: 504 when the time is up, 503 when the server ends.
        """
        gone, ending = asyncio.ensure_future(disconnected(receive)), asyncio.ensure_future(self.ending.wait())
        left = max(0.0, self.deadline - time.monotonic())
        try:
            await asyncio.wait({work, gone, ending}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return
            if gone.done():
                raise ClientGone
            if ending.done():
                raise unavailable("the server ends before the answer is complete; try again", "draining")
            raise timed_out(f"the answer was not complete after {self.seconds:g} seconds; ask for fewer tokens")
        finally:
            for task in (work, gone, ending):
                task.cancel()
            await asyncio.gather(work, gone, ending, return_exceptions=True)


def patience_with(request: Request) -> Patience:
    """One for all that is done about a request, from the first time on that it is asked for."""
    if not hasattr(request.state, "patience"):
        server: Server = request.app.state.server
        request.state.patience = Patience(server.config.requests.seconds, server.ending)
    patience: Patience = request.state.patience
    return patience


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work returns. Raises as it does, and as `Patience.wait`."""
    working = asyncio.ensure_future(work)
    await patience_with(request).wait(working, request.receive)
    return working.result()


class EventStream(Response):
    """Server-sent events, each as soon as it is there.

    Args:
        events: What to send, encoded. An exception in it becomes the last event.
        ended: Is called in the end, however it comes.
        request: What they answer.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], ended: Callable[[], Awaitable[None]], request: Request):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.events = events
        self.ended = ended
        self.patience = patience_with(request)
        self.server: Server = request.app.state.server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error: ApiError | None = None
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self.patience.wait(asyncio.ensure_future(self._write(send)), receive)
        except ClientGone:
            pass
        except ApiError as caught:
            error = caught
        finally:
            await self.events.aclose()
            await self.ended()
        if error is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORDS_SECONDS):
                    await self._end(send, self._told(error))

    async def _write(self, send: Send) -> None:
        last = b""
        try:
            async for event in self.events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:
            last = self._told(as_api_error(error))
        await self._end(send, last)

    def _told(self, error: ApiError) -> bytes:
        self.server.count(error)
        return as_event(error.body())

    async def _end(self, send: Send, last: bytes) -> None:
        await send({"type": "http.response.body", "body": last, "more_body": False})
