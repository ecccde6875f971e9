"""The runner for CPUs against the plain one, and its kernels against the plain forms of what they do."""

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bdh.errors import BDHError
from bdh.inference.runner import ModelRunner, make_runner
from bdh.inference.runner_cpu import MAX_PENDING, SHORT, CPURunner, DecodeStep
from bdh.kernels.decode.cpu_step import SlotPhases, lazy_zeros, rotate_pairs, split_runs, sum_rows
from bdh.kernels.decode.cpu_weights import (
    FEW,
    INT4_GROUP,
    Int4Matrices,
    Int8Matrices,
    Int8WeightMatrices,
    Matrices,
    PackedMatrices,
    PlainMatrices,
    SmallMatrices,
    round_groups,
    round_rows,
)
from bdh.model import BDHConfig, BDHForCausalLM, BDHState
from bdh.model.modeling_bdh import rotary_phases, rotate
from tests.inference.small import random_gates

SLOTS = 4


def random_model(**changes: object) -> BDHForCausalLM:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "mlp_internal_dim_multiplier": 4, "initializer_range": 0.3}
    return random_gates(BDHForCausalLM(BDHConfig(**{**sizes, **changes})).eval())


MODEL = random_model()
HALF_LIVES = [None, 5.0]
MODELS = {  # by decay and write
    "none-add": MODEL,
    "none-delta": random_model(write="delta"),
    **{
        f"{decay}-{write}": random_model(decay=decay, decay_half_lives=HALF_LIVES, write=write)
        for decay in ("fixed", "gated")
        for write in ("add", "delta")
    },
}
all_models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


def runner(model: BDHForCausalLM = MODEL, n_slots: int = SLOTS, **settings: object) -> CPURunner:
    """A runner over a copy of the model."""
    return CPURunner(copy.deepcopy(model), n_slots, **settings)  # type: ignore[arg-type]


def plain(model: BDHForCausalLM = MODEL, n_slots: int = SLOTS) -> ModelRunner:
    made = ModelRunner(model, n_slots)
    for slot in range(n_slots):
        made.clear(slot)
    return made


def text(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def assert_near(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the size of the whole, by row."""
    error = (got.float() - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1).clamp(min=1e-6)
    assert error.max() <= tolerance, error


def assert_same_state(got: BDHState, wanted: BDHState, tolerance: float = 1e-5) -> None:
    assert got.position.tolist() == wanted.position.tolist() and got.length == wanted.length
    for mine, other in zip(got.synapses, wanted.synapses, strict=True):
        assert mine.dtype == torch.float32
        assert_near(mine, other, tolerance)


# ------------------------------------------------------------------------------------------------ the runner

slot = st.integers(0, SLOTS - 1)
steps = st.one_of(
    st.tuples(st.just("prefill"), slot, st.integers(1, 40)),
    st.tuples(st.just("decode"), st.permutations(range(SLOTS)), st.integers(1, SLOTS), st.integers(1, 20)),
    st.tuples(st.just("copy"), slot, slot),
    st.tuples(st.just("clear"), slot),
)


def take(step: tuple, on: CPURunner | ModelRunner, tokens: np.random.Generator) -> Tensor | None:
    """One step of a schedule; the logits it gives, (B, V)."""
    match step:
        case "prefill", at, length:
            return on.prefill(at, tokens.integers(0, 256, length).tolist())[None]
        case "decode", order, size, times:
            slots = list(order[:size])
            return torch.cat([on.decode(slots, tokens.integers(0, 256, size).tolist()) for _ in range(times)])
        case "copy", source, target:
            on.write_state(target, on.read_state(source))
        case "clear", at:
            on.clear(at)
    return None


@all_models
@settings(max_examples=20)
@given(schedule=st.lists(steps, min_size=1, max_size=8))
def test_any_schedule_gives_what_the_plain_runner_gives(model: BDHForCausalLM, schedule: list[tuple]) -> None:
    fast, slow = runner(model), plain(model)
    ours, theirs = np.random.default_rng(0), np.random.default_rng(0)
    for step in schedule:
        got, wanted = take(step, fast, ours), take(step, slow, theirs)
        if got is not None and wanted is not None:
            assert got.dtype == torch.float32
            assert_near(got, wanted)
    for at in range(SLOTS):
        assert_same_state(fast.read_state(at), slow.read_state(at))


@all_models
def test_greedy_text_is_the_models_own(model: BDHForCausalLM) -> None:
    fast = runner(model)
    prompt = text(21)
    wanted = model.generate(torch.tensor([prompt]), max_new_tokens=100, do_sample=False, eos_token_id=-1)[0, 21:]
    logits, written = fast.prefill(2, prompt)[None], []
    for _ in range(100):
        written.append(int(logits.argmax()))
        logits = fast.decode([2], written[-1:])  # (1, V)
    assert written == wanted.tolist()


@all_models
def test_the_company_in_a_batch_changes_nothing(model: BDHForCausalLM) -> None:
    alone, together = runner(model), runner(model)
    prompt, rest = text(30), text(50, seed=1)
    for made in (alone, together):
        made.prefill(1, prompt)
    together.prefill(0, text(7, seed=2))
    together.prefill(3, text(16, seed=3))
    for t, token in enumerate(rest):
        others = [[0, 3], [3], [], [3, 0]][t % 4]
        got = together.decode([*others, 1], [t % 256] * len(others) + [token])[-1:]  # (1, V)
        assert_near(got, alone.decode([1], [token]))


def test_synapses_are_written_at_positions_of_the_slot_only() -> None:
    made = runner()
    made.prefill(0, text(37))
    assert made.flushed[0] == 37
    for position in range(38, 70):
        made.decode([0], [5])
        assert made.flushed[0] == max(37, position - position % MAX_PENDING)


@all_models
def test_a_prompt_cut_at_the_grain_gives_the_same_bits(model: BDHForCausalLM) -> None:
    tokens = text(150 + SHORT)
    made = runner(model)
    whole = made.prefill(0, tokens)
    made.prefill(1, tokens[:64])
    made.write_state(2, made.read_state(1))
    made.prefill(2, tokens[64:128])
    assert torch.equal(made.prefill(2, tokens[128:]), whole)
    states = made.read_state(0), made.read_state(2)
    assert all(torch.equal(mine, other) for mine, other in zip(*(state.synapses for state in states), strict=True))


@all_models
def test_a_state_read_is_a_copy_and_reading_it_changes_nothing(model: BDHForCausalLM) -> None:
    made = runner(model)
    made.prefill(0, text(20))
    made.decode([0], [1])
    state = made.read_state(0)
    before = state.clone()
    assert made.flushed[0] == 20
    made.decode([0], [2])
    made.clear(0)
    assert_same_state(state, before, tolerance=0)
    assert made.state_nbytes == state.nbytes


@all_models
def test_states_pass_between_runner_and_model(model: BDHForCausalLM) -> None:
    made = runner(model)
    made.prefill(0, text(40))
    made.decode([0], [7])
    with torch.inference_mode():
        output = model(torch.tensor([text(9, seed=1)]), past_key_values=made.read_state(0), use_cache=True)
    made.write_state(1, output.past_key_values)
    assert_near(made.prefill(0, text(9, seed=1))[None], output.logits[:, -1])
    assert_near(made.decode([1], [3]), made.decode([0], [3]))


@all_models
def test_far_positions(model: BDHForCausalLM) -> None:
    fast, slow = runner(model), plain(model)
    state = BDHState.zeros(MODEL.config, 1)
    state.position, state.columns = torch.tensor([1_999_990]), torch.tensor(1_999_990)
    for made in (fast, slow):
        made.write_state(0, state)
    for token in text(20):
        assert_near(fast.decode([0], [token]), slow.decode([0], [token]))


@pytest.mark.parametrize("rows", [1, 3, 5])
@pytest.mark.parametrize("gates", [{}, {"decay": "gated", "write": "delta"}], ids=["none-add", "gated-delta"])
def test_a_model_with_large_matrices(rows: int, gates: dict[str, str]) -> None:
    sizes = {"n_layer": 1, "n_embd": 64, "n_head": 1, "mlp_internal_dim_multiplier": 512, "initializer_range": 0.05}
    model = random_model(**sizes, **gates)
    fast, slow = runner(model, rows), plain(model, rows)
    assert fast.few_rows == 4 and isinstance(fast.encoder, PackedMatrices)
    for token in text(3):
        got, wanted = (made.decode(range(rows), [token] * rows) for made in (fast, slow))
        assert_near(got, wanted)


@pytest.mark.parametrize(
    ("dtype", "quantization", "tolerance"),
    [("bfloat16", None, 0.02), ("bfloat16", "int8", 0.05), ("float32", "int8", 0.05), ("bfloat16", "int4", 0.4)],
)
@all_models
def test_lower_precision_stays_near(
    model: BDHForCausalLM, dtype: str, quantization: str | None, tolerance: float
) -> None:
    fast = make_runner(copy.deepcopy(model), SLOTS, dtype, quantization)
    slow = plain(model)
    for made in (fast, slow):
        made.prefill(1, text(11))
    for token in text(40, seed=1):
        got, wanted = (made.decode([1, 3], [token, 9]) for made in (fast, slow))
        assert got.dtype == torch.float32
        assert_near(got, wanted, tolerance)


def test_gates_stay_in_float32_beside_weights_in_bfloat16() -> None:
    """A half-life that bfloat16 would round by some percent: the synapses lose exactly what they should."""
    model = random_model(decay="fixed", decay_half_lives=[None, 1000.0])
    gated = MODELS["gated-delta"]
    assert runner(gated, dtype=torch.bfloat16).model.model.layer.gates.decay_rate.dtype == torch.float32
    made = runner(model, dtype=torch.bfloat16)
    state = BDHState.zeros(model.config, 1)
    for S in state.synapses:
        S.fill_(1e6)  # beside which nothing that is written counts
    made.write_state(0, state)
    made.prefill(0, text(40))
    for token in text(23):
        made.decode([0], [token])
    for S in made.read_state(0).synapses:
        torch.testing.assert_close(S[0, 0] / 1e6, torch.ones_like(S[0, 0]), rtol=0, atol=1e-3)
        torch.testing.assert_close(S[0, 1] / 1e6, torch.full_like(S[0, 1], 2 ** (-63 / 1000)), rtol=0, atol=1e-3)


class Interrupted(CPURunner):
    """A runner whose decoding steps fail after the second layer while `fails` is set."""

    fails = False

    def layer(self, x: Tensor, i: int, step: DecodeStep) -> Tensor:
        x = super().layer(x, i, step)  # (B, D)
        if self.fails and i == 1:
            raise KeyboardInterrupt
        return x


@all_models
def test_a_step_that_fails_halfway_can_be_taken_again(model: BDHForCausalLM) -> None:
    fast, slow = Interrupted(copy.deepcopy(model), SLOTS), plain(model)
    for made in (fast, slow):
        made.prefill(0, text(21))
        made.prefill(1, text(18, seed=1))
    for token in text(30, seed=2):
        fast.fails = token % 2 == 0
        if fast.fails:
            with pytest.raises(KeyboardInterrupt):
                fast.decode([0, 1], [200, 201])
        fast.fails = False
        assert_near(fast.decode([0, 1], [token, 9]), slow.decode([0, 1], [token, 9]))


def test_a_head_may_forget_all_at_once() -> None:
    """A retention that underflows, and one of a half-life near 0: no number overflows, and the rest is as it was."""
    model = random_model(decay="gated", write="delta", decay_half_lives=[0.001, 1e-6])
    fast, slow = runner(model), plain(model)
    for made in (fast, slow):
        made.prefill(0, text(40))
    for token in text(40, seed=1):
        assert_near(fast.decode([0], [token]), slow.decode([0], [token]))
    assert_same_state(fast.read_state(0), slow.read_state(0))


@pytest.mark.parametrize(
    ("quantization", "sizes", "message"),
    [
        ("int8", {"n_embd": 24}, "int8 needs an n_embd divisible by 16, and this model's is 24"),
        ("int4", {"n_embd": 16, "mlp_internal_dim_multiplier": 8}, "int4 needs an n_embd divisible by 32"),
        ("int4", {"n_head": 16}, "neurons a head divisible by 16, and this model has 32 and 8"),
    ],
)
def test_sizes_that_cannot_be_quantised(quantization: str, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(BDHError, match=message):
        CPURunner(random_model(**sizes), 1, torch.bfloat16, quantization)


# ------------------------------------------------------------------------------------------------ matrices


def rounded_by_rows(weight: Tensor) -> Tensor:
    whole, scale = round_rows(weight)
    assert whole.abs().amax() == 127
    return whole * scale


def rounded_by_groups(weight: Tensor) -> Tensor:
    whole, scales = round_groups(weight)
    assert whole.amin() >= 0 and whole.amax() <= 15
    scale, offset = scales.float().transpose(0, 1).repeat_interleave(INT4_GROUP, dim=1).unbind(-1)  # (out, in)
    return (whole - 8) * scale + offset


def skip_unless_the_processor_has(form: type[Matrices], dtype: str) -> None:
    if form is Int8Matrices and not torch.cpu._is_vnni_supported():
        pytest.skip("no int8 sums of products")
    if form is PackedMatrices and dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no bfloat16")


FORMS: Sequence[tuple[type[Matrices], str, float]] = [
    (PlainMatrices, "float32", 1e-6),
    (PackedMatrices, "float32", 1e-6),
    (SmallMatrices, "float32", 1e-6),
    (PlainMatrices, "bfloat16", 0.01),
    (PackedMatrices, "bfloat16", 0.01),
    (Int8Matrices, "float32", 1e-6),
    (Int8Matrices, "bfloat16", 0.005),
    (Int8WeightMatrices, "bfloat16", 0.01),
    (Int4Matrices, "bfloat16", 0.01),
]


@pytest.mark.parametrize(("form", "dtype", "tolerance"), FORMS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("relu", [False, True])
def test_matrices_multiply(form: type[Matrices], dtype: str, tolerance: float, k: int, relu: bool) -> None:
    skip_unless_the_processor_has(form, dtype)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(48, 64, generator=generator) for _ in range(k)]
    matrices = form(weights, getattr(torch, dtype), relu)
    if form in (Int8Matrices, Int8WeightMatrices):
        weights = [rounded_by_rows(weight) for weight in weights]
    if form is Int4Matrices:
        weights = [rounded_by_groups(weight) for weight in weights]
    for rows in (1, 2, 5, FEW // (48 * 64) + 1):
        x = torch.randn(rows, k, 64, generator=generator)
        read = rounded_by_rows(x) if form is Int8Matrices else x
        wanted = torch.cat([read[:, i] @ weights[i].T for i in range(k)], dim=1)  # (rows, k * 48)
        got = matrices(x)
        assert got.dtype == getattr(torch, dtype)
        assert_near(got, wanted.relu() if relu else wanted, tolerance * 2)
    assert not matrices(torch.zeros(1, k, 64)).any()


@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_rounded_weights_are_near(rows: int, seed: int) -> None:
    weight = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed % 5 - 2)
    assert_near(rounded_by_rows(weight), weight, 0.02)
    assert_near(rounded_by_groups(weight), weight, 0.15)


# ------------------------------------------------------------------------------------------------ the other kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.floats(0, 1), st.integers(0, 99))
def test_sums_of_rows(dtype: torch.dtype, slots: list[int], density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    activity = torch.randn(len(slots), 2, 8, generator=generator)  # (B, h, N)
    activity *= torch.rand(activity.shape, generator=generator) < density
    table = torch.randn(6 * 16, 32, generator=generator)  # (rows, D)
    wanted = torch.einsum("bhn,bhnd->bhd", activity, table.view(6, 2, 8, 32)[slots])
    got = sum_rows(activity.to(dtype), table.to(dtype), [16 * slot for slot in slots])
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), wanted, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.2)


@given(st.permutations(range(7)), st.integers(1, 7), st.integers(0, 99))
def test_runs_take_every_row_once(order: list[int], size: int, seed: int) -> None:
    slots, counts = order[:size], np.random.default_rng(seed).integers(0, 4, size).tolist()
    seen: list[int] = []
    for run in split_runs(slots, counts):
        rows = range(run.rows.start, run.rows.stop)
        assert [slots[row] for row in rows] == list(range(run.slots.start, run.slots.stop))
        is_pending = torch.ones(len(rows), 1, run.longest).bool() if run.is_pending is None else run.is_pending
        assert is_pending.sum((1, 2)).tolist() == [counts[row] for row in rows]
        seen += rows
    assert seen == list(range(size))


@given(st.lists(st.integers(0, 2_000_000), min_size=1, max_size=5), st.sampled_from([16, 50]))
def test_phases_are_the_models(positions: list[int], span: int) -> None:
    phases = SlotPhases(5, 64, 65536.0, span)
    for step in (0, 1, span):  # slots keep what they can of the step before
        at = [position + step for position in positions]
        got = phases.at(range(len(at)), at)  # (B, 1, N/2)
        cos, sin = rotary_phases(torch.tensor(at)[:, None], 64, 65536.0, torch.float32)  # (B, 1, 1, N)
        torch.testing.assert_close(got.real, cos[:, 0, :, ::2], rtol=0, atol=6e-8)
        torch.testing.assert_close(got.imag, sin[:, 0, :, 1::2], rtol=0, atol=6e-8)


def test_rotation_is_the_models() -> None:
    X = torch.randn(3, 2, 64)  # (B, h, N)
    positions = torch.tensor([[0], [17], [12345]])
    wanted = rotate(X[:, :, None], *rotary_phases(positions, 64, 65536.0, torch.float32))[:, :, 0]  # (B, h, N)
    got = rotate_pairs(X, SlotPhases(3, 64, 65536.0, 16).at([0, 1, 2], positions[:, 0].tolist()))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def test_lazy_zeros_begin_at_a_cache_line() -> None:
    for size in (1, 17, 1000):
        zeros = lazy_zeros(size, 3)
        assert zeros.shape == (size, 3) and not zeros.any() and zeros.data_ptr() % 64 == 0
