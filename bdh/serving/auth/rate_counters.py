"""Sliding counts of the last minute, by name: in Redis, shared by several servers, or in this process.

A count is one number for each minute of the clock. Of the minute before the current one as much counts as still lies
within the last 60 seconds. That is two numbers, however large the limit, and what was counted past a limit is still
there in the next minute. The clocks of servers that share a Redis should agree to within a second.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from limits.aio.storage import MemoryStorage, RedisStorage
from limits.errors import StorageError

from bdh.errors import BDHError

if TYPE_CHECKING:
    from redis.asyncio import BlockingConnectionPool

WINDOW_SECONDS = 60
REDIS_TIMEOUT_SECONDS = 2.0
REDIS_RETRY_SECONDS = 5.0  # after Redis failed, until it is asked again
MAX_REDIS_CONNECTIONS = 16  # a caller that finds none free waits for one
UNLIMITED = 1 << 53  # the largest number that Redis counts to exactly

T = TypeVar("T")
Storage = MemoryStorage | RedisStorage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Usage:
    """A count of the last minute.

    Attributes:
        before: Count of the minute before the current one.
        before_left: Seconds until the last of that is more than a minute ago.
        now: Count of the current minute.
        now_left: Seconds until it is the minute before.
    """

    before: int
    before_left: float
    now: int
    now_left: float

    @property
    def total(self) -> float:
        return self.before * self.before_left / WINDOW_SECONDS + self.now

    def seconds_until_below(self, limit: int) -> float:
        """Seconds until the total is below `limit`, if nothing is added."""
        if self.total < limit:
            return 0.0
        if self.now < limit:  # the rest of `before` that is too much has to go
            return self.before_left - (limit - self.now) * WINDOW_SECONDS / self.before
        return self.now_left + WINDOW_SECONDS - limit * WINDOW_SECONDS / self.now


@dataclass(frozen=True)
class CountEntry:
    """A counted amount: its storage, its name and its minute of the clock."""

    storage: Storage
    name: str
    minute: int


class SlidingCounters:
    """Sliding counts by name: in Redis if one is given and answers, else in this process.

    The storages are used without the strategies of their library: those count nothing that goes past a limit, do not
    say exactly when there is room again, and cannot take back a part of what was counted.

    Raises:
        BDHError: The storage is neither "memory://" nor the address of a Redis.
    """

    def __init__(self, storage: str):
        self._local = MemoryStorage()
        self._redis: RedisStorage | None = None
        self._pool: BlockingConnectionPool | None = None
        self._retry_at: float | None = None  # when Redis is asked again; None while it answers
        if storage != "memory://":
            self._pool = redis_pool(storage)
            self._redis_name = f"redis at {urlsplit(storage).hostname}"  # an address may hold a password
            self._redis = RedisStorage(
                "async+redis://",  # the pool has the address
                wrap_exceptions=True,
                implementation="redispy",
                key_prefix="bdh",
                connection_pool=self._pool,  # type: ignore[arg-type]
            )

    async def add(self, name: str, amount: int, limit: int) -> tuple[Usage, CountEntry | None]:
        """Adds an amount, unless the total would exceed the limit.

        Returns:
            The usage afterwards, and an entry for `remove`; None if nothing was added.
        """
        return await self._run(lambda storage: add_to(storage, name, amount, limit))

    async def remove(self, entry: CountEntry, amount: int) -> None:
        """Takes back a part of what was added, from the minute in which it was added.

        Does nothing if that minute counts no more, or if its storage does not answer.
        """
        if entry.minute < current_minute() - 1:
            return
        if entry.storage is self._local:
            await add_at(entry, -amount)
        elif self._retry_at is None:
            try:
                await within(REDIS_TIMEOUT_SECONDS, add_at(entry, -amount))
            except (StorageError, TimeoutError, OSError) as error:
                self._on_redis_failure(error)

    async def usage(self, name: str) -> Usage:
        return await self._run(lambda storage: usage_in(storage, name, current_minute()))

    async def close(self) -> None:
        if self._pool is not None:
            await self._pool.aclose()

    async def _run(self, operation: Callable[[Storage], Awaitable[T]]) -> T:
        """Runs an operation on Redis; on the counts of this process if there is none, or while it fails."""
        if self._redis is not None and (self._retry_at is None or time.monotonic() >= self._retry_at):
            if self._retry_at is not None:
                self._retry_at = time.monotonic() + REDIS_RETRY_SECONDS  # one tries; the others need not wait with it
            try:
                result = await within(REDIS_TIMEOUT_SECONDS, operation(self._redis))
                self._on_redis_success()
                return result
            except (StorageError, TimeoutError, OSError) as error:
                self._on_redis_failure(error)
        return await operation(self._local)

    def _on_redis_failure(self, error: Exception) -> None:
        if self._retry_at is None:
            cause = error.storage_error if isinstance(error, StorageError) else error
            words = " ".join(str(cause).split())[:200] or f"no answer in {REDIS_TIMEOUT_SECONDS:g} s"
            logger.warning(
                "%s fails (%s); until it answers, this server counts rates for itself", self._redis_name, words
            )
        self._retry_at = time.monotonic() + REDIS_RETRY_SECONDS

    def _on_redis_success(self) -> None:
        if self._retry_at is not None:
            logger.warning("%s answers again; rates are counted there", self._redis_name)
        self._retry_at = None


async def add_to(storage: Storage, name: str, amount: int, limit: int) -> tuple[Usage, CountEntry | None]:
    """`SlidingCounters.add` in one storage.

    The amount is added before the limit is checked, and taken back if it does not fit: so callers that come together,
    also on several servers, never pass together. What does not fit from the beginning is not added at all, so that a
    caller that is refused again and again keeps nobody out.
    """
    entry = CountEntry(storage, name, current_minute())
    usage = await usage_in(storage, name, entry.minute)
    if math.floor(usage.total) + amount > limit:
        return usage, None
    now = await add_at(entry, amount)
    added = Usage(usage.before, usage.before_left, now, usage.now_left)
    if math.floor(added.total) <= limit:
        return added, entry
    await add_at(entry, -amount)
    return added, None


async def add_at(entry: CountEntry, amount: int) -> int:
    """Adds an amount, which may be negative, to the count of one minute; returns that count."""
    key = minute_key(entry.name, entry.minute)
    count = await entry.storage.incr(key, 2 * WINDOW_SECONDS, amount)
    if count < 0:  # the storage has lost what was added
        count = await entry.storage.incr(key, 2 * WINDOW_SECONDS, -count)
    return count


async def usage_in(storage: Storage, name: str, minute: int) -> Usage:
    left = max(0.0, (minute + 1) * WINDOW_SECONDS - time.time())
    before = await storage.get(minute_key(name, minute - 1))
    now = await storage.get(minute_key(name, minute))
    return Usage(before, left if before else 0.0, now, left)


def current_minute() -> int:
    return int(time.time() // WINDOW_SECONDS)


def minute_key(name: str, minute: int) -> str:
    return f"{name}/{minute}"


async def within(seconds: float, work: Awaitable[T]) -> T:
    """As `asyncio.timeout`, which lasts longer if what is cancelled goes on, as redis-py at times does."""
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # it may have no other reader
    try:
        await asyncio.wait({task}, timeout=seconds)
    finally:
        task.cancel()
    if not task.done():
        raise TimeoutError
    return task.result()


def redis_pool(address: str) -> "BlockingConnectionPool":
    """Connections to Redis, made when they are used. Raises BDHError if the address is not one."""
    from redis.asyncio import BlockingConnectionPool
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    try:
        parts = urlsplit(address)
        number = parts.path.strip("/") or "0"
        if parts.scheme in ("redis", "rediss") and parts.hostname and parts.port != 0 and number.isdecimal():
            retry = Retry(NoBackoff(), 1)  # idle connections are dead after Redis was restarted
            pool = BlockingConnectionPool.from_url(
                address,
                max_connections=MAX_REDIS_CONNECTIONS,
                timeout=None,
                retry=retry,
                socket_timeout=REDIS_TIMEOUT_SECONDS,
                socket_connect_timeout=REDIS_TIMEOUT_SECONDS,
            )
            pool.connection_class(**pool.connection_kwargs)  # raises for unknown options
            return pool
    except (ValueError, TypeError):  # a wrong port or option
        pass
    raise BDHError('serve.limits.storage must be "memory://", or as "redis://HOST:PORT/DB" or "rediss://…"')
