"""Log of a server on stderr, one line for each record: readable text on a terminal, JSON elsewhere.

Everything goes through the standard library's `logging`, as uvicorn and torch use it too; python-json-logger is only a
formatter for it, where structlog would be a second way of logging beside the one that the libraries have.

No text of a user, key or header gets into a line: what a request was about comes from the fields that its handler put
into `scope["state"]["log"]`, its prompt and answer only where `LogSettings.prompts` asks for them, and the words of an
exception only if its kind never quotes what it was given.
"""

import json
import logging
import re
import secrets
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from bdh.serving.config import LogSettings

if TYPE_CHECKING:
    from bdh.serving.observability.metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
ExceptionInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # of clients; nothing that a header or a line could be broken with
CLIENT_GONE = 499  # the status of a request whose client went away before it was answered, as nginx has it
TEXTS = ("prompt", "answer")  # fields that are only written if asked for
NO_FIELDS = frozenset({*RESERVED_ATTRS, "color_message"})  # what every record has, and what uvicorn adds for terminals
LONGEST = 200  # characters of a field that may come from a client
ROUTINE = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})  # asked for every few seconds
SAFE_WORDS = (OSError, RuntimeError, TypeError, AttributeError, NameError, AssertionError, ImportError, MemoryError)

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
access = logging.getLogger("bdh.access")


def configure_logging(settings: LogSettings) -> None:
    """Makes all loggers of the process, uvicorn's too, write as the settings say.

    uvicorn must be told to leave them alone: `log_config=None, access_log=False`.
    """
    as_text = settings.format == "text" or (settings.format == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter(settings.prompts) if as_text else LineFormatter(settings.prompts))
    handler.addFilter(with_request_id)
    if not settings.prompts:
        handler.addFilter(without_values)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        adopt(name)
    level = logging.getLevelName(settings.level.upper())
    logging.getLogger("bdh").setLevel(level)
    logging.getLogger("uvicorn").setLevel(max(level, logging.INFO))  # below, it writes what clients send
    logging.getLogger("uvicorn.access").disabled = True  # it writes whole addresses; RequestLog does it instead
    access.disabled = not settings.access
    logging.captureWarnings(True)


def adopt(name: str) -> None:
    """Makes a library's logger that has a handler of its own write as all others do."""
    logger = logging.getLogger(name)
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


# ------------------------------------------------------------------------------------------------------------- records


def with_request_id(record: logging.LogRecord) -> bool:
    """A filter that lets everything pass, and tells which request it belongs to."""
    name = request_id.get()
    if name is not None and not hasattr(record, "request_id"):
        record.request_id = name
    return True


def without_values(record: logging.LogRecord) -> bool:
    """A filter that lets everything pass, but shortens asyncio's lines about what failed, which quote its exception."""
    if record.name == "asyncio":
        record.msg, record.args = record.getMessage().partition("\n")[0], ()
    return True


def time_of(record: logging.LogRecord) -> str:
    """The time of a record in UTC, in ISO 8601."""
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def exception_text(info: ExceptionInfo, with_words: bool) -> str:
    """The traceback of an exception; its words, and those of what led to it, only if they cannot quote a user."""
    kind, error, trace = info
    if kind is None or error is None:
        return ""
    told = traceback.TracebackException(kind, error, trace)
    return "".join(told.format() if with_words else careful(told, error)).rstrip("\n")


def careful(told: traceback.TracebackException, error: BaseException) -> list[str]:
    """The lines of a traceback, much as Python prints it, without words that may be a user's."""
    lines: list[str] = []
    for before, led_to in ((error.__cause__, told.__cause__), (error.__context__, told.__context__)):
        if before is not None and led_to is not None:
            lines += [*careful(led_to, before), "\nwhich led to:\n\n"]
            break
    words = str(error) if isinstance(error, SAFE_WORDS) else "(not shown: it may quote a user)"
    kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    lines += ["Traceback (most recent call last):\n", *told.stack.format(), f"{kind}: {words}\n"]
    if isinstance(error, BaseExceptionGroup):
        for inside, one in zip(told.exceptions or (), error.exceptions, strict=False):
            lines += ["\nin which there was:\n\n", *careful(inside, one)]
    return lines


class LineFormatter(JsonFormatter):
    """A record as one line of JSON: time, level, logger, message, request_id, then its own fields."""

    def __init__(self, with_words: bool):
        super().__init__(["time", "level", "logger", "message"], reserved_attrs=sorted(NO_FIELDS))
        self.with_words = with_words

    def format(self, record: logging.LogRecord) -> str:
        record.time, record.level, record.logger = time_of(record), record.levelname.lower(), record.name
        return super().format(record)

    def formatException(self, info: ExceptionInfo) -> str:  # noqa: N802
        return exception_text(info, self.with_words)


class TextFormatter(logging.Formatter):
    """A record as a line to read: time, level, message, its own fields. A traceback follows on lines of its own."""

    def __init__(self, with_words: bool):
        super().__init__()
        self.with_words = with_words

    def format(self, record: logging.LogRecord) -> str:
        own = {name: value for name, value in vars(record).items() if name not in NO_FIELDS}
        line = f"{time_of(record)} {record.levelname.lower():<7} {printable(record.getMessage().rstrip())}"
        line = " ".join([line, *(f"{name}={shown(value)}" for name, value in own.items() if value is not None)])
        return line if not record.exc_info else f"{line}\n{exception_text(record.exc_info, self.with_words)}"


def shown(value: Any) -> str:
    """A field's value; in quotes where it could be taken for several."""
    text = printable(str(value))
    return text if text and not re.search(r'[\s="]', text) else json.dumps(text, ensure_ascii=False)


def printable(text: str) -> str:
    """The text on one line, and harmless to a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ------------------------------------------------------------------------------------------------------------ requests


class RequestLog:
    """An ASGI app around another, the outermost one: gives each request an id, and tells what became of it.

    The id is the client's `X-Request-ID`, if it is a plain name of 64 characters at most, or a new one. It is in the
    answer's `x-request-id`, in the contextvar `request_id`, and on all lines that are logged meanwhile.

    Handlers say what a request is about in the dict `scope["state"]["log"]`: `model`, `key`, `key_name`,
    `prompt_tokens`, `completion_tokens`, `cached_tokens`, `finish_reason`, and what else may be known to whoever reads
    logs; `prompt` and `answer` are left out unless the settings ask for them. A handler that sees its client go away
    sets `disconnected`.
    """

    def __init__(self, app: App, metrics: "Metrics", settings: LogSettings):
        self.app = app
        self.metrics = metrics
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send)
        request_id.set(
            exchange.id
        )  # each request is a task of its own; a server that logs its failure still has the id
        try:
            await self.app(scope, exchange.receive, exchange.send)
        finally:
            self._tell(exchange)

    def _tell(self, exchange: "Exchange") -> None:
        seconds = time.perf_counter() - exchange.began
        fields = exchange.fields
        gone = bool(fields.pop("disconnected", False)) or exchange.gone
        status = exchange.status(gone)
        self.metrics.request_done(exchange.route or "unknown", fields.get("model"), status, seconds)
        if gone:
            self.metrics.disconnected(fields.get("model"))
        about = {
            "request_id": exchange.id,
            "method": exchange.scope["method"],
            "path": exchange.route or exchange.scope["path"][:LONGEST],
            "status": status,
            "seconds": round(seconds, 4),
            "client": exchange.scope["client"][0] if exchange.scope.get("client") else None,
        }
        for name, value in fields.items():
            if self.settings.prompts or name not in TEXTS:
                about[f"{name}_" if name in NO_FIELDS else name] = value if name in TEXTS else cut(value)
        if gone:
            about["disconnected"] = True
        elif not exchange.complete:
            about["broken_off"] = True
        routine = exchange.route in ROUTINE and status < 400
        access.log(logging.DEBUG if routine else logging.INFO, "request", extra=about)


class Exchange:
    """One request and its answer, as they pass."""

    def __init__(self, scope: Scope, receive: Receive, send: Send):
        self.began = time.perf_counter()
        self.scope = scope
        self.id = incoming_id(scope) or f"req_{secrets.token_hex(16)}"
        self.fields: dict[str, Any] = {}
        scope.setdefault("state", {})["log"] = self.fields
        self.gone = False  # the client, before its answer was complete
        self.complete = False  # the answer
        self._status: int | None = None
        self._left: int | None = None  # bytes of the answer's body, if it says how long it is
        self._receive = receive
        self._send = send

    def status(self, gone: bool) -> int:
        """The status of the response; without one 500, or 499 if the client has disconnected."""
        if self._status is not None:
            return self._status
        return CLIENT_GONE if gone else 500

    @property
    def route(self) -> str | None:
        """The template of the path, as "/v1/models/{id}"; None if no route has it."""
        return getattr(self.scope.get("route"), "path", None)

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self.complete:
            self.gone = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = [header for header in message.get("headers", ()) if header[0].lower() != b"x-request-id"]
            self._left = next((int(value) for name, value in headers if name.lower() == b"content-length"), None)
            message = {**message, "headers": [*headers, (b"x-request-id", self.id.encode())]}
        elif message["type"] == "http.response.body":
            if self._left is not None:
                self._left -= len(message.get("body", b""))
            # who has all bytes may go, though there is still to be said that no more come
            self.complete |= self._left == 0 or not message.get("more_body", False)
        await self._send(message)


def incoming_id(scope: Scope) -> str | None:
    """The id that the client gave its request, if it is harmless."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text = value.decode("latin-1")
            return text if REQUEST_ID.fullmatch(text) else None
    return None


def cut(value: Any) -> Any:
    """A value, not too long if it is a text."""
    return value[:LONGEST] if isinstance(value, str) else value
