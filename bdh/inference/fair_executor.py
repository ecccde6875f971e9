"""Bounded thread executor, whose threads and queue are shared evenly among clients."""

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from typing import Any, TypeVar

from bdh.errors import QueueFull
from bdh.inference.stats import EngineStats, queue_has_room

T = TypeVar("T")


class ExecutorClosed(Exception):  # noqa: N818
    """The executor was shut down, and the function not called."""


class PendingLimit:
    """Bounds the calls that wait or run, for all clients together, in equal shares. For any number of threads.

    Args:
        limit: Number of calls; beyond it, those of a client that has less than an equal share are still taken.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._calls: Counter[str | None] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def counted(self, client: str | None) -> Iterator[None]:
        """Count one call of a client. Raises QueueFull if it has too many."""
        with self._lock:
            total = self._calls.total()
            stats = EngineStats(waiting=total, waiting_of=dict(self._calls))
            if not queue_has_room(stats, client, 1, self.limit, free=0):
                raise QueueFull(f"{total} long prompts or chats wait to be tokenized already; try again later")
            self._calls[client] += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls[client] -= 1
                if not self._calls[client]:
                    del self._calls[client]


class FairExecutor:
    """Calls functions in a few threads. The next is of the client with the fewest calls running, among equals of the
    one whose last call began the longest ago.

    Args:
        threads: Number of threads.
        name: Prefix of their names.
        pending: Bounds the calls; may be shared with other executors.
    """

    def __init__(self, threads: int, name: str, pending: PendingLimit):
        self._threads = ThreadPoolExecutor(threads, name)
        self._pending = pending
        self._lock = threading.Lock()
        self._waiting: dict[str | None, deque[tuple[Future[Any], Callable[[], Any]]]] = {}  # none is empty
        self._running: Counter[str | None] = Counter()
        self._began: dict[str | None, int] = {}  # the number of each waiting or running client's last call
        self._numbers = count(1)

    async def call(self, function: Callable[[], T], client: str | None = None) -> T:
        """Calls a function in one of the threads. If the caller is cancelled before it begins, it is not called.

        Raises:
            QueueFull: Too many calls wait.
            ExecutorClosed: The executor was shut down.
            Exception: As the function.
        """
        with self._pending.counted(client):
            future: Future[T] = Future()
            item = future, function
            with self._lock:
                self._waiting.setdefault(client, deque()).append(item)
            try:
                try:
                    self._threads.submit(self._call_next)
                except RuntimeError as error:
                    raise ExecutorClosed from error
                return await asyncio.wrap_future(future)
            finally:
                self._remove(client, item)

    def shut_down(self) -> None:
        """End the threads without waiting for them; waiting calls fail."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            futures = [future for queue in self._waiting.values() for future, _ in queue]
            self._waiting.clear()
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(ExecutorClosed())

    def _call_next(self) -> None:
        """Call the next waiting function, if there is one. Runs in a thread."""
        with self._lock:
            if not self._waiting:  # its caller was cancelled
                return
            client = min(self._waiting, key=lambda client: (self._running[client], self._began.get(client, 0)))
            queue = self._waiting[client]
            future, function = queue.popleft()
            if not queue:
                del self._waiting[client]
            self._running[client] += 1
            self._began[client] = next(self._numbers)
        called = future.set_running_or_notify_cancel()
        result, failure = None, None
        if called:
            try:
                result = function()
            except BaseException as error:
                failure = error
        with self._lock:
            self._running[client] -= 1
            if not self._running[client]:
                del self._running[client]
                if client not in self._waiting:
                    self._began.pop(client, None)
        if failure is not None:
            future.set_exception(failure)
        elif called:
            future.set_result(result)

    def _remove(self, client: str | None, item: tuple[Future[Any], Callable[[], Any]]) -> None:
        """Remove a call whose caller was cancelled from the queue, if it is still there."""
        with self._lock:
            queue = self._waiting.get(client)
            if queue is not None and item in queue:
                queue.remove(item)
                if not queue:
                    del self._waiting[client]
