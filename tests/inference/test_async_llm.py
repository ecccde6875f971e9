"""One engine for many callers: side by side, cancelled, closed, and when it fails."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

import bdh
from bdh.errors import BDHError
from bdh.inference.async_llm import AsyncLLM
from bdh.inference.engine import QueueFull
from bdh.inference.sampling_params import SamplingParams
from tests.inference.small import BYTES, CHAT, Tripwire, letters, small_llm, small_model


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


async def in_work(llm: AsyncLLM, requests: int) -> None:
    """Waits until the engine has so many requests."""
    while len(llm.llm.engine.groups) != requests:
        await asyncio.sleep(0.001)


async def collect(llm: AsyncLLM, prompt: str, params: SamplingParams) -> str:
    return "".join([delta.text async for delta in llm.stream(prompt, params)])


def test_many_callers_get_what_they_would_get_alone() -> None:
    prompts = [chr(97 + i) * (1 + i % 5) for i in range(12)]
    settings = [letters(seed=i, max_new_tokens=5 + i) for i in range(12)]
    expected = [completion.text for completion in small_llm().generate(prompts, settings)]

    async def work() -> None:
        async with bdh.AsyncLLM(small_model(), BYTES, max_batch_size=3) as llm:
            streams = [collect(llm, *pair) for pair in zip(prompts[::2], settings[::2], strict=True)]
            calls = [llm.generate(*pair) for pair in zip(prompts[1::2], settings[1::2], strict=True)]
            texts, completions = await asyncio.gather(asyncio.gather(*streams), asyncio.gather(*calls))
            assert texts == expected[::2] and [completion.text for completion in completions] == expected[1::2]
            assert llm.stats.finished == 12

    run(work())


def test_choices_chats_beams_and_grammars() -> None:
    params = letters(262, n=2, best_of=3)
    messages = [{"role": "user", "content": "Hi"}]
    beams = SamplingParams(num_beams=2, max_new_tokens=5)
    plain = small_llm(CHAT)

    async def work() -> None:
        async with AsyncLLM(small_model(vocab_size=262), CHAT) as llm:
            assert await llm.generate("ab", params) == plain.generate("ab", params)[0]
            assert await llm.chat(messages, letters(262)) == plain.chat(messages, letters(262))
            pieces = [delta.text async for delta in llm.stream_chat(messages, letters(262))]
            assert "".join(pieces) == plain.chat(messages, letters(262)).text
            assert await llm.generate("ab", beams) == plain.generate("ab", beams)[0]
            assert (await llm.generate("ab", SamplingParams(regex="[xy]{3}"))).text.strip("xy") == ""
            deltas = [delta async for delta in llm.stream("ab", letters(262, n=2))]
            assert [delta.index for delta in deltas if delta.finish_reason] == [0, 1]

    run(work())


def test_cancelling_and_closing_end_requests() -> None:
    endless = letters(max_new_tokens=10**9)

    async def work() -> None:
        async with AsyncLLM(small_model(), BYTES, max_batch_size=2) as llm:
            task = asyncio.create_task(llm.generate("a", endless))
            stream = llm.stream("b", endless)
            await anext(stream)
            waiting = asyncio.create_task(llm.generate("c", endless))  # both slots are taken
            await in_work(llm, 3)
            for one in (task, waiting):
                one.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await one
            await stream.aclose()
            await in_work(llm, 0)
            assert len(llm.llm.engine.free) == 2 and llm.stats.cancelled == 3
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(llm.generate("d", endless), 0.05)
            await in_work(llm, 0)
            assert (await llm.generate("e", letters())).text

    run(work())


def test_what_is_wrong_with_a_request_reaches_its_caller_only() -> None:
    async def work() -> None:
        async with AsyncLLM(small_model(), BYTES, max_batch_size=1) as llm:
            running = llm.stream("x", letters(max_new_tokens=10**9))
            await anext(running)
            llm.llm.engine.queue_size = 1
            waiting = asyncio.create_task(llm.generate("y", letters()))
            await in_work(llm, 2)
            with pytest.raises(QueueFull, match="try again later"):
                await llm.generate("z", letters())
            with pytest.raises(QueueFull, match="try again later"):
                await collect(llm, "z", letters())
            await running.aclose()
            assert await waiting == small_llm().generate("y", letters())[0]

            good = asyncio.create_task(collect(llm, "x", letters(max_new_tokens=200)))
            with pytest.raises(BDHError, match="the prompt is empty"):
                await llm.generate("", letters())
            with pytest.raises(BDHError, match="regex"):
                await llm.generate("a", SamplingParams(regex="("))
            with pytest.raises(BDHError, match="not valid text"):
                await collect(llm, "\ud800", letters())
            with pytest.raises(BDHError, match="best_of is 2, which cannot be streamed"):
                await collect(llm, "a", letters(best_of=2))
            assert await good == small_llm().generate("x", letters(max_new_tokens=200))[0].text

    run(work())


def test_a_failure_of_the_engine_reaches_all_who_wait_and_it_begins_anew() -> None:
    def fail() -> None:
        raise MemoryError("no room")

    async def work() -> None:
        async with AsyncLLM(Tripwire(small_model(), 2, 4, fail), BYTES) as llm:
            calls = [llm.generate("a", letters()), collect(llm, "b", letters()), llm.generate("c", letters())]
            for result in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(result, RuntimeError) and "MemoryError: no room" in str(result)
                assert isinstance(result.__cause__, MemoryError)
            assert await llm.generate("a", letters()) == small_llm().generate("a", letters())[0]

    run(work())


def test_closing_reaches_all_who_wait() -> None:
    async def work() -> None:
        llm = AsyncLLM(small_model(), BYTES, max_batch_size=1)
        endless = letters(max_new_tokens=10**9)
        tasks = [asyncio.create_task(llm.generate("a", endless)), asyncio.create_task(collect(llm, "b", endless))]
        await in_work(llm, 2)
        await llm.close()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, BDHError) and "closed" in str(result)
        with pytest.raises(BDHError, match="this model is closed"):
            await llm.generate("a", letters())
        await llm.close()
        assert not any(thread.name == "bdh-engine" for thread in threading.enumerate())

    run(work())


def test_callers_in_several_event_loops_one_of_which_goes_away() -> None:
    llm = AsyncLLM(small_model(), BYTES, max_batch_size=2)
    texts: list[str] = []

    async def give_up() -> None:
        await anext(llm.stream("a", letters(max_new_tokens=10**9)))

    async def work() -> None:
        texts.append((await llm.generate("ab", letters())).text)

    run(give_up())
    threads = [threading.Thread(target=run, args=(work(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [small_llm().generate("ab", letters())[0].text] * 3
    asyncio.run(llm.close())
