"""Brings what replicas log to the stderr of the command that began them; Ray would put it into files.

Only where they are on the same machine: elsewhere Ray's files on that machine have it.
"""

import io
import logging
import re
import socket
import socketserver
import sys
import threading
from pathlib import Path

from bdh.serving.config import LogSettings
from bdh.serving.observability.logs import configure_logging

log = logging.getLogger(__name__)

COLOURS = re.compile("\x1b\\[[0-9;]*m")


class LogSink:
    """Writes lines that come through a socket to stderr, until it is closed."""

    def __init__(self, path: Path):
        self.path = path
        self._server = Listener(str(path), Lines)
        threading.Thread(target=self._server.serve_forever, name="logs of replicas", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Listener(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False


class Lines(socketserver.StreamRequestHandler):
    """One process that logs."""

    def handle(self) -> None:
        for line in self.rfile:
            sys.stderr.write(line.decode("utf-8", "backslashreplace"))
            sys.stderr.flush()


def log_to(sink: str | None, settings: LogSettings, replica: str | None = None) -> None:
    """Makes this process log as the settings say: to a sink, or to its stderr if there is none.

    Args:
        sink: The socket of a `LogSink`.
        settings: Their format is "json" or "text": the process whose stderr it is knows which "auto" would be.
        replica: Is told with each line, if this is one.
    """
    if sink is not None:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(sink)
        sys.stderr = connection.makefile("w", encoding="utf-8", errors="backslashreplace", buffering=1)
    configure_logging(settings)
    if replica is not None:
        for handler in logging.getLogger().handlers:
            handler.addFilter(Stamp(replica))


class Words(io.TextIOBase):
    """A stdout for what Ray says there, which becomes lines of the log."""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for line in COLOURS.sub("", text).splitlines():
            if line.strip():
                log.info("Ray: %s", line.strip())
        return len(text)


class Stamp(logging.Filter):
    """Lets everything pass, and tells which replica it is from."""

    def __init__(self, replica: str):
        super().__init__()
        self.replica = replica

    def filter(self, record: logging.LogRecord) -> bool:
        record.replica = self.replica
        return True
