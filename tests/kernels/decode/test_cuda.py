"""The Triton kernels of inference, in Triton's interpreter: `CUDARunner` against the model, on odd sizes."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdh.inference import runner_cuda
from bdh.inference.runner import ModelRunner, cast
from bdh.inference.runner_cuda import CUDARunner, DecodeTiles
from bdh.kernels.decode.cuda import halved, interleaved
from bdh.kernels.decode.prefill import attend_chunks, attend_delta
from bdh.model import BDHConfig, BDHForCausalLM, BDHState
from bdh.model.modeling_bdh import Gates, attention_quadratic, gated_attention_recurrent, unit_keys


def make_model(
    n_layer: int, n_head: int, n_embd: int, multiplier: int, vocab_size: int = 37, **gates: Any
) -> BDHForCausalLM:
    torch.manual_seed(n_layer + 10 * n_head + n_embd)
    config = BDHConfig(
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        mlp_internal_dim_multiplier=multiplier,
        vocab_size=vocab_size,
        **gates,
    )
    model = BDHForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6)  # so that attention weighs against the residual, and logits differ
        for name, parameter in model.model.layer.named_parameters():
            if name.startswith("gates.") and name != "gates.decay_rate":
                parameter.normal_()
    return model


SIZES = [(1, 1, 8, 2), (2, 2, 16, 8), (1, 3, 24, 4), (1, 8, 20, 4), (2, 2, 40, 3)]  # layers, heads, D, multiplier


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("matrix_batch", [1, 8])
@torch.inference_mode()
def test_prefill_and_decoding_equal_the_model(
    sizes: tuple[int, int, int, int], matrix_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_cuda, "MATRIX_BATCH", matrix_batch)
    model = make_model(*sizes)
    tokens = torch.randint(37, (1, 30))
    expected = model(tokens).logits[0]  # (T, V)
    ids = tokens[0].tolist()
    runner = CUDARunner(model, 3)
    runner.clear(1)
    assert torch.allclose(runner.prefill(1, ids[:21]), expected[20], atol=1e-5)
    for t in range(21, 24):
        assert torch.allclose(runner.decode([1], [ids[t]])[0], expected[t], atol=1e-5)
    assert torch.allclose(runner.prefill(1, ids[24:28]), expected[27], atol=1e-5)
    runner.write_state(2, runner.read_state(1))
    runner.clear(0)
    for t in range(28, 30):  # two rows, one of them at the beginning
        assert torch.allclose(runner.decode([2, 0], [ids[t], ids[t - 28]]), expected[[t, t - 28]], atol=1e-5)
    assert torch.allclose(runner.prefill(1, ids[28:29]), expected[28], atol=1e-5)


@torch.inference_mode()
def test_decoding_beyond_the_pending_tokens() -> None:
    model = make_model(1, 2, 8, 4)
    tokens = torch.randint(37, (1, 40))
    expected = model(tokens).logits[0]  # (T, V)
    runner = CUDARunner(model, 2)
    runner.clear(0)
    for t in range(40):
        assert torch.allclose(runner.decode([0], [int(tokens[0, t])])[0], expected[t], atol=1e-5)


GATES = [
    {"decay": decay, "write": write, **({} if decay == "none" else {"decay_half_lives": [3.0, None]})}
    for decay, write in [("fixed", "add"), ("gated", "add"), ("none", "delta"), ("fixed", "delta"), ("gated", "delta")]
]


@pytest.mark.parametrize(
    ("gates", "sizes", "matrix_batch"),
    list(
        zip(
            GATES, [(1, 2, 8, 4), (2, 2, 8, 4), (1, 2, 8, 4), (2, 2, 8, 4), (1, 2, 12, 6)], [8, 1, 1, 1, 8], strict=True
        )
    ),
    ids=lambda value: f"{value['decay']}-{value['write']}" if isinstance(value, dict) else None,
)
@torch.inference_mode()
def test_decay_and_the_delta_rule_equal_the_model(
    gates: dict[str, Any], sizes: tuple[int, int, int, int], matrix_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sequences with different numbers of pending tokens, past a flush; with carried states and prompts."""
    monkeypatch.setattr(runner_cuda, "MATRIX_BATCH", matrix_batch)
    model = make_model(*sizes, **gates)
    runner, reference = CUDARunner(model, 4), ModelRunner(model, 4)
    for slot in range(4):
        runner.clear(slot)
        reference.clear(slot)

    def prefill(slot: int, count: int) -> None:
        tokens = torch.randint(37, (count,)).tolist()
        assert torch.allclose(runner.prefill(slot, tokens), reference.prefill(slot, tokens), atol=2e-5)

    def prefill_logits(slot: int, count: int) -> None:
        tokens = torch.randint(37, (count,)).tolist()
        logits, expected = (torch.cat(list(each.prefill_logits(slot, tokens))) for each in (runner, reference))
        assert len(logits) == count and torch.allclose(logits, expected, atol=2e-5)

    def decode(slots: list[int]) -> None:
        tokens = torch.randint(37, (len(slots),)).tolist()
        assert torch.allclose(runner.decode(slots, tokens), reference.decode(slots, tokens), atol=2e-5)

    prefill(1, 7)
    for _ in range(2):
        decode([3])
    for _ in range(15):
        decode([1, 3])
    decode([3, 0, 1])
    decode([1])
    for S, expected in zip(runner.read_state(1).synapses, reference.read_state(1).synapses, strict=True):
        assert torch.allclose(S, expected, atol=2e-5)
    for each in (runner, reference):
        each.write_state(2, each.read_state(3))
        each.clear(3)
    decode([2, 3])
    prefill_logits(2, 18)
    prefill_logits(3, 1)
    decode([3, 2])


@pytest.mark.parametrize("gates", GATES, ids=lambda gates: f"{gates['decay']}-{gates['write']}")
@torch.inference_mode()
def test_prompts_of_several_chunks_with_decay_and_the_delta_rule(
    gates: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_cuda, "CHUNK", 16)
    model = make_model(1, 2, 8, 4, **gates)
    runner, reference = CUDARunner(model, 2), ModelRunner(model, 1)
    for each, slot in ((runner, 0), (runner, 1), (reference, 0)):
        each.clear(slot)
    tokens = torch.randint(37, (40,)).tolist()
    logits = runner.prefill(0, tokens)
    assert torch.allclose(logits, reference.prefill(0, tokens), atol=2e-5)
    runner.prefill(1, tokens[:16])
    assert torch.allclose(runner.prefill(1, tokens[16:]), logits, atol=1e-5)
    state = reference.read_state(0).synapses[0]
    for slot in (0, 1):
        assert torch.allclose(runner.read_state(slot).synapses[0], state, atol=2e-5)


@torch.inference_mode()
def test_decoding_in_bfloat16_with_decay_and_the_delta_rule() -> None:
    """Without products of matrices, which Triton's interpreter does not know in bfloat16."""
    exact = make_model(1, 2, 8, 16, decay="gated", write="delta", decay_half_lives=[3.0, None])
    reference = ModelRunner(exact, 1)
    runner = CUDARunner(cast(copy.deepcopy(exact), torch.bfloat16), 1)
    reference.clear(0)
    reference.prefill(0, torch.randint(37, (20,)).tolist())
    runner.write_state(0, reference.read_state(0))
    for token in torch.randint(37, (8,)).tolist():
        expected = reference.decode([0], [token])[0]  # (V)
        assert (runner.decode([0], [token])[0] - expected).norm() < 0.03 * expected.norm()


@torch.inference_mode()
def test_state_goes_between_runner_and_model_at_a_far_position() -> None:
    model = make_model(1, 2, 8, 4)
    state = BDHState.zeros(model.config, 1)
    state.position += 1_000_003
    state.synapses = [torch.randn_like(S) for S in state.synapses]
    runner = CUDARunner(model, 2)
    runner.write_state(1, state)
    tokens = torch.randint(37, (1, 6))
    expected = model(tokens, past_key_values=state, use_cache=True).logits[0]  # leaves the state advanced
    runner.prefill(1, tokens[0, :3].tolist())
    for t in range(3, 6):
        assert torch.allclose(runner.decode([1], [int(tokens[0, t])])[0], expected[t], atol=2e-5)
    left = runner.read_state(1)
    assert int(left.position) == int(state.position) == 1_000_009
    for S, expected_S in zip(left.synapses, state.synapses, strict=True):
        assert torch.allclose(S, expected_S, atol=1e-5)


@torch.inference_mode()
def test_a_row_does_not_depend_on_other_rows() -> None:
    model = make_model(1, 2, 8, 4)
    alone, together = CUDARunner(model, 3), CUDARunner(model, 3)
    for runner in (alone, together):
        for slot in range(3):
            runner.clear(slot)
    for t in range(4):
        rows = together.decode([2, 0, 1], [t, (7 * t) % 37, 5])
        assert torch.equal(rows[1], alone.decode([0], [(7 * t) % 37])[0])


@torch.inference_mode()
def test_how_the_work_is_cut_up_does_not_matter() -> None:
    model = make_model(1, 1, 8, 16)  # 128 neurons a head
    tokens = [3, 1, 4]
    results = []
    for tiles in (DecodeTiles(1, 1, 16, 16, 1), DecodeTiles(4, 8, 16, 16, 2), DecodeTiles(2, 2, 64, 128, 1)):
        runner = CUDARunner(model, 1)
        runner.few = replace(tiles).fitted(runner.N)
        runner.clear(0)
        results.append(torch.stack([runner.decode([0], [token])[0] for token in tokens]))
    for result in results[1:]:
        assert torch.allclose(result, results[0], atol=1e-5)


@torch.inference_mode()
def test_silent_neurons() -> None:
    model = make_model(1, 2, 8, 4)
    model.model.layer.encoder.weight[:] = 0  # nobody ever fires
    tokens = torch.randint(37, (1, 12))
    runner = CUDARunner(model, 1)
    runner.clear(0)
    expected = model(tokens).logits[0]
    assert torch.allclose(runner.prefill(0, tokens[0, :10].tolist()), expected[9], atol=1e-5)
    for t in range(10, 12):
        assert torch.allclose(runner.decode([0], [int(tokens[0, t])])[0], expected[t], atol=1e-5)


@settings(max_examples=20)
@given(h=st.integers(1, 4), half=st.integers(1, 9), D=st.integers(1, 5))
def test_layout_goes_both_ways(h: int, half: int, D: int) -> None:
    rows = torch.arange(h * 2 * half * D).view(h * 2 * half, D)
    reordered = halved(rows, h)
    assert torch.equal(interleaved(reordered, h), rows)
    head = reordered.view(h, 2 * half, D)
    assert torch.equal(head[:, :half], rows.view(h, half, 2, D)[:, :, 0])


@settings(max_examples=10)
@given(h=st.integers(1, 3), chunks=st.integers(1, 4), C=st.sampled_from([1, 2, 8]), seed=st.integers(0, 99))
def test_attention_in_chunks_equals_all_pairs(h: int, chunks: int, C: int, seed: int) -> None:
    torch.manual_seed(seed)
    T, N, D = chunks * C, 6, 5
    R, x, S = (torch.randn(*shape, dtype=torch.float64) for shape in ((h, T, N), (T, D), (h, N, D)))
    written = torch.einsum("htn,td->htnd", R, x).view(h, chunks, C, N, D).sum(2)  # (h, chunks, N, D)
    before = S[:, None] + written.cumsum(1) - written
    expected = attention_quadratic(R[None], x[None], S[None])[0]  # (h, T, D)
    assert torch.allclose(attend_chunks(R, x, before), expected)


@settings(max_examples=20)
@given(
    h=st.integers(1, 3),
    chunks=st.integers(1, 4),
    C=st.sampled_from([1, 2, 8]),
    decays=st.booleans(),
    delta=st.booleans(),
    seed=st.integers(0, 99),
)
def test_attention_in_chunks_with_decay_and_the_delta_rule_equals_token_by_token(
    h: int, chunks: int, C: int, decays: bool, delta: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    T, N, D = chunks * C, 6, 5
    R, x, S = (torch.randn(*shape, dtype=torch.float64) for shape in ((h, T, N), (T, D), (h, N, D)))
    log_decay = -torch.rand(h, T, dtype=torch.float64) * 2  # (h, T)
    beta = torch.rand(h, T, dtype=torch.float64)  # (h, T)
    if not decays:
        log_decay.zero_()
    gates = Gates(log_decay[None], beta[None] if delta else None)
    keys = unit_keys(R) if delta else R  # (h, T, N)
    expected, after = gated_attention_recurrent(keys[None], x[None], S[None].clone(), gates)
    u = log_decay.view(h, chunks, C).cumsum(-1)  # (h, chunks, C)
    if delta:
        A = attend_delta(R, x, S, u if decays else None, beta.view(h, chunks, C))  # (h, T, D)
        assert torch.allclose(S, after[0])
    else:
        before = [S]
        for c in range(chunks - 1):
            now = slice(c * C, (c + 1) * C)
            before.append(
                gated_attention_recurrent(R[None, :, now], x[None, now], before[-1][None], gates.at(now))[1][0]
            )
        A = attend_chunks(R, x, torch.stack(before, 1), u)  # (h, T, D)
    assert torch.allclose(A, expected[0])
