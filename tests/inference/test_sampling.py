"""Sampling: against a slow reference written from the definitions, and alone against in company."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bdh.errors import BDHError
from bdh.inference.sampling import Sampled, Sampler, mix, uniforms
from bdh.inference.sampling_params import SamplingParams

CPU = torch.device("cpu")
PLAIN = SamplingParams(temperature=1.0)


# The reference: one row at a time, in float64, from the definitions


def reference(
    logits: np.ndarray,
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    may_come: Sequence[int],
    nudge: float = 0.0,
) -> np.ndarray:
    """The distribution of the next token, (V,) float64; thresholds are moved by `nudge` of themselves."""
    scores = logits.astype(np.float64)
    for token, bias in (params.logit_bias or {}).items():
        scores[token] += np.float32(bias)
    for token in {*prompt, *output}:
        penalty = params.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token, count in Counter(output).items():
        scores[token] -= params.presence_penalty + params.frequency_penalty * count
    left = list(may_come)
    result = np.zeros(len(scores))
    if params.greedy:
        result[max(left, key=lambda token: (scores[token], -token))] = 1.0
        return result
    scores = scores / params.temperature
    if params.typical_p < 1:
        p = softmax(scores, left)
        surprisal = {token: -math.log(p[token]) if p[token] else math.inf for token in left}
        entropy = sum(p[token] * surprisal[token] for token in left if p[token])
        order = sorted(left, key=lambda token: (round(abs(surprisal[token] - entropy), 10), token))
        left = until(order, p, params.typical_p * (1 + nudge))
    by_likelihood = sorted(left, key=lambda token: (-scores[token], token))
    if params.top_k:
        left = by_likelihood = by_likelihood[: params.top_k]
    if params.top_p < 1:
        left = until(by_likelihood, softmax(scores, left), params.top_p * (1 + nudge))
    p = softmax(scores, left)
    least = min(params.min_p * (1 + nudge), 1.0) * max(p.values())
    for token, share in softmax(scores, [token for token in left if p[token] >= least]).items():
        result[token] = share
    return result


def softmax(scores: np.ndarray, tokens: Sequence[int]) -> dict[int, float]:
    greatest = max(scores[token] for token in tokens)
    if greatest == -math.inf:
        return {token: 1 / len(tokens) for token in tokens}
    powers = {token: math.exp(scores[token] - greatest) for token in tokens}
    return {token: power / sum(powers.values()) for token, power in powers.items()}


def until(order: Sequence[int], p: Mapping[int, float], mass: float) -> list[int]:
    """The first tokens that hold `mass`, the one that reaches it included."""
    kept: list[int] = []
    for token in order:
        kept.append(token)
        if sum(p[token] for token in kept) >= mass:
            break
    return kept


def plain_uniform(seed: int, step: int) -> float:
    """The random number of a seed's step, with Python's whole numbers."""

    def plain_mix(number: int) -> int:
        number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) % 2**64
        return number ^ (number >> 31)

    return (plain_mix((plain_mix(seed) + (step + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 11) / 2**53


@dataclass
class Sequenced:
    """A request as the tests follow it: what it asked for, and what it got."""

    params: SamplingParams
    prompt: list[int]
    seed: int
    allowed: list[int] | None = None
    forbidden: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)

    def may_come(self, size: int) -> list[int]:
        allowed = [token for token in range(size) if self.allowed is None or token in self.allowed]
        return [token for token in allowed if token not in self.forbidden] or allowed

    def mask(self, size: int) -> Tensor:
        return torch.tensor([token in (self.allowed or ()) for token in range(size)])


def masks(requests: Mapping[int, Sequenced], size: int) -> dict[str, Any]:
    """The last two arguments of `sample` for requests by slot."""
    allowed = {slot: request.mask(size) for slot, request in requests.items() if request.allowed is not None}
    forbidden = {slot: request.forbidden for slot, request in requests.items() if request.forbidden}
    return {"allowed": allowed, "forbidden": forbidden}


def some(plain: float, *others: float) -> st.SearchStrategy[float]:
    """A setting: often one that does nothing."""
    return st.just(plain) | st.sampled_from(others)


@st.composite
def requests_of(draw: st.DrawFn, size: int) -> Sequenced:
    tokens = st.lists(st.integers(0, size - 1), max_size=4)
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.3, 0.8, 1.0, 1.7, 50.0])),
        top_k=int(draw(some(0, 1, 2, 5, 40, 1000))),
        top_p=draw(some(1.0, 0.01, 0.37, 0.9, 0.999)),
        min_p=draw(some(0.0, 0.02, 0.3, 1.0)),
        typical_p=draw(some(1.0, 0.05, 0.43, 0.95)),
        repetition_penalty=draw(some(1.0, 0.7, 1.3)),
        presence_penalty=draw(some(0.0, -0.9, 1.1)),
        frequency_penalty=draw(some(0.0, -0.4, 0.6)),
        logit_bias=draw(
            st.none() | st.dictionaries(st.integers(0, size - 1), st.sampled_from([-100.0, -1.3, 0.1, 4.0, 100.0]))
        ),
        logprobs=draw(st.none() | st.integers(0, 5)),
    )
    allowed = draw(st.none() | st.lists(st.integers(0, size - 1), min_size=1))
    return Sequenced(params, draw(tokens), draw(st.integers(0, 2**64 - 1)), allowed, draw(tokens))


@st.composite
def logits_of(draw: st.DrawFn, rows: int, size: int) -> Tensor:
    """(rows, size) float32: some smooth, some with many equals, some with -inf."""
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    values = random.normal(size=(rows, size)) * draw(st.sampled_from([0.0, 0.5, 3.0, 20.0]))
    if draw(st.booleans()):
        values = values.round()
    if draw(st.booleans()):
        values[random.random(values.shape) < draw(st.sampled_from([0.1, 0.9]))] = -np.inf
    return torch.from_numpy(values.astype(np.float32))


@given(st.data())
@settings(max_examples=150)
def test_distributions_and_tokens_are_those_of_the_definitions(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([1, 2, 3, 7, 16, 33, 100, 256, 300]))
    rows = data.draw(st.integers(1, 4))
    requests = {slot: data.draw(requests_of(size)) for slot in data.draw(st.permutations(range(4)))[:rows]}
    sampler = Sampler(4, size, CPU)
    for slot, request in requests.items():
        sampler.add(slot, request.params, request.prompt, request.seed)
    for step in range(3):
        logits = data.draw(logits_of(rows, size))
        before = logits.clone()
        found = sampler.probabilities(logits, list(requests), **masks(requests, size)).numpy()
        sampled = sampler.sample(logits, list(requests), **masks(requests, size))
        assert torch.equal(logits, before)
        for row, request in enumerate(requests.values()):
            asked = logits[row].numpy(), request.params, request.prompt, request.output, request.may_come(size)
            near = [reference(*asked, nudge) for nudge in (0.0, -1e-9, 1e-9)]  # where a sum lies on its threshold
            expected = next((p for p in near if np.allclose(found[row], p, rtol=0, atol=1e-8)), None)
            assert expected is not None, (found[row], near[0])
            token = sampled.tokens[row]
            if request.params.greedy:
                assert expected[token] == 1
            else:
                until_token = expected[:token].sum()
                u = plain_uniform(request.seed, step)
                assert until_token - 1e-8 <= u <= until_token + expected[token] + 1e-8
            assert expected[token] > 0 and token in request.may_come(size)
            request.output.append(token)


@given(st.data())
@settings(max_examples=60)
def test_company_and_slot_change_nothing(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([1, 5, 64, 255]))
    requests = {slot: data.draw(requests_of(size)) for slot in data.draw(st.permutations(range(5)))[:3]}
    together = Sampler(5, size, CPU)
    alone = {slot: Sampler(1, size, CPU) for slot in requests}
    for slot, request in requests.items():
        together.add(slot, request.params, request.prompt, request.seed)
        alone[slot].add(0, request.params, request.prompt, request.seed)
    for _ in range(3):
        logits = data.draw(logits_of(3, size))
        distributions = together.probabilities(logits, list(requests), **masks(requests, size))
        sampled = together.sample(logits, list(requests), **masks(requests, size))
        for row, (slot, request) in enumerate(requests.items()):
            its = logits[row : row + 1], [0]
            masked = masks({0: request}, size)
            assert torch.equal(alone[slot].probabilities(*its, **masked)[0], distributions[row])
            single = alone[slot].sample(*its, **masked)
            assert single.tokens == sampled.tokens[row : row + 1]
            if request.params.logprobs is not None:
                assert sampled.logprobs is not None and sampled.top is not None
                assert single.logprobs == pytest.approx([sampled.logprobs[row]], abs=1e-12, nan_ok=True)
                assert single.top is not None and dict(single.top[0]) == pytest.approx(
                    dict(sampled.top[row]), nan_ok=True
                )


def test_a_request_that_joins_and_leaves_changes_nothing() -> None:
    """One request through its steps, while others come to its batch and go, at other rows and with other settings."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, 6, 50, generator=generator)
    params = SamplingParams(temperature=0.9, top_p=0.8, frequency_penalty=0.5)
    alone, together = Sampler(1, 50, CPU), Sampler(6, 50, CPU)
    alone.add(0, params, [1, 2], seed=9)
    together.add(3, params, [1, 2], seed=9)
    for step in range(40):
        others = [slot for slot in (0, 1, 2, 4, 5) if (step >> slot) % 2]
        for slot in others:
            together.add(slot, SamplingParams(top_k=slot + 1, repetition_penalty=1.5, typical_p=0.5), [3], seed=step)
        slots = [*others[:2], 3, *others[2:]]
        row = slots.index(3)
        found = together.sample(logits[step, : len(slots)], slots).tokens[row]
        assert alone.sample(logits[step, row : row + 1], [0]).tokens == [found]
        for slot in others:
            together.remove(slot)


# Randomness


def fits(counts: np.ndarray, probabilities: np.ndarray) -> bool:
    """Whether counts (V,) fit a distribution: chi-square, made normal (Wilson and Hilferty), within 4 deviations."""
    assert counts[probabilities == 0].sum() == 0
    counts, probabilities = counts[probabilities > 0], probabilities[probabilities > 0]
    expected = probabilities * counts.sum()
    assert expected.min() > 5, "too few draws for a test"
    degrees = len(counts) - 1
    spread = 2 / (9 * degrees)
    ratio = ((counts - expected) ** 2 / expected).sum() / degrees
    return abs(ratio ** (1 / 3) - (1 - spread)) / math.sqrt(spread) < 4


@pytest.mark.parametrize(
    "params",
    [
        PLAIN,
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=1.5, top_k=7),
        SamplingParams(temperature=1.0, top_p=0.8, logit_bias={3: 1.0}),
        SamplingParams(temperature=1.0, typical_p=0.7, min_p=0.05),
    ],
    ids=["plain", "cold", "top-k", "top-p", "typical"],
)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(2))
    expected = reference(logits.numpy(), params, [], [], range(20))
    by_step = Sampler(1, 20, CPU)
    by_step.add(0, params, [], seed=1)
    steps = [by_step.sample(logits[None], [0]).tokens[0] for _ in range(4000)]
    by_seed = Sampler(4000, 20, CPU)
    for seed in range(4000):
        by_seed.add(seed, params, [], seed)
    seeds = by_seed.sample(logits.expand(4000, -1), range(4000)).tokens
    for tokens in (steps, seeds):
        assert fits(np.bincount(tokens, minlength=20), expected)


def test_random_numbers_are_those_of_plain_arithmetic() -> None:
    seeds = [0, 1, 2, 12345, 2**63 - 1, 2**64 - 1]
    steps = [0, 1, 2, 1000, 2**40]
    streams = mix(np.array([seed for seed in seeds for _ in steps], np.uint64))
    found = uniforms(streams, np.array([step for _ in seeds for step in steps], np.uint64))
    assert found.tolist() == [plain_uniform(seed, step) for seed in seeds for step in steps]


def test_random_numbers_of_neighbours_have_nothing_to_do_with_each_other() -> None:
    streams, steps = np.meshgrid(mix(np.arange(200, dtype=np.uint64)), np.arange(200, dtype=np.uint64))
    numbers = uniforms(streams, steps)  # (steps, seeds)
    assert 0 <= numbers.min() and numbers.max() < 1 and len(np.unique(numbers)) == numbers.size
    assert fits(np.histogram(numbers, 100, (0, 1))[0], np.full(100, 0.01))
    for one, next_one in ((numbers[:-1], numbers[1:]), (numbers[:, :-1], numbers[:, 1:])):
        pairs = np.histogram2d(one.ravel(), next_one.ravel(), 20, [[0, 1], [0, 1]])[0]
        assert fits(pairs.ravel(), np.full(400, 1 / 400))


def test_seeds_and_steps_make_the_difference_and_a_new_request_starts_over() -> None:
    logits = torch.zeros(1, 1000)
    sampler = Sampler(3, 1000, CPU)
    drawn = []
    for slot, seed in ((0, 5), (2, 5), (1, 6), (0, 5)):
        sampler.add(slot, PLAIN, [], seed)
        drawn.append([sampler.sample(logits, [slot]).tokens[0] for _ in range(20)])
    assert drawn[0] == drawn[1] == drawn[3] != drawn[2]
    assert len(set(drawn[0])) > 15


def test_the_random_number_zero_draws_the_first_possible_token() -> None:
    sampler = Sampler(1, 4, CPU)
    sampler.add(0, PLAIN, [], 0)
    sampler.streams[0] = 2**64 - 0x9E3779B97F4A7C15
    assert uniforms(sampler.streams, sampler.steps)[0] == 0
    assert sampler.sample(torch.tensor([[-math.inf, -math.inf, 0.0, 0.0]]), [0]).tokens == [2]


def test_looking_at_probabilities_draws_nothing() -> None:
    logits = torch.zeros(1, 100)
    sampler = Sampler(1, 100, CPU)
    sampler.add(0, replace(PLAIN, presence_penalty=2.0), [], 3)
    first = sampler.probabilities(logits, [0])
    assert torch.equal(sampler.probabilities(logits, [0]), first)
    assert sampler.sample(logits, [0]).tokens == [int(plain_uniform(3, 0) * 100)]


# What is kept, where it matters which


def kept(params: SamplingParams, logits: list[float]) -> list[int]:
    sampler = Sampler(1, len(logits), CPU)
    sampler.add(0, params, [], 0)
    return sampler.probabilities(torch.tensor([logits]), [0])[0].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("change", "logits", "expected"),
    [
        ({"top_k": 2}, [1.0, 1.0, 1.0, 0.0], [0, 1]),
        ({"top_k": 2}, [0.0, 1.0, 2.0, 1.0], [1, 2]),
        ({"top_k": 1}, [0.0, 3.0, 3.0], [1]),
        ({"top_k": 9}, [0.0, 3.0, 3.0], [0, 1, 2]),
        ({"top_p": 0.5}, [0.0] * 4, [0, 1]),  # two hold exactly a half
        ({"top_p": 0.51}, [0.0] * 4, [0, 1, 2]),  # the one that crosses stays
        ({"top_p": 0.9}, [0.0] * 10, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ({"top_p": 1e-9}, [0.0, 1.0, 0.5], [1]),
        ({"min_p": 1.0}, [1.0, 0.5, 1.0], [0, 2]),
        ({"min_p": 0.5}, [0.0, -0.69, -0.70], [0, 1]),
        ({"typical_p": 0.5}, [0.0] * 4, [0, 1]),
        # 0.4 and six of 0.1: the likeliest, too expected, is the last to be taken
        ({"typical_p": 0.55}, [math.log(4.0), *[0.0] * 6], [1, 2, 3, 4, 5, 6]),
        # half the mass goes to 0, then top-p is of what is left
        ({"top_k": 2, "top_p": 0.5}, [0.0] * 8, [0]),
        ({"top_p": 0.5, "min_p": 0.9}, [1.0, 1.0, 0.0, -5.0], [0, 1]),
    ],
)
def test_which_tokens_are_kept(change: dict[str, Any], logits: list[float], expected: list[int]) -> None:
    assert kept(replace(PLAIN, **change), logits) == expected


@pytest.mark.parametrize("temperature", [0.0, 9e-6])
def test_greedy_takes_the_first_of_the_likeliest_whatever_filters_say(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_k=3, typical_p=0.1)
    assert params.greedy and kept(params, [0.0, 4.0, 4.0, 3.0]) == [1]
    sampler = Sampler(2, 4, CPU)
    sampler.add(0, params, [], 0)
    sampler.add(1, replace(PLAIN, top_p=0.9), [], 0)
    rows = torch.tensor([[0.0, 4.0, 4.0, 3.0]] * 2)
    assert sampler.sample(rows[:1], [0]).tokens == [1] and sampler.sample(rows, [1, 0]).tokens[1] == 1


def test_penalties_count_what_they_should() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.0, 0.5]])

    def scores(params: SamplingParams, prompt: list[int], output: list[int]) -> list[float]:
        """What the logits became, up to a constant, after `output` was made to come."""
        sampler = Sampler(2, 5, CPU)
        sampler.add(1, params, prompt, 0)
        for token in output:
            only = torch.full((1, 5), -torch.inf)
            only[0, token] = 0.0
            assert sampler.sample(only, [1]).tokens == [token]
        found = sampler.probabilities(logits, [1])[0].log()
        return (found - found[3]).tolist()  # a token that nothing happens to

    plain = {"temperature": 1.0}
    cases: list[tuple[dict[str, float], list[float]]] = [
        ({"repetition_penalty": 2.0}, [1.0, -4.0, 0.5, 0.0, 0.5]),  # in the prompt: 0 twice, 1; in the output: 2 thrice
        ({"presence_penalty": 0.5}, [2.0, -2.0, 0.5, 0.0, 0.5]),
        ({"frequency_penalty": 0.5}, [2.0, -2.0, -0.5, 0.0, 0.5]),
        ({"presence_penalty": 1.0, "frequency_penalty": -1.0}, [2.0, -2.0, 3.0, 0.0, 0.5]),
        ({"repetition_penalty": 2.0, "presence_penalty": 0.25}, [1.0, -4.0, 0.25, 0.0, 0.5]),
    ]
    for change, expected in cases:
        assert scores(SamplingParams(**plain | change), [0, 0, 1], [2, 2, 2]) == pytest.approx(expected)  # type: ignore[arg-type]


def test_rounding_errors_do_not_part_equals() -> None:
    """-1 times 0.7 plus 1.7 is 1 but for the last bit; of two tokens as typical the smaller id stays."""
    penalties = {"repetition_penalty": 0.7, "presence_penalty": -0.9, "frequency_penalty": -0.4}
    sampler = Sampler(1, 3, CPU)
    sampler.add(0, SamplingParams(temperature=0.3, typical_p=0.05, **penalties), [], 0)  # type: ignore[arg-type]
    for _ in range(2):
        sampler.sample(torch.tensor([[0.0, -torch.inf, -torch.inf]]), [0])
    assert sampler.probabilities(torch.tensor([[-1.0, 0.0, 1.0]]), [0]).tolist() == [[1.0, 0.0, 0.0]]


def test_a_slot_forgets_the_request_before() -> None:
    logits = torch.tensor([[0.0, 0.5, 1.0]])
    sampler = Sampler(2, 3, CPU)
    params = replace(PLAIN, repetition_penalty=3.0, frequency_penalty=2.0, logit_bias={1: 5.0}, logprobs=2)
    sampler.add(0, params, [0, 1, 2], 0)
    sampler.sample(logits, [0])
    sampler.remove(0)
    assert sampler.sample(logits, [0]) == Sampled([2])  # an empty slot in a batch costs as little as can be
    sampler.add(0, replace(params, logit_bias={2: 1.0}), [], 0)
    expected = torch.tensor([0.0, 0.5, 2.0]).double().softmax(-1)
    torch.testing.assert_close(sampler.probabilities(logits, [0])[0], expected)
    sampler.add(0, PLAIN, [1], 0)
    torch.testing.assert_close(sampler.probabilities(logits, [0])[0], logits[0].double().softmax(-1))
    assert sampler.sample(logits, [0]).logprobs is None


# What must never happen


def test_impossible_tokens_never_come_and_something_always_does() -> None:
    size, inf = 6, math.inf
    logits = torch.tensor([[-inf, 0.0, -inf, 1.0, -inf, -inf], [-inf] * 6, [math.nan] * 6, [inf, 0, math.nan, 0, 0, 0]])
    for params in (
        PLAIN,
        replace(PLAIN, temperature=0.0),
        replace(PLAIN, typical_p=0.5, top_k=4, top_p=0.9, min_p=0.1),
    ):
        sampler = Sampler(4, size, CPU)
        for slot in range(4):
            sampler.add(slot, params, [], slot)
        for _ in range(50):
            tokens = sampler.sample(logits, range(4)).tokens
            assert tokens[0] in (1, 3) and all(0 <= token < size for token in tokens)
            assert params.greedy or tokens[3] == 0
            tokens = sampler.sample(logits, range(4), {slot: torch.arange(6) == 4 for slot in range(4)}).tokens
            assert tokens == [4] * 4


def test_forbidden_tokens_come_only_where_nothing_else_may() -> None:
    sampler = Sampler(3, 3, CPU)
    for slot in range(3):
        sampler.add(slot, replace(PLAIN, temperature=0.0), [], 0)
    logits = torch.tensor([[3.0, 2.0, 1.0]] * 3)
    mask = torch.tensor([False, True, False])
    assert sampler.sample(logits, [0, 1, 2], forbidden={0: [0], 2: [0, 1]}).tokens == [1, 0, 2]
    assert sampler.sample(logits, [0, 1, 2], forbidden={1: [2, 1, 0, 0]}).tokens == [0, 0, 0]
    assert sampler.sample(logits, [1, 2, 0], {2: mask}, {2: [1], 0: [0]}).tokens == [0, 1, 1]
    assert mask.tolist() == [False, True, False]
    with pytest.raises(ValueError, match="slot 2 is allowed no token"):
        sampler.sample(logits, [0, 1, 2], {2: torch.zeros(3, dtype=torch.bool)})


def test_sums_too_great_for_floats_reach_every_token() -> None:
    """300 000 equal tokens weigh more than float64 counts."""
    size = 300_000
    sampler = Sampler(1, size, CPU)
    sampler.add(0, PLAIN, [], 0)
    for step in range(4):
        assert abs(sampler.sample(torch.zeros(1, size), [0]).tokens[0] - plain_uniform(0, step) * size) <= 1


def test_without_float64_the_greatest_random_number_still_draws_a_token() -> None:
    """As on a device that knows float32 only, where the greatest random number becomes 1."""
    number = 2**64 - 1  # what `mix` should give; so its steps backwards
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        undone = number
        for _ in range(3):
            undone = number ^ (undone >> shift)
        number = undone * pow(factor, -1, 2**64) % 2**64
    sampler = Sampler(1, 3, CPU)
    sampler.real = torch.float32
    sampler.add(0, replace(PLAIN, top_p=0.99), [], 0)
    sampler.streams[0] = (number - 0x9E3779B97F4A7C15) % 2**64
    assert uniforms(sampler.streams, sampler.steps)[0] == 1 - 2**-53
    logits = torch.tensor([[0.0, 0.0, -20.0]])
    assert sampler.sample(logits, [0]).tokens == [1]
    assert logits.tolist() == [[0.0, 0.0, -20.0]]


# Log-probabilities


def test_logprobs_are_of_the_raw_logits_and_as_many_as_asked() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(4, 9, generator=generator)
    logits[2, 3:7] = 5.0  # equals: smaller ids first
    expected = logits.double().log_softmax(-1)
    sampler = Sampler(4, 9, CPU)
    for slot, k in enumerate([None, 0, 3, 100]):
        params = SamplingParams(temperature=0.1, logit_bias={8: 50.0}, logprobs=k)
        sampler.add(slot, params, [], 0)
    sampled = sampler.sample(logits, [2, 0, 3, 1])
    assert sampled.tokens == [8] * 4
    assert sampled.logprobs == pytest.approx(expected[:, 8].tolist())
    assert sampled.top is not None and [len(row) for row in sampled.top] == [3, 0, 9, 0]
    for row, found in zip(expected, sampled.top, strict=True):
        order = sorted(range(9), key=lambda token: (-row[token], token))[: len(found)]
        assert [token for token, _ in found] == order
        assert [logprob for _, logprob in found] == pytest.approx(row[order].tolist())
    assert sampler.sample(logits[:1], [0]).logprobs is None


def test_who_draws_more_than_it_returns_gets_logprobs() -> None:
    sampler = Sampler(1, 4, CPU)
    sampler.add(0, SamplingParams(best_of=2), [], 0)
    sampled = sampler.sample(torch.zeros(1, 4), [0])
    assert sampled.logprobs == pytest.approx([math.log(0.25)]) and sampled.top == [[]]


# What it costs


class Calls(TorchDispatchMode):
    """Writes down which operations torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("params", "most", "wanted"),
    [
        (SamplingParams(temperature=0), 3, "argmax"),  # two are the copy to the host
        (SamplingParams(), 25, "cumsum"),
        (SamplingParams(min_p=0.1), 35, "cumsum"),
        (SamplingParams(top_k=3), 45, "topk"),
        (SamplingParams(top_p=0.5), 45, "sort"),
    ],
    ids=["greedy", "temperature", "min-p", "top-k", "top-p"],
)
def test_a_batch_pays_for_what_it_asks_for(params: SamplingParams, most: int, wanted: str) -> None:
    sampler = Sampler(3, 16, CPU)
    for slot in range(3):
        sampler.add(slot, replace(params, logit_bias={1: 1.0}, repetition_penalty=2.0), [1], 0)
        sampler.add(slot, params, [1], 0)  # what went before is paid for no more
    logits = torch.zeros(3, 16)
    with Calls() as calls:
        sampler.sample(logits, range(3))
    assert len(calls.names) <= most and wanted in calls.names, calls.names
    costly = {"sort", "topk"} - {wanted}
    assert not costly & set(calls.names)


def test_tables_are_made_when_wanted() -> None:
    sampler = Sampler(2, 16, CPU)
    sampler.add(0, SamplingParams(top_p=0.5), [], 0)
    assert not sampler.tables
    sampler.add(1, SamplingParams(presence_penalty=0.5), [], 0)
    assert [tuple(table.shape) for table in sampler.tables.values()] == [(2, 16)]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_any_mode_of_gradients_will_do(mode: Callable[[], Any]) -> None:
    sampler = Sampler(1, 4, CPU)
    params = replace(PLAIN, logit_bias={1: 1.0}, repetition_penalty=2.0, frequency_penalty=1.0, logprobs=1)
    with mode():
        sampler.add(0, params, [1], 0)
        logits = torch.zeros(1, 4, requires_grad=True) * 2
        first = sampler.sample(logits, [0])
    sampler.add(0, params, [1], 0)
    assert sampler.sample(torch.zeros(1, 4), [0]) == first


# Settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"max_new_tokens": None}, "max_new_tokens is None; it must be a whole number"),
        ({"max_new_tokens": 3, "min_new_tokens": 4}, "min_new_tokens is 4; it must be at most max_new_tokens 3"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1; it must be at least 0"),
        ({"temperature": -0.5}, "temperature is -0.5; it must be at least 0 and finite"),
        ({"temperature": math.nan}, "temperature is nan; it must be"),
        ({"temperature": math.inf}, "temperature is inf; it must be"),
        ({"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
        ({"temperature": True}, "temperature is True; it must be a number"),
        ({"temperature": None}, "temperature is None; it must be a number"),
        ({"top_k": -1}, "top_k is -1; it must be at least 0 (0 means all tokens)"),
        ({"top_k": 2.5}, "top_k is 2.5; it must be a whole number"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5; it must be above 0 and at most 1"),
        ({"min_p": 1.1}, "min_p is 1.1; it must be at least 0 and at most 1"),
        ({"typical_p": 0}, "typical_p is 0; it must be above 0 and at most 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be at least 0.01 and at most 100"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5; it must be at least -2 and at most 2"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3; it must be at least -2 and at most 2"),
        ({"logit_bias": [1]}, "logit_bias is [1]; it must map token ids to numbers"),
        ({"logit_bias": {"1": 2.0}}, "logit_bias has the token '1'; it must be a whole number"),
        ({"logit_bias": {-1: 2.0}}, "logit_bias has the token -1; it must be a whole number of at least 0"),
        ({"logit_bias": {1: 101}}, "logit_bias of token 1 is 101; it must be a number from -100 to 100"),
        ({"logit_bias": {1: math.nan}}, "logit_bias of token 1 is nan; it must be a number from -100 to 100"),
        ({"logit_bias": {1: None}}, "logit_bias of token 1 is None; it must be a number"),
        ({"stop": ""}, "stop is ('',); each string must have a character at least"),
        ({"stop": ["a", ""]}, "stop is ['a', '']; each string must have a character at least"),
        ({"stop": ["a", 1]}, "stop is ['a', 1]; it must be a string or a list of strings"),
        ({"stop": None}, "stop is None; it must be a string or a list of strings"),
        ({"stop_token_ids": 3}, "stop_token_ids is 3; it must be a list of token ids, whole numbers from 0"),
        ({"stop_token_ids": [3, -1]}, "stop_token_ids is [3, -1]; it must be a list of token ids"),
        ({"ignore_eos": 1}, "ignore_eos is 1; it must be true or false"),
        ({"logprobs": -1}, "logprobs is -1; it must be at least 0"),
        ({"logprobs": True}, "logprobs is True; it must be a whole number"),
        ({"n": 0}, "n is 0; it must be at least 1"),
        ({"n": 3, "best_of": 2}, "best_of is 2; it must be at least n 3"),
        (
            {"best_of": 2, "temperature": 0},
            "temperature is 0.0 and best_of is 2; the temperature must be at least 1e-05",
        ),
        ({"seed": -1}, "seed is -1; it must be at least 0 and below 2^63"),
        ({"seed": 2**63}, "seed is 9223372036854775808; it must be at least 0 and below 2^63"),
        ({"num_beams": 0}, "num_beams is 0; it must be at least 1"),
        ({"num_beams": 2, "n": 3}, "n is 3; it must be at most num_beams 2"),
        ({"num_beams": 2, "best_of": 3}, "best_of is 3 and num_beams is 2; leave one of them out"),
        ({"num_beams": 2, "logprobs": 0}, "logprobs is 0 and num_beams is 2; leave one of them out"),
        ({"num_beams": 2, "regex": "a"}, "regex is 'a' and num_beams is 2; leave one of them out"),
        ({"num_beams": 2, "json_schema": "{}"}, "json_schema is '{}' and num_beams is 2; leave one of them out"),
        ({"regex": 1}, "regex is 1; it must be a string"),
        ({"regex": "a", "json_schema": {}}, "regex is 'a' and json_schema is given too; leave one of them out"),
        ({"json_schema": 1}, "json_schema is 1; it must be a mapping or JSON text"),
        ({"json_schema": "{a}"}, "json_schema is '{a}'; it must be JSON: Expecting property name"),
        ({"json_schema": "[" * 10**5}, "json_schema is '[[[["),
        ({"json_schema": "3"}, "json_schema is '3'; it must be a JSON object or true or false"),
        ({"json_schema": {"type": {1, 2}}}, "json_schema is {'type': {1, 2}}; it must be JSON: Object of type set"),
    ],
    ids=lambda value: json.dumps(value, default=str)[:60] if isinstance(value, dict) else "",
)
def test_settings_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BDHError) as caught:
        SamplingParams(**change)
    text = str(caught.value)
    assert text.startswith(message) and "\n" not in text and len(text) < 400


def test_settings_that_are_right_are_taken() -> None:
    given = {1: 2.0}
    params = SamplingParams(stop="end", stop_token_ids=[1, 2], logit_bias=given, seed=2**63 - 1)  # type: ignore[arg-type]
    given[300] = 1.0
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("end",), (1, 2), {1: 2.0})
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
    assert SamplingParams() == SamplingParams(best_of=None) and not SamplingParams().greedy
    for change in (
        {"json_schema": "true"},
        {"json_schema": {"type": "object"}},
        {"num_beams": 4, "n": 4, "best_of": 4, "temperature": 0},
        {"temperature": np.float32(0.5), "top_k": np.int64(10**12), "seed": np.int64(3)},
        {"n": 3, "temperature": 0.0},
        {"top_k": 10**30, "temperature": 1e300},
    ):
        params = SamplingParams(**change)  # type: ignore[arg-type]
        sampler = Sampler(1, 5, CPU)
        sampler.add(0, params, [], 1)
        assert 0 <= sampler.sample(torch.zeros(1, 5), [0]).tokens[0] < 5


def test_settings_are_plain_numbers() -> None:
    """As JSON has them: of sessions, and of the lines of many prompts."""
    one, half = np.int64(1), np.float32(0.5)
    given = {"max_new_tokens": one, "top_k": one, "seed": one, "temperature": half, "top_p": 1}
    params = SamplingParams(**given, logit_bias={one: half}, stop_token_ids=(one,))  # type: ignore[arg-type, dict-item]
    numbers = (params.max_new_tokens, params.top_k, params.seed, *(params.logit_bias or ()), *params.stop_token_ids)
    assert [type(number) for number in numbers] == [int] * 5
    reals = (params.temperature, params.top_p, *(params.logit_bias or {}).values())
    assert [type(number) for number in reals] == [float] * 3
    assert json.loads(json.dumps(asdict(params)))["logit_bias"] == {"1": 0.5}


def test_tokens_beyond_the_vocabulary_are_refused() -> None:
    SamplingParams(logit_bias={9: 1.0}, stop_token_ids=(9,)).check_vocabulary(10)
    with pytest.raises(BDHError, match=r"^logit_bias has the token 10; the model's tokens are 0 to 9$"):
        SamplingParams(logit_bias={10: 1.0}).check_vocabulary(10)
    with pytest.raises(BDHError, match=r"^stop_token_ids has the token 12; the model's tokens are 0 to 9$"):
        Sampler(1, 10, CPU).add(0, SamplingParams(stop_token_ids=(3, 12)), [], 0)
