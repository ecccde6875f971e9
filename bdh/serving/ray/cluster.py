"""Ray itself: a cluster of one machine, made for a server and ended with it; or one that runs already."""

import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from bdh.errors import BDHError
from bdh.serving.config import RaySettings, ServeConfig
from bdh.serving.ray.logs import LogSink

OBJECT_STORE_BYTES = 128 << 20  # Ray's least is 75 MiB; answers pass through it in small pieces
CONNECT_SECONDS = 5.0
LONGEST_FOLDER = 39  # characters: Ray makes sockets far below it, whose paths may have 107
RAYS_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",  # to files
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # or Ray would make environments of its own
}


MISSING = "--ray needs Ray Serve, which is not installed; install it: pip install 'bdh[ray]'"


class Interrupted(BaseException):
    """A signal came before there was anything to drain."""


class Signals:
    """SIGINT and SIGTERM.

    Attributes:
        count: How many came.
        raising: Whether they raise `Interrupted` wherever the program is, instead of waiting to be asked for.
    """

    def __init__(self) -> None:
        self.count = 0
        self.raising = True
        self._came = threading.Event()

    def __enter__(self) -> Self:
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """To be repeated after Ray has put a handler of its own in this place."""
        for number in self._before:
            signal.signal(number, self._handle)

    def wait(self, seconds: float) -> None:
        """Waits, but not longer than until a signal comes."""
        self._came.wait(seconds)
        self._came.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self._came.set()
        if self.raising:
            raise Interrupted


@contextmanager
def cluster(config: ServeConfig, signals: Signals) -> Iterator[str | None]:
    """Ray, within it. Gives the socket where processes may log to, if they are all on this machine.

    Raises:
        BDHError: It cannot be reached, or cannot begin, or has too little for this server.
        Interrupted: A signal came.
    """
    try:
        with local_cluster() if config.ray.address is None else remote_cluster(config.ray.address) as sink:
            signals.install()
            signals.raising = False
            if signals.count:
                raise Interrupted
            check_resources(config.ray)
            yield sink
    except SystemExit as error:  # Ray's handler of SIGTERM, while it begins
        raise Interrupted from error


@contextmanager
def local_cluster() -> Iterator[str]:
    """A cluster of this machine. Raises BDHError."""
    folder = private_folder()
    sink = LogSink(folder / "log")
    try:
        # its ports are open to the network, and whoever may talk to Ray may run anything
        os.environ.update(
            RAYS_SETTINGS, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), TMPDIR=str(folder)
        )
        os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
        with connected("Ray cannot begin", address="local", include_dashboard=False,
                       object_store_memory=OBJECT_STORE_BYTES, _temp_dir=str(folder / "ray")):  # fmt: skip
            yield str(sink.path)
    finally:
        sink.close()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def remote_cluster(address: str) -> Iterator[None]:
    """A cluster that runs. Raises BDHError if it cannot be reached."""
    os.environ.update(RAYS_SETTINGS)
    failure = f"the Ray cluster at {address} cannot be reached"
    host, _, port = address.rpartition(":")
    if port.isdecimal():  # Ray would try for minutes
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        except OSError as error:
            raise BDHError(f"{failure}: {error.strerror or error}") from error
    hint = "if it asks for a token, RAY_AUTH_MODE=token and RAY_AUTH_TOKEN in the environment give it"
    with connected(f"{failure} ({hint})", address=address):
        yield None


@contextmanager
def connected(failure: str, **options: Any) -> Iterator[None]:
    """Ray's library, at work. It reads the environment when it is imported. Raises BDHError."""
    try:
        import ray.serve
    except ImportError as error:
        raise BDHError(MISSING) from error
    try:
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise BDHError(f"{failure}: {first_line(error)}") from error
        yield
    finally:
        ray.shutdown()
        if options["address"] == "local":
            end_children()


def check_resources(settings: RaySettings) -> None:
    """Raises BDHError if the replicas that must be there will never fit in."""
    import ray

    there = ray.cluster_resources()
    for name, each in (("cpus", settings.cpus), ("gpus", settings.gpus or 0.0)):
        have, need = there.get(name.upper()[:-1], 0.0), each * settings.min_replicas
        if need > have:
            raise BDHError(
                f"{settings.min_replicas} replicas with {each:g} {name} each need {need:g}, but Ray has {have:g}; "
                f"lower serve.ray.{name} or serve.ray.min_replicas"
            )


def private_folder() -> Path:
    """A new folder for all files of Ray, which nobody else may enter."""
    folder = tempfile.mkdtemp(prefix="bdh-ray-")
    if len(folder) > LONGEST_FOLDER:
        Path(folder).rmdir()
        folder = tempfile.mkdtemp(prefix="bdh-ray-", dir="/tmp")
    return Path(folder)


def end_children() -> None:
    """Ends what Ray has left of its processes, as it does where it was interrupted."""
    import psutil  # type: ignore[import-untyped]  # Ray brings it

    children = psutil.Process().children(recursive=True)
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(children, timeout=5)


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
