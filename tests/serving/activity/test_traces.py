"""Traces: they tell what the model does, end when they are full or others come, and belong to who made them."""

import asyncio
import base64
import gc
import re
import weakref
from collections.abc import Coroutine
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from bdh.errors import BDHError
from bdh.inference.async_llm import AsyncLLM
from bdh.insight.activity_record import raster_of
from bdh.model import BDHState
from bdh.serving.activity.schemas import BrainChunk, BrainTrace, NeuronDetails, TokenDetails
from bdh.serving.activity.traces import TraceRecorder, TraceStore
from bdh.serving.api.errors import ApiError
from bdh.serving.config import BrainSettings, ModelSettings, ServeConfig
from bdh.serving.model_registry import ServedModel
from tests.inference.small import BYTES, CHAT, letters, small_model

PROMPT = list(b"The dragon said: ")
UNKNOWN = "trc_" + 32 * "0"


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


def tiny_llm() -> AsyncLLM:
    return AsyncLLM(small_model(vocab_size=262), CHAT, max_batch_size=2)


def served_by(llm: AsyncLLM) -> ServedModel:
    return ServedModel(ModelSettings("tiny", name="tiny"), ServeConfig(), llm)


def as_json(model: BaseModel) -> dict[str, Any]:
    return model.model_dump(by_alias=True)


async def watched(
    store: TraceStore, llm: AsyncLLM, prompt: list[int], owner: str | None = None, state: BDHState | None = None
) -> TraceRecorder:
    watch = await store.start(served_by(llm), owner, prompt, state)
    await watch.read_prompt()
    return watch


def missing(store: TraceStore, id: str, owner: str | None = None) -> bool:
    try:
        store.get(id, owner)
    except ApiError as error:
        assert error.status == 404
        return True
    return False


def test_a_text_is_watched_while_it_is_written() -> None:
    async def work() -> None:
        store, told = TraceStore(BrainSettings()), []
        async with tiny_llm() as llm:
            watch = await store.start(served_by(llm), None, PROMPT, None)
            told.append(await watch.read_prompt())
            written = []
            async for delta in llm.stream(PROMPT, letters(262)):
                written += delta.tokens
                told.append(await watch.read(delta.tokens))
            watch.close()
            trace = store.get(watch.id, None)
            whole = as_json(trace.whole())
            assert [token for chunk in told for token in BrainChunk.model_validate(chunk).model_dump()["tokens"]] == (
                BrainTrace.model_validate(whole).model_dump()["tokens"]
            )
            text = PROMPT + written
            assert [token["id"] for token in whole["tokens"]] == text
            assert [token["index"] for token in whole["tokens"]] == list(range(len(text)))
            assert [token["prompt"] for token in whole["tokens"]] == [True] * len(PROMPT) + [False] * len(written)
            assert "".join(token["text"] for token in whole["tokens"]) == bytes(text).decode()
            assert (whole["trace"], whole["model"], whole["bins"]) == (watch.id, "tiny", 128)
            assert (whole["n_layer"], whole["n_head"], whole["n_neurons"]) == (2, 2, 128)

            # What was told is what the model does.
            model = small_model(vocab_size=262)
            with torch.no_grad():
                x = model(torch.tensor([text]), output_hidden_states=True).hidden_states[1][0]  # into layer 1
                X = model.model.layer.encoder(x).relu()
            rasters = torch.tensor([list(base64.b64decode(token["raster"][1])) for token in whole["tokens"]])
            assert (rasters - raster_of(X, 16).long()).abs().max() <= 1
            last = len(text) - 1
            details = TokenDetails.model_validate(await trace.token(last))
            assert (details.index, details.id, details.text) == (last, text[-1], chr(text[-1]))
            layer = details.layers[1]
            assert abs(layer.active - int((X[-1] > 0).sum())) <= 1
            assert abs(layer.neurons[0].activity - float(X[-1].max())) < 1e-4
            assert layer.written and layer.read and all(source.index < last for source in layer.sources)
            assert layer.sources[0].text == chr(text[layer.sources[0].index])
            neuron = NeuronDetails.model_validate(await trace.neuron(1, layer.neurons[0].neuron))
            history = X[:, neuron.neuron]
            assert neuron.of == len(text) and abs(neuron.fired - int((history > 0).sum())) <= 1
            assert neuron.tokens[0].index == int(history.argmax()) and neuron.head == neuron.neuron // 64
            assert all(token.activity > 0 for token in neuron.tokens)

    run(work())


def test_what_there_is_not_is_not_found() -> None:
    async def work() -> None:
        store = TraceStore(BrainSettings())
        async with tiny_llm() as llm:
            trace = (await watched(store, llm, PROMPT)).trace
            for work in (trace.token(len(PROMPT)), trace.neuron(2, 0), trace.neuron(0, 128)):
                with pytest.raises(ApiError) as error:
                    await work
                assert error.value.status == 404
            assert missing(store, UNKNOWN)

    run(work())


def test_long_texts_are_kept_in_part() -> None:
    """Of a prompt the last half of what a trace holds, and all told that is said to be; the text goes on without."""

    async def work() -> None:
        prompt = [97 + i % 26 for i in range(900)]
        async with tiny_llm() as llm:
            watch = await TraceStore(BrainSettings(max_tokens=600)).start(served_by(llm), None, prompt, None)
            first = as_json(await watch.read_prompt())
            assert [token["index"] for token in first["tokens"]] == list(range(44, 300))
            whole = as_json(watch.trace.whole())["tokens"]
            assert [token["id"] for token in whole] == prompt[600:] and whole[44:] == first["tokens"]
            assert watch.trace.record.start == 600 and watch.trace.record.base is not None
            assert as_json(await watch.trace.token(0))["layers"][0]["read"]  # from what came before

            assert len(as_json(await watch.read([97] * 299))["tokens"]) == 299
            assert watch.observer is not None
            told = as_json(await watch.read([98, 99]))
            assert [(token["index"], token["id"], token["prompt"]) for token in told["tokens"]] == [(599, 98, False)]
            assert watch.observer is None  # and its memory is free
            assert as_json(await watch.read([100])) == {"trace": watch.id, "tokens": []}
            assert len(watch.trace.record) == 600

    run(work())


def test_it_goes_on_from_a_state_and_leaves_it_alone() -> None:
    async def work() -> None:
        store = TraceStore(BrainSettings())
        async with tiny_llm() as llm:
            alone = await watched(store, llm, PROMPT)
            assert alone.observer is not None
            state = alone.observer.state.clone()
            before = state.clone()
            watch = await watched(store, llm, list(b"Hello"), state=state)
            assert watch.trace.record.start == len(PROMPT)
            assert all(torch.equal(S, kept) for S, kept in zip(state.synapses, before.synapses, strict=True))
            await alone.read(list(b"Hello"))
            layers = [as_json(await one.trace.token(len(one.trace.record) - 1)) for one in (alone, watch)]
            for one, other in zip(*(view["layers"] for view in layers), strict=True):
                assert [(s["from"], s["to"]) for s in one["read"]] == [(s["from"], s["to"]) for s in other["read"]]
            empty = await store.start(served_by(llm), None, [], state)
            assert as_json(await empty.read_prompt()) == {"trace": empty.id, "tokens": []}
            assert [token["prompt"] for token in as_json(await empty.read([97]))["tokens"]] == [False]

    run(work())


def test_traces_belong_to_who_made_them() -> None:
    async def work() -> None:
        store = TraceStore(BrainSettings())
        async with tiny_llm() as llm:
            mine, everybodys = await watched(store, llm, PROMPT, "key_1"), await watched(store, llm, PROMPT)
            assert store.get(mine.id, "key_1") is mine.trace
            assert missing(store, mine.id) and missing(store, mine.id, "key_2") and missing(store, everybodys.id, "k")
            with pytest.raises(ApiError):
                store.delete(mine.id, "key_2")
            store.delete(mine.id, "key_1")
            assert missing(store, mine.id, "key_1") and len(store) == 1
            assert as_json(await mine.read([97]))["tokens"] == []  # the text goes on

    run(work())


def test_the_trace_longest_out_of_use_goes() -> None:
    async def work() -> None:
        store = TraceStore(BrainSettings(max_traces=3))
        async with tiny_llm() as llm:
            watches = [await watched(store, llm, PROMPT) for _ in range(3)]
            await watches[0].read([97])
            store.get(watches[1].id, None)
            watches.append(await watched(store, llm, PROMPT))
            assert [missing(store, watch.id) for watch in watches] == [False, False, True, False]
            assert watches[2].observer is None and (await watches[2].read([97])).tokens == []
            assert len(watches[2].trace.record) == len(PROMPT)

    run(work())


def test_who_has_most_traces_makes_room() -> None:
    async def work() -> None:
        store = TraceStore(BrainSettings(max_traces=4))
        async with tiny_llm() as llm:
            other = await watched(store, llm, PROMPT, "key_2")  # the one longest out of use
            other.close()
            mine = [await watched(store, llm, PROMPT, "key_1") for _ in range(3)]
            mine[1].close()
            mine += [await watched(store, llm, PROMPT, "key_1") for _ in range(2)]
            assert [missing(store, watch.id, "key_1") for watch in mine] == [True, True, False, False, False]
            assert mine[0].observer is None  # all others were at work, too, and it was the oldest
            others = [other, *[await watched(store, llm, PROMPT, "key_2") for _ in range(2)]]
            assert [missing(store, watch.id, "key_2") for watch in others] == [True, False, False]
            assert [missing(store, watch.id, "key_1") for watch in mine[2:]] == [True, False, False]

    run(work())


def test_others_go_on_while_a_prompt_is_read_and_a_token_studied() -> None:
    async def work() -> None:
        store = TraceStore(BrainSettings())
        async with tiny_llm() as llm:
            stream = llm.stream("a", letters(262, max_new_tokens=10**6))
            await anext(stream)
            start = llm.stats.decode_tokens
            watch = await watched(store, llm, [97] * 1000)
            between = llm.stats.decode_tokens
            await watch.trace.token(999)
            assert between >= start + 10 and llm.stats.decode_tokens >= between + 10
            await stream.aclose()

    run(work())


def test_a_watch_ends_with_what_goes_wrong() -> None:
    async def work() -> None:
        store = TraceStore(BrainSettings())
        async with tiny_llm() as llm:
            watch = await watched(store, llm, PROMPT)
            with pytest.raises(IndexError):
                await watch.read([999])
            assert watch.observer is None and as_json(await watch.read([97]))["tokens"] == []
            left = await watched(store, llm, PROMPT)
        with pytest.raises(BDHError, match="closed"):
            await left.read([97])

    run(work())


def test_the_memory_of_a_watch_goes_with_it() -> None:
    async def work() -> None:
        store = TraceStore(BrainSettings())
        async with tiny_llm() as llm:
            watch = await watched(store, llm, PROMPT)
            assert watch.observer is not None
            id, state = watch.id, weakref.ref(watch.observer.state)
            gc.disable()  # at once, not when somebody clears up
            try:
                del watch
                while state() is not None:  # until the engine's thread has let go of its last work
                    await asyncio.sleep(0.001)
            finally:
                gc.enable()
            assert store.get(id, None).whole().tokens

    run(work())


def test_who_may_not_watch_is_told() -> None:
    async def work() -> None:
        async with tiny_llm() as llm:
            with pytest.raises(ApiError, match="off on this server"):
                await TraceStore(BrainSettings(enabled=False)).start(served_by(llm), None, PROMPT, None)
            llm.llm.model = None
            with pytest.raises(ApiError, match="tiny cannot be watched"):
                await TraceStore(BrainSettings()).start(served_by(llm), None, PROMPT, None)
        for settings in (BrainSettings(max_traces=0), BrainSettings(max_tokens=0)):
            with pytest.raises(BDHError, match=r"serve\.brain\.max_\w+ is 0; it must be at least 1"):
                TraceStore(settings)

    run(work())


def test_texts_of_tokens() -> None:
    async def work() -> None:
        store = TraceStore(BrainSettings())
        async with AsyncLLM(small_model(), BYTES) as llm:
            watch = await watched(store, llm, list("aé\n€\x00".encode()))
            assert [token.text for token in watch.trace.tokens()] == [
                *("a", "<0xC3>", "<0xA9>", "\n", "<0xE2>", "<0x82>", "<0xAC>", "\x00")
            ]
        async with tiny_llm() as llm:
            special = CHAT.all_special_ids[0]
            watch = await watched(store, llm, [special, 97])
            assert watch.trace.text(0) == CHAT.convert_ids_to_tokens(special)
            assert re.fullmatch("trc_[0-9a-f]{32}", watch.id)

    run(work())
