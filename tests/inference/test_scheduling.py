"""Clients share the engine evenly: its slots, whoever came first, and its queue."""

from collections import Counter, defaultdict
from typing import Any

import pytest

from bdh.errors import QueueFull
from bdh.inference.constraint import Grammars
from bdh.inference.engine import Engine
from bdh.inference.request import Event, Request
from bdh.inference.runner import ModelRunner, Runner, make_runner
from bdh.inference.sampling_params import SamplingParams
from bdh.inference.stats import EngineStats, queue_has_room
from tests.inference.small import BYTES, letters, small_model

ENDLESS = letters(max_new_tokens=10**6)
PROMPT = list(b"The dragon")


def engine_of(n_slots: int, **settings: Any) -> Engine:
    return Engine(ModelRunner(small_model(), n_slots), **settings)


def add(engine: Engine, client: str | None, params: SamplingParams = ENDLESS, prompt: list[int] = PROMPT) -> Request:
    request = Request(prompt, params, client=client, keep_state=True)
    engine.add(request)
    return request


def running(engine: Engine) -> Counter[str | None]:
    return Counter(sequence.request.client for sequence in (*engine.reading, *engine.writing))


def finish(engine: Engine, *requests: Request, steps: int = 400) -> dict[str, list[Event]]:
    """The events of a number of steps at most, until some requests have ended."""
    found: dict[str, list[Event]] = defaultdict(list)
    for _ in range(steps):
        for event in engine.step():
            found[event.request_id].append(event)
        if not any(request.id in engine.groups for request in requests):
            return found
    raise AssertionError("they do not come to their end")


def test_a_client_with_many_texts_does_not_keep_another_waiting() -> None:
    engine = engine_of(4)
    add(engine, "many", letters(max_new_tokens=10**6, n=20))
    for _ in range(3):
        engine.step()
    short = add(engine, "few", letters(max_new_tokens=5))
    assert running(engine) == {"many": 4}
    events = finish(engine, short, steps=6)[short.id]
    assert len(events) == 5 and engine.stats.preempted == 1
    engine.step()
    assert running(engine) == {"many": 4} and engine.stats.preempted_nbytes == 0  # it goes on


def test_slots_are_shared_evenly() -> None:
    engine = engine_of(6)
    for client, count in (("a", 9), ("b", 5), ("c", 1)):
        for _ in range(count):
            add(engine, client)
        engine.step()
    assert running(engine) in ({"a": 3, "b": 2, "c": 1}, {"a": 2, "b": 3, "c": 1})
    for _ in range(5):
        engine.step()
    assert engine.stats.preempted <= 4  # no slot goes to and fro
    assert engine.stats.waiting_of == {client: count - running(engine)[client] for client, count in
                                       (("a", 9), ("b", 5), ("c", 1))}  # fmt: skip


def test_clients_take_turns_where_there_is_one_slot() -> None:
    engine = engine_of(1)
    requests = [add(engine, "many", letters(max_new_tokens=2)) for _ in range(6)]
    requests += [add(engine, client, letters(max_new_tokens=2)) for client in ("b", "b", "c")]
    order = []
    while engine.busy:
        for event in engine.step():
            if event.finish_reason:
                order.append(next(str(one.client) for one in requests if one.id == event.request_id))
    assert sorted(order[:3]) == ["b", "c", "many"] and sorted(order[3:5]) == ["b", "many"]


@pytest.fixture(params=["model", "cpu", "gated"])
def runner(request: pytest.FixtureRequest) -> Runner:
    gates: dict[str, Any] = {"decay": "gated", "write": "delta"} if request.param == "gated" else {}
    model = small_model(**gates)
    return ModelRunner(model, 2) if request.param == "model" else make_runner(model, 2)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 12, "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
CASES: list[dict[str, Any]] = [
    {},
    {"frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.4},
    {"n": 2, "min_new_tokens": 5},
    {"regex": "[ab]{20,40}", "logit_bias": None},
    {"logprobs": 2, "top_p": 0.9},
    {"json_schema": SCHEMA, "logit_bias": None, "max_new_tokens": 80},
]


@pytest.mark.parametrize("settings", CASES)
def test_who_gives_up_a_slot_writes_what_it_would_have_written(runner: Runner, settings: dict[str, Any]) -> None:
    """Also in the middle of its prompt; with its penalties, draws, grammar and log-probabilities."""
    params, long = letters(**{"max_new_tokens": 25, **settings}), list(b"A long story of dragons. " * 12)

    def written(interrupted_after: int | None) -> tuple[dict[int, list[int]], Engine]:
        engine = Engine(runner, grammars=Grammars(BYTES, 256), prefix_cache_bytes=0)
        requests = [add(engine, "a", params, long), add(engine, "a", params)]
        events: list[Event] = []
        for _ in range(interrupted_after or 0):
            events += engine.step()
        if interrupted_after is not None:
            add(engine, "b", letters(max_new_tokens=6))
        while engine.busy:
            events += engine.step()
        tokens: dict[int, list[int]] = defaultdict(list)
        for event in events:
            for number, request in enumerate(requests):
                if event.request_id == request.id:
                    assert event.error is None
                    tokens[10 * number + event.index].append(event.token)
        return dict(tokens), engine

    alone, _ = written(None)
    for steps in (1, 2, 9, 14):
        interrupted, engine = written(steps)
        assert interrupted == alone and engine.stats.preempted == 1
        assert sorted(engine.free) == [0, 1] and not engine.waiting and engine.stats.preempted_nbytes == 0


@pytest.mark.parametrize("how", ["cancel", "finish"])
def test_who_waits_for_its_slot_again_can_be_ended(how: str) -> None:
    engine = engine_of(2)
    mine = [add(engine, "a") for _ in range(2)]
    events = [event for _ in range(4) for event in engine.step()]
    add(engine, "b")
    events += engine.step()
    [sequence] = engine.waiting
    assert sequence.saved is not None and sequence.request in mine and engine.stats.preempted_nbytes > 0
    count = sum(event.request_id == sequence.request.id for event in events)
    if how == "cancel":
        engine.cancel(sequence.request.id)
    else:
        state = engine.finish(sequence.request.id, 0)
        assert state is not None and state.length == len(PROMPT) + count - 1
    assert not engine.waiting and sequence.request.id not in engine.groups and running(engine) == {"a": 1, "b": 1}


def test_a_full_queue_takes_those_of_a_client_with_less_than_its_share() -> None:
    engine = engine_of(2, queue_size=6)
    for _ in range(8):
        add(engine, "a")
    with pytest.raises(QueueFull):
        add(engine, "a")
    engine.step()
    for _ in range(3):  # half of the queue
        add(engine, "b")
    with pytest.raises(QueueFull):
        add(engine, "b")
    with pytest.raises(QueueFull):
        add(engine, "c", letters(n=3))
    add(engine, "c", letters(n=2))
    assert engine.stats.waiting_of == {"a": 6, "b": 3, "c": 2}


def test_room_in_a_queue() -> None:
    def has_room(client: str, count: int, waiting: dict[str | None, int]) -> bool:
        stats = EngineStats(waiting=sum(waiting.values()), waiting_of=waiting)
        return queue_has_room(stats, client, count, 8, 0)

    assert has_room("a", 8, {}) and not has_room("a", 9, {})
    assert has_room("a", 3, {"a": 5}) and not has_room("a", 4, {"a": 5})
    assert has_room("b", 4, {"a": 8}) and not has_room("b", 5, {"a": 8}) and not has_room("a", 1, {"a": 8, "b": 0})
    assert has_room("c", 1, {"a": 8, "b": 4, **{str(number): 1 for number in range(20)}})


def test_slots_give_their_memory_back(runner: Runner) -> None:
    """And what is written afterwards is the same."""
    engine = Engine(runner)
    assert engine.stats.slots_nbytes == 0
    written = []
    for _ in range(2):
        request = add(engine, "a", letters(max_new_tokens=20))
        events = finish(engine, request)[request.id]
        written.append([event.token for event in events])
        assert runner.state_nbytes <= engine.stats.slots_nbytes
        add(engine, "a")
        engine.step()
        engine.release()  # does nothing while a slot is in use
        assert engine.stats.slots_nbytes > 0
        for name in list(engine.groups):
            engine.cancel(name)
        engine.release()
        assert engine.stats.slots_nbytes == 0
    assert written[0] == written[1]
