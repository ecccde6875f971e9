"""The door of the server: reads a request whole, within limits, before anything is done about it."""

import asyncio
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bdh.serving.api.errors import ApiError, too_large, unavailable
from bdh.serving.api.sse import error_answer
from bdh.serving.auth.authentication import admit_caller, release_caller, requires_caller

if TYPE_CHECKING:
    from bdh.serving.config import RequestSettings
    from bdh.serving.server import Server

HEALTH = frozenset({"/health", "/health/live", "/health/ready"})  # tell nothing; probes call them by any name
ALWAYS_OPEN = HEALTH | {"/metrics"}


class Door:
    """An ASGI app around another: lets requests in one by one, counts those inside, and says no while draining.

    Who may not come in is told so before the body is read. The body is read to its end before the app sees it, so that
    one that is too large, too slow or endless costs no more than the limit. The headers about rate limits go out with
    the answer here.
    """

    def __init__(self, app: ASGIApp, server: "Server"):
        self.app = app
        self.server = server
        self.limits = server.config.requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.server.hosts is not None and scope["path"] not in HEALTH:
            try:
                self.server.hosts.check(scope["headers"])
            except ApiError as error:
                self.server.count(error)
                await error_answer(error)(scope, receive, send)
                return
        if scope["path"] in ALWAYS_OPEN:
            await self.app(scope, receive, send)
            return
        self.server.inside += 1
        try:
            await self._let_in(scope, receive, send)
        finally:
            release_caller(scope, self.server)
            self.server.inside -= 1
            self.server.check_drained()

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = scope["state"].get("limit_headers") or {}
                added = [(name.encode(), value.encode()) for name, value in more.items()]
                message = {**message, "headers": [*message["headers"], *added, *SAFE]}
            await send(message)

        try:
            if self.server.draining:
                error = unavailable("the server is about to end and takes no new requests", "draining", 1)
                error.headers["Connection"] = "close"
                raise error
            if requires_caller(scope["path"]):
                await admit_caller(scope, self.server)
            body = await read_body(scope, receive, self.limits)
        except ApiError as error:
            self.server.count(error)
            await error_answer(error)(scope, receive, send_with_limits)
            return
        if body is None:  # the client went away
            return
        await self.app(scope, replaying(body, receive), send_with_limits)


async def read_body(scope: Scope, receive: Receive, limits: "RequestSettings") -> bytes | None:
    """The body of a request, or None if the client went away before its end. Raises ApiError 408 or 413."""
    most = limits.max_body_bytes
    for name, value in scope["headers"]:
        if name == b"content-length" and (not value.isdigit() or int(value[:20]) > most):
            raise larger_than(most)
    try:
        async with asyncio.timeout(limits.body_seconds):
            pieces: list[bytes] = []
            size, more = 0, True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                pieces.append(message.get("body", b""))
                size += len(pieces[-1])
                if size > most:
                    raise larger_than(most)
                more = message.get("more_body", False)
            return b"".join(pieces)
    except TimeoutError:
        closing = {"Connection": "close"}
        words = f"the request did not come within {limits.body_seconds:g} seconds"
        raise ApiError(408, words, headers=closing, reason="timeout") from None


def larger_than(most: int) -> ApiError:
    error = too_large(f"the body is larger than this server reads; {most} bytes is the most")
    error.headers["Connection"] = "close"  # what follows of it is not read
    return error


def replaying(body: bytes, receive: Receive) -> Receive:
    """Receives a body that was read already, and then what comes after it."""
    unread = [body]

    async def replay() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await receive()

    return replay


SAFE = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
