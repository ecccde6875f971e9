"""A server: its parts, its start, and its graceful shutdown."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType

import uvicorn

from bdh.errors import BDHError
from bdh.serving.activity.traces import TraceStore
from bdh.serving.api.middleware import MAX_HEAD_BYTES, RequestDrain
from bdh.serving.app import create_app
from bdh.serving.auth.api_keys import KeyStore
from bdh.serving.auth.host_check import HostCheck, is_loopback
from bdh.serving.auth.rate_limits import RateLimits
from bdh.serving.config import ServeConfig, validate
from bdh.serving.model_registry import ModelRegistry, ServedModel
from bdh.serving.observability.metrics import Metrics
from bdh.serving.sessions.peers import Peers
from bdh.serving.sessions.store import SessionStore

log = logging.getLogger(__name__)

CANCELLED_SECONDS = 3  # for the errors of cancelled requests to reach their clients


class Server:
    """Creates the parts of a server, and starts and closes them.

    Args:
        config: Settings of the server.
        environment: Environment variables, of which `BDH_API_KEYS` is read.
        place: Identifies this server in ids, if it is one of several replicas.
        models: Its models, if their processes have been started.

    Attributes:
        peers: All replicas, if it is one of several.
        failure: Why the server cannot continue.
        failed: Set with `failure`.

    Raises:
        BDHError: A setting is invalid.
    """

    def __init__(
        self,
        config: ServeConfig,
        environment: Mapping[str, str] = os.environ,
        place: str = "",
        models: ModelRegistry | None = None,
    ):
        validate(config)
        self.config = config
        keys_file = config.auth.keys_file
        self.keys = KeyStore(Path(keys_file) if keys_file else None, environment.get("BDH_API_KEYS"))
        self.hosts = None if self.keys.required else HostCheck(config.host, config.allowed_hosts)
        self.limits = RateLimits(config.limits)
        self.metrics = Metrics()
        self.models = models or ModelRegistry(config)
        self.sessions = SessionStore(config.sessions, place)
        self.traces = TraceStore(config.brain, place)
        self.drain = RequestDrain()
        self.peers: Peers | None = None
        self.failure: BDHError | None = None
        self.failed = asyncio.Event()
        self._loading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start to load the models; requests are answered with 503 until they are loaded."""
        self._loading = asyncio.create_task(self._load())
        await self.sessions.start()

    async def close(self) -> None:
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
        await self.sessions.close()
        await self.models.close()
        await self.limits.close()

    async def _load(self) -> None:
        self.models.on_lost, self.models.on_failed = self._on_model_lost, self._on_failed
        try:
            await self.models.load()
            for served in self.models.loaded.values():
                self._watch(served)
        except Exception as error:
            self._on_failed(error if isinstance(error, BDHError) else BDHError(f"the models cannot be loaded: {error}"))

    def _on_failed(self, error: BDHError) -> None:
        self.failure = error
        self.failed.set()

    def _on_model_lost(self, served: ServedModel) -> None:
        """Forget what was only in the memory of a model's process."""
        self.sessions.lose(served)
        self.traces.remove_lost(served)

    def _watch(self, served: ServedModel) -> None:
        """Add the statistics of a model to the metrics."""
        info = served.llm.model_info

        def state_bytes() -> dict[str, float]:
            return {"prefix_cache": served.llm.stats.prefix_nbytes, "sessions": self.sessions.nbytes(served.name)}

        self.metrics.watch(
            served.name,
            lambda: served.llm.stats,
            info.n_slots,
            info.state_nbytes,
            state_bytes,
            lambda: served.llm.resident_nbytes,
            info.loaded_nbytes,
        )


class UvicornServer(uvicorn.Server):
    """uvicorn server that drains on the first signal, and cancels the requests in flight on the second."""

    def __init__(self, config: uvicorn.Config, server: Server):
        super().__init__(config)
        self.server = server
        self.loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self.tasks = [asyncio.create_task(self._exit_when_drained()), asyncio.create_task(self._exit_when_failed())]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self.tasks:
            task.cancel()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.loop is None or self.server.drain.cancelled.is_set():
            self.should_exit = True
            self.force_exit = sig == signal.SIGINT
        else:
            self.loop.call_soon_threadsafe(self._on_signal)

    def _on_signal(self) -> None:
        drain = self.server.drain
        if drain.draining:
            drain.cancelled.set()
        else:
            log.info("draining: %d requests are in flight; a second signal cancels them", drain.in_flight)
            drain.start()

    async def _exit_when_drained(self) -> None:
        """Wait for the requests in flight after a signal, for a limited time; then cancel them."""
        drain, seconds = self.server.drain, self.server.config.drain_seconds
        try:
            await drain.started.wait()
            events = [asyncio.ensure_future(event.wait()) for event in (drain.drained, drain.cancelled)]
            await asyncio.wait(events, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if drain.in_flight:
                log.warning("%d requests are cancelled", drain.in_flight)
                drain.cancelled.set()
                with suppress(TimeoutError):
                    async with asyncio.timeout(CANCELLED_SECONDS):
                        await drain.drained.wait()
            for event in events:
                event.cancel()
        finally:
            self.should_exit = True

    async def _exit_when_failed(self) -> None:
        await self.server.failed.wait()
        self.should_exit = True


def serve(config: ServeConfig, models: ModelRegistry) -> None:
    """Serve models until a signal arrives. Raises BDHError if the server cannot start, or a model cannot be loaded."""
    server = Server(config, models=models)
    listening = listen(config.host, config.port, config.requests.idle_seconds)
    address = shown_address(listening)
    log.info("serving %s at %s", ", ".join(server.models.settings), address)
    if not server.keys.required and not is_loopback(config.host):
        log.warning("%s is open to the network without API keys: whoever reaches it can use it; see bdh keys", address)
    logging.getLogger("uvicorn.error").addFilter(adapt_uvicorn_record)
    listener = UvicornServer(
        uvicorn.Config(
            create_app(server),
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            timeout_keep_alive=round(config.requests.idle_seconds) or 1,
            timeout_graceful_shutdown=CANCELLED_SECONDS,
            forwarded_allow_ips=config.trusted_proxies,
        ),
        server,
    )
    listener.run(sockets=[listening])
    if server.failure is not None:
        raise server.failure


def listen(host: str, port: int, write_timeout: float | None = None) -> socket.socket:
    """Create a listening socket.

    Args:
        host: Address or name to listen on.
        port: Port; 0 chooses a free one.
        write_timeout: Seconds after which a connection is closed whose client reads nothing of what it was sent.

    Raises:
        BDHError: The address is invalid or in use.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.create_server((address[0], port), family=family, backlog=1024)
    except OSError as error:
        is_system_error = error.errno is not None and error.errno > 0  # and not one of the resolver
        reason = os.strerror(error.errno or 0) if is_system_error else error.strerror or str(error)
        raise BDHError(f"{host}:{port} cannot be listened on: {reason}; choose another --host or --port") from error
    listening.setblocking(False)
    if write_timeout is not None and hasattr(socket, "TCP_USER_TIMEOUT"):  # connections inherit it; Linux only
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(write_timeout * 1000))
    return listening


def adapt_uvicorn_record(record: logging.LogRecord) -> bool:
    """Filter of uvicorn's log: drops advice that does not apply here, and lowers the level of an expected event."""
    message = record.getMessage()
    if "timeout graceful shutdown exceeded" in message:  # some client does not read its response
        record.levelno, record.levelname = logging.WARNING, "WARNING"
    return "pip install" not in message  # after a proposal of web sockets or HTTP/2, which gets HTTP/1.1


def shown_address(listening: socket.socket) -> str:
    host, port, *_ = listening.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
