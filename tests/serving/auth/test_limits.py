"""Rate limits: counted in memory and in a real Redis, also when that dies, hangs or comes back."""

import asyncio
import logging
import math
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdh.errors import BDHError
from bdh.serving.api.errors import TooManyRequests
from bdh.serving.auth import rate_counters as module
from bdh.serving.auth.api_keys import Key, hash_of
from bdh.serving.auth.rate_counters import Usage
from bdh.serving.auth.rate_limits import RateHeaders, RateLimits, Reservation, network, shown_duration
from bdh.serving.config import LimitSettings

HERE = "203.0.113.7"


def key(name: str, requests: int | None = None, tokens: int | None = None, at_once: int | None = None) -> Key:
    public = f"key_{hash_of(name)[:8]}"
    created = "2026-01-01T00:00:00Z"
    return Key(
        public,
        name,
        hash_of(name),
        created,
        requests_per_minute=requests,
        tokens_per_minute=tokens,
        concurrent_requests=at_once,
    )


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


async def refusal(limits: RateLimits, who: Key | None, address: str = HERE, refused: bool = False) -> TooManyRequests:
    with pytest.raises(TooManyRequests) as raised:
        await limits.admit(who, address, refused)
    error = raised.value
    assert error.status == 429 and error.code == "rate_limit_exceeded"
    assert 1 <= int(error.headers["Retry-After"]) <= 2 * module.WINDOW_SECONDS
    assert f"try again in {error.headers['Retry-After']} s" in error.message and "\n" not in error.message
    return error


async def admitted(limits: RateLimits, who: Key | None, tries: int, address: str = HERE) -> int:
    """How many of some requests at once come in."""
    answers = await asyncio.gather(*(limits.admit(who, address) for _ in range(tries)), return_exceptions=True)
    assert all(isinstance(answer, dict | TooManyRequests) for answer in answers), answers
    return sum(isinstance(answer, dict) for answer in answers)


async def use(limits: RateLimits, who: Key | None, tokens: int) -> RateHeaders:
    """Uses tokens that were not reserved, also past the limit; the headers then."""
    reservation = await limits.reserve(who, HERE, 0)
    return {} if reservation is None else await reservation.settle(tokens)


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings of the module under test."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == module.__name__ and record.levelno == logging.WARNING
    ]


class Redis:
    """A real redis-server on a free loopback port, which keeps nothing."""

    def __init__(self, folder: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"redis://:hush@127.0.0.1:{self.port}/1"
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        settings = {"port": self.port, "bind": "127.0.0.1", "save": "", "appendonly": "no", "requirepass": "hush"}
        flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(["redis-server", *flags], cwd=self.folder, stdout=log, stderr=log)
        for _ in range(500):
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.01)
        raise AssertionError((self.folder / "redis.log").read_text())

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    if shutil.which("redis-server") is None:
        pytest.skip("there is no redis-server here")
    server = Redis(tmp_path)
    yield server
    server.stop()


@pytest.fixture(params=["memory", "redis"])
def storage(request: pytest.FixtureRequest) -> str:
    return "memory://" if request.param == "memory" else request.getfixturevalue("redis").url


@pytest.fixture(autouse=True)
def not_at_the_turn_of_the_minute() -> None:
    """Counts in memory sink from the turn of a minute on, which a test should not be in the midst of."""
    time.sleep(max(0.0, time.time() % 60 - 58) and 2.1)


def test_requests_of_a_key(storage: str) -> None:
    async def work() -> None:
        limits = RateLimits(LimitSettings(requests_per_minute=3, storage=storage))
        web = key("web")
        for left in (2, 1, 0):
            headers = await limits.admit(web, HERE)
            assert headers["x-ratelimit-limit-requests"] == "3"
            assert headers["x-ratelimit-remaining-requests"] == str(left)
            assert headers["x-ratelimit-reset-requests"].endswith("s") and "x-ratelimit-limit-tokens" not in headers
        error = await refusal(limits, web, "198.51.100.1")  # wherever it comes from
        assert error.reason == "request_limit" and error.response_model().error.type == "requests"
        assert error.headers["x-ratelimit-remaining-requests"] == "0"
        assert "3 requests per minute for this key" in error.message
        await limits.admit(key("phone"), HERE)
        assert await admitted(limits, key("large", requests=30), 40) == 30
        assert await admitted(limits, key("small", requests=1), 3) == 1
        assert await admitted(limits, None, 5) == 3  # no keys asked for: the address
        assert await admitted(limits, None, 5, "198.51.100.2") == 3
        await limits.close()

    run(work())


def test_tokens_count_past_the_limit(storage: str) -> None:
    async def work() -> None:
        limits = RateLimits(LimitSettings(requests_per_minute=9, tokens_per_minute=100, storage=storage))
        web = key("web")
        headers = await limits.admit(web, HERE)
        assert headers["x-ratelimit-remaining-tokens"] == "100" and headers["x-ratelimit-reset-tokens"] == "0ms"
        headers = await use(limits, web, 60)
        assert headers["x-ratelimit-remaining-tokens"] == "40" and headers["x-ratelimit-limit-tokens"] == "100"
        assert (await use(limits, web, 0))["x-ratelimit-remaining-tokens"] == "40"
        await limits.admit(web, HERE)
        assert (await use(limits, web, 1_000_000))["x-ratelimit-remaining-tokens"] == "0"
        error = await refusal(limits, web)
        assert error.reason == "token_limit" and error.response_model().error.type == "tokens"
        assert "100 tokens per minute for this key are used up" in error.message
        assert int(error.headers["Retry-After"]) > 59  # what was too much stays through the next minute
        await limits.admit(key("large", tokens=2_000_000), HERE)
        await use(limits, None, 99)
        await limits.admit(None, HERE)
        await use(limits, None, 1)
        assert "from one address" in (await refusal(limits, None)).message
        await limits.close()

    run(work())


def test_who_used_up_the_tokens_loses_no_requests() -> None:
    async def work() -> None:
        limits = RateLimits(LimitSettings(requests_per_minute=2, tokens_per_minute=10))
        web, rich = key("web"), key("web", tokens=20)
        await use(limits, web, 10)
        for _ in range(5):
            assert (await refusal(limits, web)).reason == "token_limit"
        assert (await limits.admit(rich, HERE))["x-ratelimit-remaining-requests"] == "1"

    run(work())


async def reserved(limits: RateLimits, who: Key | None, tokens: int, is_estimate: bool = False) -> Reservation | None:
    """A reservation; None if it is refused."""
    try:
        return await limits.reserve(who, HERE, tokens, is_estimate)
    except TooManyRequests as error:
        assert error.reason == "token_limit" and "tokens per minute" in error.message
        assert "max_tokens" in error.message and 1 <= int(error.headers["Retry-After"]) <= 120
        return None


async def settle(reservation: Reservation | None, used: int) -> RateHeaders:
    assert reservation is not None
    return await reservation.settle(used)


def test_requests_that_come_together_reserve_what_they_may_use(storage: str) -> None:
    async def work() -> None:
        limits = RateLimits(LimitSettings(tokens_per_minute=2000, storage=storage))
        web = key("web")
        together = await asyncio.gather(*(reserved(limits, web, 910) for _ in range(30)))
        one, two = [each for each in together if each is not None]
        # What is reserved counts; a storage may admit them in any order.
        assert {each.headers["x-ratelimit-remaining-tokens"] for each in (one, two)} == {"1090", "180"}
        others = await reserved(limits, key("other"), 910), await reserved(limits, None, 910)
        assert None not in others  # others have theirs
        headers = await one.settle(15)  # one has written little, and is over
        assert headers["x-ratelimit-remaining-tokens"] == str(2000 - 15 - 910)
        third = await reserved(limits, web, 910)
        assert third is not None and await reserved(limits, web, 910) is None
        fourth = await reserved(limits, web, 110)
        assert await reserved(limits, web, 3010) is None
        for reservation in (two, third, fourth):
            await settle(reservation, 0)
        whole = await reserved(limits, web, 3010)  # more than the whole limit: alone
        assert whole is not None and await reserved(limits, web, 1) is None
        assert (await whole.settle(10))["x-ratelimit-remaining-tokens"] == str(2000 - 15 - 10)
        assert not limits._reserved[f"key/{web.id}"]
        await limits.close()

    run(work())


def test_tokens_to_be_read_are_reserved_while_the_storage_is_awaited(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long each answer of the storage takes."""
    usage_in = module.usage_in

    async def slow(*arguments: Any) -> Usage:
        usage = await usage_in(*arguments)
        await asyncio.sleep(0.05)
        return usage

    monkeypatch.setattr(module, "usage_in", slow)

    async def work() -> None:
        settings = LimitSettings(tokens_per_minute=1000, storage=storage)
        servers = [RateLimits(settings)] if storage == "memory://" else [RateLimits(settings), RateLimits(settings)]
        for tokens, fit in ((1000, 1), (400, 2)):
            for is_estimate in (False, True):
                web = key(f"web {tokens} {is_estimate}")
                tries = [reserved(servers[number % len(servers)], web, tokens, is_estimate) for number in range(30)]
                passed = [each for each in await asyncio.gather(*tries) if each is not None]
                # each server lets one in whose number of tokens is not known yet, while there are tokens left
                assert len(passed) == fit or (is_estimate and len(passed) <= fit + len(servers) - 1)
                for reservation in passed:
                    await reservation.settle(0)
                assert await reserved(servers[0], web, 1000) is not None
        for limits in servers:
            await limits.close()

    run(work())


def test_an_estimate_refuses_nobody_who_has_nothing_else_in_work(storage: str) -> None:
    async def work() -> None:
        limits = RateLimits(LimitSettings(tokens_per_minute=100, storage=storage))
        web = key("web")
        for _ in range(3):
            reservation = await reserved(limits, web, 90, is_estimate=True)
            assert reservation is not None and await reserved(limits, web, 90, is_estimate=True) is None
            await reservation.settle(20)
        assert await reserved(limits, web, 90) is None
        left = (await settle(await reserved(limits, web, 90, is_estimate=True), 40))["x-ratelimit-remaining-tokens"]
        assert left == "0" and await reserved(limits, web, 90, is_estimate=True) is None
        await limits.close()

    run(work())


def test_what_is_given_back_is_taken_from_the_minute_in_which_it_was_counted(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        limits = RateLimits(LimitSettings(tokens_per_minute=1000, storage=storage))
        web, now = key("web"), 60.0 * 30_000_000
        monkeypatch.setattr(module.time, "time", lambda: now)
        one, two = [await limits.reserve(web, HERE, 400) for _ in range(2)]
        now += 90  # in the middle of the next minute: half of what was counted counts
        assert (await settle(one, 100))["x-ratelimit-remaining-tokens"] == str(1000 - (100 + 400) // 2)
        three = await limits.reserve(web, HERE, 600)
        now += 120
        for reservation in (two, three):
            assert (await settle(reservation, 0))["x-ratelimit-remaining-tokens"] == "1000"
        assert await use(limits, web, 10) and not limits._reserved
        await limits.close()

    run(work())


def test_so_many_requests_at_once() -> None:
    limits = RateLimits(LimitSettings(concurrent_requests=2))
    web, busy = key("web"), key("busy", at_once=3)
    for who, most in ((web, 2), (busy, 3), (None, 2)):
        for _ in range(most):
            limits.acquire(who, HERE)
        with pytest.raises(TooManyRequests, match=f"{most} requests at once") as raised:
            limits.acquire(who, HERE)
        assert raised.value.reason == "concurrency_limit" and raised.value.headers["Retry-After"] == "1"
        limits.release(who, HERE)
        limits.acquire(who, HERE)
    limits.acquire(None, "203.0.113.8")
    for _ in range(9):
        RateLimits(LimitSettings()).acquire(None, HERE)


def test_an_address_that_guesses_keys(storage: str) -> None:
    async def work() -> None:
        limits = RateLimits(LimitSettings(address_requests_per_minute=4, requests_per_minute=3, storage=storage))
        for _ in range(3):
            assert await limits.admit(None, HERE, refused=True) == {}
        await limits.admit(key("web"), HERE)
        error = await refusal(limits, None, refused=True)
        assert error.reason == "address_limit" and "4 requests per minute from one address" in error.message
        assert (await refusal(limits, key("web"))).reason == "address_limit"  # also with a right one
        await limits.admit(key("web"), "198.51.100.1")
        await limits.close()

    run(work())


def test_addresses() -> None:
    assert network("203.0.113.7") == network("::ffff:203.0.113.7") == "203.0.113.7"
    assert network("2001:db8:1:2::1") == network("2001:db8:1:2:ffff::9%eth0") == "2001:db8:1:2::"
    assert network("2001:db8:1:3::1") != network("2001:db8:1:2::1")
    assert network("testclient") == "testclient"


def test_without_limits_nothing_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        limits = RateLimits(LimitSettings(storage="redis://127.0.0.1:1"))  # nobody there
        assert await limits.admit(key("web"), HERE) == await use(limits, key("web"), 5) == {}
        await limits.close()

    run(work())
    assert not ours(caplog)


def test_who_waits_as_told_comes_in(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW_SECONDS", 1)

    async def work() -> None:
        limits = RateLimits(LimitSettings(requests_per_minute=5, tokens_per_minute=100, storage=storage))
        web, phone = key("web"), key("phone", requests=9)
        await use(limits, phone, 150)
        assert await admitted(limits, web, 9) in (5, 6)  # the short minute may have turned
        waits = [int((await refusal(limits, who)).headers["Retry-After"]) for who in (web, phone)]
        await asyncio.sleep(max(waits))
        for who in (web, phone):
            await limits.admit(who, HERE)
        await limits.close()

    run(work())


@given(
    before=st.integers(0, 10_000),
    now=st.integers(0, 10_000),
    left=st.floats(0, 60),
    limit=st.integers(1, 5_000),
)
def test_the_wait_is_neither_too_short_nor_too_long(before: int, now: int, left: float, limit: int) -> None:
    usage = Usage(before, left, now, left)

    def total(later: float) -> float:
        if later <= left:
            return before * (left - later) / 60 + now
        return now * max(0.0, left + 60 - later) / 60

    wait = usage.seconds_until_below(limit)
    assert wait == 0 if usage.total < limit else 0 <= wait <= 120
    assert math.isclose(total(0), usage.total)
    assert total(wait + 0.01) < limit
    assert wait < 0.01 or total(wait - 0.01) >= limit


def test_durations_are_written_as_openai_does() -> None:
    texts = [shown_duration(seconds) for seconds in (0, 0.0201, 0.9999, 1, 59.2, 60.5, 119.5)]
    assert texts == ["0ms", "21ms", "1000ms", "1s", "1m0s", "1m1s", "2m0s"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (LimitSettings(requests_per_minute=0), r"serve\.limits\.requests_per_minute is 0; it must be at least 1"),
        (LimitSettings(tokens_per_minute=-1), r"serve\.limits\.tokens_per_minute is -1"),
        (LimitSettings(concurrent_requests=0), r"serve\.limits\.concurrent_requests is 0"),
        (LimitSettings(address_requests_per_minute=0), r"serve\.limits\.address_requests_per_minute is 0"),
        *(
            (LimitSettings(storage=storage), r"serve\.limits\.storage must be \"memory://\", or as \"redis://HOST")
            for storage in (
                *("", "memory", "mongodb://hush@h", "redis://", "redis://:hush@h:x", "redis://:hush@h:99999"),
                *("redis://h:0", "redis://h/hush", "redis://h?db=x", "redis://h?no_such_option=hush", "redis://[h"),
            )
        ),
    ],
)
def test_settings_that_cannot_be(settings: LimitSettings, expected: str) -> None:
    with pytest.raises(BDHError, match=expected) as raised:
        RateLimits(settings)
    assert "hush" not in str(raised.value)


# ------------------------------------------------------------------------------------------------------------- Redis


def test_a_redis_that_has_lost_a_reservation(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given back is not given twice."""
    monkeypatch.setattr(module, "REDIS_RETRY_SECONDS", 0.2)

    async def work() -> None:
        limits = RateLimits(LimitSettings(tokens_per_minute=1000, storage=redis.url))
        web = key("web")
        one, two = [await limits.reserve(web, HERE, 400) for _ in range(2)]
        redis.stop()
        assert (await settle(one, 0))["x-ratelimit-remaining-tokens"] == "1000"
        redis.start()
        await asyncio.sleep(0.25)
        await limits.admit(web, HERE)
        assert (await settle(two, 0))["x-ratelimit-remaining-tokens"] == "1000"
        assert (await use(limits, web, 100))["x-ratelimit-remaining-tokens"] == "900"
        await limits.close()

    run(work())


def test_servers_that_share_redis_share_counts(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REDIS_TIMEOUT_SECONDS", 30.0)  # however slow this machine is

    async def work() -> None:
        settings = LimitSettings(requests_per_minute=50, tokens_per_minute=100, storage=redis.url)
        one, two = RateLimits(settings), RateLimits(settings)
        web = key("web")
        counts = await asyncio.gather(admitted(one, web, 100), admitted(two, web, 100))
        assert sum(counts) == 50
        await use(one, web, 100)
        assert (await refusal(two, web)).reason == "token_limit"
        await one.close()
        await two.close()

    run(work())


def test_redis_dies_and_comes_back(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "REDIS_RETRY_SECONDS", 0.2)

    async def work() -> None:
        settings = LimitSettings(requests_per_minute=3, storage=redis.url)
        one, two = RateLimits(settings), RateLimits(settings)
        web = key("web")
        assert await admitted(one, web, 5) == 3
        assert await admitted(two, web, 5) == 0
        redis.stop()
        assert await admitted(one, web, 9) == 3  # each counts for itself now
        assert await admitted(two, web, 9) == 3
        assert await admitted(one, web, 9) == 0
        first, second = ours(caplog)
        assert "redis at 127.0.0.1 fails" in first and second == first
        redis.start()
        await asyncio.sleep(0.25)
        headers = [await limits.admit(web, HERE) for limits in (one, two)]
        assert [each["x-ratelimit-remaining-requests"] for each in headers] == ["2", "1"]  # the new Redis knew nothing
        assert await admitted(one, web, 5) == 1
        assert caplog.text.count("answers again") == 2 and "hush" not in caplog.text
        await one.close()
        await two.close()

    run(work())


def test_redis_hangs(redis: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "REDIS_RETRY_SECONDS", 0.3)
    monkeypatch.setattr(module, "REDIS_TIMEOUT_SECONDS", 0.2)

    async def work() -> None:
        limits = RateLimits(LimitSettings(requests_per_minute=1000, storage=redis.url))
        web = key("web")
        assert await admitted(limits, web, 3) == 3
        redis.send(signal.SIGSTOP)
        begin = time.monotonic()
        assert await admitted(limits, web, 100) == 100
        assert await admitted(limits, web, 100) == 100
        assert time.monotonic() - begin < 2
        assert "no answer in 0.2 s" in caplog.text
        redis.send(signal.SIGCONT)
        await asyncio.sleep(0.35)
        headers = await limits.admit(web, HERE)
        assert "answers again" in caplog.text and int(headers["x-ratelimit-remaining-requests"]) > 850
        await limits.close()

    run(work())


def test_a_redis_that_refuses_us(redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        limits = RateLimits(LimitSettings(requests_per_minute=1, storage=redis.url.replace("hush", "wrong-hush")))
        assert await admitted(limits, key("web"), 3) == 1
        await limits.close()

    run(work())
    (line,) = ours(caplog)
    assert "redis at 127.0.0.1 fails" in line and "hush" not in line


def test_callers_that_leave_do_not_confuse_those_that_stay(redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        limits = RateLimits(LimitSettings(requests_per_minute=10_000, storage=redis.url))
        for turn in range(10):
            tasks = [asyncio.create_task(limits.admit(key("gone"), HERE)) for _ in range(20)]
            await asyncio.sleep(turn * 0.0005)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            headers = await limits.admit(key("web"), HERE)
            assert headers["x-ratelimit-remaining-requests"] == str(9_999 - turn)
        await limits.close()

    run(work())
    assert not ours(caplog)
