"""HTTP as bytes on a connection, to send what no client library would."""

import contextlib
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        headers: With names in small letters.
    """

    status: int
    headers: dict[str, str]
    body: bytes


class Wire:
    """A connection to a server."""

    def __init__(self, url: str, seconds: float = 30.0, receive_buffer: int | None = None):
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(seconds)
        parts = urlsplit(url)
        self.socket.connect((parts.hostname, parts.port))

    def send(self, *parts: bytes) -> None:
        self.socket.sendall(b"".join(parts))

    def answer(self) -> Answer:
        """The next answer, whole."""
        response = HTTPResponse(self.socket)
        response.begin()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, headers, response.read())

    def rest(self) -> bytes:
        """All that comes until the server closes the connection."""
        received = b""
        with contextlib.suppress(ConnectionError):
            while piece := self.socket.recv(1 << 16):
                received += piece
        return received

    def seconds_until_closed(self) -> float:
        begin = time.monotonic()
        self.rest()
        return time.monotonic() - begin

    def close(self) -> None:
        self.socket.close()


@contextlib.contextmanager
def wire(url: str, seconds: float = 30.0, receive_buffer: int | None = None) -> Iterator[Wire]:
    """A connection that is closed when the block ends."""
    connection = Wire(url, seconds, receive_buffer)
    try:
        yield connection
    finally:
        connection.close()


def asked(url: str, request: bytes) -> list[int]:
    """The statuses of all answers that some bytes bring about on a connection of their own, until it is closed."""
    with wire(url) as connection:
        connection.send(request)
        return statuses(connection.rest())


def statuses(received: bytes) -> list[int]:
    """The statuses in what came back."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


__all__ = ["Answer", "HTTPException", "Wire", "asked", "statuses", "wire"]
