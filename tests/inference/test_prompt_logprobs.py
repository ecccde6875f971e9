"""Log-probabilities of a prompt's tokens: from the one read that also leads to the first token written."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bdh.inference.engine import Engine
from bdh.inference.outputs import token_logprobs
from bdh.inference.request import Event, PromptLogprobs, Request
from bdh.inference.runner import ModelRunner, Runner, make_runner
from bdh.model import BDHForCausalLM
from tests.inference.small import letters, small_model

TEXT = list(b"The dragon that hatches looks around, and remembers what it sees. " * 4)  # more than four chunks


def events_of(engine: Engine, *requests: Request) -> dict[str, list[Event]]:
    found: dict[str, list[Event]] = {request.id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.busy:
        for event in engine.step():
            found[event.request_id].append(event)
    return found


def scores_of(events: list[Event]) -> PromptLogprobs:
    """The scores that one of the events has, as the first of its continuation."""
    [event] = [event for event in events if event.prompt_logprobs is not None]
    assert event is next(one for one in events if one.index == event.index)
    assert event.prompt_logprobs is not None
    return event.prompt_logprobs


@torch.inference_mode()
def expected_logprobs(model: BDHForCausalLM, prompt: list[int]) -> Tensor:
    """By the model's own forward: (T, V)."""
    return model(torch.tensor([prompt])).logits[0].log_softmax(-1)


@pytest.fixture(params=["model", "cpu", "gated"])
def runner(request: pytest.FixtureRequest) -> Runner:
    gates: dict[str, Any] = {"decay": "gated", "write": "delta"} if request.param == "gated" else {}
    model = small_model(**gates)
    return ModelRunner(model, 3) if request.param == "model" else make_runner(model, 3)


@pytest.mark.parametrize("length", [1, 2, 5, 64, 65, 67, 200])
def test_scores_are_the_models(runner: Runner, length: int) -> None:
    engine, prompt = Engine(runner), TEXT[:length]
    request = Request(prompt, letters(max_new_tokens=3, n=2), prompt_logprobs=3)
    scores = scores_of(events_of(engine, request)[request.id])
    logprobs = expected_logprobs(runner.model, prompt)  # type: ignore[attr-defined]
    assert scores.logprobs.shape == (length - 1,) and scores.top_tokens.shape == (length - 1, 3)
    chosen = logprobs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    best = logprobs[:-1].topk(3)
    assert torch.allclose(torch.from_numpy(scores.logprobs), chosen, atol=1e-4)
    assert torch.allclose(torch.from_numpy(scores.top_logprobs), best.values, atol=1e-4)
    for one, token in zip(token_logprobs(prompt[1:], scores), prompt[1:], strict=True):
        assert one.token == token and len(one.top) == 3 and one.top == sorted(one.top, key=lambda pair: -pair[1])


def test_what_is_written_is_the_same(runner: Runner) -> None:
    """Beside others, and after the same prompt was kept: a scored prompt is read once, and from its beginning."""
    engine = Engine(runner)
    plain = [Request(TEXT, letters(max_new_tokens=4)) for _ in range(3)]
    alone = [events_of(engine, request)[request.id] for request in plain]
    read = engine.counts.prefill_tokens
    scored = [Request(TEXT, letters(max_new_tokens=4), prompt_logprobs=0) for _ in range(4)]
    together = events_of(engine, *scored)
    assert engine.counts.prefill_tokens - read == 4 * len(TEXT)
    for request in scored:
        events = together[request.id]
        assert [event.token for event in events] == [event.token for event in alone[0]]
        assert events[0].cached == 0 and scores_of(events).top_tokens.shape == (len(TEXT) - 1, 0)
    after = Request(TEXT, letters(max_new_tokens=1))
    assert events_of(engine, after)[after.id][0].cached == 256


def test_a_prompt_is_scored_though_its_first_reader_is_cancelled() -> None:
    engine = Engine(ModelRunner(small_model(), 3))
    request = Request(TEXT, letters(max_new_tokens=2, n=2), prompt_logprobs=1)
    engine.add(request)
    assert engine.step() == []  # in the middle of the prompt
    engine.cancel(request.id, 0)
    events: list[Event] = []
    while engine.busy:
        events += engine.step()
    assert {event.index for event in events} == {1} and len(scores_of(events).logprobs) == len(TEXT) - 1


class Sparing(ModelRunner):
    """A runner whose logits of whole prompts nobody has to ask for."""

    def prefill_logits(self, slot: int, tokens: Any) -> Iterator[Tensor]:
        raise AssertionError("no request asked for log-probabilities of its prompt")


def test_other_prompts_are_read_without_their_logits() -> None:
    engine = Engine(Sparing(small_model(), 1))
    request = Request(TEXT, letters(max_new_tokens=2, logprobs=2))
    assert all(event.prompt_logprobs is None for event in events_of(engine, request)[request.id])
