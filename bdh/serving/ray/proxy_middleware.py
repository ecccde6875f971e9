"""Middleware of Ray's HTTP proxies, with which they treat clients as `bdh serve` does.

A proxy of Ray's passes requests on to replicas. Left alone, it would read bodies of any size, let clients have a say in
how it works by headers, keep requests waiting while there is no replica, answer in words of its own, and say nothing at
all when a replica dies.
"""

import asyncio
import json
import logging
import os
import re
import secrets
from dataclasses import asdict, dataclass
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bdh.serving.api.errors import ApiError, unavailable
from bdh.serving.api.health import Health
from bdh.serving.api.middleware import SECURITY_HEADERS, read_body, replay_body
from bdh.serving.api.response_schemas import ModelResponse, error_response
from bdh.serving.api.sse import sse_event
from bdh.serving.config import LogSettings, RequestSettings, ServeConfig
from bdh.serving.observability.logs import incoming_id
from bdh.serving.ray.logs import log_to
from bdh.serving.sessions.ids import DIGITS

log = logging.getLogger(__name__)

VARIABLE = "BDH_RAY_GATE"  # where a proxy finds a gate's settings
REPLICA_HEADER = b"x-replica"  # says which replica it was; without it, an answer is Ray's own
PLACE_HEADER = b"x-session-id"  # tells Ray's router where to
RAYS_HEADERS = frozenset(  # by which clients could meddle with Ray
    {PLACE_HEADER, b"serve-multiplexed-model-id", b"x-request-timeout-seconds", b"x-request-disconnect-disabled"}
)
RAYS_PATHS = ("/-/healthz", "/-/routes")
PLACED = re.compile(rf"/v1/(?:sessions/ses|brain/trc)_([0-9a-f]{{{DIGITS}}})[0-9a-f]{{{32 - DIGITS}}}(?:/.*)?")
ATTEMPTS = 3  # to have a request answered by replicas that die
PATIENCE = 5.0  # seconds that a request waits while there is no replica


@dataclass
class Present:
    """The number of replicas that the router of this process knows."""

    replicas: int = 0


present = Present()


def gate_settings(config: ServeConfig, sink: str | None) -> dict[str, str]:
    """Environment variables for Ray's proxies, from which they learn of gates and what these are to be like."""
    settings = {"requests": asdict(config.requests), "logging": asdict(config.logging), "sink": sink}
    return {
        VARIABLE: json.dumps(settings),
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}.middlewares",
        "FORWARDED_ALLOW_IPS": ",".join(config.trusted_proxies),
    }


def middlewares() -> list[Middleware]:
    """Is called by Ray in each proxy before it begins to listen."""
    settings = json.loads(os.environ[VARIABLE])
    limits = RequestSettings(**settings["requests"])
    log_to(settings["sink"], LogSettings(**settings["logging"]))
    return [Middleware(Gate, limits=limits)]


class Gate:
    """An ASGI app around Ray's proxy."""

    def __init__(self, app: ASGIApp, limits: RequestSettings):
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        elif scope["type"] != "http" or scope["path"] in RAYS_PATHS:
            await self.app(scope, receive, send)
        else:
            await self._let_in(scope, receive, send)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or has it answered by a replica."""
        id = incoming_id(scope) or f"req_{secrets.token_hex(16)}"
        try:
            body = await read_body(scope, receive, self.limits)
            if body is None:  # the client went away
                return
            if scope["path"] == "/health/live":
                await ModelResponse(Health(status="alive"))(scope, receive, with_headers(send, id))
            else:
                await self._pass_on(scope, body, id, receive, send)
        except ApiError as error:
            about = {"request_id": id, "path": scope["path"][:200], "status": error.status, "code": error.code}
            log.warning("a request got no answer of a replica", extra=about)
            await error_response(error)(scope, receive, with_headers(send, id))

    async def _pass_on(self, scope: Scope, body: bytes, id: str, receive: Receive, send: Send) -> None:
        """Raises ApiError if no replica answered."""
        for _ in range(ATTEMPTS):
            passage = Passage(receive, send, id)
            headers = [*without(RAYS_HEADERS | {b"x-request-id"}, scope["headers"]), (b"x-request-id", id.encode())]
            if found := PLACED.fullmatch(scope["path"]):
                headers.append((PLACE_HEADER, found[1].encode()))
            await self._call({**scope, "headers": headers}, replay_body(body, passage.receive), passage)
            if passage.gone or passage.complete:
                return
            if passage.began:
                await passage.break_off()
                return
            if passage.refused is not None:
                raise refusal(passage.refused)
            log.warning("a replica died with a request", extra={"request_id": id})
        raise ApiError(502, "the replicas that tried to answer this died; try again later", "server_error",
                       code="replica_failed", reason="replica_failed")  # fmt: skip

    async def _call(self, scope: Scope, receive: Receive, passage: "Passage") -> None:
        """Has Ray answer. Raises ApiError 503 if there is no replica that might."""
        if not present.replicas:
            raise refusal(503)
        call = asyncio.ensure_future(self.app(scope, receive, passage.send))
        try:
            while not call.done():
                await asyncio.wait({call}, timeout=None if passage.began else PATIENCE)
                if not call.done() and not passage.began and not present.replicas:
                    raise refusal(503)
            call.result()
        finally:
            call.cancel()


class Passage:
    """One attempt to have a request answered, as its messages pass.

    Attributes:
        gone: The client.
        began: Whether a replica has begun to answer.
        complete: Whether its answer is.
        refused: The status of an answer of Ray's own, which is not passed on.
    """

    def __init__(self, receive: Receive, send: Send, id: str):
        self._receive = receive
        self._send = with_headers(send, id)
        self.gone = self.began = self.complete = False
        self.refused: int | None = None
        self.streams = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.gone = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = dict(message["headers"])
            if REPLICA_HEADER not in headers:
                self.refused = message["status"]
                return
            self.began = True
            self.streams = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        if self.refused is None:
            self.complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await self._send(message)

    async def break_off(self) -> None:
        """Tells a client whose answer has begun that it will not end well. Other answers than streams just break."""
        log.warning("a replica died with an answer that it had begun")
        if self.streams:
            error = ApiError(502, "the replica that wrote this is gone; send the request once more", "server_error",
                             code="replica_failed")  # fmt: skip
            await self._send(
                {"type": "http.response.body", "body": sse_event(error.response_model()), "more_body": False}
            )


def with_headers(send: Send, id: str) -> Send:
    """Sends an answer with this id and no other, and with what makes browsers careful."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            ours = [(b"x-request-id", id.encode()), *SECURITY_HEADERS]
            headers = [*without({name for name, _ in ours}, message["headers"]), *ours]
            message = {**message, "headers": headers}
        await send(message)

    return send_with_headers


def without(names: set[bytes] | frozenset[bytes], headers: Any) -> list[tuple[bytes, bytes]]:
    """Headers but for some, which proxies may have written with underscores."""
    return [(name, value) for name, value in headers if name.lower().replace(b"_", b"-") not in names]


def refusal(status: int) -> ApiError:
    """The error response for requests that no replica has answered."""
    if status in (404, 503):  # no replica is ready, or none is there any more
        return unavailable("no replica is ready; try again in a moment", "loading", 2)
    return ApiError(502, f"Ray could not pass the request on (status {status})", "server_error",
                    code="replica_failed", reason="replica_failed")  # fmt: skip
