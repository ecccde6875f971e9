"""Arguments that the library gives to any model: honoured, or refused in words; none changes nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from bdh.model import BDHConfig, BDHForCausalLM, BDHState
from tests.inference.small import random_gates

V = 23
TOKENS = torch.arange(18).view(2, 9) * 5 % V


@pytest.fixture(params=[{}, {"decay": "gated", "write": "delta"}], ids=["add", "delta"])
def model(request: pytest.FixtureRequest) -> BDHForCausalLM:
    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_embd": 16, "n_head": 2, "mlp_internal_dim_multiplier": 8, "vocab_size": V}
    return random_gates(BDHForCausalLM(BDHConfig(initializer_range=0.3, **sizes, **request.param)).eval())


def test_hidden_states_are_returned_where_the_configuration_says_so(model: BDHForCausalLM) -> None:
    expected = model(TOKENS, output_hidden_states=True).hidden_states
    assert len(expected) == 4 and model(TOKENS).hidden_states is None
    model.config.output_hidden_states = True
    for outputs in (model(TOKENS), model.model(TOKENS)):
        assert all(map(torch.equal, outputs.hidden_states, expected))
    assert model(TOKENS, output_hidden_states=False).hidden_states is None
    assert torch.equal(model.model(TOKENS).last_hidden_state, expected[-1])


@pytest.mark.parametrize(("wanted", "kept"), [(-1, {3}), ([0, 2], {0, 2}), (0, {0}), ([], set())])
def test_some_hidden_states_can_be_chosen(model: BDHForCausalLM, wanted: Any, kept: set[int]) -> None:
    every = model(TOKENS, output_hidden_states=True).hidden_states
    found = model(TOKENS, output_hidden_states=wanted).hidden_states
    assert {i for i, x in enumerate(found) if x is not None} == kept and len(found) == 4
    assert all(torch.equal(found[i], every[i]) for i in kept)


def test_outputs_are_tuples_where_they_are_asked_for(model: BDHForCausalLM) -> None:
    named = model(TOKENS, labels=TOKENS)
    for settings in ({"return_dict": False}, {}):
        model.config.return_dict = bool(settings)
        loss, logits, state = model(TOKENS, labels=TOKENS, **settings)
        assert torch.equal(loss, named.loss) and torch.equal(logits, named.logits) and isinstance(state, BDHState)
        (x,) = model.model(TOKENS, use_cache=False, **settings)
        assert x.shape == (2, 9, 16)
    assert model(TOKENS, return_dict=True).logits is not None


def test_positions_are_honoured(model: BDHForCausalLM) -> None:
    positions = torch.arange(9)[None]
    plain = model(TOKENS)
    given = model(TOKENS, position_ids=positions)
    assert torch.equal(given.logits, plain.logits) and given.past_key_values.position.tolist() == [9, 9]
    later = model(TOKENS, position_ids=positions.expand(2, -1) + torch.tensor([[0], [100]]))
    assert later.past_key_values.position.tolist() == [9, 109]
    assert torch.allclose(later.logits, plain.logits, atol=1e-5)  # phases are relative
    spread = model(TOKENS, attention_mask=torch.ones_like(TOKENS), position_ids=positions * 3)
    assert not torch.allclose(spread.logits, plain.logits, atol=1e-2)
    state = model(TOKENS[:, :4]).past_key_values
    going_on = model(TOKENS[:, 4:], past_key_values=state, position_ids=positions[:, 4:])
    assert torch.allclose(going_on.logits, plain.logits[:, 4:], atol=1e-5)
    assert going_on.past_key_values.position.tolist() == [9, 9]


def test_positions_of_padding_do_not_count(model: BDHForCausalLM) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0, 0], [0] * 9])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = model(TOKENS, attention_mask=mask, position_ids=positions)
    plain = model(TOKENS, attention_mask=mask)
    assert torch.allclose(given.logits[0, 2:7], plain.logits[0, 2:7], atol=1e-6)
    assert given.past_key_values.position.tolist() == plain.past_key_values.position.tolist() == [5, 0]


def test_positions_that_begin_anew_keep_packed_documents_apart(model: BDHForCausalLM) -> None:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    packed = model(TOKENS, position_ids=positions)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, 2]]).expand(2, -1)
    assert torch.allclose(packed.logits, model(TOKENS, document_ids=documents).logits, atol=1e-5)
    alone = torch.cat([model(TOKENS[:, a:b]).logits for a, b in ((0, 4), (4, 6), (6, 9))], dim=1)
    assert torch.allclose(packed.logits, alone, atol=1e-5)


def test_the_loss_takes_what_the_trainer_gives(model: BDHForCausalLM) -> None:
    labels = TOKENS.clone()
    labels[0, :4] = -100
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    loss = model(TOKENS, labels=labels).loss
    assert torch.equal(model(TOKENS, shift_labels=shifted).loss, loss)
    scored = (shifted != -100).sum()
    summed = model(TOKENS, labels=labels, num_items_in_batch=torch.tensor(26)).loss
    assert torch.allclose(summed * 26, loss * scored)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"atention_mask": TOKENS}, TypeError, "BDH does not take atention_mask"),
        ({"token_type_ids": TOKENS}, TypeError, "BDH does not take token_type_ids"),
        ({"is_causal": False}, TypeError, "BDH does not take is_causal"),
        ({"output_attentions": True}, TypeError, "has no attention weights"),
        ({"cu_seq_lens_q": TOKENS[0]}, TypeError, "does not take cu_seq_lens_q; give document_ids"),
        ({"attention_mask": torch.ones(2, 1, 9, 9)}, ValueError, r"attention_mask has shape \(2, 1, 9, 9\)"),
        ({"attention_mask": torch.ones(1, 9)}, ValueError, r"attention_mask has shape \(1, 9\)"),
        ({"attention_mask": torch.ones(2, 8)}, ValueError, r"attention_mask has shape \(2, 8\)"),
        ({"position_ids": torch.arange(9)}, ValueError, r"position_ids has shape \(9,\)"),
        ({"position_ids": torch.zeros(3, 2, 9)}, ValueError, r"position_ids has shape \(3, 2, 9\)"),
        ({"position_ids": torch.arange(8)[None]}, ValueError, r"position_ids has shape \(1, 8\); it must be \(2, 9\)"),
        ({"past_key_values": DynamicCache()}, TypeError, "the cache is a DynamicCache; BDH goes on from a BDHState"),
        ({"cache": ((TOKENS, TOKENS),)}, TypeError, "the cache is a tuple"),
        ({"inputs_embeds": torch.zeros(2, 9, 16)}, ValueError, "either input_ids or inputs_embeds"),
    ],
)
@pytest.mark.parametrize("head", [True, False], ids=["head", "base"])
def test_what_cannot_be_honoured_is_refused(head: bool, arguments: Any, error: type[Exception], words: str) -> None:
    model = BDHForCausalLM(BDHConfig(n_layer=1, n_embd=16, n_head=2, mlp_internal_dim_multiplier=2, vocab_size=V))
    with pytest.raises(error, match=words):
        (model if head else model.model)(TOKENS, **arguments)


def test_two_states_are_refused(model: BDHForCausalLM) -> None:
    state = model(TOKENS).past_key_values
    with pytest.raises(ValueError, match="either past_key_values or cache"):
        model(TOKENS, past_key_values=state, cache=state)


def test_attentions_asked_for_by_the_configuration_are_refused(model: BDHForCausalLM) -> None:
    model.config.output_attentions = True
    with pytest.raises(TypeError, match="has no attention weights"):
        model(TOKENS)


def test_what_changes_nothing_anywhere_is_taken(model: BDHForCausalLM) -> None:
    nothing: dict[str, Any] = {"output_attentions": False, "token_type_ids": None, "is_causal": True}
    assert torch.equal(model(TOKENS, **nothing).logits, model(TOKENS).logits)


# ------------------------------------------------------------------------------------------- ways of generate()


def written(model: BDHForCausalLM, **options: Any) -> Tensor:
    result: Tensor = model.generate(TOKENS[:1], max_new_tokens=5, do_sample=False, **options)
    return result


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"prompt_lookup_num_tokens": 3}, ValueError, "assisted generation is not supported with stateful models"),
        ({"past_key_values": DynamicCache()}, TypeError, "BDH goes on from a BDHState"),
        ({"cache_implementation": "paged"}, NotImplementedError, "continuous batching"),
        ({"output_attentions": True, "return_dict_in_generate": True}, TypeError, "has no attention weights"),
        ({"temprature": 1.0}, ValueError, "temprature"),
    ],
)
def test_ways_that_need_keys_and_values_are_refused(
    model: BDHForCausalLM, options: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        written(model, **options)


def test_assisted_decoding_is_refused_on_either_side(model: BDHForCausalLM) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    other = LlamaForCausalLM(LlamaConfig(vocab_size=V, **small)).eval()
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        written(model, assistant_model=other)
    with pytest.raises(ValueError, match="synapses cannot go back by tokens"):
        other.generate(TOKENS[:1], max_new_tokens=5, do_sample=False, assistant_model=model)


def test_continuous_batching_is_refused(model: BDHForCausalLM) -> None:
    with pytest.raises(NotImplementedError, match=r"use generate\(\), or bdh\.LLM"):
        model.generate_batch([[1, 2, 3]])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_a_prompt_can_be_read_in_pieces(model: BDHForCausalLM, options: Any) -> None:
    assert torch.equal(written(model, prefill_chunk_size=4, **options), written(model, **options))
    state = model(TOKENS[:1, :3]).past_key_values
    going_on = written(model, prefill_chunk_size=2, past_key_values=state)
    assert torch.equal(going_on, written(model))


@pytest.mark.parametrize("tokens", [TOKENS, None], ids=["with-tokens", "alone"])
def test_embeddings_are_not_read_in_pieces(model: BDHForCausalLM, tokens: Tensor | None) -> None:
    embeds = model.get_input_embeddings()(TOKENS)
    with pytest.raises(ValueError, match="give input_ids without inputs_embeds"):
        model.generate(tokens, inputs_embeds=embeds, prefill_chunk_size=4, max_new_tokens=2)


def test_hidden_states_and_scores_are_collected(model: BDHForCausalLM) -> None:
    options = {"output_hidden_states": True, "output_scores": True, "output_logits": True}
    outputs: Any = written(model, return_dict_in_generate=True, **options)
    assert len(outputs.hidden_states) == len(outputs.scores) == len(outputs.logits) == 5
    assert [x.shape for x in outputs.hidden_states[0]] == [(1, 9, 16)] * 4
    assert [x.shape for x in outputs.hidden_states[1]] == [(1, 1, 16)] * 4
    logits = model(outputs.sequences).logits[:, 8:-1]
    assert torch.allclose(torch.stack(outputs.logits, dim=1), logits, atol=1e-4)


def test_one_prompt_read_once_has_several_continuations(model: BDHForCausalLM) -> None:
    state = model(TOKENS[:1, :6]).past_key_values
    state.batch_repeat_interleave(3)
    assert state.batch_size == 3
    torch.manual_seed(0)
    several = model.generate(
        TOKENS[:1], past_key_values=state, max_new_tokens=5, num_return_sequences=3, do_sample=True
    )
    torch.manual_seed(0)
    assert torch.equal(several, model.generate(TOKENS[:1], max_new_tokens=5, num_return_sequences=3, do_sample=True))
    state.batch_select_indices(torch.tensor([2]))
    assert state.batch_size == 1


def test_prefix_tuning_is_refused_and_prompt_tuning_learns(model: BDHForCausalLM) -> None:
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    prefixed = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(TypeError, match=r"none that could be put before them \(prefix tuning\)"):
        prefixed(input_ids=TOKENS, labels=TOKENS)
    prompted = get_peft_model(prefixed.base_model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    prompted.train()
    prompted(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), labels=TOKENS).loss.backward()
    gradients = [p.grad for p in prompted.parameters() if p.requires_grad]
    assert gradients and all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    assert prompted.eval().generate(input_ids=TOKENS, max_new_tokens=3, do_sample=False).shape == (2, 12)
