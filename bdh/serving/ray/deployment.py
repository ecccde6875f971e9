"""`bdh serve --ray`: replicas of the server under Ray Serve."""

import logging
import math
import os
import re
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdh.errors import BDHError
from bdh.serving.auth.host_check import is_loopback
from bdh.serving.config import RaySettings, ServeConfig, check_folders
from bdh.serving.observability.logs import configure_logging
from bdh.serving.ray.cluster import MISSING, Interrupted, Signals, cluster, first_line
from bdh.serving.ray.logs import Words
from bdh.serving.ray.proxy_middleware import gate_settings
from bdh.serving.server import Server, listen, shown_address

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

log = logging.getLogger(__name__)

HEALTH_SECONDS = 2.0  # between two looks whether a replica lives
STUCK_SECONDS = 10.0  # to answer such a look; one that misses three in a row counts as dead
SCALE_UP_SECONDS, SCALE_DOWN_SECONDS, LOOK_BACK_SECONDS = 5.0, 600.0, 15.0  # of Ray's autoscaling
MOST_REQUESTS = 100_000  # in one replica; what it cannot take it refuses itself, and earlier
FIRST_TRIES = 2  # of replicas to begin, before the first has
LOOK_SECONDS = 1.0  # between two looks at what Ray does
GONE_SECONDS = 30.0  # without a word of Ray's
ASK_SECONDS = 5.0  # for replicas to answer
FASTER = {  # for Ray's proxies and for replicas
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",  # each loop more takes time for each piece of a stream
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}
QUIET_LOGS = {"log_level": "ERROR", "enable_access_log": False}


def serve_on_ray(config: ServeConfig) -> None:
    """Serves until a signal comes. Raises BDHError if it cannot begin, or no replica can."""
    configure_logging(config.logging)
    if find_spec("ray") is None:
        raise BDHError(MISSING)
    check(config.ray)
    check_folders(config)
    server = Server(config)  # raises for what every replica would trip over
    config = made_absolute(config)
    address = chosen_address(config)
    if not server.keys.required and not is_loopback(config.host):
        log.warning("%s is open to the network without API keys: whoever reaches it can use it; see bdh keys", address)
    try:
        with redirect_stdout(Words()), Signals() as signals, cluster(config, signals) as sink:
            Running(config, sink, signals).run(address)
    except Interrupted:
        log.info("ended before it was ready")


def check(settings: RaySettings) -> None:
    """Raises BDHError for the first setting that cannot be."""
    for name in ("min_replicas", "target_queue", "cpus"):
        value = getattr(settings, name)
        if not 0 < value < math.inf:
            raise BDHError(f"serve.ray.{name} is {value}; it must be more than 0")
    if settings.max_replicas < settings.min_replicas:
        raise BDHError(
            f"serve.ray.max_replicas is {settings.max_replicas}; it must be at least serve.ray.min_replicas, "
            f"which is {settings.min_replicas}"
        )
    if settings.gpus is not None and not 0 <= settings.gpus < math.inf:
        raise BDHError(f"serve.ray.gpus is {settings.gpus}; it must be at least 0, or null")


def made_absolute(config: ServeConfig) -> ServeConfig:
    """The settings with paths and a format of logs that mean the same in other processes."""
    as_text = config.logging.format == "text" or (config.logging.format == "auto" and sys.stderr.isatty())
    keys_file, folder = config.auth.keys_file, config.sessions.folder
    return replace(
        config,
        models=[replace(model, path=str(Path(model.path).resolve()), name=model.shown_name) for model in config.models],
        auth=replace(config.auth, keys_file=str(Path(keys_file).resolve()) if keys_file else None),
        sessions=replace(config.sessions, folder=str(Path(folder).resolve()) if folder else None),
        logging=replace(config.logging, format="text" if as_text else "json"),
    )


def chosen_address(config: ServeConfig) -> str:
    """The address of the server, whose port is free if Ray is on this machine. Raises BDHError."""
    if config.ray.address is not None:
        if config.port == 0:
            raise BDHError("serve.port is 0; name a port that is free on all machines of the Ray cluster")
        return f"port {config.port} of the Ray cluster's machines"
    listening = listen(config.host, config.port)
    try:
        config.port = listening.getsockname()[1]
        return shown_address(listening)
    finally:
        listening.close()


class Running:
    """The server while Ray is there.

    Args:
        config: Of the server.
        sink: Where replicas may log to.
        signals: What says when to end.
    """

    def __init__(self, config: ServeConfig, sink: str | None, signals: Signals):
        self.config = config
        self.sink = sink
        self.signals = signals
        self.replicas: dict[Any, int] = {}  # how many there are in each state of Ray's
        self.seen = time.monotonic()  # when Ray told that the last time

    def run(self, address: str) -> None:
        """Serves until a signal comes. Raises BDHError."""
        from ray import serve

        from bdh.serving.ray.replica import APPLICATION

        for name in ("ray", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self._listen()
        log.info("serving %s at %s", ", ".join(model.shown_name for model in self.config.models), address)
        handle = serve.run_many(
            [serve.RunTarget(self._application(), APPLICATION, "/", QUIET_LOGS)], wait_for_applications_running=False
        )[0]
        self.seen = time.monotonic()
        try:
            while not self.signals.count:
                self._look()
                self.signals.wait(LOOK_SECONDS)
            self._drain(handle)
        finally:
            self._end(handle)

    def _listen(self) -> None:
        """Begins Ray's HTTP proxies. Raises BDHError."""
        from ray import serve

        local = self.config.ray.address is None
        if not local and serve.status().proxies:
            raise BDHError("Ray Serve runs already on this cluster; end it, for instance with: serve shutdown")
        try:
            serve.start(
                proxy_location="HeadOnly" if local else "EveryNode",
                http_options={
                    "host": self.config.host,
                    "port": self.config.port,
                    "keep_alive_timeout_s": round(self.config.requests.idle_seconds) or 1,
                },
                logging_config=QUIET_LOGS,
                controller_options={"runtime_env": {"env_vars": FASTER | gate_settings(self.config, self.sink)}},
            )
        except (RuntimeError, TimeoutError) as error:
            raise BDHError(f"Ray Serve cannot begin: {str(error).strip().splitlines()[-1]}") from error

    def _application(self) -> "Application":
        """The application that Ray runs."""
        import ray
        from ray import serve

        from bdh.serving.ray.replica import DEPLOYMENT, Replica

        settings = self.config.ray
        devices = {model.device for model in self.config.model_settings()}
        gpus = settings.gpus
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU") and devices & {"auto", "cuda"} else 0.0
        environment = {name: os.environ[name] for name in ("BDH_API_KEYS",) if name in os.environ}
        return serve.deployment(  # type: ignore[attr-defined]
            Replica,
            name=DEPLOYMENT,
            ray_actor_options={
                "num_cpus": settings.cpus,
                "num_gpus": gpus,
                "runtime_env": {"env_vars": FASTER},
            },
            autoscaling_config={
                "min_replicas": settings.min_replicas,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": settings.target_queue,
                "upscale_delay_s": SCALE_UP_SECONDS,
                "downscale_delay_s": SCALE_DOWN_SECONDS,
                "look_back_period_s": LOOK_BACK_SECONDS,
            },
            max_ongoing_requests=MOST_REQUESTS,
            max_constructor_retry_count=FIRST_TRIES,
            request_router_config={"request_router_class": "bdh.serving.ray.router:PlaceRouter"},
            health_check_period_s=HEALTH_SECONDS,
            health_check_timeout_s=STUCK_SECONDS,
            graceful_shutdown_wait_loop_s=0.2,
            graceful_shutdown_timeout_s=self.config.drain_seconds,
        ).bind(self.config, environment, self.sink)

    def _look(self) -> None:
        """Tells of what changed. Raises BDHError if no replica can begin, or Ray is gone."""
        import ray
        from ray import serve

        from bdh.serving.ray.replica import APPLICATION, DEPLOYMENT

        try:
            application = serve.status().applications[APPLICATION]
        except (ray.exceptions.RayError, ConnectionError, RuntimeError, KeyError) as error:
            if time.monotonic() - self.seen > GONE_SECONDS:
                raise BDHError(f"Ray is gone: {first_line(error)}") from error
            return
        self.seen = time.monotonic()
        if application.status == "DEPLOY_FAILED":
            raise BDHError(reason_of(application.deployments[DEPLOYMENT].message))
        deployment = application.deployments.get(DEPLOYMENT)
        if deployment is not None and deployment.replica_states != self.replicas:
            self.replicas = dict(deployment.replica_states)
            ready = self.replicas.get("RUNNING", 0)
            more = [f"{count} {state.lower()}" for state, count in self.replicas.items() if state != "RUNNING"]
            log.info("replicas: %s", ", ".join([f"{ready} ready", *more]))

    def _drain(self, handle: "DeploymentHandle[Any]") -> None:
        """Lets requests come to their end, new ones being refused, unless they take too long or a signal comes."""
        inside = sum(asked(handle, "drain"))
        log.info("draining: %d requests are inside; once more to end at once", inside)
        deadline = time.monotonic() + self.config.drain_seconds
        while inside and self.signals.count < 2 and time.monotonic() < deadline:
            self.signals.wait(0.1)
            inside = sum(asked(handle, "drain"))
        if inside:
            log.warning("%d requests are cut off", inside)

    def _end(self, handle: "DeploymentHandle[Any]") -> None:
        """Ends the replicas in order; what is left of Ray on this machine ends with the cluster."""
        from ray import serve

        asked(handle, "end")
        if self.config.ray.address is not None:
            serve.shutdown()


def asked(handle: "DeploymentHandle[Any]", method: str) -> list[Any]:
    """The results of all replicas that respond in time."""
    from bdh.serving.ray.replica import answers

    try:
        return answers(handle.broadcast(method).results(timeout_s=ASK_SECONDS, return_exceptions=True))
    except Exception as error:  # whatever Ray may raise where nobody is left
        log.warning("the replicas cannot be asked to %s: %s", method, first_line(error))
        return []


def reason_of(message: str) -> str:
    """Why replicas cannot begin, from what Ray says of it."""
    ours = re.findall(r"BDHError: (.+)", message)
    return ours[-1] if ours else f"no replica can begin: {message.strip().splitlines()[-1] if message else 'no reason'}"
