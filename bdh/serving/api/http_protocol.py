"""Connections: as uvicorn has them, but no client may send or take without end, or so slowly that it never ends."""

import asyncio
import re
from collections import deque

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MOST_HEAD_BYTES = 64 << 10
LEAVING_SECONDS = 2.0  # for clients to take their answers when the server ends
UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)


class PatientProtocol(HttpToolsProtocol):
    """One connection of HTTP/1.1. What uvicorn leaves open:

    - A head must come in time, and within 64 KiB; nor does anything else around a body take more of the memory.
    - What follows a body (its trailers) is not taken for a part of the head.
    - A client that takes nothing of its answer is left.
    - Who sends requests ahead of the answers may hang up, and is seen to: uvicorn would stop listening. One request may
      wait; where there is more, the connection ends with the answer that is being made.
    - Who would rather have another protocol (Java's HttpClient asks for HTTP/2 this way) gets an answer in this one;
      the parser would stop before the body.
    """

    head_seconds = 20.0

    @classmethod
    def within(cls, seconds: float) -> "type[PatientProtocol]":
        """Connections whose heads must come within this time."""
        return type("PatientProtocol", (cls,), {"head_seconds": seconds})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.in_head = True
        self.head_bytes = 0
        self.unused_bytes = 0  # that came since something was made of what came
        self.deadline: asyncio.TimerHandle | None = None
        self.taking: asyncio.TimerHandle | None = None
        self.unanswered: deque[RequestResponseCycle] = deque()  # the one being answered first
        self.deaf = False  # nothing is made of what comes
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        self._stop_looking()
        for cycle in self.unanswered:  # uvicorn tells the last only
            cycle.disconnected = not cycle.response_complete
            cycle.message_event.set()
        super().connection_lost(exc)

    # ------------------------------------------------------------------------------------------- what the client sends

    def data_received(self, data: bytes) -> None:
        if self.deaf:
            return
        if self.deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_head()  # of the next request on this connection
        self.unused_bytes += len(data)
        super().data_received(without_upgrade(data) if self.in_head else data)
        if self.unused_bytes > MOST_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("What comes around a request is too large.")

    def send_400_response(self, msg: str) -> None:
        if not self.deaf:
            super().send_400_response(msg)

    def on_message_begin(self) -> None:
        if len(self.unanswered) > 1:
            self._stop_hearing()
        self.in_head = True
        self.head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.in_head:
            self._count(name, value)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self.in_head = False
        self.unused_bytes = 0
        self._head_came()
        super().on_headers_complete()
        self.unanswered.append(self.cycle)
        if self.pipeline:
            self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        self.unused_bytes = 0
        super().on_body(body)
        if self.pipeline and self.flow.read_paused:  # it is larger than uvicorn keeps unread
            self._stop_hearing()

    def on_message_complete(self) -> None:
        self.in_head = True  # of what comes next
        self.unused_bytes = 0
        super().on_message_complete()

    def _unsupported_upgrade_warning(self) -> None:
        pass

    def _count(self, *parts: bytes) -> None:
        self.head_bytes += sum(map(len, parts))
        if self.head_bytes > MOST_HEAD_BYTES:
            raise ValueError("the head of a request is too large")  # the parser makes a 400 of it

    def _stop_hearing(self) -> None:
        """Makes nothing of what a client sends too far ahead; the connection ends with the answer it waits for."""
        self.deaf = True
        self.unanswered[0].keep_alive = False
        self.flow.resume_reading()
        raise ValueError("too much is sent ahead of the answers")  # for the parser to stop

    def _expect_head(self) -> None:
        self.deadline = self.loop.call_later(self.head_seconds, self._too_slow)

    def _head_came(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None

    def _too_slow(self) -> None:
        self.deadline = None
        if self.transport is not None and not self.transport.is_closing():
            self.transport.abort()

    # ------------------------------------------------------------------------------------------- what the client takes

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look_on()

    def shutdown(self) -> None:
        super().shutdown()
        self.loop.call_later(LEAVING_SECONDS, self.transport.abort)  # whatever it has not taken then

    def resume_writing(self) -> None:
        self._stop_looking()
        super().resume_writing()

    def on_response_complete(self) -> None:
        self.unanswered.popleft()
        super().on_response_complete()
        self._look_on()

    def _look_on(self) -> None:
        """Leaves the client if it takes nothing of what waits for it for as long as a connection may be idle."""
        self._stop_looking()
        left = self.transport.get_write_buffer_size()
        if left:
            self.taking = self.loop.call_later(self.timeout_keep_alive, self._check_taking, left)

    def _check_taking(self, before: int) -> None:
        self.taking = None
        if self.transport.get_write_buffer_size() < before:
            self._look_on()
        else:
            self.transport.abort()

    def _stop_looking(self) -> None:
        if self.taking is not None:
            self.taking.cancel()
            self.taking = None


def without_upgrade(data: bytes) -> bytes:
    """What begins in a head, without its wish for another protocol."""
    end = data.find(b"\r\n\r\n")
    head = data if end < 0 else data[:end]
    return UPGRADE.sub(b"\r\nx-upgrade:", head) + data[len(head) :]
