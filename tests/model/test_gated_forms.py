"""Decay and the delta rule: every form, and the model, against a float64 definition that loops over tokens."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bdh.data.tokenizer import byte_tokenizer
from bdh.model import BDHConfig, BDHForCausalLM, BDHState
from bdh.model.export import load_export, save_export
from bdh.model.model_card import model_card
from bdh.model.modeling_bdh import (
    KEY_EPS,
    BDHGates,
    Gates,
    gated_attend,
    gated_attention_chunked,
    gated_attention_quadratic,
    gated_attention_recurrent,
    rotary_phases,
    rotate,
    unit_keys,
)
from tests.conftest import environment

THETA = 64.0
FORMS = [(False, False), (True, False), (False, True), (True, True)]  # (decays, delta rule)
VARIANTS = [("fixed", "add"), ("gated", "add"), ("none", "delta"), ("fixed", "delta"), ("gated", "delta")]

by_form = pytest.mark.parametrize(("decays", "delta"), FORMS)
by_variant = pytest.mark.parametrize(("decay", "write"), VARIANTS)
seeds = st.integers(0, 2**32 - 1)


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    scale = b.norm().item() or 1.0
    return bool((a.double() - b.double()).norm().item() <= tolerance * scale)


# ---------------------------------------------------------------------------------------------- the definition


def turned(X: Tensor, position: int) -> Tensor:
    """Activity (h, N) of one token, rotated as at a position, by complex multiplication."""
    N = X.shape[-1]
    angles = position * THETA ** (-2 * torch.arange(N // 2, dtype=torch.float64) / N)  # (N / 2)
    turn = torch.polar(torch.ones_like(angles), angles)  # (N / 2) complex
    pairs = torch.view_as_complex(X.reshape(-1, N // 2, 2)) * turn  # (h, N / 2) complex
    return torch.view_as_real(pairs).reshape(X.shape)  # (h, N)


@dataclass
class Case:
    """Inputs of the attention of some tokens, as the equations name them.

    Attributes:
        X: Activity before the rotation, (B, h, T, N).
        x: Values, (B, T, D).
        S: Synapses before, (B, h, N, D).
        log_decay: (B, h, T), or None.
        write_strength: (B, h, T), or None.
        documents: (B, T) int64, or None.
        real: Which tokens are no padding, (B, T) bool.
        start: Position of the first token, by sequence, (B) int64.
    """

    X: Tensor
    x: Tensor
    S: Tensor
    log_decay: Tensor | None
    write_strength: Tensor | None
    documents: Tensor | None
    real: Tensor
    start: Tensor

    @property
    def positions(self) -> Tensor:
        """(B, T); padding takes none."""
        return (self.real.long().cumsum(1) - 1).clamp(min=0) + self.start[:, None]  # (B, T)

    def rotated(self) -> Tensor:
        """The rotated activity that the forms are given, (B, h, T, N)."""
        return rotate(self.X, *rotary_phases(self.positions, self.X.shape[-1], THETA, self.X.dtype))

    def keys(self) -> Tensor:
        return self.rotated() if self.write_strength is None else unit_keys(self.rotated())  # (B, h, T, N)

    def values(self) -> Tensor:
        return self.x * self.real[..., None]  # (B, T, D)

    def gates(self) -> Gates:
        masked = (None if g is None else g * self.real[:, None] for g in (self.log_decay, self.write_strength))
        return Gates(*masked)  # (B, h, T)

    def without_padding(self, A: Tensor) -> Tensor:
        """A (B, h, T, D) with the rows of padding, which mean nothing, set to zero."""
        return A * self.real[:, None, :, None]  # (B, h, T, D)


def definition(case: Case) -> tuple[Tensor, Tensor]:
    """Computes A (B, h, T, D), zero at padding, and the final S (B, h, N, D), token by token in float64."""
    all_A, all_S = [], []
    for b in range(case.x.shape[0]):
        X, x, S = case.X[b].double(), case.x[b].double(), case.S[b].double()  # (h, T, N), (T, D), (h, N, D)
        position, document, rows = int(case.start[b]), 0, []
        for t in range(x.shape[0]):
            if case.documents is not None and int(case.documents[b, t]) != document:
                document = int(case.documents[b, t])
                S = torch.zeros_like(S)  # (h, N, D)
            if not case.real[b, t]:
                rows.append(torch.zeros_like(S[:, 0]))  # (h, D)
                continue
            k = turned(X[:, t], position)  # (h, N)
            if case.log_decay is not None:
                S = torch.exp(case.log_decay[b, :, t].double())[:, None, None] * S  # (h, N, D)
            U = x[t].expand(S.shape[0], -1)  # (h, D)
            if case.write_strength is None:
                A = (k[:, :, None] * S).sum(1)  # (h, D)
            else:
                k = k / (k.norm(dim=-1, keepdim=True) + KEY_EPS)  # (h, N)
                A = (k[:, :, None] * S).sum(1)  # (h, D)
                U = case.write_strength[b, :, t].double()[:, None] * (U - A)  # (h, D)
            S = S + torch.stack([torch.outer(key, value) for key, value in zip(k, U, strict=True)])  # (h, N, D)
            rows.append(A)
            position += 1
        all_A.append(torch.stack(rows, 1))  # (h, T, D)
        all_S.append(S)
    return torch.stack(all_A), torch.stack(all_S)


@st.composite
def cases(draw: st.DrawFn, decays: bool, delta: bool, dtype: torch.dtype, longest: int = 20) -> Case:
    """Random inputs: heads that never decay and tokens that erase everything, silent neurons, padding, documents."""
    random = torch.Generator().manual_seed(draw(seeds))
    B, h, T, D = (draw(st.integers(1, n)) for n in (2, 3, longest, 5))
    N = 2 * draw(st.integers(1, 5))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    def chance(probability: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=random) < probability

    X = normal(B, h, T, N).relu()  # (B, h, T, N)
    if draw(st.booleans()):
        X = X * ~chance(0.3, B, h, T, 1)  # (B, h, T, N)  keys that are zero
    log_decay = beta = documents = None
    if decays:
        half_lives = 10 ** (4 * torch.rand(B, h, T, generator=random, dtype=torch.float64) - 1)  # (B, h, T)
        log_decay = -math.log(2) / half_lives  # (B, h, T)
        if draw(st.booleans()):
            log_decay = torch.where(chance(0.2, B, h, T), -30.0, log_decay)  # (B, h, T)
        if draw(st.booleans()):
            log_decay = log_decay * ~chance(0.4, 1, h, 1)  # (B, h, T)  heads that never decay
        log_decay = log_decay.to(dtype)
    if delta:
        beta = torch.sigmoid(2 * normal(B, h, T))  # (B, h, T)
    if draw(st.booleans()):
        documents = chance(0.25, B, T).long().cumsum(1)  # (B, T)  the first is 0 or 1
    real = torch.ones(B, T, dtype=torch.bool)  # (B, T)
    if draw(st.booleans()):
        real = ~chance(0.25, B, T)
    return Case(
        X=X,
        x=normal(B, T, D),
        S=normal(B, h, N, D) * (2.0 if draw(st.booleans()) else 0.0),
        log_decay=log_decay,
        write_strength=beta,
        documents=documents,
        real=real,
        start=torch.tensor([draw(st.integers(0, 10**6)) for _ in range(B)]),
    )


dtypes = st.sampled_from([torch.float32, torch.float64])


# --------------------------------------------------------------------------------------------------- the forms


@by_form
@settings(max_examples=60)
@given(data=st.data(), dtype=dtypes, chunk=st.integers(1, 24))
def test_every_form_equals_the_definition(
    decays: bool, delta: bool, data: st.DataObject, dtype: torch.dtype, chunk: int
) -> None:
    case = data.draw(cases(decays, delta, dtype))
    # float32 keeps the sum of log-decays, up to 600 here, to 1e-4
    tolerance = 3e-4 if dtype == torch.float32 else 1e-9
    A, S = definition(case)
    k, x, gates, documents = case.keys(), case.values(), case.gates(), case.documents
    results = (
        gated_attention_quadratic(k, x, case.S.clone(), gates, documents),
        gated_attention_chunked(k, x, case.S.clone(), gates, chunk, documents),
        gated_attention_recurrent(k, x, case.S.clone(), gates, documents),
        gated_attend(case.rotated(), x, case.S.clone(), gates, chunk, documents),
    )
    with torch.no_grad():  # the synapses are then overwritten
        in_place = gated_attend(case.rotated(), x, case.S.clone(), gates, chunk, documents)
    for found_A, found_S in (*results, in_place):
        assert found_S is not None and found_A.dtype == found_S.dtype == dtype
        assert close(case.without_padding(found_A), A, tolerance)
        assert close(found_S, S, tolerance)
    if not case.S.any():
        found_A, found_S = gated_attend(case.rotated(), x, None, gates, chunk, documents)
        assert found_S is None and close(case.without_padding(found_A), A, tolerance)


@by_form
@settings(max_examples=40)
@given(data=st.data(), dtype=dtypes, chunk=st.integers(1, 24))
def test_any_split_with_carried_state_equals_the_definition(
    decays: bool, delta: bool, data: st.DataObject, dtype: torch.dtype, chunk: int
) -> None:
    case = data.draw(cases(decays, delta, dtype))
    tolerance = 3e-4 if dtype == torch.float32 else 1e-9
    T = case.x.shape[1]
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, T - 1)), max_size=6)) - {T})
    R, x, gates, S = case.rotated(), case.values(), case.gates(), case.S.clone()
    pieces = []
    with torch.no_grad():
        for start, end in zip([0, *cuts], [*cuts, T], strict=True):
            piece, documents = slice(start, end), None
            if case.documents is not None:  # document 0 of a piece is the one that the state is of
                before = case.documents[:, start - 1 : start] if start else torch.zeros_like(case.documents[:, :1])
                documents = case.documents[:, piece] - before  # (B, T')
            A_p, S_p = gated_attend(R[:, :, piece], x[:, piece], S, gates.at(piece), chunk, documents)
            assert S_p is not None
            S = S_p
            pieces.append(A_p)
    A, after = definition(case)
    assert close(case.without_padding(torch.cat(pieces, 2)), A, tolerance)
    assert close(S, after, tolerance)


@by_form
@settings(max_examples=50)
@given(
    data=st.data(),
    dtype=dtypes,
    chunk=st.integers(1, 12),
    form=st.sampled_from(["quadratic", "chunked", "recurrent", "attend"]),
)
def test_gradients_equal_those_of_the_definition(
    decays: bool, delta: bool, data: st.DataObject, dtype: torch.dtype, chunk: int, form: str
) -> None:
    case = data.draw(cases(decays, delta, dtype, longest=10))
    tolerance, smallest = (1e-3, 1e-3) if dtype == torch.float32 else (1e-8, 1e-12)
    before_relu = torch.where(case.X > 0, case.X, -1.0)  # (B, h, T, N)  a silent neuron has no gradient
    leaves = [before_relu, case.x, case.S, *(g for g in (case.log_decay, case.write_strength) if g is not None)]
    for leaf in leaves:
        leaf.requires_grad_()
    case.X = before_relu.relu()
    random = torch.Generator().manual_seed(data.draw(seeds))
    B, h, T, _ = case.X.shape
    dA = torch.randn(B, h, T, case.x.shape[-1], generator=random, dtype=torch.float64)  # (B, h, T, D)
    dS = torch.randn(case.S.shape, generator=random, dtype=torch.float64)  # (B, h, N, D)

    def gradients(A: Tensor, S: Tensor | None) -> list[Tensor]:
        assert S is not None
        loss = (case.without_padding(A) * dA).sum() + (S * dS).sum()
        loss = loss + 0 * sum(leaf.sum() for leaf in leaves)  # a leaf that nothing depends on has a gradient of zero
        return list(torch.autograd.grad(loss, leaves, retain_graph=True))

    k, x, gates, documents = case.keys(), case.values(), case.gates(), case.documents
    if form == "quadratic":
        result = gated_attention_quadratic(k, x, case.S, gates, documents)
    elif form == "chunked":
        result = gated_attention_chunked(k, x, case.S, gates, chunk, documents)
    elif form == "recurrent":
        result = gated_attention_recurrent(k, x, case.S, gates, documents)
    else:
        result = gated_attend(case.rotated(), x, case.S, gates, chunk, documents)
    for found, expected in zip(gradients(*result), gradients(*definition(case)), strict=True):
        assert close(found, expected, tolerance) or (found - expected).abs().max() < smallest


@by_form
@pytest.mark.parametrize("with_documents", [False, True])
def test_gradients_equal_finite_differences(decays: bool, delta: bool, with_documents: bool) -> None:
    torch.manual_seed(1)
    B, h, T, N, D = 2, 2, 5, 4, 3
    documents = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 2, 2]]) if with_documents else None
    R = torch.randn(B, h, T, N, dtype=torch.float64, requires_grad=True)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    S = torch.randn(B, h, N, D, dtype=torch.float64, requires_grad=True)
    log_decay = (-torch.rand(B, h, T, dtype=torch.float64)).requires_grad_()
    beta = torch.rand(B, h, T, dtype=torch.float64).requires_grad_()

    for chunk in (2, T):

        def function(R: Tensor, x: Tensor, S: Tensor, log_decay: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
            gates = Gates(log_decay if decays else None, beta if delta else None)
            A, after = gated_attend(R, x, S, gates, chunk, documents)
            assert after is not None
            return A + 0 * (log_decay.sum() + beta.sum()), after

        assert torch.autograd.gradcheck(function, (R, x, S, log_decay, beta))


@pytest.mark.parametrize("delta", [False, True])
def test_gradients_are_finite_where_everything_is_erased_again_and_again(delta: bool) -> None:
    """exp(u_t - u_s) of a pair that is not seen, s > t, would be infinite in float32."""
    random = torch.Generator().manual_seed(4)
    B, h, T, N, D = 1, 2, 30, 6, 4
    k = torch.randn(B, h, T, N, generator=random)
    k = unit_keys(k) if delta else k
    x, S = torch.randn(B, T, D, generator=random), torch.randn(B, h, N, D, generator=random)
    log_decay = -30 * (torch.rand(B, h, T, generator=random) < 0.5).float()  # (B, h, T)
    beta = torch.rand(B, h, T, generator=random)
    for leaf in (k, x, S, log_decay):
        leaf.requires_grad_()

    def gradients(form: Callable[..., tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        A, after = form(k, x, S, Gates(log_decay, beta if delta else None))
        assert after is not None
        return list(torch.autograd.grad((A**2).sum() + (after**2).sum(), (k, x, S, log_decay)))

    for found, expected in zip(gradients(gated_attention_quadratic), gradients(gated_attention_recurrent), strict=True):
        assert found.isfinite().all() and close(found, expected, 1e-3)


def test_a_key_without_activity_is_zero_and_has_a_finite_gradient() -> None:
    R = torch.zeros(2, 1, 3, 4, requires_grad=True)
    k = unit_keys(R)
    assert not k.any()
    k.sum().backward()
    assert R.grad is not None and R.grad.isfinite().all()


# --------------------------------------------------------------------------------------------------- the model


def gated_config(decay: str, write: str, **fields: object) -> BDHConfig:
    half_lives = None if decay == "none" else [3.0, None]
    sizes: dict[str, object] = {
        "n_layer": 2,
        "n_embd": 6,
        "n_head": 2,
        "mlp_internal_dim_multiplier": 4,
        "vocab_size": 23,
        "initializer_range": 0.5,
        "rope_theta": THETA,
    }
    return BDHConfig(**{**sizes, "decay": decay, "write": write, "decay_half_lives": half_lives, **fields})


def gated_model(seed: int, decay: str, write: str, **fields: object) -> BDHForCausalLM:
    """A model in float64 whose gates depend on the token."""
    torch.manual_seed(seed)
    model = BDHForCausalLM(gated_config(decay, write, **fields)).double().eval()
    with torch.no_grad():
        for parameter in gates_of(model).parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def gates_of(model: BDHForCausalLM) -> BDHGates:
    gates = model.model.layer.gates
    assert gates is not None
    return gates


@torch.no_grad()
def plain_logits(model: BDHForCausalLM, tokens: list[int]) -> Tensor:
    """Logits (T, V) of one sequence from the beginning, by the definition."""
    config, layer, gates = model.config, model.model.layer, gates_of(model)
    h, N, D = config.n_head, config.neurons_per_head, config.n_embd

    def norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, (D,), eps=config.layer_norm_eps)

    x = norm(model.model.embed_tokens.weight[tokens])  # (T, D)
    for _ in range(config.n_layer):
        X = (x @ layer.encoder.weight.T).relu().view(-1, h, N)  # (T, h, N)
        log_decay = beta = None
        lives = config.decay_half_lives or []
        decaying = torch.tensor([float(life is not None) for life in lives]).double()  # (h)
        if config.decay == "fixed":
            retention = [1.0 if life is None else 2.0 ** (-1 / life) for life in lives]
            log_decay = torch.tensor(retention, dtype=torch.float64).log().expand(len(x), -1)  # (T, h)
        if config.decay == "gated":
            share = torch.sigmoid(x @ gates.decay_weight.T + gates.decay_bias)  # (T, h)
            log_decay = -gates.decay_rate.exp() * share * decaying  # (T, h)
        if config.write == "delta":
            beta = torch.sigmoid(x @ gates.write_weight.T + gates.write_bias)  # (T, h)
        case = Case(
            X=X.transpose(0, 1)[None],
            x=x[None],
            S=torch.zeros(1, h, N, D, dtype=torch.float64),
            log_decay=None if log_decay is None else log_decay.T[None],
            write_strength=None if beta is None else beta.T[None],
            documents=None,
            real=torch.ones(1, len(x), dtype=torch.bool),
            start=torch.zeros(1, dtype=torch.int64),
        )
        A = norm(definition(case)[0][0])  # (h, T, D)
        Z = [X[:, k] * layer.encoder_v[k](A[k]).relu() for k in range(h)]  # h x (T, N)
        x = norm(x + norm(torch.cat(Z, -1) @ layer.decoder.weight.T))  # (T, D)
    return x @ model.lm_head.weight.T  # (T, V)


sequences = st.lists(st.integers(0, 22), min_size=1, max_size=9)


@by_variant
@settings(max_examples=25)
@given(seed=seeds, prompts=st.lists(sequences, min_size=1, max_size=3), chunk=st.sampled_from([3, 512]), data=st.data())
def test_padding_on_either_side_leaves_no_trace(
    decay: str, write: str, seed: int, prompts: list[list[int]], chunk: int, data: st.DataObject
) -> None:
    model = gated_model(seed, decay, write, chunk_size=chunk)
    width = max(map(len, prompts)) + data.draw(st.integers(0, 3))
    lefts = [data.draw(st.integers(0, width - len(prompt))) for prompt in prompts]
    tokens, mask = torch.randint(23, (len(prompts), width)), torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, (prompt, left) in enumerate(zip(prompts, lefts, strict=True)):
        tokens[row, left : left + len(prompt)] = torch.tensor(prompt)
        mask[row, left : left + len(prompt)] = 1
    following = torch.randint(23, (len(prompts), 2))
    full = torch.cat([mask, torch.ones_like(following)], dim=1)  # (B, width + 2)
    with torch.no_grad():
        first = model(tokens, attention_mask=mask)
        state = first.past_key_values
        assert state.position.tolist() == [len(prompt) for prompt in prompts]
        second = model(following, attention_mask=full, past_key_values=state).logits  # (B, 2, V)
    for row, (prompt, left) in enumerate(zip(prompts, lefts, strict=True)):
        expected = plain_logits(model, prompt + following[row].tolist())  # (T + 2, V)
        assert close(first.logits[row, left : left + len(prompt)], expected[:-2], 1e-8)
        assert close(second[row], expected[-2:], 1e-8)


@by_variant
@settings(max_examples=25)
@given(
    seed=seeds,
    past=st.lists(st.integers(0, 22), max_size=6),
    texts=st.lists(sequences, min_size=1, max_size=4),
    chunk=st.sampled_from([3, 512]),
)
def test_documents_of_a_row_equal_separate_sequences(
    decay: str, write: str, seed: int, past: list[int], texts: list[list[int]], chunk: int
) -> None:
    """The first document goes on from the state; positions of the others go on in the row, which changes nothing."""
    model = gated_model(seed, decay, write, chunk_size=chunk)
    documents = torch.cat([torch.full((len(text),), i) for i, text in enumerate(texts)])[None]
    with torch.no_grad():
        state = model(torch.tensor([past])).past_key_values if past else None
        out = model(
            torch.tensor([[token for text in texts for token in text]]), past_key_values=state, document_ids=documents
        )
        apart = [plain_logits(model, past + texts[0])[len(past) :], *(plain_logits(model, text) for text in texts[1:])]
        assert close(out.logits[0], torch.cat(apart), 1e-8)
        last = (past if len(texts) == 1 else []) + texts[-1]  # what the state left is of
        more = model(torch.tensor([[3, 1]]), past_key_values=out.past_key_values).logits[0]
    assert close(more, plain_logits(model, [*last, 3, 1])[-2:], 1e-8)


@by_variant
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_beams_and_left_padded_batches(decay: str, write: str, beams: int) -> None:
    model = gated_model(5, decay, write, pad_token_id=0)
    tokens = torch.tensor([[0, 0, 0, 5, 6], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    options = {"max_new_tokens": 8, "num_beams": beams, "num_return_sequences": beams, "do_sample": False}
    together = model.generate(tokens, attention_mask=mask, **options)
    assert torch.equal(model.generate(tokens, attention_mask=mask, use_cache=False, **options), together)
    alone = [model.generate(prompt[None], **options)[:, len(prompt) :] for prompt in (tokens[0, 3:], tokens[1])]
    assert torch.equal(together[:, 5:], torch.cat(alone))


@pytest.mark.parametrize("decay", ["fixed", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_retention_is_that_of_the_half_lives(decay: str, dtype: torch.dtype) -> None:
    lives: list[float | int | None] = [0.25, 1, 16.0, 1e6, None, 40]
    config = gated_config(decay, "delta", n_head=6, n_embd=12, decay_half_lives=lives)
    gates = gates_of(BDHForCausalLM(config).to(dtype))
    if dtype == torch.float64:
        gates.reset_parameters()  # what was made in float32 is exact to float32
    log_decay, beta = gates(torch.randn(2, 3, 12, dtype=dtype))  # (2, 6, 3) each: gated ones do not depend on x yet
    assert log_decay is not None and beta is not None
    retention = [1.0 if life is None else 2.0 ** (-1 / life) for life in lives]
    eps = torch.finfo(dtype).eps
    expected = torch.tensor(retention, dtype=torch.float64)[None, :, None].expand(2, 6, 3)
    assert torch.allclose(log_decay.double().exp(), expected, rtol=8 * eps, atol=0.0)
    assert torch.allclose(log_decay.double(), expected.log(), rtol=max(8 * eps, 1e-9), atol=0.0)
    assert (log_decay[:, 4] == 0).all() and (beta == 0.5).all()


def test_half_lives_not_given_are_spaced_evenly_in_the_logarithm() -> None:
    config = gated_config("gated", "add", n_embd=8, n_head=4, decay_half_lives=None)
    assert config.decay_half_lives == [16.0, 64.0, 256.0, 1024.0]
    assert gated_config("fixed", "add", n_head=1, decay_half_lives=None).decay_half_lives == [128.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decay": "none", "decay_half_lives": [3.0, 4.0]}, 'decay_half_lives are given, but decay is "none"'),
        ({"decay": "fixed", "decay_half_lives": [3.0]}, "has 1 entries; it must have one for each of the 2 heads"),
        ({"decay": "gated", "decay_half_lives": []}, "has 0 entries"),
        ({"decay": "gated", "decay_half_lives": [3.0, 0.0]}, "decay_half_lives holds 0.0; a half-life must be"),
        ({"decay": "fixed", "decay_half_lives": [-1, None]}, "decay_half_lives holds -1; a half-life must be"),
        ({"decay": "fixed", "decay_half_lives": [math.inf, 1]}, "decay_half_lives holds inf"),
        ({"decay": "fixed", "decay_half_lives": [math.nan, 1]}, "decay_half_lives holds nan"),
        ({"decay": "fixed", "decay_half_lives": ["8", 1]}, "decay_half_lives"),
        ({"decay": "sometimes"}, "decay"),
        ({"write": "replace"}, "write"),
    ],
)
def test_wrong_gates_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        BDHConfig(n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, **fields)


def same_model(a: BDHForCausalLM, b: BDHForCausalLM) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@by_variant
def test_weights_and_configuration_come_back(decay: str, write: str, tmp_path: Path) -> None:
    model = gated_model(1, decay, write, training_block_size=64).float()
    model.save_pretrained(tmp_path)
    loaded = BDHForCausalLM.from_pretrained(tmp_path)
    assert same_model(model, loaded)
    for field in ("decay", "decay_half_lives", "write", "training_block_size"):
        assert getattr(loaded.config, field) == getattr(model.config, field)
    tokens = torch.randint(23, (2, 9))
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@by_variant
def test_loaded_in_bfloat16_the_gates_stay_in_float32(decay: str, write: str, tmp_path: Path) -> None:
    model = gated_model(1, decay, write).float()
    model.save_pretrained(tmp_path)
    loaded = BDHForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.model.layer.encoder.weight.dtype == torch.bfloat16
    for mine, theirs in zip(gates_of(loaded).parameters(), gates_of(model).parameters(), strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, theirs)
    tokens = torch.randint(23, (2, 30))
    with torch.no_grad():
        whole = loaded(tokens)
        state = loaded(tokens[:, :20]).past_key_values
        rest = [loaded(tokens[:, t : t + 1], past_key_values=state).logits for t in range(20, 30)]
    assert whole.logits.dtype == torch.bfloat16 and state.synapses[0].dtype == torch.float32
    exact = model(tokens).logits
    assert close(whole.logits, exact, 0.2) and close(torch.cat(rest, 1), exact[:, 20:], 0.2)


def test_weights_without_gates_get_initial_ones(tmp_path: Path) -> None:
    """A model trained without decay is loaded with it switched on."""
    torch.manual_seed(0)
    plain = BDHForCausalLM(gated_config("none", "add"))
    plain.save_pretrained(tmp_path)
    config = gated_config("gated", "delta")
    loaded = BDHForCausalLM.from_pretrained(tmp_path, config=config)
    expected = BDHForCausalLM(config)
    mine, theirs = gates_of(loaded).state_dict(), gates_of(expected).state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert torch.equal(loaded.model.layer.encoder.weight, plain.model.layer.encoder.weight)


def test_a_configuration_without_these_fields_is_the_published_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BDHForCausalLM(gated_config("none", "add"))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    for name in ("decay", "decay_half_lives", "write", "training_block_size"):
        fields.pop(name, None)
    path.write_text(json.dumps(fields))
    loaded = BDHForCausalLM.from_pretrained(tmp_path)
    model.eval()
    assert (loaded.config.decay, loaded.config.write, loaded.config.decay_half_lives) == ("none", "add", None)
    assert not loaded.config.has_gates and loaded.model.layer.gates is None
    assert not [name for name in loaded.state_dict() if "gates" in name] and same_model(model, loaded)
    tokens = torch.randint(23, (2, 9))
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_an_export_with_gates_loads_in_a_process_without_bdh(tmp_path: Path) -> None:
    model = gated_model(2, "gated", "delta", vocab_size=256).float()
    save_export(model, byte_tokenizer(), tmp_path / "model", model_card("a test", model.config, []))
    assert same_model(model, load_export(tmp_path / "model")[0])
    script = tmp_path / "without.py"
    script.write_text(
        "import sys, json, torch\n"
        "sys.modules['bdh'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r}, trust_remote_code=True)\n"
        "ids = torch.tensor([list(b'The dragon')])\n"
        "written = model.generate(ids, max_new_tokens=12, do_sample=False).tolist()\n"
        "print(json.dumps([type(model).__module__, model.config.decay_half_lives, written]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", str(script)],
        cwd=tmp_path,
        env=environment(HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    module, half_lives, written = json.loads(done.stdout.splitlines()[-1])
    assert module.startswith("transformers_modules") and half_lives == [3.0, None]
    ids = torch.tensor([list(b"The dragon")])
    assert written == model.generate(ids, max_new_tokens=12, do_sample=False).tolist()


def test_gradients_of_the_gates_flow_through_a_carried_state() -> None:
    model = gated_model(3, "gated", "delta")
    tokens = torch.randint(23, (2, 12))

    def gradients(*lengths: int) -> list[Tensor]:
        state, logits = BDHState.zeros(model.config, 2, dtype=torch.float64), []
        for piece in tokens.split(list(lengths), dim=1):
            output = model(piece, past_key_values=state)
            state = output.past_key_values
            logits.append(output.logits)
        return list(torch.autograd.grad(torch.cat(logits, dim=1).square().mean(), list(model.parameters())))

    names = [name for name, _ in model.named_parameters()]
    whole = gradients(12)
    assert all(g.any() for name, g in zip(names, whole, strict=True) if "gates" in name)
    for split in ((5, 7), (1,) * 12):
        for a, b in zip(gradients(*split), whole, strict=True):
            assert close(a, b, 1e-9)
