"""What the generation tests of transformers check of every model, as far as other tests here do not."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, StoppingCriteria, WatermarkingConfig
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from bdh.model import BDHForCausalLM, BDHState, state_of
from bdh.model.modeling_bdh import STATE
from tests.inference.small import small_model

V, D, PROMPT, NEW = 23, 16, 9, 4
TOKENS = torch.arange(2 * PROMPT).view(2, PROMPT) * 5 % V
MASK = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
EXACTLY: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}
GREEDY = {"do_sample": False, **EXACTLY}
EVERYTHING = dict.fromkeys(("return_dict_in_generate", "output_scores", "output_logits", "output_hidden_states"), True)
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "num_return_sequences": 2, "top_k": 10, "top_p": 0.7, "temperature": 0.7},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0},
    "beam-sample": {"do_sample": True, "num_beams": 2, "top_k": 10},
}


@pytest.fixture(params=[{}, {"decay": "gated", "write": "delta"}], ids=["add", "delta"])
def model(request: pytest.FixtureRequest) -> BDHForCausalLM:
    return small_model(vocab_size=V, **request.param)


def embeds_of(model: BDHForCausalLM, tokens: Tensor) -> Tensor:
    embeds: Tensor = model.get_input_embeddings()(tokens)
    return embeds


def same_states(found: BDHState | None, expected: BDHState | None) -> bool:
    assert found is not None and expected is not None
    synapses = zip(found.synapses, expected.synapses, strict=True)
    return (
        found.length == expected.length
        and torch.equal(found.position, expected.position)
        and all(torch.allclose(a, b, atol=1e-5) for a, b in synapses)
    )


@pytest.mark.parametrize("use_cache", [True, False], ids=["state", "no-state"])
@pytest.mark.parametrize("way", WAYS)
def test_outputs_have_the_forms_that_the_library_promises(model: BDHForCausalLM, way: str, use_cache: bool) -> None:
    options = {**EXACTLY, **WAYS[way], "use_cache": use_cache, "attention_mask": MASK}
    options |= {"bad_words_ids": [[1, 0]], "repetition_penalty": 1.2, "remove_invalid_values": True}
    torch.manual_seed(0)
    outputs = model.generate(TOKENS, **EVERYTHING, **options)
    torch.manual_seed(0)
    assert torch.equal(model.generate(TOKENS, **options), outputs.sequences)

    beams, returned = WAYS[way].get("num_beams", 1), WAYS[way].get("num_return_sequences", 1)
    rows = 2 * beams if beams > 1 else 2 * returned
    assert type(outputs) is (GenerateBeamDecoderOnlyOutput if beams > 1 else GenerateDecoderOnlyOutput)
    assert outputs.sequences.shape == (2 * returned, PROMPT + NEW)
    assert torch.equal(outputs.sequences[:, :PROMPT], TOKENS.repeat_interleave(returned, 0))
    for per_step in (outputs.scores, outputs.logits):
        assert isinstance(per_step, tuple) and [x.shape for x in per_step] == [(rows, V)] * NEW
    assert outputs.attentions is None and len(outputs.hidden_states) == NEW
    for step, hidden in enumerate(outputs.hidden_states):
        read = PROMPT + step if not use_cache else 1 if step else PROMPT
        assert isinstance(hidden, tuple) and [x.shape for x in hidden] == [(rows, read, D)] * 3
    state = state_of(outputs)
    if not use_cache:
        assert state is None
        return
    assert isinstance(state, BDHState) and state.length == PROMPT + NEW - 1
    assert [S.shape for S in state.synapses] == [(rows, 2, 64, D)] * 2
    assert sorted(state.position.tolist()) == [9] * (rows // 2) + [12] * (rows // 2)


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_scores_of_transitions_are_the_log_probabilities_of_the_tokens(model: BDHForCausalLM, way: str) -> None:
    options = {**EXACTLY, **WAYS[way], "return_dict_in_generate": True, "output_scores": True}
    options["attention_mask"] = torch.ones_like(TOKENS)
    outputs = model.generate(TOKENS, **options)
    beams = getattr(outputs, "beam_indices", None)
    found = model.compute_transition_scores(outputs.sequences, outputs.scores, beams, normalize_logits=beams is None)
    logits = model(outputs.sequences).logits[:, PROMPT - 1 : -1].log_softmax(-1)
    expected = logits.gather(-1, outputs.sequences[:, PROMPT:, None])[..., 0]
    if beams is None:
        assert torch.allclose(found, expected, atol=1e-4)
    else:  # a score of a beam is the sum so far
        assert torch.allclose(outputs.sequences_scores, expected.sum(1) / NEW**2.0, atol=1e-4)


def test_a_text_begins_with_the_begin_of_text_where_there_is_no_prompt(model: BDHForCausalLM) -> None:
    begun = model.generate(bos_token_id=7, **GREEDY)
    assert torch.equal(begun, model.generate(torch.tensor([[7]]), **GREEDY))
    with pytest.raises(ValueError, match="`bos_token_id` has to be defined"):
        model.generate(**GREEDY)


@pytest.mark.parametrize("all_tokens", [True, False], ids=["all-tokens", "new-token"])
def test_a_second_call_goes_on_from_the_state_of_the_first(model: BDHForCausalLM, all_tokens: bool) -> None:
    options = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "output_scores": True}
    whole = model.generate(TOKENS, attention_mask=MASK, max_new_tokens=NEW, **options)
    first = model.generate(TOKENS, attention_mask=MASK, max_new_tokens=NEW - 1, **options)
    tokens = first.sequences if all_tokens else first.sequences[:, -1:]
    longer = F.pad(MASK, (0, NEW - 1), value=1)
    second = model.generate(tokens, attention_mask=longer, **{STATE: state_of(first)}, max_new_tokens=1, **options)
    assert torch.equal(second.sequences[:, -1], whole.sequences[:, -1])
    for found, expected in zip(first.scores + second.scores, whole.scores, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
    assert same_states(state_of(second), state_of(whole))


def test_a_second_call_goes_on_from_embeddings(model: BDHForCausalLM) -> None:
    options = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    embeds = embeds_of(model, TOKENS)
    whole = model.generate(inputs_embeds=embeds, max_new_tokens=NEW, **options)
    first = model.generate(inputs_embeds=embeds, max_new_tokens=NEW - 1, **options)
    longer = torch.cat([embeds, embeds_of(model, first.sequences)], dim=1)
    second = model.generate(inputs_embeds=longer, **{STATE: state_of(first)}, max_new_tokens=1, **options)
    assert torch.equal(torch.cat([first.sequences, second.sequences], dim=1), whole.sequences)
    assert same_states(state_of(second), state_of(whole))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_embeddings_as_a_prompt_write_what_their_tokens_write(model: BDHForCausalLM, options: dict[str, Any]) -> None:
    options = {**GREEDY, "attention_mask": MASK, **options}
    embeds, expected = embeds_of(model, TOKENS), model.generate(TOKENS, **options)
    assert torch.equal(model.generate(TOKENS, inputs_embeds=embeds, **options), expected)
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), expected[:, PROMPT:])


def test_embeddings_count_where_tokens_are_given_too(model: BDHForCausalLM) -> None:
    options = {**GREEDY, "return_dict_in_generate": True, "output_scores": True}
    embeds = embeds_of(model, TOKENS)
    plain = model.generate(TOKENS, inputs_embeds=embeds, **options)
    other = model.generate(TOKENS, inputs_embeds=embeds.flip(-1), **options)
    assert not any(torch.allclose(a, b) for a, b in zip(plain.scores, other.scores, strict=True))


def test_positions_of_a_prompt_are_continued(model: BDHForCausalLM) -> None:
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    plain = model.generate(TOKENS, attention_mask=MASK, **GREEDY)
    assert torch.equal(model.generate(TOKENS, attention_mask=MASK, position_ids=positions, **GREEDY), plain)


def test_keeping_the_logits_of_every_token_changes_no_text(model: BDHForCausalLM) -> None:
    assert torch.equal(model.generate(TOKENS, logits_to_keep=0, **GREEDY), model.generate(TOKENS, **GREEDY))


@pytest.mark.parametrize("kind", ["static", "offloaded_static", "dynamic", "offloaded", "quantized"])
def test_kinds_of_caches_of_keys_and_values_leave_the_state_as_it_is(model: BDHForCausalLM, kind: str) -> None:
    outputs = model.generate(TOKENS, cache_implementation=kind, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(outputs.sequences, model.generate(TOKENS, **GREEDY))
    assert isinstance(state_of(outputs), BDHState)
    with pytest.raises(ValueError, match="Passing both `cache_implementation`"):
        model.generate(TOKENS, **{STATE: state_of(model(TOKENS))}, cache_implementation=kind, **GREEDY)


class EndsAfter(StoppingCriteria):
    def __init__(self, lengths: list[int]):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return input_ids.shape[1] >= self.lengths


class Allow(LogitsProcessor):
    """Allows one token at each length."""

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        wanted = torch.arange(V) == input_ids.shape[1] % V
        return scores.masked_fill(~wanted, float("-inf"))


def test_lengths_ends_and_custom_rules_are_kept(model: BDHForCausalLM) -> None:
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
    free = model.generate(TOKENS, max_length=14, **options)
    assert free.shape == (2, 14)
    stopped = model.generate(TOKENS, max_length=14, stopping_criteria=[EndsAfter([11, 13])], **options)
    assert torch.equal(stopped, free[:, :13])
    forced = model.generate(TOKENS, max_length=14, logits_processor=[Allow()], **options)
    assert forced[:, 9:].tolist() == [[9, 10, 11, 12, 13]] * 2
    allowed = model.generate(TOKENS, max_length=14, prefix_allowed_tokens_fn=lambda row, ids: [row + 3], **options)
    assert allowed[:, 9:].tolist() == [[3] * 5, [4] * 5]
    ends = [int(free[0, 9]), int(free[1, 9])]
    assert model.generate(TOKENS, max_length=14, eos_token_id=ends, **options).shape == (2, 10)
    late = model.generate(TOKENS, max_length=14, min_length=13, eos_token_id=ends, **options)
    assert late.shape[1] >= 13 and not any(end in late[row, 9:13].tolist() for row in (0, 1) for end in ends)
    assert model.generate(TOKENS, max_length=14, max_time=0.0, **options).shape == (2, 10)
    marked = model.generate(TOKENS, max_length=14, watermarking_config=WatermarkingConfig(bias=5.0), **options)
    assert marked.shape == (2, 14)


def test_guidance_runs_a_second_state_beside_the_first(model: BDHForCausalLM) -> None:
    options = {**GREEDY, "guidance_scale": 1.5, "negative_prompt_ids": TOKENS[:, :4]}
    assert torch.equal(model.generate(TOKENS, **options), model.generate(TOKENS, use_cache=False, **options))


def test_generate_works_while_training(model: BDHForCausalLM) -> None:
    expected = model.generate(TOKENS, **GREEDY)
    model.config.dropout = 0.0
    model.train()
    model.gradient_checkpointing_enable()
    assert torch.equal(model.generate(TOKENS, **GREEDY), expected) and model.training


def test_a_generation_configuration_makes_the_round_trip(model: BDHForCausalLM, tmp_path: Path) -> None:
    model.generation_config = GenerationConfig(max_new_tokens=3, do_sample=True, top_k=5, eos_token_id=[1, 2])
    model.save_pretrained(tmp_path)
    loaded = BDHForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()
    assert loaded.generate(TOKENS, generation_config=GenerationConfig(**GREEDY)).shape == (2, PROMPT + NEW)
    given = GenerationConfig(**GREEDY)
    before = copy.deepcopy(given)
    model.generate(TOKENS, generation_config=given)
    assert given == before


def test_arguments_reach_the_model_through_the_library(model: BDHForCausalLM) -> None:
    assert GenerationMixin in BDHForCausalLM.__bases__
    own = {"document_ids": torch.zeros_like(TOKENS), "output_hidden_states": True, "number": 42, "text": "x"}
    inputs = model.prepare_inputs_for_generation(TOKENS, **own)
    assert torch.equal(inputs["input_ids"], TOKENS) and all(inputs[name] is value for name, value in own.items())


def test_generate_does_not_compile_what_it_was_not_asked_to(model: BDHForCausalLM) -> None:
    assert torch.equal(
        model.generate(TOKENS, disable_compile=False, **GREEDY), model.generate(TOKENS, disable_compile=True, **GREEDY)
    )
    assert not hasattr(model, "_compiled_call")
