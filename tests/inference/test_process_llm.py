"""An engine in a process of its own: it does what the one in a thread does, and its end is noticed on both sides."""

import asyncio
import gc
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bdh.errors import BDHError, QueueFull
from bdh.inference import process_llm
from bdh.inference.async_session import TokensRead, Turn
from bdh.inference.engine_messages import FrameDecoder, HandleTable, ObjectTable, RemoteHandle, encode_frame
from bdh.inference.engine_process import EngineProcess, EngineSettings
from bdh.inference.process_llm import ProcessLLM
from bdh.inference.sampling_params import SamplingParams
from bdh.model import BDHState
from bdh.model.export import save_export
from bdh.serving.activity.traces import TraceStore
from bdh.serving.config import BrainSettings, ModelSettings, ServeConfig
from bdh.serving.model_registry import ServedModel
from tests.inference.small import CHAT, letters, small_llm, small_model

ENDLESS = letters(262, max_new_tokens=10**9)
SYSTEM = "You are a dragon."


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "tiny"
    save_export(small_model(vocab_size=262), CHAT, folder, "A tiny model for tests.\n")
    return folder


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


@asynccontextmanager
async def opened(export: Path, **settings: Any) -> AsyncGenerator[ProcessLLM]:
    process = EngineProcess()
    async with await ProcessLLM.open(process, EngineSettings(str(export), **settings)) as llm:
        yield llm


async def idle(llm: ProcessLLM) -> None:
    while llm.stats.running or llm.stats.waiting:
        await asyncio.sleep(0.001)


async def objects_there(llm: ProcessLLM) -> int:
    return await llm.call(count_states)


def count_states(llm: object) -> int:
    """How many states live in this process, beside those of the engine's slots."""
    gc.collect()
    return sum(isinstance(one, BDHState) for one in gc.get_objects())


def fail(llm: object) -> None:
    raise KeyError("something the other process need not know")


async def collect(llm: ProcessLLM, prompt: str, params: SamplingParams) -> str:
    return "".join([delta.text async for delta in llm.stream(prompt, params)])


def test_all_it_writes_is_what_an_engine_beside_it_would_write(export: Path) -> None:
    prompts = [chr(97 + i) * (1 + i % 5) for i in range(12)]
    settings = [letters(262, seed=i, max_new_tokens=5 + i, stop=("e",) if i % 3 == 0 else ()) for i in range(12)]
    alone = small_llm(CHAT)
    expected = [completion.text for completion in alone.generate(prompts, settings)]
    messages = [{"role": "user", "content": "Hi"}]
    params, beams = letters(262, n=2, best_of=3), SamplingParams(num_beams=2, max_new_tokens=5)
    scored = letters(262, logprobs=2, max_new_tokens=4)

    async def work() -> None:
        async with opened(export, max_batch_size=3) as llm:
            streams = [collect(llm, *pair) for pair in zip(prompts[::2], settings[::2], strict=True)]
            calls = [llm.generate(*pair) for pair in zip(prompts[1::2], settings[1::2], strict=True)]
            texts, completions = await asyncio.gather(asyncio.gather(*streams), asyncio.gather(*calls))
            assert texts == expected[::2] and [completion.text for completion in completions] == expected[1::2]
            assert await llm.generate("ab", params) == alone.generate("ab", params)[0]
            assert await llm.generate("ab", scored) == alone.generate("ab", scored)[0]
            assert await llm.chat(messages, letters(262)) == alone.chat(messages, letters(262))
            assert await llm.generate("ab", beams) == alone.generate("ab", beams)[0]
            assert (await llm.generate("ab", SamplingParams(regex="[xy]{3}"))).text.strip("xy") == ""
            deltas = [delta async for delta in llm.stream("ab", letters(262, n=2))]
            assert [delta.index for delta in deltas if delta.finish_reason] == [0, 1]
            scores = await llm.score(list(b"The dragon"), 3)
            assert len(scores) == 9 and all(len(one.top) == 3 and one.logprob <= 0 for one in scores)
            await idle(llm)
            assert llm.stats.finished == 12 + 3 + 1 + 1 + 1 + 2
            assert await llm.fingerprint() == alone.fingerprint and llm.model_info.n_parameters == 14528

    run(work())


def test_the_memory_of_the_process_is_accounted_for(tmp_path: Path) -> None:
    """Slots keep the memory of states that they had; the figures say so, or it would be missed."""
    model = small_model(n_layer=4, n_embd=128, mlp_internal_dim_multiplier=128, vocab_size=262)
    save_export(model, CHAT, tmp_path / "wide", "A wide model for tests.\n")

    async def work() -> None:
        async with opened(tmp_path / "wide", max_batch_size=8, prefix_cache_bytes=100 << 20) as llm:
            prompts = [chr(97 + number) * 70 for number in range(8)]
            for _ in range(2):  # the second time there are beginnings worth keeping
                await asyncio.gather(
                    *(llm.generate(f"{prompt}!", letters(262, max_new_tokens=2)) for prompt in prompts)
                )
            await idle(llm)
            states, stats = 8 * llm.model_info.state_nbytes, llm.stats
            assert states <= stats.slots_nbytes < 1.2 * states and stats.prefix_nbytes > 60 << 20
            known = llm.model_info.loaded_nbytes + stats.slots_nbytes + stats.prefix_nbytes
            assert llm.model_info.loaded_nbytes > 100 << 20
            assert abs(llm.resident_nbytes - known) < states / 2, (llm.resident_nbytes, llm.model_info, stats)

    run(work())


@pytest.mark.slow
def test_an_idle_process_gives_memory_back(tmp_path: Path) -> None:
    model = small_model(n_layer=4, n_embd=128, mlp_internal_dim_multiplier=128, vocab_size=262)
    save_export(model, CHAT, tmp_path / "wide", "A wide model for tests.\n")

    async def work() -> None:
        async with opened(tmp_path / "wide", max_batch_size=8, prefix_cache_bytes=0) as llm:
            before = await llm.generate("a" * 70, letters(262, n=8))
            busy = llm.resident_nbytes
            while llm.stats.slots_nbytes:
                await asyncio.sleep(0.1)
            assert busy - llm.resident_nbytes > 7 * llm.model_info.state_nbytes
            assert await llm.generate("a" * 70, letters(262, n=8)) == before

    run(work())


def test_requests_end_when_nobody_wants_them(export: Path) -> None:
    async def work() -> None:
        async with opened(export, max_batch_size=2) as llm:
            task = asyncio.create_task(llm.generate("a", ENDLESS))
            stream = llm.stream("b", ENDLESS)
            await anext(stream)
            waiting = asyncio.create_task(llm.generate("c", ENDLESS))  # both slots are taken
            while llm.stats.running + llm.stats.waiting < 3:
                await asyncio.sleep(0.001)
            for one in (task, waiting):
                one.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await one
            await stream.aclose()
            await idle(llm)
            assert llm.stats.cancelled == 3
            assert (await llm.generate("e", letters(262))).text

    run(work())


def test_what_is_wrong_with_a_request_reaches_its_caller_only(export: Path) -> None:
    async def work() -> None:
        async with opened(export, max_batch_size=1, queue_size=1) as llm:
            running = llm.stream("x", ENDLESS)
            await anext(running)
            waiting = asyncio.create_task(llm.generate("y", letters(262)))
            while not llm.stats.waiting:
                await asyncio.sleep(0.001)
            for _ in range(2):
                with pytest.raises(QueueFull, match="try again later"):
                    await llm.generate("z", letters(262))
            await running.aclose()
            assert await waiting == small_llm(CHAT).generate("y", letters(262))[0]
            for prompt, params, words in (
                ("", letters(262), "the prompt is empty"),
                ("a", SamplingParams(regex="("), "regex"),
                ("\ud800", letters(262), "not valid text"),
                ("a", SamplingParams(stop_token_ids=(999,)), "stop_token_ids has the token 999"),
            ):
                with pytest.raises(BDHError, match=words):
                    await llm.generate(prompt, params)
            with pytest.raises(RuntimeError, match="KeyError"):
                await llm.call(fail)
            assert (await llm.generate("a", letters(262))).text

    run(work())


async def taken(turn: Turn) -> str:
    text = ""
    try:
        async for deltas in turn.deltas():
            text += "".join(delta.text for delta in deltas)
    finally:
        turn.drop()
    return text


@pytest.mark.parametrize("stop", [(), ("q",), ("a",)])
def test_sessions_say_what_they_say_elsewhere_and_their_states_stay_there(
    export: Path, tmp_path: Path, stop: tuple[str, ...]
) -> None:
    params, single = letters(262, stop=stop), small_llm(CHAT)

    async def work() -> None:
        async with opened(export) as llm:
            ours, theirs = llm.session(SYSTEM, params), single.session(SYSTEM, params)
            theirs.read("A document. ")
            assert await ours.read("A document. ") == TokensRead(theirs.position - 1, 0)
            for text in ("Who are you?", "Indeed?"):
                assert await taken(await ours.send(text)) == "".join(delta.text for delta in theirs.send(text))
                assert (ours.position, ours.unread, ours.transcript) == (
                    theirs.position,
                    theirs.unread,
                    theirs.transcript,
                )
            assert isinstance(ours.state, RemoteHandle) and ours.nbytes == theirs.nbytes
            path = tmp_path / "talk.safetensors"
            await ours.save(path)
            again, loaded = await llm.load_session(path), single.load_session(path)
            for one in (again, ours):
                assert await taken(await one.send("Well?")) == "".join(delta.text for delta in loaded.send("Well?"))
                loaded = single.load_session(path)

    run(work())


def test_a_turn_that_is_left_goes_on_exactly(export: Path) -> None:
    """The engine is further on by then; the session is where its reader stopped."""
    single = small_llm(CHAT)

    async def work() -> None:
        async with opened(export) as llm:
            session = llm.session(SYSTEM)
            for _ in range(3):
                turn, text = await session.send("Go on.", ENDLESS), ""
                async for deltas in turn.deltas():
                    text += "".join(delta.text for delta in deltas)
                    if len(text) > 20:
                        break
                turn.drop()
                await session.settled()
                assert session.transcript[-1] == {"role": "assistant", "content": text}
            fresh = single.session(SYSTEM)
            fresh.transcript = list(session.transcript)
            params = letters(262, temperature=0.0, max_new_tokens=12)
            prompt = single.chat_format.render([*session.transcript, {"role": "user", "content": "Well?"}])
            asked = single.as_chat_request(single.text_request(prompt, params))
            [(_, expected)] = single.run([asked])
            assert await taken(await session.send("Well?", params)) == expected.text

    run(work())


def test_what_nothing_stands_for_any_more_goes(export: Path) -> None:
    async def work() -> None:
        async with opened(export) as llm:
            await llm.generate("warm", letters(262))
            before = await objects_there(llm)
            session = llm.session(SYSTEM, letters(262))
            await taken(await session.send("Hi"))
            store = TraceStore(BrainSettings())
            served = ServedModel(ModelSettings("tiny", name="tiny"), ServeConfig(), llm)
            watch = await store.start(served, None, list(b"The dragon"), None)
            told = await watch.read_prompt()
            details = await watch.trace.token(9)
            assert len(told.tokens) == 10 and details.layers[1].neurons
            assert (await watch.trace.neuron(1, 3)).of == 10
            assert await objects_there(llm) >= before + 2
            del session, watch, store
            gc.collect()
            while await objects_there(llm) > before:
                await asyncio.sleep(0.01)

    run(work())


def test_a_process_that_is_killed_fails_what_it_had_and_nothing_else(export: Path) -> None:
    async def work() -> None:
        async with opened(export, max_batch_size=2) as llm:
            stream = llm.stream("b", ENDLESS)
            await anext(stream)
            calls = [asyncio.create_task(llm.generate(text, ENDLESS)) for text in "acd"]
            while llm.stats.waiting < 2:
                await asyncio.sleep(0.001)
            os.kill(llm.pid, signal.SIGKILL)
            began = time.monotonic()
            for result in await asyncio.gather(*calls, collect_rest(stream), return_exceptions=True):
                assert isinstance(result, RuntimeError) and "the engine failed" in str(result)
            assert time.monotonic() - began < 1
            await llm.lost.wait()
            assert llm.exit_reason() == "was ended by SIGKILL"
            with pytest.raises(RuntimeError, match="its process is gone"):
                await llm.generate("a", ENDLESS)

    run(work())


async def collect_rest(stream: AsyncGenerator[Any]) -> None:
    async for _ in stream:
        pass


def test_closing_reaches_all_who_wait(export: Path) -> None:
    async def work() -> None:
        async with opened(export, max_batch_size=1) as llm:
            tasks = [asyncio.create_task(llm.generate("a", ENDLESS)), asyncio.create_task(collect(llm, "b", ENDLESS))]
            while llm.stats.running + llm.stats.waiting < 2:
                await asyncio.sleep(0.001)
            await llm.close()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(result, BDHError) and "closed" in str(result)
            with pytest.raises(BDHError, match="this model is closed"):
                await llm.generate("a", ENDLESS)
            with pytest.raises(BDHError, match="the model was closed"):  # its threads have ended
                await llm.run_in_thread(lambda: None)

    run(work())


def test_what_cannot_be_loaded_is_said_and_leaves_no_process(tmp_path: Path) -> None:
    async def work() -> None:
        process = EngineProcess()
        with pytest.raises(BDHError, match="does not exist; give the folder of an export"):
            await ProcessLLM.open(process, EngineSettings(str(tmp_path / "none")))
        assert process.process.poll() is not None

    run(work())


def test_files_in_the_working_directory_are_no_modules_and_descriptors_may_be_many(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit('this is not the library')\n")
    monkeypatch.chdir(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.fail(f"this test needs 2000 open files, and {hard} are allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2000, hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]

    async def work() -> None:
        async with opened(export) as llm:
            texts = await asyncio.gather(*(llm.generate("a", letters(262)) for _ in range(3)))
            assert len({one.text for one in texts}) == 1

    try:
        run(work())
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def slow_function(llm: object) -> None:
    time.sleep(0.2)


def test_what_nobody_waits_for_is_not_done(export: Path) -> None:
    async def work() -> None:
        async with opened(export) as llm:
            calls = [asyncio.create_task(llm.call_in_thread(slow_function)) for _ in range(60)]
            await asyncio.sleep(0.05)
            for call in calls:
                call.cancel()
            began = time.monotonic()
            await llm.call_in_thread(count_states)
            assert time.monotonic() - began < 2  # and not the three seconds that all would take

    run(work())


def fail_at_a_stop(llm: Any) -> None:
    def read_state(slot: int) -> None:
        raise MemoryError("no room for a state")

    llm.runner.read_state = read_state


def test_an_engine_that_fails_between_its_steps_begins_anew(export: Path) -> None:
    async def work() -> None:
        async with opened(export) as llm:
            await llm.call(fail_at_a_stop)
            session = llm.session(None, letters(262, stop=("a", "e", "o", " ")))
            with pytest.raises(RuntimeError, match=r"the engine failed.*MemoryError: no room"):
                await taken(await session.send("Hi"))
            assert (await llm.generate("a", letters(262))).text and not llm.is_lost

    run(work())


def test_it_ends_with_the_process_it_works_for(export: Path) -> None:
    program = f"""
import asyncio
from bdh.inference.engine_process import EngineProcess, EngineSettings
from bdh.inference.sampling_params import SamplingParams
from bdh.inference.process_llm import ProcessLLM
async def work():
    llm = await ProcessLLM.open(EngineProcess(), EngineSettings({str(export)!r}))
    print(llm.pid, flush=True)
    await llm.generate("a", SamplingParams(max_new_tokens=10**9, ignore_eos=True))
asyncio.run(work())
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    os.kill(pid, 0)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_messages_however_they_are_cut() -> None:
    objects, released = ObjectTable(), list[int]()
    handles = HandleTable(released.append)
    state = BDHState.zeros(small_model().config, 1)
    messages: list[Any] = [("a", state), ("b", list(range(1000))), ("c",)]
    for size in (1, 7, 100, 10**6):
        frames, data = FrameDecoder(), b"".join(encode_frame(objects.dumps(message)) for message in messages)
        pieces = [data[start : start + size] for start in range(0, len(data), size)]
        came = [handles.loads(one) for piece in pieces for one in frames.feed(piece)]
        assert came[1:] == messages[1:]
        remote = came[0][1]
        assert (remote.length, remote.nbytes) == (state.length, state.nbytes)
        assert objects.loads(handles.dumps(("back", remote)))[1] is state
        number = remote.number
        del came, remote
        gc.collect()
        assert number in released
        objects.release(number)
        with pytest.raises(KeyError):
            objects.loads(handles.dumps(RemoteHandle(number, 0, 0, handles)))
        with pytest.raises(RuntimeError, match="a process that is gone"):
            HandleTable(released.append).dumps(RemoteHandle(number, 0, 0, handles))
    assert replace(EngineSettings("x"), device="cpu") == objects.loads(handles.dumps(EngineSettings("x", device="cpu")))


def test_an_engine_that_is_stopped_is_noticed(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `/health/ready` tells; one that only waits for work is not silent."""
    monkeypatch.setattr(process_llm, "PING_SECONDS", 0.05)
    monkeypatch.setattr(process_llm, "SILENT_SECONDS", 1.0)

    async def until(llm: ProcessLLM, silent: bool) -> None:
        while llm.is_silent is not silent:
            await asyncio.sleep(0.02)

    async def work() -> None:
        async with opened(export) as llm:
            await llm.generate("abc", letters(262))
            await until(llm, False)
            os.kill(llm.pid, signal.SIGSTOP)
            await until(llm, True)
            os.kill(llm.pid, signal.SIGCONT)
            await until(llm, False)
            assert (await llm.generate("abc", letters(262))).text

    run(work())


def test_an_error_does_not_end_the_questions_whether_the_engine_goes_on(
    export: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process_llm, "PING_SECONDS", 0.01)
    monkeypatch.setattr(process_llm, "SILENT_SECONDS", 0.3)
    errors = [RuntimeError("a reply that could not be read"), KeyError("anything"), BDHError("another")]

    async def work() -> None:
        async with opened(export) as llm:
            call = llm.call

            async def fail_first(function: Any, *arguments: Any) -> Any:
                if errors:
                    raise errors.pop()
                return await call(function, *arguments)

            monkeypatch.setattr(llm, "call", fail_first)
            while errors:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            os.kill(llm.pid, signal.SIGSTOP)
            while not llm.is_silent:
                await asyncio.sleep(0.01)
            os.kill(llm.pid, signal.SIGCONT)
            while llm.is_silent:
                await asyncio.sleep(0.01)

    run(work())
    assert caplog.text.count("answered a ping with an error") == 3
