"""Clients share the threads beside the engine: one with many long texts keeps no other out, or waiting for them all."""

import asyncio
import threading
from collections.abc import Coroutine
from functools import partial
from typing import Any

import pytest

from bdh.errors import QueueFull
from bdh.inference.fair_executor import ExecutorClosed, FairExecutor, PendingLimit


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


async def occupy(executor: FairExecutor, client: str, threads: int = 1) -> tuple[threading.Event, list[Any]]:
    """Calls of a client that last until the event is set, in all threads."""
    begun, may_end = threading.Semaphore(0), threading.Event()

    def wait() -> None:
        begun.release()
        assert may_end.wait(60)

    tasks = [asyncio.create_task(executor.call(wait, client)) for _ in range(threads)]
    for _ in range(threads):
        await asyncio.to_thread(begun.acquire)
    return may_end, tasks


def test_a_client_with_all_places_keeps_no_other_out() -> None:
    async def work() -> None:
        executor = FairExecutor(2, "test", PendingLimit(8))
        may_end, tasks = await occupy(executor, "many", 2)
        order: list[str] = []
        tasks += [asyncio.create_task(executor.call(lambda: order.append("many"), "many")) for _ in range(6)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="8 long prompts"):
            await executor.call(lambda: None, "many")
        for client in ("few", "few", "third"):
            tasks.append(asyncio.create_task(executor.call(partial(order.append, client), client)))
            await asyncio.sleep(0)
        may_end.set()
        await asyncio.gather(*tasks)
        assert set(order[:3]) >= {"few", "third"} and len(order) == 9 and order.index("few") < 2
        assert await executor.call(lambda: 7, "many") == 7 and not executor._began and not executor._waiting
        executor.shut_down()

    run(work())


def test_the_results_and_errors_are_those_of_the_function() -> None:
    async def work() -> None:
        executor = FairExecutor(1, "test", PendingLimit(8))

        def fail() -> None:
            raise KeyError("anything")

        with pytest.raises(KeyError):
            await executor.call(fail)
        assert await executor.call(threading.get_ident) != threading.get_ident()
        may_end, tasks = await occupy(executor, "a")
        called: list[int] = []
        waiting = [asyncio.create_task(executor.call(lambda: called.append(1), "a")) for _ in range(7)]
        await asyncio.sleep(0)
        for task in waiting:  # who goes away makes room, and is not worked for
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        last = asyncio.create_task(executor.call(lambda: called.append(2), "a"))
        await asyncio.sleep(0)
        may_end.set()
        await asyncio.gather(*tasks, last)
        assert called == [2]
        may_end, tasks = await occupy(executor, "a")
        left = asyncio.create_task(executor.call(lambda: None, "a"))
        await asyncio.sleep(0)
        executor.shut_down()
        may_end.set()
        await asyncio.gather(*tasks)
        with pytest.raises(ExecutorClosed):
            await left
        with pytest.raises(ExecutorClosed):
            await executor.call(lambda: None)

    run(work())
