"""Reads JSON bodies of requests; large ones in a thread, so that other requests are answered meanwhile."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

SMALL_BODY_BYTES = 1 << 16  # read in the event loop: that takes a millisecond


class JSONBodyRequest(Request):
    """A request whose JSON is read without delaying other requests."""

    async def json(self) -> Any:
        """The body. Raises json.JSONDecodeError, UnicodeDecodeError or RecursionError."""
        body = await self.body()
        if len(body) <= SMALL_BODY_BYTES:
            return json.loads(body)
        return await asyncio.to_thread(read_in_thread, body)


class JSONBodyRoute(APIRoute):
    """A route that reads its body as `JSONBodyRequest` does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_request(request: Request) -> Response:
            return await handle(JSONBodyRequest(request.scope, request.receive))

        return handle_request


def read_in_thread(body: bytes) -> Any:
    """The value of a JSON text. Raises as `json.loads`.

    The decoder is C code, during which no other thread runs. The functions that it calls here for each number and
    object are Python code, during which others may.
    """
    return json.loads(body, parse_int=as_int, parse_float=as_float, object_hook=as_object)


def as_int(text: str) -> int:
    return int(text)


def as_float(text: str) -> float:
    return float(text)


def as_object(value: dict[str, Any]) -> dict[str, Any]:
    return value
