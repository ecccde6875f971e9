"""Clients that are slow to send and to take: none is waited for without end, and nobody else has to wait for them."""

import contextlib
import json
import select
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.serving.guarded import SECONDS, Guarded
from tests.serving.wire import Wire, statuses, wire


@dataclass(frozen=True)
class Siege:
    """What became of slow clients, and of others meanwhile.

    Attributes:
        seconds: Until the server let go of each slow client, from when it began to be slow.
        answers: What each was told.
        many: As `seconds`, of very many that were slow together.
        latencies: Of ordinary requests meanwhile.
    """

    seconds: dict[str, float]
    answers: dict[str, bytes]
    many: list[float]
    latencies: list[float]


def drip(url: str, before: bytes, quick: bytes, slow: bytes) -> tuple[float, bytes]:
    """A request that is answered, if any, then the beginning of another, then a byte now and then.

    Returns how long that may go on, and what it is told at last.
    """
    with wire(url) as connection:
        if before:
            connection.send(before)
            assert connection.answer().status == 200
        connection.send(quick)
        begin, received = time.monotonic(), b""
        connection.socket.setblocking(False)
        while time.monotonic() - begin < 20:
            with contextlib.suppress(OSError):
                connection.socket.send(slow[:1])
                slow = slow[1:]
            if select.select([connection.socket], [], [], 0.2)[0]:
                piece = b""
                with contextlib.suppress(ConnectionError):
                    piece = connection.socket.recv(4096)
                if not piece:
                    break
                received += piece
        return time.monotonic() - begin, received


def is_held(connection: Wire) -> bool:
    """Whether a process has the server's end of a connection; what it had sent may wait in the system for ever."""
    ours, theirs = connection.socket.getsockname()[1], connection.socket.getpeername()[1]
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        here, there, inode = (line.split()[place] for place in (1, 2, 9))
        if (int(here[-4:], 16), int(there[-4:], 16)) == (theirs, ours):
            return inode != "0"
    return False


def taking_nothing(guarded: Guarded) -> tuple[float, bytes]:
    """Asks for an answer that is larger than what the system buffers, and takes none of it."""
    body = json.dumps({"model": "tiny", "prompt": "é" * 140_000}).encode()
    with wire(guarded.url, receive_buffer=4096) as connection:
        connection.send(guarded.head("/v1/tokenize", f"Content-Length: {len(body)}"), b"\r\n", body)
        while not is_held(connection):  # the server has not come to it yet
            time.sleep(0.05)
        begin = time.monotonic()
        while is_held(connection) and time.monotonic() - begin < 20:
            time.sleep(0.05)
        return time.monotonic() - begin, connection.socket.recv(15)


def many_slow(guarded: Guarded, count: int) -> list[float]:
    """As `drip`, for many connections at once."""
    begin = time.monotonic()
    waiting = {Wire(guarded.url).socket for _ in range(count)}
    found: list[float] = []
    for connection in waiting:
        connection.setblocking(False)
        connection.send(guarded.head("/v1/tokenize", "Content-Length: 1000") + b"\r\n")
    while waiting and time.monotonic() - begin < 20:
        for connection in waiting:
            with contextlib.suppress(OSError):
                connection.send(b"x")
        for closed in select.select(waiting, [], [], 0.2)[0]:
            found.append(time.monotonic() - begin)
            waiting.remove(closed)
            closed.close()
    for connection in waiting:
        connection.close()
    return found


@pytest.fixture(scope="module")
def siege(guarded: Guarded) -> Siege:
    """All slow clients at once."""
    get = guarded.head("/v1/models", method="GET") + b"\r\n"
    post = guarded.head("/v1/tokenize", "Content-Length: 1000") + b"\r\n"
    chunked = guarded.head("/v1/tokenize", "Transfer-Encoding: chunked") + b"\r\n"
    filler, chunks = b"x" * 500, b"1\r\nx\r\n" * 100
    slow: dict[str, Callable[[], tuple[float, bytes]]] = {
        "no second": lambda: drip(guarded.url, get, b"", b""),
        "body": lambda: drip(guarded.url, b"", post, filler),
        "no body": lambda: drip(guarded.url, b"", post, b""),
        "chunks": lambda: drip(guarded.url, b"", chunked, chunks),
        "second body": lambda: drip(guarded.url, get, post, filler),
        "taking": lambda: taking_nothing(guarded),
    }
    over, latencies = threading.Event(), []

    def ordinary() -> None:
        body = {"model": "tiny", "prompt": "abc", "max_tokens": 1}
        while not over.wait(0.1):
            begin = time.monotonic()
            answer = httpx.post(f"{guarded.url}/v1/completions", json=body, headers=guarded.headers())
            assert answer.status_code == 200
            latencies.append(time.monotonic() - begin)

    with ThreadPoolExecutor(len(slow) + 2) as pool:
        others = pool.submit(ordinary)
        found = {name: pool.submit(work) for name, work in slow.items()}
        many = pool.submit(many_slow, guarded, 300)
        ended = {name: one.result() for name, one in found.items()}
        many_ended = many.result()
        over.set()
        others.result()
    return Siege(
        {name: seconds for name, (seconds, _) in ended.items()},
        {name: answer for name, (_, answer) in ended.items()},
        many_ended,
        latencies,
    )


def test_an_idle_connection_is_closed(siege: Siege) -> None:
    assert SECONDS * 0.5 < siege.seconds["no second"] < SECONDS + 5
    assert siege.answers["no second"] == b""


@pytest.mark.parametrize("what", ["body", "no body", "chunks", "second body"])
def test_a_body_must_come_in_time(siege: Siege, what: str) -> None:
    assert SECONDS * 0.5 < siege.seconds[what] < SECONDS + 5
    assert statuses(siege.answers[what]) == [408]
    assert b"the request did not come within 2 seconds" in siege.answers[what]


def test_an_answer_must_be_taken_in_time(siege: Siege) -> None:
    assert SECONDS * 0.5 < siege.seconds["taking"] < 2 * SECONDS + 8
    assert siege.answers["taking"] == b"HTTP/1.1 200 OK"


def test_many_slow_clients_keep_nobody_from_being_served(siege: Siege) -> None:
    assert len(siege.many) == 300 and max(siege.many) < SECONDS + 8
    assert len(siege.latencies) > 3 and sorted(siege.latencies)[len(siege.latencies) // 2] < 0.5, siege.latencies
