"""ASGI middleware: admission of requests, HEAD, and slashes at the end of paths."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bdh.serving.api.errors import ApiError, unavailable
from bdh.serving.api.response_schemas import error_response
from bdh.serving.auth.api_keys import KeyStore
from bdh.serving.auth.authentication import admit_caller, release_caller, requires_caller
from bdh.serving.auth.host_check import HostCheck
from bdh.serving.auth.rate_limits import RateLimits
from bdh.serving.config import RequestSettings
from bdh.serving.observability.metrics import Metrics

HEALTH_PATHS = frozenset({"/health", "/health/live", "/health/ready"})  # probes may use any Host header
ALWAYS_ADMITTED = HEALTH_PATHS | {"/metrics"}
SECURITY_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
CLOSE = {"Connection": "close"}
MAX_HEAD_BYTES = 64 << 10
MAX_LENGTH_DIGITS = 19
STATIC_FILES = "/page"  # its paths are not normalized


class RequestDrain:
    """Counts the requests in flight, and refuses new ones once the server drains.

    Attributes:
        in_flight: Number of requests, without those to `ALWAYS_ADMITTED`.
        started: Set when new requests are refused.
        drained: Set when the last request has ended.
        cancelled: Set when the server does not wait any longer: requests in flight end with an error.
    """

    def __init__(self) -> None:
        self.in_flight = 0
        self.started = asyncio.Event()
        self.drained = asyncio.Event()
        self.cancelled = asyncio.Event()

    @property
    def draining(self) -> bool:
        return self.started.is_set()

    def start(self) -> None:
        """Refuse new requests from now on."""
        self.started.set()
        self._update()

    def enter(self) -> None:
        self.in_flight += 1

    def leave(self) -> None:
        self.in_flight -= 1
        self._update()

    def _update(self) -> None:
        if self.draining and self.in_flight == 0:
            self.drained.set()


class AdmissionMiddleware:
    """Admits requests: checks host and caller, counts requests in flight, and reads the body within limits.

    A request is refused before its body is read. The app receives the whole body at once, so that a body that is too
    large, too slow or endless costs no more than the limit. The response gets the headers of the rate limits.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: RequestSettings,
        drain: RequestDrain,
        hosts: HostCheck | None,
        keys: KeyStore,
        limits: RateLimits,
        metrics: Metrics,
    ):
        self.app = app
        self.settings = settings
        self.drain = drain
        self.hosts = hosts
        self.keys = keys
        self.limits = limits
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            if self.hosts is not None and scope["path"] not in HEALTH_PATHS:
                self.hosts.check(scope["headers"])
        except ApiError as error:
            await self._refuse(error, scope, receive, send)
            return
        if scope["path"] in ALWAYS_ADMITTED:
            await self.app(scope, receive, send)
            return
        self.drain.enter()
        try:
            await self._admit(scope, receive, send)
        finally:
            release_caller(scope, self.limits)
            self.drain.leave()

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                limit_headers = scope["state"].get("limit_headers") or {}
                added = [(name.encode(), value.encode()) for name, value in limit_headers.items()]
                message = {**message, "headers": [*message["headers"], *added, *SECURITY_HEADERS]}
            await send(message)

        try:
            if self.drain.draining:
                error = unavailable("the server is about to end and takes no new requests", "draining", 1)
                error.headers["Connection"] = "close"
                raise error
            if requires_caller(scope["path"]):
                await admit_caller(scope, self.keys, self.limits)
            body = await read_body(scope, receive, self.settings)
        except ApiError as error:
            await self._refuse(error, scope, receive, send_with_headers)
            return
        if body is None:  # the client has disconnected
            return
        scope["state"]["deadline"] = asyncio.get_running_loop().time() + self.settings.seconds
        await self.app(scope, replay_body(body, receive), send_with_headers)

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        self.metrics.refused(error.reason)
        await error_response(error)(scope, receive, send)


async def read_body(scope: Scope, receive: Receive, settings: RequestSettings) -> bytes | None:
    """Read the body of a request; return None if the client disconnects before its end. Raises ApiError 4xx."""
    max_bytes = settings.max_body_bytes
    headers = dict(scope["headers"])
    if (length := headers.get(b"content-length")) is not None:
        if b"transfer-encoding" in headers or not length.isdigit() or len(length) > MAX_LENGTH_DIGITS:
            raise ApiError(400, "the headers of the request leave the length of its body open", headers=CLOSE)
        if int(length) > max_bytes:
            raise body_too_large(max_bytes)
    header_bytes = sum(len(name) + len(value) + len(": \r\n") for name, value in scope["headers"])
    if header_bytes + len(scope["raw_path"]) > MAX_HEAD_BYTES:
        raise ApiError(400, f"the head of the request is larger than {MAX_HEAD_BYTES} bytes", headers=CLOSE)
    try:
        async with asyncio.timeout(settings.body_seconds):
            body = bytearray()
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > max_bytes:
                    raise body_too_large(max_bytes)
                more = message.get("more_body", False)
            return bytes(body)
    except TimeoutError:
        text = f"the request did not come within {settings.body_seconds:g} seconds"
        raise ApiError(408, text, headers=CLOSE, reason="timeout") from None


def body_too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than this server reads; {max_bytes} bytes is the most",
        code="request_too_large",
        headers=CLOSE,  # the rest of the body is not read
        reason="body_too_large",
    )


def replay_body(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that returns a body which was read already, then the messages after it."""
    unread = [body]

    async def replay() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await receive()

    return replay


class NormalizationMiddleware:
    """Routes HEAD as GET, and ignores one slash at the end of a path. The HTTP server omits the body of a HEAD."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        normalized = {**scope, "method": method, "path": without_slash(scope["path"])}
        try:
            await self.app(normalized, receive, send)
        finally:
            if "route" in normalized:  # for the log
                scope["route"] = normalized["route"]


def without_slash(path: str) -> str:
    """Return the path without one slash at its end."""
    is_file = path == STATIC_FILES or path.startswith(f"{STATIC_FILES}/")
    return path[:-1] if len(path) > 1 and path[-1] == "/" != path[-2] and not is_file else path
