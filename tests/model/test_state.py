"""BDHState: cloned, selected, moved; advanced by forward; guarded against misuse."""

import copy

import pytest
import torch

from bdh.model import BDHConfig, BDHForCausalLM, BDHState
from bdh.training.device_setup import recompute_layers

CONFIG = BDHConfig(n_layer=2, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=11)


@pytest.fixture
def model() -> BDHForCausalLM:
    torch.manual_seed(0)
    return BDHForCausalLM(copy.deepcopy(CONFIG)).eval()


@torch.no_grad()
def test_shape_and_constant_size(model: BDHForCausalLM) -> None:
    state = model(torch.randint(11, (3, 5))).past_key_values
    assert [tuple(S.shape) for S in state.synapses] == [(3, 2, 16, 8)] * 2
    assert all(S.dtype == torch.float32 for S in state.synapses)
    size = state.nbytes
    state = model(torch.randint(11, (3, 50)), past_key_values=state).past_key_values
    assert state.nbytes == size == 2 * 3 * 2 * 16 * 8 * 4
    assert state.position.tolist() == [55, 55, 55] and state.get_seq_length() == 55


@torch.no_grad()
def test_clone_shares_nothing(model: BDHForCausalLM) -> None:
    state = model(torch.randint(11, (1, 5))).past_key_values
    before = state.clone()
    copy = [S.clone() for S in before.synapses]
    model(torch.randint(11, (1, 3)), past_key_values=state)
    assert before.position.tolist() == [5] and state.position.tolist() == [8]
    assert all(torch.equal(a, b) for a, b in zip(before.synapses, copy, strict=True))
    assert not torch.equal(before.synapses[0], state.synapses[0])


@torch.no_grad()
def test_select_and_reorder_go_on_like_the_chosen_sequences(model: BDHForCausalLM) -> None:
    tokens = torch.randint(11, (3, 6))
    state = model(tokens).past_key_values
    order = torch.tensor([2, 0, 2, 1])
    chosen = state.select(order)
    following = torch.tensor([[1], [2], [3], [4]])
    logits = model(following, past_key_values=chosen).logits
    alone = [model(torch.cat([tokens[i], f])[None]).logits[:, -1] for i, f in zip(order, following, strict=True)]
    assert torch.allclose(logits[:, 0], torch.cat(alone), atol=1e-5)

    state.reorder_cache(torch.tensor([1, 1, 0]))
    assert torch.equal(state.synapses[0][0], state.synapses[0][1])


@torch.no_grad()
def test_moving_to_another_dtype_keeps_positions_whole(model: BDHForCausalLM) -> None:
    state = model(torch.randint(11, (1, 5))).past_key_values.to(dtype=torch.bfloat16)
    assert state.synapses[0].dtype == torch.bfloat16 and state.position.dtype == torch.int64
    logits = model(torch.tensor([[1]]), past_key_values=state).logits
    assert torch.isfinite(logits).all()


def test_a_state_made_in_inference_mode_goes_on_outside_of_it(model: BDHForCausalLM) -> None:
    tokens = torch.randint(11, (1, 8))
    with torch.inference_mode():
        state = model(tokens[:, :5]).past_key_values
    with torch.no_grad():
        logits = model(tokens[:, 5:], past_key_values=state).logits
    assert torch.allclose(logits, model(tokens).logits[:, 5:], atol=1e-6)


def test_detach_cuts_the_graph(model: BDHForCausalLM) -> None:
    state = model(torch.randint(11, (1, 5)), use_cache=True).past_key_values
    assert state.synapses[1].requires_grad
    assert not any(S.requires_grad for S in state.detach().synapses)


def test_a_state_of_another_batch_is_refused(model: BDHForCausalLM) -> None:
    with pytest.raises(ValueError, match="the state holds 2 sequences, the input 3"):
        model(torch.randint(11, (3, 4)), past_key_values=BDHState.zeros(CONFIG, 2))


def test_training_makes_no_state_unless_asked(model: BDHForCausalLM) -> None:
    model.train()
    assert model(torch.randint(11, (1, 4))).past_key_values is None
    assert model(torch.randint(11, (1, 4)), use_cache=True).past_key_values is not None
    assert model.eval()(torch.randint(11, (1, 4)), use_cache=False).past_key_values is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 3}, "n_head is 3; it must divide the 32 neurons"),
        ({"n_embd": 5, "n_head": 20}, "n_head is 20, which leaves 1 neurons a head"),
        ({"n_layer": 0}, "n_layer is 0; it must be 1 or more"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1"),
    ],
)
def test_a_configuration_is_checked_when_it_is_made(changes: dict[str, float], message: str) -> None:
    sizes = {"n_layer": 2, "n_embd": 8, "n_head": 2, "mlp_internal_dim_multiplier": 4, "vocab_size": 11}
    with pytest.raises(ValueError, match=message):
        BDHConfig(**(sizes | changes))


def test_every_weight_is_drawn_from_the_published_distribution() -> None:
    torch.manual_seed(0)
    model = BDHForCausalLM(BDHConfig(n_embd=64, mlp_internal_dim_multiplier=32, n_head=4))
    for name, weight in model.named_parameters():
        assert abs(weight.mean()) < 1e-3 and abs(weight.std() - 0.02) < 1e-3, name
    assert sum(p.numel() for p in BDHForCausalLM(BDHConfig()).parameters()) == 25_296_896


def test_gradient_checkpointing_changes_nothing_but_memory(model: BDHForCausalLM) -> None:
    tokens = torch.randint(11, (2, 9))
    model.train()
    model.config.dropout = 0.0
    expected = torch.autograd.grad(model(tokens, labels=tokens).loss, list(model.parameters()))
    recompute_layers(model)
    found = torch.autograd.grad(model(tokens, labels=tokens).loss, list(model.parameters()))
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(found, expected, strict=True))


def test_dropout_silences_in_training_only(model: BDHForCausalLM) -> None:
    tokens = torch.randint(11, (1, 9))
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
