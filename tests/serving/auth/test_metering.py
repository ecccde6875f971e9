"""Tokens count before a request is worked on: requests that come together do not do more than their key may."""

import asyncio
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import Request

from bdh.errors import BDHError, QueueFull
from bdh.serving.api.errors import TooManyRequests
from bdh.serving.auth.authentication import Caller, admit_caller, release_caller
from bdh.serving.auth.token_usage import TokenMeter
from bdh.serving.config import LimitSettings, ModelSettings, ServeConfig
from bdh.serving.server import Server

CALLER = Caller(None, "203.0.113.7")


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


def server_with(**limits: Any) -> Server:
    return Server(ServeConfig(models=[ModelSettings("tiny")], limits=LimitSettings(**limits)), {})


def request_of(log: dict[str, Any] | None = None) -> Request:
    state = {"log": {}, "limit_headers": {}} if log is None else {"log": log}
    return Request({"type": "http", "state": state, "headers": [], "client": (CALLER.address, 1)})


def left(request: Request) -> int:
    return int(request.state.limit_headers["x-ratelimit-remaining-tokens"])


def test_a_text_counts_before_it_is_tokenized() -> None:
    async def work() -> None:
        server, begun, may_end = server_with(tokens_per_minute=100), asyncio.Event(), asyncio.Event()

        async def tokenize() -> list[int]:
            begun.set()
            await may_end.wait()
            return [1] * 20

        first, second = request_of(), request_of()
        task = asyncio.create_task(TokenMeter(server.limits, CALLER, first).encode(tokenize(), 60))
        await begun.wait()
        begun.clear()
        other = tokenize()
        with pytest.raises(TooManyRequests):
            await TokenMeter(server.limits, CALLER, second).encode(other, 60)
        assert not begun.is_set() and left(first) == 40
        may_end.set()
        assert await task == [1] * 20 and left(first) == 80
        await TokenMeter(server.limits, CALLER, second).encode(other, 60)  # which was not begun
        assert left(second) == 60

    run(work())


@pytest.mark.parametrize(("error", "used"), [(QueueFull("many wait"), 0), (BDHError("too long"), 60)])
def test_what_fails_counts_if_it_was_tokenized(error: Exception, used: int) -> None:
    async def fail() -> list[int]:
        raise error

    async def work() -> None:
        request = request_of()
        with pytest.raises(type(error)):
            await TokenMeter(server_with(tokens_per_minute=100).limits, CALLER, request).encode(fail(), 60)
        assert left(request) == 100 - used

    run(work())


def test_a_client_that_disconnects_has_used_what_is_tokenized() -> None:
    async def work() -> None:
        server, request = server_with(tokens_per_minute=100), request_of()
        task = asyncio.create_task(TokenMeter(server.limits, CALLER, request).encode(asyncio.Future(), 60))
        while "x-ratelimit-remaining-tokens" not in request.state.limit_headers:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert left(request) == 40 and not server.limits._reserved

    run(work())


def test_a_request_that_is_refused_is_not_in_work() -> None:
    async def work() -> None:
        server = server_with(requests_per_minute=1, concurrent_requests=1)
        first, second = request_of({}).scope, request_of({}).scope
        await admit_caller(first, server.keys, server.limits)
        release_caller(first, server.limits)
        with pytest.raises(TooManyRequests) as raised:
            await admit_caller(second, server.keys, server.limits)
        assert raised.value.reason == "request_limit"
        server.limits.acquire(None, CALLER.address)  # while the refusal is still being sent
        release_caller(second, server.limits)
        with pytest.raises(TooManyRequests):
            server.limits.acquire(None, CALLER.address)

    run(work())


def test_a_bound_of_tokens() -> None:
    from bdh.serving.model_registry import ServedModel

    served = ServedModel(ModelSettings("tiny"), server_with().config, SimpleNamespace())  # type: ignore[arg-type]
    assert served.token_bound(["é", "", "ab"]) == 4 and served.token_bound(["\ud800"]) == 3
    assert served.token_bound(["x" * (1 << 20)]) == served.limits.max_prompt_tokens
