"""Streams of server-sent events, and the time that the work for a request may take."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bdh.serving.api.errors import ApiError, as_api_error, unavailable
from bdh.serving.api.response_schemas import json_bytes

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
LAST_EVENT_SECONDS = 2.0  # to send the event about an error to a slow client


def sse_event(model: BaseModel) -> bytes:
    return b"data: " + json_bytes(model) + b"\n\n"


class ClientDisconnected(Exception):  # noqa: N818
    """The client has closed its connection before the response was complete."""


async def wait_for(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await the work for a request; cancel it when its result is no longer needed.

    Raises:
        ClientDisconnected: The client has disconnected.
        ApiError: 504 when the time of the request is up, 503 when the server shuts down.
        Exception: As the work.
    """
    state = request.app.state

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    disconnected, shutdown = asyncio.ensure_future(disconnect()), asyncio.ensure_future(state.drain.cancelled.wait())
    seconds_left = max(0.0, request.state.deadline - asyncio.get_running_loop().time())
    tasks = (task, disconnected, shutdown)
    try:
        await asyncio.wait(tasks, timeout=seconds_left, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if disconnected.done():
            raise ClientDisconnected
        if shutdown.done():
            raise unavailable("the server ends before the answer is complete; try again", "draining")
        seconds = state.config.requests.seconds
        message = f"the answer was not complete after {seconds:g} seconds; ask for fewer tokens"
        raise ApiError(504, message, "server_error", code="timeout", reason="timeout")
    finally:
        for other in tasks:
            other.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Response of server-sent events, each sent as soon as it is available.

    Args:
        request: The request.
        events: Encoded events. An exception becomes the last event.
        close: Called at the end in any case.
    """

    media_type = "text/event-stream"

    def __init__(self, request: Request, events: AsyncGenerator[bytes], close: Callable[[], Awaitable[None]]):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.request = request
        self.events = events
        self.close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error: ApiError | None = None
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await wait_for(self.request, self._send_events(send))
        except ClientDisconnected:
            pass
        except ApiError as caught:
            error = caught
        finally:
            await self.events.aclose()
            await self.close()
        if error is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_EVENT_SECONDS):
                    await send({"type": "http.response.body", "body": self._error_event(error)})

    async def _send_events(self, send: Send) -> None:
        last = b""
        try:
            async for event in self.events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:
            last = self._error_event(as_api_error(error))
        await send({"type": "http.response.body", "body": last})

    def _error_event(self, error: ApiError) -> bytes:
        self.request.app.state.metrics.refused(error.reason)
        return sse_event(error.response_model())
