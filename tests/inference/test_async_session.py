"""Sessions on a shared engine: token for token those of `Session`, however a turn ended, and one thing at a time."""

import asyncio
import threading
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from bdh.errors import BDHError
from bdh.inference.async_llm import SHORT_PROMPT, AsyncLLM
from bdh.inference.async_session import AsyncSession, ReserveTokens, TokensRead, Turn
from bdh.inference.sampling_params import SamplingParams
from bdh.inference.session import Session
from bdh.inference.state_metadata import read_metadata
from bdh.model import BDHForCausalLM
from tests.inference.small import BYTES, CHAT, Tripwire, letters, small_llm, small_model

SYSTEM = "You are a dragon."
ENDLESS = letters(max_new_tokens=10**9)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


def many(tokenizer: PreTrainedTokenizerFast = BYTES, n_slots: int = 2) -> AsyncLLM:
    return AsyncLLM(small_model(vocab_size=256 if tokenizer is BYTES else 262), tokenizer, max_batch_size=n_slots)


async def taken(turn: Turn, pieces: int | None = None) -> str:
    """The text of a turn, or of its first pieces and no more."""
    text = ""
    try:
        async for deltas in turn.deltas():
            text += "".join(delta.text for delta in deltas)
            pieces = None if pieces is None else pieces - 1
            if pieces == 0:
                break
    finally:
        turn.drop()
    return text


def said(session: Session, text: str, params: SamplingParams) -> str:
    return "".join(delta.text for delta in session.send(text, params))


def place(session: Session | AsyncSession) -> tuple[object, ...]:
    """All that says where a session is, but its numbers."""
    return session.position, session.unread, session.transcript, session.answering, session.ended


def test_tokens_are_reserved_before_the_engine_reads_them() -> None:
    """If that is refused, nothing is read, and the session is free and as it was."""

    async def work() -> None:
        async with many() as llm:
            ours = llm.session(None, letters(max_new_tokens=3))
            numbers: list[int] = []

            async def reserve(tokens: int) -> None:
                assert llm.stats.running + llm.stats.waiting == 0 and llm.stats.prefill_tokens == before
                numbers.append(tokens)
                if refused:
                    raise BDHError("so many are not left")

            for refused in (True, False):
                for number in range(3):
                    before, was = llm.stats.prefill_tokens, place(ours)
                    if refused:
                        with pytest.raises(BDHError, match="not left"):
                            await act(ours, number, reserve)
                        assert place(ours) == was and not ours.busy and llm.stats.prefill_tokens == before
                    else:
                        read = await act(ours, number, reserve)
                        assert numbers[-1] == read

    async def act(session: AsyncSession, number: int, reserve: ReserveTokens) -> int:
        if number == 0:
            return (await session.read("A document. ", reserve=reserve)).tokens
        turn = await (session.send("Hi", reserve=reserve) if number == 1 else session.write(text="On", reserve=reserve))
        await taken(turn)
        return turn.prompt_tokens

    run(work())


@pytest.mark.parametrize("tokenizer", [BYTES, CHAT], ids=["transcript", "template"])
def test_it_says_what_the_other_session_says(tokenizer: PreTrainedTokenizerFast) -> None:
    params = letters(256 if tokenizer is BYTES else 262, stop=("q",))
    single = small_llm(tokenizer)

    async def work() -> None:
        async with many(tokenizer) as llm:
            ours, theirs = llm.session(SYSTEM, params), single.session(SYSTEM, params)
            long = "There was a dragon. " * (SHORT_PROMPT // 10)
            for text in ("A document. ", "", long):
                before = ours.position
                read = await ours.read(text)
                theirs.read(text)
                assert read == TokensRead(max(0, ours.position - before - (before == 0 and text != "")), 0)
            for text in ("Who are you?", "Indeed?", long):
                turn = await ours.send(text)
                assert await taken(turn) == "".join(delta.text for delta in theirs.send(text))
                assert place(ours) == place(theirs)
            shorter = replace(params, max_new_tokens=9, stop=())
            assert await taken(await ours.send("Well?", shorter)) == said(theirs, "Well?", shorter)
            for _ in range(2):
                turn = await ours.write(shorter, wants_deltas=False)
                completion = await turn.completion()
                assert completion.text == "".join(delta.text for delta in theirs.write(shorter))
                assert turn.prompt_tokens == 1 and len(completion.choices[0].tokens) == 9
            turn = await ours.write(shorter, " And then")
            theirs.read(" And then")
            assert await taken(turn) == "".join(delta.text for delta in theirs.write(shorter))
            assert place(ours) == place(theirs) and turn.prompt_tokens == len(" And then") + 1
            ours.reset()
            theirs.reset()
            assert await taken(await ours.send("Hi")) == "".join(delta.text for delta in theirs.send("Hi"))
            assert turn.cached_tokens == 0

    run(work())


def test_it_begins_with_what_is_kept_of_other_prompts() -> None:
    async def work() -> None:
        async with many() as llm:
            system = SYSTEM * 20
            for number in range(3):
                turn = await llm.session(system).send("Hi", letters())
                await taken(turn)
                assert (turn.cached_tokens > 0) == (number > 1) and turn.prompt_tokens > len(system)

    run(work())


def test_it_does_one_thing_at_a_time() -> None:
    async def work() -> None:
        async with many() as llm:
            session = llm.session(SYSTEM)
            turn = await session.send("Hi", ENDLESS)
            assert session.busy
            for other in (session.send("Ho"), session.write(), session.read("x"), session.save("x")):
                with pytest.raises(BDHError, match="the last answer is not finished"):
                    await other
            with pytest.raises(BDHError, match="the last answer is not finished"):
                session.reset()
            await taken(turn, 3)
            # What comes next waits until the end of the dropped turn has come about.
            assert await taken(await session.send("Ho", letters()))
            assert not session.busy and len(session.transcript) == 5

            reading = asyncio.create_task(session.read("a dragon " * 200))
            await asyncio.sleep(0)
            with pytest.raises(BDHError, match="the last answer is not finished"):
                await session.send("Hm")
            await reading

            async for deltas in (await session.send("Hm", letters())).deltas():
                if deltas[-1].finish_reason:  # with the last piece it is free
                    assert await taken(await session.send("Hm", letters()))

    run(work())


@pytest.mark.parametrize("how", ["dropped", "cancelled", "before the first piece", "whole"])
def test_a_client_that_goes_away_leaves_it_at_what_was_handed_on(how: str) -> None:
    pieces = 0 if how == "before the first piece" else 6

    async def leave(session: AsyncSession) -> str:
        """Ends a turn too soon; the text that was handed on."""
        shown = ""

        async def talk() -> None:
            nonlocal shown
            turn = await session.send("Who are you?", ENDLESS, wants_deltas=how != "whole")
            try:
                if how == "whole":
                    await turn.completion()
                async for deltas in turn.deltas():
                    shown += "".join(delta.text for delta in deltas)
                    if how != "cancelled" and len(shown) >= pieces:
                        return
            finally:
                turn.drop()

        if how in ("dropped",):
            await talk()
        elif how == "before the first piece":
            turn = await session.send("Who are you?", ENDLESS)
            turn.drop()
        else:
            task = asyncio.create_task(talk())
            while len(shown) < pieces and not (how == "whole" and session.llm.stats.running):
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return shown

    async def work() -> None:
        async with many(n_slots=1) as llm:
            ours, theirs = llm.session(SYSTEM), small_llm().session(SYSTEM)
            assert await taken(await ours.send("Hi", letters())) == said(theirs, "Hi", letters())
            shown = await leave(ours)
            if shown:
                deltas = theirs.send("Who are you?", replace(ENDLESS, max_new_tokens=10**6))
                text = ""
                while len(text) < len(shown):
                    text += next(deltas).text
                deltas.close()  # type: ignore[attr-defined]
                assert text == shown
            assert await taken(await ours.send("Hm", letters())) == said(theirs, "Hm", letters())
            assert ours.transcript == theirs.transcript and ours.position == theirs.position
            assert len(ours.transcript) == (7 if shown else 5) and ours.ahead is None
            assert llm.stats.running == 0 and len(llm.llm.engine.free) == 1

    run(work())


def test_what_is_wrong_with_a_turn_leaves_it_as_it_was() -> None:
    def refuse(tokens: object) -> None:
        assert isinstance(tokens, list)
        raise BDHError(f"{len(tokens)} tokens are too many")

    async def work() -> None:
        async with many() as llm:
            session = llm.session(SYSTEM)
            with pytest.raises(BDHError, match="nothing to write on from"):
                await session.write()
            await taken(await session.send("Hi", letters()))
            before = place(session)
            wrong = [
                (session.send("Hi", letters(n=2)), "n is 2; a session writes one answer at a time"),
                (session.send("\ud800"), "half of one"),
                (session.send(b"Hi"), "is no message"),  # type: ignore[arg-type]
                (session.read(3), "the text is a int"),  # type: ignore[arg-type]
                (session.send("Ho", SamplingParams(regex="(")), "regex"),
                (session.write(letters(), "abc", check=refuse), "^3 tokens are too many"),
                (session.read("abcd", check=refuse), "^4 tokens are too many"),
                (session.send("Ho", check=refuse), "tokens are too many"),
            ]
            for one, message in wrong:
                with pytest.raises(BDHError, match=message):
                    await one
                assert place(session) == before and not session.busy
            llm.llm.engine.queue_size = 0
            others = [llm.stream("x", ENDLESS) for _ in range(2)]
            for other in others:
                await anext(other)
            with pytest.raises(BDHError, match="try again later"):
                await session.send("Ho")
            for other in others:
                await other.aclose()
            assert place(session) == before and await taken(await session.send("Ho", letters()))

    run(work())


def test_it_goes_on_after_the_engine_failed_and_knows_when_it_is_closed() -> None:
    def fail() -> None:
        raise MemoryError("no room")

    async def work() -> None:
        llm = AsyncLLM(Tripwire(small_model(), 2, 9, fail), BYTES)
        session = llm.session(SYSTEM)
        turn = await session.send("Hi", ENDLESS)
        with pytest.raises(RuntimeError, match="no room"):
            await taken(turn)
        assert await taken(await session.write(letters()))
        assert session.transcript[-1]["role"] == "assistant" and len(session.transcript) == 3
        turn = await session.send("Ho", ENDLESS)
        closing = asyncio.create_task(llm.close())
        with pytest.raises(BDHError, match="closed"):
            await taken(turn)
        await closing
        with pytest.raises(BDHError, match="closed"):
            await session.send("Ho")
        assert not session.busy

    run(work())


def test_it_is_saved_and_comes_back_here_and_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    state_dict = BDHForCausalLM.state_dict

    def watched(self: BDHForCausalLM, *args: Any, **kwargs: Any) -> Any:
        looked.append(threading.current_thread().name)
        return state_dict(self, *args, **kwargs)

    monkeypatch.setattr(BDHForCausalLM, "state_dict", watched)
    path = tmp_path / "s"

    async def work() -> None:
        async with many() as llm:
            session = llm.session(SYSTEM, letters())
            await session.read("A document. ")
            text = await taken(await session.send("Hi", letters(stop=("a",))), 4)
            assert text and session.nbytes in (llm.llm.runner.state_nbytes, 0)
            await asyncio.gather(session.save(path, model="small"), session.save(tmp_path / "t"))
            assert read_metadata(path)["model"] == "small"
            with pytest.raises(BDHError, match="is a folder"):
                await session.save(tmp_path)
            again = [await llm.load_session(path) for _ in range(2)]
            there = small_llm().load_session(path)
            expected = await taken(await session.send("And now?"))
            assert expected == "".join(delta.text for delta in there.send("And now?"))
            for one in again:  # each is a session of its own
                assert await taken(await one.send("And now?")) == expected
                assert place(one) == place(session) == place(there)
            assert len(looked) == 2 and not any("MainThread" in name or "engine" in name for name in looked[:1])
            with pytest.raises(BDHError, match="does not exist"):
                await llm.load_session(tmp_path / "none")

    run(work())
