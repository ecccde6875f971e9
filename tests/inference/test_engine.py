"""The engine: what a request gets does not depend on who is beside it, and no slot is ever lost."""

import random
from collections import defaultdict
from typing import Any

import pytest
import torch

from bdh.data.tokenizer import byte_tokenizer
from bdh.errors import BDHError
from bdh.inference.constraint import Grammars
from bdh.inference.engine import Engine, QueueFull
from bdh.inference.request import Event, Request
from bdh.inference.runner import ModelRunner, Runner, make_runner
from bdh.inference.runner_cuda import CUDARunner
from bdh.inference.sampling_params import SamplingParams
from bdh.model import BDHConfig, BDHForCausalLM, BDHState
from tests.inference.small import small_model

MODEL = small_model(3)
GRAMMARS = Grammars(byte_tokenizer(end_of_text=False), 256)
# A beginning that comes again.
SYSTEM = list(b"You are a small dragon and you answer every question in one line, kindly and truly.")


def fast() -> Runner:
    return make_runner(small_model(3), 4)


def engine(runner: Runner | None = None, **settings: Any) -> Engine:
    return Engine(runner or ModelRunner(MODEL, 4), grammars=GRAMMARS, **settings)


def drain(engine: Engine) -> list[Event]:
    events = []
    while engine.busy:
        events += engine.step()
    return events


def texts(events: list[Event]) -> dict[tuple[str, int], list[tuple[Any, ...]]]:
    """What each continuation got: its tokens, log-probabilities to rounding, and end."""
    found = defaultdict(list)
    for event in events:
        logprob = None if event.logprob is None else pytest.approx(event.logprob, abs=1e-3)
        top = event.top and {token: pytest.approx(value, abs=1e-3) for token, value in event.top}
        found[event.request_id, event.index].append((event.token, logprob, top, event.finish_reason))
    return dict(found)


def random_params(rng: random.Random) -> SamplingParams:
    chosen: dict[str, Any] = {"max_new_tokens": rng.randint(1, 16), "seed": rng.randrange(2**63)}
    choices: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": rng.choice([0.5, 1.0, 1.5])},
        {"top_k": rng.choice([1, 5, 40])},
        {"top_p": 0.9, "min_p": 0.01},
        {"typical_p": 0.8},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"logit_bias": {101: 5.0, 32: -100.0}},
        {"stop_token_ids": tuple(range(0, 256, 7)), "min_new_tokens": 1},
        {"logprobs": rng.choice([0, 3])},
        {"n": 2, "best_of": 3},
        {"regex": "[a-f]{3,9}"},
    ]
    for extra in rng.sample(choices, 2):
        chosen |= extra
    if chosen.get("temperature") == 0.0:
        chosen.pop("best_of", None)
    return SamplingParams(**chosen)


def random_request(rng: random.Random, name: str) -> Request:
    prompt = [rng.randrange(256) for _ in range(rng.choice([1, 2, 5, 20, 70, 150]))]
    return Request((SYSTEM if rng.random() < 0.4 else []) + prompt, random_params(rng), id=name)


@pytest.mark.parametrize("kind", ["plain", "fast"])
def test_200_random_requests_each_equal_to_running_alone(kind: str) -> None:
    """Random lengths, settings, arrivals and cancels; a small prefix cache; long prompts in chunks."""
    rng = random.Random(7)
    requests = [random_request(rng, f"request {i}") for i in range(200)]
    state_bytes = 4 * MODEL.config.n_layer * MODEL.config.n_neurons * MODEL.config.n_embd
    shared = engine(fast() if kind == "fast" else None, prefill_chunk=64, prefix_cache_bytes=3 * state_bytes)
    alone = engine(fast() if kind == "fast" else None, prefix_cache_bytes=0)
    events, cancelled, to_come = [], set(), list(requests)
    while to_come or shared.busy:
        for _ in range(min(len(to_come), rng.choice([0, 0, 1, 2, 6]))):
            shared.add(to_come.pop(0))
        events += shared.step()
        if shared.busy and rng.random() < 0.05:
            name = rng.choice(sorted(shared.groups))
            shared.cancel(name)
            cancelled.add(name)
    assert shared.stats.prefix_hits > 5
    assert 5 < len(cancelled) < 100
    assert sorted(shared.free) == [0, 1, 2, 3]
    got = texts(events)
    for request in requests:
        alone.add(request)
        expected = texts(drain(alone))
        for key, tokens in expected.items():
            if request.id in cancelled:  # what came before is the same; it may have ended before it was cancelled
                assert tokens[: len(got.get(key, []))] == got.get(key, [])
            else:
                assert got[key] == tokens, request


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_slot_is_lost(count: int) -> None:
    rng = random.Random(1)
    shared, started = engine(fast(), queue_size=10**5), 0
    while started < count or shared.busy:
        if started < count and rng.random() < 0.7:
            best_of = rng.choice([1, 1, 3])
            params = SamplingParams(max_new_tokens=rng.randint(1, 3), best_of=best_of, stop_token_ids=(32, 101))
            shared.add(Request([rng.randrange(256) for _ in range(rng.randint(1, 3))], params))
            started += 1
        if shared.busy and rng.random() < 0.3:
            name = rng.choice(list(shared.groups))
            shared.cancel(name, rng.choice([None, 0, 1]))
        for event in shared.step():
            if event.finish_reason is None and rng.random() < 0.1:
                shared.finish(event.request_id, event.index)
    assert sorted(shared.free) == [0, 1, 2, 3]
    assert not (shared.groups or shared.waiting or shared.reading or shared.writing)
    assert shared.stats.running == shared.stats.waiting == 0
    assert shared.stats.finished > count / 3 and shared.stats.cancelled > count / 10


def test_a_long_prompt_does_not_stall_the_others() -> None:
    shared = engine(prefill_chunk=64)
    shared.add(Request([1, 2], SamplingParams(max_new_tokens=40), id="short"))
    shared.step()
    shared.add(Request([3] * 640, SamplingParams(max_new_tokens=1), id="long"))
    shared.add(Request([4, 5], SamplingParams(max_new_tokens=2), id="behind"))
    rounds = [{event.request_id for event in shared.step()} for _ in range(12)]
    assert all("short" in events for events in rounds)  # a token in every step
    assert "behind" in rounds[1]  # it need not wait until the long prompt is read
    assert "long" in rounds[9] | rounds[10]


def test_n_answers_read_the_prompt_once() -> None:
    params = SamplingParams(max_new_tokens=3, n=6, seed=5)
    shared = engine()
    shared.add(Request(SYSTEM, params))
    assert len(texts(drain(shared))) == 6
    assert shared.stats.prefill_tokens == len(SYSTEM)


def test_the_reader_of_a_group_may_be_cancelled() -> None:
    params = SamplingParams(max_new_tokens=4, n=3, seed=5)
    shared, alone = engine(prefill_chunk=64), engine()
    shared.add(Request(SYSTEM, params, id="a"))
    shared.step()
    shared.cancel("a", 0)  # in the middle of the prompt
    got = texts(drain(shared))
    alone.add(Request(SYSTEM, params, id="a"))
    expected = texts(drain(alone))
    assert got == {key: value for key, value in expected.items() if key[1] != 0}


def test_common_beginnings_are_read_once() -> None:
    shared = engine()
    for i, ending in enumerate(("one?", "two?", "three?")):
        shared.add(Request([*SYSTEM, *ending.encode()], SamplingParams(max_new_tokens=2)))
        drain(shared)
        assert shared.stats.prefix_hits == (1 if i == 2 else 0)  # the second time it is seen to be common and kept
    assert shared.stats.prefix_tokens_saved == 64  # of the 83 they share: whole grains
    state = next(iter(shared.prefixes.states.values()))
    assert int(state.position) == 64


def test_kept_beginnings_stay_within_their_bytes() -> None:
    one = 4 * MODEL.config.n_layer * MODEL.config.n_neurons * MODEL.config.n_embd
    shared = engine(prefix_cache_bytes=2 * one)
    for i in range(12):
        shared.add(Request([i % 4] * 70 + [i], SamplingParams(max_new_tokens=1)))
        drain(shared)
        assert shared.prefixes.nbytes == one * len(shared.prefixes) <= 2 * one


def test_a_state_is_gone_on_from_and_handed_back() -> None:
    shared, params = engine(), SamplingParams(max_new_tokens=5, temperature=0)
    shared.add(Request(SYSTEM, params, keep_state=True))
    first = drain(shared)
    tokens = [event.token for event in first]
    state = first[-1].state
    assert state is not None and int(state.position) == len(SYSTEM) + 4  # the last token was not read
    before = [S.clone() for S in state.synapses]
    shared.add(Request([tokens[-1], 65], params, state=state))
    after = [event.token for event in drain(shared)]
    assert all(torch.equal(S, old) for S, old in zip(state.synapses, before, strict=True))
    shared.add(Request([*SYSTEM, *tokens, 65], params))
    assert [event.token for event in drain(shared)] == after


def test_finish_hands_over_the_state_at_the_last_token() -> None:
    shared, params = engine(), SamplingParams(max_new_tokens=50, temperature=0)
    name = shared.add(Request(SYSTEM, params, keep_state=True))
    while not any(event.index == 0 for event in shared.step()):
        pass
    shared.step()
    state = shared.finish(name, 0)
    assert isinstance(state, BDHState) and int(state.position) == len(SYSTEM) + 1
    assert not shared.busy and len(shared.free) == 4


def test_the_queue_is_bounded() -> None:
    shared = engine(queue_size=2)
    for _ in range(6):  # four slots and two places
        shared.add(Request([1], SamplingParams(max_new_tokens=3)))
    with pytest.raises(QueueFull, match="6 requests wait already"):
        shared.add(Request([1]))
    drain(shared)
    shared.add(Request([1], SamplingParams(max_new_tokens=1)))
    assert len(drain(shared)) == 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "the prompt is empty"),
        (Request([256]), "its tokens are 0 to 255"),
        (Request([-1]), "its tokens are 0 to 255"),
        (Request([1], SamplingParams(logit_bias={300: 1.0})), "300"),
        (Request([1], SamplingParams(num_beams=2)), "num_beams"),
        (Request([1], SamplingParams(regex="")), "nothing but an empty text"),
        (Request([1], SamplingParams(regex="(")), "regex"),
    ],
)
def test_what_cannot_be_done_is_refused(request_: Request, message: str) -> None:
    shared = engine()
    with pytest.raises(BDHError, match=message):
        shared.add(request_)
    assert not shared.busy
    shared.add(Request([1], id="same"))
    with pytest.raises(BDHError, match="an id of its own"):
        shared.add(Request([1], id="same"))


def test_without_grammars_constraints_are_refused() -> None:
    with pytest.raises(BDHError, match="need a tokenizer"):
        Engine(ModelRunner(MODEL, 1)).add(Request([1], SamplingParams(regex="a")))


def test_prompts_of_one_token_on_the_runner_for_gpus() -> None:
    """Its steps share buffers: what one leaves must outlast the next."""
    config = BDHConfig(n_layer=1, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, initializer_range=0.5)
    torch.manual_seed(5)
    model = BDHForCausalLM(config).eval()
    params = SamplingParams(temperature=0, max_new_tokens=3)
    prompts = ([10, 20, 30], [65], [66], [200])
    alone, shared = engine(ModelRunner(model, 1)), engine(CUDARunner(model, 4))
    shared.add(Request(prompts[0], params, id="0"))
    events = shared.step()
    for i, prompt in enumerate(prompts[1:], 1):
        shared.add(Request(prompt, params, id=str(i)))
    events += drain(shared)
    for i, prompt in enumerate(prompts):
        alone.add(Request(prompt, params, id=str(i)))
        for key, tokens in texts(drain(alone)).items():
            assert texts(events)[key] == tokens


def test_a_failed_prompt_leaves_nothing_in_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = small_model(3), SamplingParams(temperature=0, max_new_tokens=5)
    shared = engine(make_runner(model, 1))
    shared.add(Request(SYSTEM, params))
    expected = [event.token for event in drain(shared)]
    layer, calls = model.model.layer, iter(range(10))
    forward = layer.forward

    def fails_once(*args: Any) -> Any:
        if next(calls) == 1:  # the first layer has written its synapses
            raise MemoryError
        return forward(*args)

    monkeypatch.setattr(layer, "forward", fails_once)
    fresh = engine(shared.runner)
    fresh.add(Request([7] * 40, params))
    with pytest.raises(MemoryError):
        fresh.step()
    monkeypatch.undo()
    fresh = engine(shared.runner)
    fresh.add(Request(SYSTEM, params))
    assert [event.token for event in drain(fresh)] == expected


def test_a_grammar_at_its_limits_ends_its_own_request_only() -> None:
    options = [
        {"type": "object", "properties": {f"k{i % 5}": {"type": "integer"}, f"z{i}": {"$ref": "#"}}} for i in range(200)
    ]
    shared, params = engine(), SamplingParams(max_new_tokens=8, seed=1)
    shared.add(Request([1, 2], params, id="innocent"))
    shared.add(Request([1, 2], SamplingParams(json_schema={"anyOf": options}, max_new_tokens=8), id="greedy"))
    events = drain(shared)
    failed = [event for event in events if event.error is not None]
    assert [event.request_id for event in failed] == ["greedy"] and failed[0].token == -1
    assert sum(event.request_id == "innocent" for event in events) == 8
    assert len(shared.free) == 4


def test_the_state_after_a_prompt_is_let_go_when_nobody_waits_for_it() -> None:
    shared = engine()
    name = shared.add(Request([1, 2, 3], SamplingParams(max_new_tokens=50, n=6)))
    shared.step()
    shared.step()
    for index in range(4, 6):
        shared.cancel(name, index)
    assert shared.stats.waiting == 0 and shared.stats.running == 4
    assert shared.groups[name].after_prompt is None


def test_more_continuations_than_can_wait_are_refused() -> None:
    with pytest.raises(BDHError, match="ask for 12 at most"):
        engine(queue_size=8).add(Request([1], SamplingParams(n=10**9)))


def test_a_state_of_another_model_is_refused() -> None:
    other = BDHState.zeros(BDHConfig(n_layer=2, n_embd=8, n_head=2, mlp_internal_dim_multiplier=8), 1)
    with pytest.raises(BDHError, match="not one sequence of this model"):
        engine().add(Request([1], state=other))
