"""What is told of neurons and synapses is what the equations say."""

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bdh.insight import LayerStudy, LayerView, Observer, Synapse, neuron_activity
from bdh.insight.layer_study import NEURONS, SENDERS, SOURCES, SYNAPSES, Strongest
from bdh.model import BDHForCausalLM, BDHState
from tests.insight.plain import VARIANTS, plainly, random_state, small_model


def studied(study: LayerStudy) -> LayerView:
    for piece in study.pieces:
        study.read_past(piece)
    return study.view()


def same_synapses(found: list[Synapse], all_of_them: Tensor) -> bool:
    """Whether these are the strongest of (h, N, N)."""
    N = all_of_them.shape[-1]
    flat = all_of_them.flatten()
    expected = flat.abs().sort(descending=True).values
    expected = expected[: min(SYNAPSES, int((expected > 1e-12).sum()))]
    found = [one for one in found if abs(one.strength) > 1e-12]
    strengths = torch.tensor([one.strength for one in found], dtype=torch.float64)
    there = [all_of_them[one.sender // N, one.sender % N, one.receiver % N] for one in found]
    return (
        len(found) == len(set(found)) == len(expected)
        and all(one.sender // N == one.receiver // N for one in found)
        and torch.allclose(strengths.abs(), expected, rtol=1e-6)
        and torch.allclose(strengths, torch.tensor(there, dtype=torch.float64), rtol=1e-6)
    )


@pytest.mark.parametrize(("decay", "write"), VARIANTS)
@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_layer=st.integers(1, 3),
    h=st.integers(1, 3),
    width=st.integers(1, 4),
    pairs=st.integers(1, 8),
    length=st.integers(1, 150),
    skipped=st.integers(0, 5),
    position=st.integers(0, 10**6),
    with_state=st.booleans(),
    data=st.data(),
)
def test_views_are_what_the_equations_say(
    decay: Literal["none", "fixed", "gated"],
    write: Literal["add", "delta"],
    seed: int,
    n_layer: int,
    h: int,
    width: int,
    pairs: int,
    length: int,
    skipped: int,
    position: int,
    with_state: bool,
    data: st.DataObject,
) -> None:
    model = small_model(seed, n_layer, h, width, pairs, decay, write)
    tokens = torch.randint(0, 20, (skipped + length,)).tolist()
    state = random_state(model, position) if with_state else None
    observer = Observer(model, 200, state)
    if skipped:
        observer.skip(tokens[:skipped])
    observer.read(tokens[skipped:])
    index = data.draw(st.integers(0, length - 1))
    layer = data.draw(st.integers(0, n_layer - 1))

    study = LayerStudy(model, observer.record, index, layer)
    view = studied(study)
    plain = plainly(model, tokens[: skipped + index + 1], state, layer)

    n, N = model.config.n_neurons, model.config.neurons_per_head
    brought = torch.zeros(n, model.config.n_embd, dtype=torch.float64)
    brought[study.rows] = study.brought
    assert torch.allclose(brought.view(h, N, -1).sum(1), plain.A, rtol=1e-8, atol=1e-8)
    assert same_synapses(view.written, plain.written)
    assert same_synapses(view.read, plain.read * (plain.Y > 0)[:, None])

    X = plain.X.flatten()
    assert (view.layer, view.active, view.share) == (layer, int((X > 0).sum()), float((X > 0).double().mean()))
    assert torch.allclose(torch.tensor([value for _, value in view.neurons]).double(), X.topk(len(view.neurons)).values)
    assert len(view.neurons) == min(NEURONS, view.active)
    assert all(abs(X[neuron] - value) < 1e-9 for neuron, value in view.neurons)
    scores = plain.scores[skipped:]
    assert len(view.sources) == min(SOURCES, int((scores != 0).sum()))
    assert all(abs(scores[s] - weight) < 1e-6 for s, weight in view.sources)
    strongest = scores.abs().sort(descending=True).values[: len(view.sources)]
    assert torch.allclose(torch.tensor([abs(weight) for _, weight in view.sources]).double(), strongest.double())
    if index == 0 and not skipped and not with_state:
        assert not view.read and not view.sources

    for found, expected in ((view.log_decay, plain.log_decay), (view.write_strength, plain.write_strength)):
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert torch.allclose(torch.tensor(found, dtype=torch.float64), expected, rtol=1e-9, atol=1e-12)

    neuron = data.draw(st.integers(0, n - 1))
    activity = neuron_activity(model, observer.record, layer, neuron)
    assert len(activity) == length and torch.allclose(activity[index], X[neuron])


def attention_of(model: BDHForCausalLM, tokens: list[int], state: BDHState) -> list[list[Tensor]]:
    """What the model's own layers hand to `encoder_v`: by layer and head, LN(A) of the last token."""
    seen: list[Tensor] = []
    hooks = [
        one.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][0, -1]))
        for one in model.model.layer.encoder_v
    ]
    with torch.no_grad():
        model(torch.tensor([tokens]), past_key_values=state.clone())
    for hook in hooks:
        hook.remove()
    h = model.config.n_head
    return [seen[i : i + h] for i in range(0, len(seen), h)]


@pytest.mark.parametrize(("decay", "write"), VARIANTS)
def test_what_was_brought_is_the_models_own_attention(
    decay: Literal["none", "fixed", "gated"], write: Literal["add", "delta"]
) -> None:
    model = small_model(3, decay=decay, write=write)
    state = random_state(model, 77)
    tokens = torch.randint(0, 20, (70,)).tolist()
    observer = Observer(model, 100, state)
    observer.read(tokens)
    for layer, heads in enumerate(attention_of(model, tokens, state)):
        study = LayerStudy(model, observer.record, 69, layer)
        studied(study)
        for k, expected in enumerate(heads):
            A = study.brought[study.rows // model.config.neurons_per_head == k].sum(0)
            assert torch.allclose(model.model.layer.norm(A), expected, rtol=1e-8, atol=1e-9)


def test_the_strongest_are_found_among_many() -> None:
    """More senders than are compared at once: the search may stop early, but not too early."""
    model = small_model(5, n_layer=1, h=2, width=8, pairs=40)
    tokens = torch.randint(0, 20, (30,)).tolist()
    observer = Observer(model, 30)
    observer.read(tokens)
    view = studied(LayerStudy(model, observer.record, 29, 0))
    plain = plainly(model, tokens, None, 0)
    assert view.active > 256 and same_synapses(view.read, plain.read * (plain.Y > 0)[:, None])


def test_a_record_that_grows_meanwhile_changes_nothing() -> None:
    model = small_model(6)
    tokens = torch.randint(0, 20, (20,)).tolist()
    observer = Observer(model, 40)
    observer.read(tokens)
    before = studied(LayerStudy(model, observer.record, 10, 1))
    study = LayerStudy(model, observer.record, 10, 1)
    observer.read(tokens)
    assert studied(study) == before


def test_bfloat16_is_read_as_it_is() -> None:
    exact, rough = small_model(7), small_model(7).bfloat16()
    tokens = torch.randint(0, 20, (20,)).tolist()
    views = []
    for model in (exact, rough):
        observer = Observer(model, 20)
        observer.read(tokens)
        views.append(studied(LayerStudy(model, observer.record, 19, 0)))
    assert views[1].neurons[0][0] == views[0].neurons[0][0]
    assert abs(views[1].read[0].strength / views[0].read[0].strength - 1) < 0.1


def test_the_search_stops_no_sooner_than_it_may() -> None:
    """Senders in the order of what they could bring at most; the strongest by far come late in it."""
    kinds = [[0.0, 2.0]] * SENDERS + [[1.0, 1.5]] * SYNAPSES + [[0.0, 1.7]] * (SENDERS - SYNAPSES) + [[1.2, 0.0]] * 3
    found = Strongest()
    numbers = torch.arange(len(kinds))
    found.search(torch.tensor(kinds), torch.tensor([[1.0, 0.0]]), numbers, torch.tensor([7]))
    assert [synapse.receiver for synapse in found.found] == [7] * SYNAPSES
    assert [synapse.strength > 1.1 for synapse in found.found] == [True] * 3 + [False] * (SYNAPSES - 3)
