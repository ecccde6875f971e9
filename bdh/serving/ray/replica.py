"""A replica under Ray Serve: one server, and what the replicas tell one another."""

import asyncio
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bdh.library_logging import quiet_libraries
from bdh.serving.app import create_app
from bdh.serving.config import ServeConfig
from bdh.serving.model_registry import ModelRegistry
from bdh.serving.ray.logs import log_to
from bdh.serving.ray.proxy_middleware import REPLICA_HEADER
from bdh.serving.server import Server
from bdh.serving.sessions.ids import place_of_replica
from bdh.serving.sessions.routes import SessionCard, card

log = logging.getLogger(__name__)

APPLICATION = "bdh"
DEPLOYMENT = "bdh"
PEER_SECONDS = 5.0  # for the other replicas to answer
GONE_SECONDS = 5.0  # for a request to end whose client has gone


class ReplicaServer(Server):
    """A server that is ready once it has begun: Ray sends no requests before."""

    async def start(self) -> None:
        """Loads the models. Raises BDHError if one cannot be."""
        if self._loading is None:
            await super().start()
            assert self._loading is not None
            await self._loading
        if self.failure is not None:
            raise self.failure


@serve.ingress()
class Replica:
    """A server as a replica of Ray Serve.

    Args:
        config: Of the server.
        environment: Where `BDH_API_KEYS` may be.
        sink: Where to log to.
    """

    async def __init__(  # type: ignore[misc]  # Ray knows how
        self, config: ServeConfig, environment: Mapping[str, str], sink: str | None
    ):
        name = serve.get_replica_context().replica_id.unique_id
        log_to(sink, config.logging, name)
        quiet_libraries()
        self.name = name
        models = ModelRegistry(config, set_up_logging=partial(log_to, sink, config.logging, name))
        self.server = ReplicaServer(config, environment, place_of_replica(name), models)
        self.server.peers = RayPeers(self)
        await self.server.start()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return Outermost(create_app(self.server), self.name)

    async def check_health(self) -> None:
        """Ray ends a replica where this raises, or takes long."""
        if self.server.failure is not None:
            raise self.server.failure

    # ------------------------------------------------------------------------------------------- what others ask for

    async def figures(self) -> tuple[str, list[Metric]]:
        return self.name, list(self.server.metrics.registry.collect())

    async def session_cards(self, owner: str | None) -> list[SessionCard]:
        return [card(kept) for kept in self.server.sessions.of(owner)]

    async def drain(self) -> int:
        """Takes no new requests from now on; returns how many are inside."""
        self.server.drain.start()
        return self.server.drain.in_flight

    async def end(self) -> None:
        """Ends what is still inside, and everything else."""
        await self.server.close()


class Outermost:
    """An ASGI app around another, whose answers say which replica they are from.

    Ray cancels a request whose client has gone, most times before it says `http.disconnect`. Here that is said first,
    so that the app ends the request as it would anywhere else.
    """

    def __init__(self, app: ASGIApp, name: str):
        self.app = app
        self.header = (REPLICA_HEADER, name.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        gone = asyncio.Event()

        async def receive_until_gone() -> Message:
            message, going = asyncio.ensure_future(receive()), asyncio.ensure_future(gone.wait())
            try:
                await asyncio.wait({message, going}, return_when=asyncio.FIRST_COMPLETED)
                return {"type": "http.disconnect"} if gone.is_set() else message.result()
            finally:
                message.cancel()
                going.cancel()

        async def send_signed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], self.header]}
            await send(message)

        answering = asyncio.ensure_future(self.app(scope, receive_until_gone, send_signed))
        try:
            await asyncio.shield(answering)
        except asyncio.CancelledError:
            gone.set()
            await asyncio.wait({answering}, timeout=GONE_SECONDS)
            answering.cancel()
            raise


class RayPeers:
    """All replicas. One that dies meanwhile is left out; where some do not answer in time, all others are."""

    def __init__(self, own: "Replica"):
        self._own = own
        self._handle: DeploymentHandle[Any] | None = None

    async def metrics(self) -> bytes:
        return generate_latest(Together(await self._ask("figures")))  # type: ignore[arg-type]

    async def sessions(self, owner: str | None) -> list[SessionCard]:
        cards = [one for some in await self._ask("session_cards", owner) for one in some]
        return sorted(cards, key=lambda one: one.created)

    async def _ask(self, method: str, *arguments: Any) -> list[Any]:
        if self._handle is None:
            self._handle = serve.get_deployment_handle(DEPLOYMENT, APPLICATION)
        asked = self._handle.broadcast(method, *arguments)
        try:
            return answers(await asked.results_async(timeout_s=PEER_SECONDS, return_exceptions=True))
        except (RayServeException, TimeoutError) as error:
            log.warning("the other replicas cannot be asked for %s: %s", method, error)
            return [await getattr(self._own, method)(*arguments)]


def answers(results: list[Any]) -> list[Any]:
    """Those of results that are no exceptions."""
    return [result for result in results if not isinstance(result, BaseException)]


class Together(Collector):
    """The figures of several replicas, each with a label that says whose it is."""

    def __init__(self, of_each: list[tuple[str, list[Metric]]]):
        self.of_each = of_each

    def collect(self) -> Iterator[Metric]:
        together: dict[str, Metric] = {}
        for name, metrics in self.of_each:
            for metric in metrics:
                whole = together.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                for sample in metric.samples:
                    whole.samples.append(sample._replace(labels={**sample.labels, "replica": name}))
        yield from together.values()
