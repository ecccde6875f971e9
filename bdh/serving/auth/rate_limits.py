"""Rate limits of a caller: requests and tokens per minute, requests at once, and requests of one address."""

import ipaddress
import math
from collections import Counter

from bdh.errors import BDHError
from bdh.serving.api.errors import TooManyRequests
from bdh.serving.auth.api_keys import Key
from bdh.serving.auth.rate_counters import UNLIMITED, CountEntry, SlidingCounters, Usage
from bdh.serving.config import LimitSettings

RateHeaders = dict[str, str]


class Reservation:
    """Tokens that are counted for a request from its beginning, until `settle` replaces them by those it used.

    Attributes:
        headers: The headers about the limit of tokens, with the reservation counted.
    """

    def __init__(
        self, limits: "RateLimits", subject: str, limit: int, tokens: int, entry: CountEntry, headers: RateHeaders
    ):
        self.headers = headers
        self._limits = limits
        self._subject = subject
        self._limit = limit
        self._tokens = tokens
        self._entry = entry

    async def settle(self, used: int) -> RateHeaders:
        """Gives back what was not used, or counts what was used beyond it, also past the limit. To be called once.

        Returns:
            The headers about the limit of tokens afterwards.
        """
        counts, name = self._limits.counts, tokens_name(self._subject)
        try:
            if used < self._tokens:
                await counts.remove(self._entry, self._tokens - used)
            elif used > self._tokens:
                await counts.add(name, used - self._tokens, UNLIMITED)
            return limit_headers("tokens", self._limit, await counts.usage(name))
        finally:
            self._limits.release_tokens(self._subject, self._tokens)


class RateLimits:
    """Counts what callers ask for, and refuses what is too much. For one event loop.

    Args:
        settings: The limits of keys that have none of their own, and of addresses.

    Raises:
        BDHError: A setting is out of its range.
    """

    def __init__(self, settings: LimitSettings):
        check(settings)
        self.settings = settings
        self.counts = SlidingCounters(settings.storage)
        self._reserved: Counter[str] = Counter()  # tokens of this server's requests in work, by subject
        self._in_work: Counter[str] = Counter()  # requests in work, by subject

    async def admit(self, key: Key | None, address: str, refused: bool = False) -> RateHeaders:
        """Counts one request; returns the headers that say how much is left.

        Args:
            key: Of the caller; None where no keys are asked for, or with `refused`.
            address: Of the caller.
            refused: The request has no valid key, and will be answered with 401: it counts for its address only.

        Raises:
            TooManyRequests: There were too many requests from this address or for this key, of which this one then is
                not counted; or the tokens of the minute are used up.
        """
        limit = self.settings.address_requests_per_minute
        if limit is not None:
            usage, entry = await self.counts.add(f"address/{network(address)}", 1, limit)
            if entry is None:
                raise refusal("address_limit", f"{limit:,} requests per minute from one address", limit, usage, {})
        if refused:
            return {}
        subject = subject_of(key, address)
        headers: RateHeaders = {}
        limit = self._tokens_per_minute(key)
        if limit is not None:
            usage = await self.counts.usage(tokens_name(subject))
            headers = limit_headers("tokens", limit, usage)
            if usage.total >= limit:
                words = f"{limit:,} tokens per minute {whose(key)} are used up"
                raise refusal("token_limit", words, limit, usage, headers)
        limit = self._requests_per_minute(key)
        if limit is not None:
            usage, entry = await self.counts.add(f"requests/{subject}", 1, limit)
            headers |= limit_headers("requests", limit, usage)
            if entry is None:
                raise refusal("request_limit", f"{limit:,} requests per minute {whose(key)}", limit, usage, headers)
        return headers

    async def reserve(
        self, key: Key | None, address: str, tokens: int, is_estimate: bool = False
    ) -> Reservation | None:
        """Counts tokens for a request before it is worked on.

        Args:
            key: Of the caller.
            address: Of the caller.
            tokens: All that the request reads and may write.
            is_estimate: The number is an upper bound of what is not known yet. A caller without other requests in work
                is not refused for it as long as it has tokens left.

        Returns:
            What to settle when the request ends; None if tokens are not limited.

        Raises:
            TooManyRequests: So many are not left; nothing is counted then.
        """
        limit = self._tokens_per_minute(key)
        if limit is None:
            return None
        subject = subject_of(key, address)
        in_work = self._reserved[subject]
        self._reserved[subject] += tokens  # before anything is awaited, so that those that come meanwhile see it
        try:
            alone = not in_work and (is_estimate or tokens > limit)
            if not alone and in_work + tokens > limit:
                usage, entry = await self.counts.usage(tokens_name(subject)), None
            else:
                most = limit - 1 + tokens if alone else limit
                usage, entry = await self.counts.add(tokens_name(subject), tokens, most)
            headers = limit_headers("tokens", limit, usage)
            if entry is not None:
                return Reservation(self, subject, limit, tokens, entry, headers)
            words = (
                f"{limit:,} tokens per minute {whose(key)}: {math.floor(usage.total):,} are used, or reserved by "
                f"requests in work, and this one asks for {tokens:,}; send less, or set a smaller max_tokens"
            )
            fits_later = usage.total + tokens <= limit  # it waits for others in work only
            raise refusal("token_limit", words, limit if fits_later else max(1, limit - tokens), usage, headers)
        except BaseException:
            self.release_tokens(subject, tokens)
            raise

    def release_tokens(self, subject: str, tokens: int) -> None:
        """Ends a reservation in this server. For `Reservation`."""
        subtract(self._reserved, subject, tokens)

    def acquire(self, key: Key | None, address: str) -> None:
        """Counts a request as in work until `release`. Raises TooManyRequests if its caller has too many."""
        own = None if key is None else key.concurrent_requests
        limit = self.settings.concurrent_requests if own is None else own
        subject = subject_of(key, address)
        if limit is not None and self._in_work[subject] >= limit:
            words = f"rate limit reached: {limit:,} requests at once {whose(key)}; try again when one is answered"
            raise TooManyRequests(words, 1, "concurrency_limit")
        self._in_work[subject] += 1

    def release(self, key: Key | None, address: str) -> None:
        subtract(self._in_work, subject_of(key, address), 1)

    async def close(self) -> None:
        """Closes the connections to Redis, if there are any."""
        await self.counts.close()

    def _requests_per_minute(self, key: Key | None) -> int | None:
        own = None if key is None else key.requests_per_minute
        return self.settings.requests_per_minute if own is None else own

    def _tokens_per_minute(self, key: Key | None) -> int | None:
        own = None if key is None else key.tokens_per_minute
        return self.settings.tokens_per_minute if own is None else own


def check(settings: LimitSettings) -> None:
    """Raises BDHError for the first setting that is out of its range."""
    for name in ("requests_per_minute", "tokens_per_minute", "concurrent_requests", "address_requests_per_minute"):
        limit = getattr(settings, name)
        if limit is not None and limit < 1:
            raise BDHError(f"serve.limits.{name} is {limit}; it must be at least 1, or null for any number")


def network(address: str) -> str:
    """The network that an address is counted with: an IPv4 address itself, the /64 of an IPv6 address, all of which
    one customer has."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # of a test, or a socket that is a file
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return str(ip.ipv4_mapped)
        return str(ipaddress.IPv6Address(int(ip) >> 64 << 64))
    return str(ip)


def subject_of(key: Key | None, address: str) -> str:
    """The name under which a caller's requests are counted: its key, or its network where no keys are asked for."""
    return f"address/{network(address)}" if key is None else f"key/{key.id}"


def tokens_name(subject: str) -> str:
    """The name of a subject's count of tokens."""
    return f"tokens/{subject}"


def whose(key: Key | None) -> str:
    """The subject of a limit, in words."""
    return "from one address" if key is None else "for this key"


def subtract(counts: Counter[str], name: str, amount: int) -> None:
    """Subtracts an amount from a count, and removes the count when nothing is left of it."""
    counts[name] -= amount
    if counts[name] <= 0:
        del counts[name]


def limit_headers(unit: str, limit: int, usage: Usage) -> RateHeaders:
    """The headers that the OpenAI API sends about a limit of "requests" or "tokens"."""
    return {
        f"x-ratelimit-limit-{unit}": str(limit),
        f"x-ratelimit-remaining-{unit}": str(max(0, limit - math.floor(usage.total))),
        f"x-ratelimit-reset-{unit}": shown_duration(usage.seconds_until_below(1)),
    }


def shown_duration(seconds: float) -> str:
    """A duration as the OpenAI API writes it: "350ms", "17s", "1m5s"."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def refusal(reason: str, words: str, limit: int, usage: Usage, headers: RateHeaders) -> TooManyRequests:
    """429 with the seconds until the usage is below the limit."""
    wait = math.floor(usage.seconds_until_below(limit)) + 1  # at the very moment it is still full
    return TooManyRequests(f"rate limit reached: {words}; try again in {wait} s", wait, reason, headers)
