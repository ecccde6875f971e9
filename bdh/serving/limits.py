"""How much one caller may ask for in a minute: requests, tokens, and what one address may send in all.

A minute slides: of the minute before the current one as much counts as still lies within the last 60 seconds. Such a
count is two numbers, however large the limit, and what was written past a limit is still there in the next minute.
"""

import asyncio
import ipaddress
import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from limits.aio.storage import MemoryStorage, RedisStorage
from limits.errors import StorageError

from bdh.errors import BDHError
from bdh.serving.errors import TooManyRequests
from bdh.serving.keys import Key

if TYPE_CHECKING:
    from redis.asyncio import BlockingConnectionPool

WINDOW = 60  # seconds
PATIENCE = 2.0  # seconds for Redis to answer
PAUSE = 5.0  # seconds until it is asked again after it did not
CONNECTIONS = 16  # to Redis; who finds none free waits for one
UNLIMITED = 1 << 53  # the largest number that Redis counts to exactly

T = TypeVar("T")
Storage = MemoryStorage | RedisStorage
RateHeaders = dict[str, str]

logger = logging.getLogger(__name__)


@dataclass
class LimitSettings:
    """How much a caller may ask for in a minute. More is refused with 429 and a Retry-After header.

    Attributes:
        requests_per_minute: Of one key that has no limit of its own, or of one address where no keys are asked for;
            None: any number.
        tokens_per_minute: Read and written, of one key or address likewise. A request reserves the most that it may
            write when it begins, and what it did not write is given back when it ends: it is refused if there is not so
            much left. One that may write more than the whole limit begins only while no other is in work, and counts
            against those that follow. Reservations are each server's own. None: any number.
        concurrent_requests: In work at once, of one key or address likewise, counted by each server for itself. None:
            any number.
        address_requests_per_minute: From one address, whatever its keys; those refused for a wrong key count too, so
            that nobody guesses fast. An IPv6 address counts with its /64 network. None: any number.
        storage: Where it is counted: "memory://", by each server for itself, or "redis://HOST:PORT/DB" (or rediss://),
            by several servers together. While Redis does not answer, each server counts for itself, and serving goes
            on; the log has a warning.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    address_requests_per_minute: int | None = None
    storage: str = "memory://"


@dataclass(frozen=True)
class Usage:
    """What was counted in the last minute.

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
        return self.before * self.before_left / WINDOW + self.now

    def seconds_until_below(self, limit: int) -> float:
        """Until the total has sunk to `limit`, if nothing is added."""
        if self.total < limit:
            return 0.0
        if self.now < limit:  # the rest of `before` that is too much has to go
            return self.before_left - (limit - self.now) * WINDOW / self.before
        return self.now_left + WINDOW - limit * WINDOW / self.now


class RateLimits:
    """Counts what callers ask for, and refuses what is too much. For one event loop.

    Args:
        settings: The limits, where keys have none of their own.

    Raises:
        BDHError: A setting cannot be.
    """

    def __init__(self, settings: LimitSettings):
        check(settings)
        self.settings = settings
        self._counts = Counts(settings.storage)
        self._reserved: Counter[str] = Counter()  # tokens that requests in work may still write, by subject
        self._in_work: Counter[str] = Counter()  # requests, by subject

    async def admit(self, key: Key | None, address: str, refused: bool = False) -> RateHeaders:
        """Counts one request; returns the headers that say how much is left.

        Args:
            key: Of the caller; None where no keys are asked for, or with `refused`.
            address: Of the caller.
            refused: It had no key that counts, and will be answered with 401: it counts for its address only.

        Raises:
            TooManyRequests: There were too many from this address or for this key, which then do not count further;
                or the tokens of the minute are used up.
        """
        place = network(address)
        most = self.settings.address_requests_per_minute
        if most is not None and not await self._counts.add(f"address/{place}", 1, most):
            usage = await self._counts.usage(f"address/{place}")
            raise refusal("address_limit", f"{most:,} requests per minute from one address", most, usage, {})
        if refused:
            return {}
        who = subject(key, place)
        headers = {}
        most = self._tokens_per_minute(key)
        if most is not None:
            usage = await self._counts.usage(f"tokens/{who}")
            headers = described("tokens", most, usage)
            if usage.total >= most:
                words = f"{most:,} tokens per minute {whose(key)} are used up"
                raise refusal("token_limit", words, most, usage, headers)
        most = self._requests_per_minute(key)
        if most is not None:
            fits = await self._counts.add(f"requests/{who}", 1, most)
            usage = await self._counts.usage(f"requests/{who}")
            headers |= described("requests", most, usage)
            if not fits:
                raise refusal("request_limit", f"{most:,} requests per minute {whose(key)}", most, usage, headers)
        return headers

    async def charge(self, key: Key | None, address: str, tokens: int) -> RateHeaders:
        """Counts tokens that were read or written, also past the limit; returns the headers about tokens as of now."""
        most = self._tokens_per_minute(key)
        if most is None:
            return {}
        name = f"tokens/{subject(key, network(address))}"
        if tokens > 0:
            await self._counts.add(name, tokens, UNLIMITED)
        return described("tokens", most, await self._counts.usage(name))

    async def reserve(self, key: Key | None, address: str, read: int, write: int) -> RateHeaders:
        """Counts tokens that are read, and reserves those that may be written until `release`; returns the headers.

        Raises:
            TooManyRequests: So many are not left; nothing is counted or reserved then.
        """
        most = self._tokens_per_minute(key)
        if most is None:
            return {}
        who = subject(key, network(address))
        usage = await self._counts.usage(f"tokens/{who}")  # nothing may be awaited from here until it is reserved
        used, reserved, asked = usage.total, self._reserved[who], read + write
        alone = asked > most and not reserved and used < most
        if used + reserved + asked > most and not alone:
            words = (
                f"{most:,} tokens per minute {whose(key)}: {math.floor(used):,} are used, {reserved:,} reserved by "
                f"requests in work, and this one asks for {asked:,}; ask for fewer with max_tokens"
            )
            left = most if used + asked <= most else max(1, most - asked)  # if not, it waits for others in work only
            raise refusal("token_limit", words, left, usage, described("tokens", most, usage))
        self._reserved[who] += write
        try:
            return await self.charge(key, address, read)
        except BaseException:
            self.release(key, address, write)
            raise

    def release(self, key: Key | None, address: str, tokens: int) -> None:
        """Gives back reserved tokens, after those that were written have been charged."""
        if self._tokens_per_minute(key) is not None:
            take(self._reserved, subject(key, network(address)), tokens)

    def enter(self, key: Key | None, address: str) -> None:
        """Counts a request as in work until `leave`. Raises TooManyRequests if there are too many of its caller."""
        own = None if key is None else key.concurrent_requests
        most = self.settings.concurrent_requests if own is None else own
        who = subject(key, network(address))
        if most is not None and self._in_work[who] >= most:
            words = f"rate limit reached: {most:,} requests at once {whose(key)}; try again when one is answered"
            raise TooManyRequests(words, 1, "concurrency_limit")
        self._in_work[who] += 1

    def leave(self, key: Key | None, address: str) -> None:
        take(self._in_work, subject(key, network(address)), 1)

    async def close(self) -> None:
        """Ends the connections to Redis, if there are any."""
        await self._counts.close()

    def _requests_per_minute(self, key: Key | None) -> int | None:
        own = None if key is None else key.requests_per_minute
        return self.settings.requests_per_minute if own is None else own

    def _tokens_per_minute(self, key: Key | None) -> int | None:
        own = None if key is None else key.tokens_per_minute
        return self.settings.tokens_per_minute if own is None else own


class Counts:
    """Sliding counts by name: in Redis where one is given and answers, else in this process.

    The storages are used without the strategies of their library: those count nothing that goes past a limit, and do
    not say exactly when there is room again.
    """

    def __init__(self, storage: str):
        self._own = MemoryStorage()
        self._shared: RedisStorage | None = None
        self._pool: BlockingConnectionPool | None = None
        self._ask_at: float | None = None  # when Redis is asked again; None while it answers
        if storage != "memory://":
            self._pool = redis_pool(storage)
            self.shown = f"redis at {urlsplit(storage).hostname}"  # an address may hold a password
            self._shared = RedisStorage(
                "async+redis://",  # the pool knows the rest
                wrap_exceptions=True,
                implementation="redispy",
                key_prefix="bdh",
                connection_pool=self._pool,  # type: ignore[arg-type]
            )

    async def add(self, name: str, amount: int, most: int) -> bool:
        """Counts, unless it would be more than `most` then; returns whether it did."""
        return await self._ask(lambda storage: storage.acquire_sliding_window_entry(name, most, WINDOW, amount))

    async def usage(self, name: str) -> Usage:
        before, before_left, now, both_left = await self._ask(lambda storage: storage.get_sliding_window(name, WINDOW))
        return Usage(before, before_left if before else 0.0, now, max(0.0, both_left - WINDOW))

    async def close(self) -> None:
        if self._pool is not None:
            await self._pool.aclose()

    async def _ask(self, question: Callable[[Storage], Awaitable[T]]) -> T:
        """Asks Redis, and, where there is none or it is away, the counts of this process."""
        if self._shared is not None and (self._ask_at is None or time.monotonic() >= self._ask_at):
            if self._ask_at is not None:
                self._ask_at = time.monotonic() + PAUSE  # one tries; the others need not wait with it
            try:
                answer = await within(PATIENCE, question(self._shared))
                self._found()
                return answer
            except (StorageError, TimeoutError, OSError) as error:
                self._lost(error)
        return await question(self._own)

    def _lost(self, error: Exception) -> None:
        if self._ask_at is None:
            cause = error.storage_error if isinstance(error, StorageError) else error
            words = " ".join(str(cause).split())[:200] or f"no answer in {PATIENCE:g} s"
            logger.warning("%s fails (%s); until it answers, this server counts rates for itself", self.shown, words)
        self._ask_at = time.monotonic() + PAUSE

    def _found(self) -> None:
        if self._ask_at is not None:
            logger.warning("%s answers again; rates are counted there", self.shown)
        self._ask_at = None


async def within(seconds: float, work: Awaitable[T]) -> T:
    """As `asyncio.timeout`, which lasts longer where what is cancelled goes on, as redis-py at times does."""
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to be told
    try:
        await asyncio.wait({task}, timeout=seconds)
    finally:
        task.cancel()
    if not task.done():
        raise TimeoutError
    return task.result()


def check(settings: LimitSettings) -> None:
    """Raises BDHError for the first setting that cannot be."""
    for name in ("requests_per_minute", "tokens_per_minute", "concurrent_requests", "address_requests_per_minute"):
        limit = getattr(settings, name)
        if limit is not None and limit < 1:
            raise BDHError(f"serve.limits.{name} is {limit}; it must be at least 1, or null for any number")


def redis_pool(address: str) -> "BlockingConnectionPool":
    """Connections to Redis, made when they are used. Raises BDHError if this is no address."""
    from redis.asyncio import BlockingConnectionPool
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    try:
        parts = urlsplit(address)
        number = parts.path.strip("/") or "0"
        if parts.scheme in ("redis", "rediss") and parts.hostname and parts.port != 0 and number.isdecimal():
            retry = Retry(NoBackoff(), 1)  # connections that lie ready are dead after Redis began anew
            pool = BlockingConnectionPool.from_url(
                address,
                max_connections=CONNECTIONS,
                timeout=None,
                retry=retry,
                socket_timeout=PATIENCE,
                socket_connect_timeout=PATIENCE,
            )
            pool.connection_class(**pool.connection_kwargs)  # raises for options that there are not
            return pool
    except (ValueError, TypeError):  # a port or an option in it that is none
        pass
    raise BDHError('serve.limits.storage must be "memory://", or as "redis://HOST:PORT/DB" or "rediss://…"')


def network(address: str) -> str:
    """Who an address stands for: itself, or with IPv6 the /64 it lies in, all of which one customer has."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # of a test, or a socket that is a file
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return str(ip.ipv4_mapped)
        return str(ipaddress.IPv6Address(int(ip) >> 64 << 64))
    return str(ip)


def subject(key: Key | None, place: str) -> str:
    """The one whose requests are counted together."""
    return f"address/{place}" if key is None else f"key/{key.id}"


def whose(key: Key | None) -> str:
    """Whose limit it is, in words."""
    return "from one address" if key is None else "for this key"


def take(counts: Counter[str], name: str, amount: int) -> None:
    """Takes an amount from a count, which is gone when there is nothing left of it."""
    counts[name] -= amount
    if counts[name] <= 0:
        del counts[name]


def described(what: str, limit: int, usage: Usage) -> RateHeaders:
    """The headers that the OpenAI API sends about a limit, of requests or tokens."""
    return {
        f"x-ratelimit-limit-{what}": str(limit),
        f"x-ratelimit-remaining-{what}": str(max(0, limit - math.floor(usage.total))),
        f"x-ratelimit-reset-{what}": shown_duration(usage.seconds_until_below(1)),
    }


def shown_duration(seconds: float) -> str:
    """As the OpenAI API writes it: "350ms", "17s", "1m5s"."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def refusal(reason: str, words: str, limit: int, usage: Usage, headers: RateHeaders) -> TooManyRequests:
    wait = math.floor(usage.seconds_until_below(limit)) + 1  # at the very moment it is still full
    return TooManyRequests(f"rate limit reached: {words}; try again in {wait} s", wait, reason, headers)
