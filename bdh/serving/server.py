"""A server: its rooms, its beginning and its end."""

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
from bdh.serving.api.errors import ApiError
from bdh.serving.api.http_protocol import PatientProtocol
from bdh.serving.app import create_app
from bdh.serving.auth.api_keys import KeyStore
from bdh.serving.auth.host_check import HostCheck, is_loopback
from bdh.serving.auth.rate_limits import RateLimits
from bdh.serving.config import ServeConfig, validate
from bdh.serving.model_registry import ModelRegistry, ServedModel
from bdh.serving.observability.metrics import Metrics
from bdh.serving.sessions.peers import Peers
from bdh.serving.sessions.store import SessionStore, attempt

log = logging.getLogger(__name__)

CLOSING_SECONDS = 3  # for answers that were cut off at the end to reach their clients
LONGEST_WAIT = 60  # seconds that a client is told to wait


class Server:
    """All that a server has. `start` and `close` are its lifespan's.

    Args:
        config: Its settings.
        environment: Where `BDH_API_KEYS` may be.
        place: What stands for this server in ids, if it is one of several that answer as one.
        models: Its models, if some have begun to load.

    Attributes:
        peers: These several.

    Raises:
        BDHError: A setting cannot be.
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
        self.peers: Peers | None = None
        self.inside = 0  # requests, those about health not counted
        self.draining = False
        self.drained = asyncio.Event()
        self.ending = asyncio.Event()  # whoever is still inside is told so, and sent home
        self.failure: BDHError | None = None  # why it cannot go on
        self.failed = asyncio.Event()
        self._seconds = 1.0  # that a request takes, about
        self._loading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to load the models; requests are answered with 503 until they are there."""
        self._loading = asyncio.create_task(self._load())
        await self.sessions.start()

    async def _load(self) -> None:
        self.models.lost, self.models.failed = self._lost, self._fail
        try:
            await self.models.load()
            for served in self.models.loaded.values():
                self.watch(served)
        except Exception as error:
            self._fail(error if isinstance(error, BDHError) else BDHError(f"the models cannot be loaded: {error}"))

    def _fail(self, error: BDHError) -> None:
        """Has the server end, as a model cannot be served."""
        self.failure = error
        self.failed.set()

    def _lost(self, served: ServedModel) -> None:
        """What was only in a model's process is no more."""
        self.sessions.lose(served)
        self.traces.lose(served.llm)

    def watch(self, served: ServedModel) -> None:
        """Makes a model's figures part of the metrics."""
        figures = served.llm.model_info

        def kept() -> dict[str, float]:
            return {"prefix_cache": served.llm.stats.prefix_nbytes, "sessions": self.sessions.nbytes(served.name)}

        self.metrics.watch(
            served.name,
            lambda: served.llm.stats,
            figures.n_slots,
            figures.state_nbytes,
            kept,
            lambda: served.llm.resident_nbytes,
            figures.loaded_nbytes,
        )

    async def close(self) -> None:
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
        await self.sessions.close()
        await self.models.close()
        await self.limits.close()

    # ---------------------------------------------------------------------------------------------------- under way

    def count(self, error: ApiError) -> None:
        """Counts a refusal."""
        if error.reason is not None:
            self.metrics.refused(error.reason)

    def took(self, seconds: float) -> None:
        """Remembers how long requests take."""
        self._seconds += (seconds - self._seconds) / 16

    def queue_seconds(self, served: ServedModel) -> int:
        """How long a full queue will take, about."""
        waves = served.llm.stats.waiting / served.llm.model_info.n_slots
        return max(1, min(LONGEST_WAIT, round(waves * self._seconds)))

    def begin_drain(self) -> None:
        """Takes no new requests from now on; those inside come to their end."""
        if not self.draining:
            log.info("draining: %d requests are inside; once more to end at once", self.inside)
            self.draining = True
        self.check_drained()

    def check_drained(self) -> None:
        if self.draining and self.inside == 0:
            self.drained.set()


class Listener(uvicorn.Server):
    """uvicorn, which drains before it ends: on the first signal, or at once on the second."""

    def __init__(self, config: uvicorn.Config, server: Server):
        super().__init__(config)
        self.server = server
        self.loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self.watching = [asyncio.create_task(self._end_when_drained()), asyncio.create_task(self._end_when_failed())]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self.watching:
            task.cancel()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.loop is None or self.server.ending.is_set():
            self.should_exit = True
            self.force_exit = sig == signal.SIGINT
        else:
            self.loop.call_soon_threadsafe(self._signalled)

    def _signalled(self) -> None:
        """What a signal asks for: the first to drain, the second not to wait for that."""
        if self.server.draining:
            self.server.ending.set()
        else:
            self.server.begin_drain()

    async def _end_when_drained(self) -> None:
        while not self.server.draining:
            await asyncio.sleep(0.05)
        try:
            await attempt("waiting for requests to end", self._wait_until_drained())
        finally:
            self.should_exit = True

    async def _wait_until_drained(self) -> None:
        """Waits for requests in work, as long as they may take; cancels them then."""
        server = self.server
        either = [asyncio.ensure_future(event.wait()) for event in (server.drained, server.ending)]
        await asyncio.wait(either, timeout=server.config.drain_seconds, return_when=asyncio.FIRST_COMPLETED)
        if server.inside:
            log.warning("%d requests are sent home with a 503", server.inside)
            server.ending.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSING_SECONDS):
                    await server.drained.wait()
        for task in either:
            task.cancel()

    async def _end_when_failed(self) -> None:
        await self.server.failed.wait()
        self.should_exit = True


def serve(config: ServeConfig, models: ModelRegistry) -> None:
    """Serves models until a signal comes. Raises BDHError if it cannot begin, or a model cannot be loaded."""
    server = Server(config, models=models)
    listening = listen(config.host, config.port)
    address = shown_address(listening)
    log.info("serving %s at %s", ", ".join(server.models.settings), address)
    if not server.keys.required and not is_loopback(config.host):
        log.warning("%s is open to the network without API keys: whoever reaches it can use it; see bdh keys", address)
    listener = Listener(
        uvicorn.Config(
            create_app(server),
            http=PatientProtocol.within(config.requests.body_seconds),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=round(config.requests.idle_seconds) or 1,
            timeout_graceful_shutdown=CLOSING_SECONDS,
            forwarded_allow_ips=config.trusted_proxies,
        ),
        server,
    )
    listener.run(sockets=[listening])
    if server.failure is not None:
        raise server.failure


def listen(host: str, port: int) -> socket.socket:
    """A socket to take connections from. Raises BDHError."""
    try:
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.create_server((where[0], port), family=family, backlog=1024)
    except OSError as error:
        system = error.errno is not None and error.errno > 0  # and not the resolver of names
        reason = os.strerror(error.errno or 0) if system else error.strerror or str(error)
        raise BDHError(f"{host}:{port} cannot be listened on: {reason}; choose another --host or --port") from error
    listening.setblocking(False)
    return listening


def shown_address(listening: socket.socket) -> str:
    host, port, *_ = listening.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
