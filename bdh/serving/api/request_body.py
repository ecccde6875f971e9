"""Parses JSON bodies of requests; large ones in a thread, so that other requests are answered meanwhile."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

SMALL_BODY_BYTES = 1 << 16  # parsed in the event loop, in a millisecond


class JSONBodyRequest(Request):
    """Request whose JSON is parsed without delaying other requests."""

    async def json(self) -> Any:
        """Parse the body. Raises json.JSONDecodeError, UnicodeDecodeError or RecursionError."""
        body = await self.body()
        if len(body) <= SMALL_BODY_BYTES:
            return json.loads(body)
        return await asyncio.to_thread(read_in_thread, body)


class JSONBodyRoute(APIRoute):
    """Route whose requests are a `JSONBodyRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_request(request: Request) -> Response:
            return await handle(JSONBodyRequest(request.scope, request.receive))

        return handle_request


def read_in_thread(body: bytes) -> Any:
    """Decode a JSON text without keeping other threads from running. Raises as `json.loads`.

    The decoder is C code, which holds the lock of the interpreter, except while it calls Python functions: here for
    each number and each object.
    """
    return json.loads(
        body,
        parse_int=lambda text: int(text),
        parse_float=lambda text: float(text),
        object_hook=lambda value: value,
    )
