"""`generate()` of transformers, in all its ways, on a state instead of a cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.streamers import BaseStreamer

from bdh.model import BDHConfig, BDHForCausalLM, BDHState

V, PAD = 23, 0


def make_model(chunk_size: int = 512) -> BDHForCausalLM:
    torch.manual_seed(7)
    config = BDHConfig(
        n_layer=2,
        n_embd=16,
        n_head=2,
        mlp_internal_dim_multiplier=8,
        vocab_size=V,
        initializer_range=0.3,
        chunk_size=chunk_size,
    )
    return BDHForCausalLM(config).eval()


def left_padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    tokens = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return tokens, mask


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=17), min_size=2, max_size=5),
    chunk_size=st.sampled_from([4, 512]),
)
def test_left_padded_batch_writes_what_each_prompt_writes_alone(prompts: list[list[int]], chunk_size: int) -> None:
    model = make_model(chunk_size)
    tokens, mask = left_padded(prompts)
    together = model.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=PAD)
    for row, prompt in zip(together, prompts, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
        assert row[tokens.shape[1] :].tolist() == alone[0, len(prompt) :].tolist()


@torch.no_grad()
def test_padding_leaves_no_trace_in_the_state() -> None:
    model = make_model()
    tokens, mask = left_padded([[5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8]])
    state = model(tokens, attention_mask=mask).past_key_values
    alone = model(torch.tensor([[5, 6, 7]])).past_key_values
    assert state.position.tolist() == [3, 8] and state.length == 8
    for S, expected in zip(state.synapses, alone.synapses, strict=True):
        assert torch.allclose(S[:1], expected, atol=1e-6)
    right = model(torch.tensor([[5, 6, 7, PAD, PAD]]), attention_mask=torch.tensor([[1, 1, 1, 0, 0]]))
    assert right.past_key_values.position.tolist() == [3]
    assert torch.allclose(right.past_key_values.synapses[1], alone.synapses[1], atol=1e-6)


def test_cache_and_no_cache_write_the_same() -> None:
    model = make_model()
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    outputs = [model.generate(prompt, max_new_tokens=20, do_sample=False, use_cache=c) for c in (True, False)]
    assert torch.equal(*outputs)


def test_sampling_repeats_with_its_seed() -> None:
    model = make_model()
    prompt = torch.tensor([[3, 1, 4], [1, 5, 9]])

    def sample(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        written: torch.Tensor = model.generate(prompt, max_new_tokens=30, do_sample=True, top_k=10, top_p=0.95)
        return written

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


@pytest.mark.parametrize("num_return_sequences", [1, 3])
def test_beam_search_is_the_same_with_and_without_state(num_return_sequences: int) -> None:
    model = make_model()
    tokens, mask = left_padded([[3, 1, 4, 1, 5], [9, 2]])
    options = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "num_beams": 4,
        "num_return_sequences": num_return_sequences,
        "do_sample": False,
        "pad_token_id": PAD,
    }
    with_state = model.generate(tokens, use_cache=True, **options)
    without = model.generate(tokens, use_cache=False, **options)
    assert torch.equal(with_state, without)
    greedy = model.generate(tokens, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=PAD)

    def score(rows: torch.Tensor) -> torch.Tensor:
        """Log-probability of the continuations, mean a token as beam search ranks them."""
        full = torch.cat([mask, torch.ones(2, 12, dtype=mask.dtype)], dim=1)
        logits = model(rows, attention_mask=full).logits[:, 4:-1].log_softmax(-1)
        return logits.gather(-1, rows[:, 5:, None]).mean((1, 2))

    best = with_state[::num_return_sequences]
    assert (score(best) >= score(greedy) - 1e-5).all()


def test_end_of_text_stops_a_sequence() -> None:
    model = make_model()
    prompt = torch.tensor([[3, 1, 4]])
    free = model.generate(prompt, max_new_tokens=20, do_sample=False)
    end = int(free[0, 8])
    stopped = model.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=end, pad_token_id=PAD)
    first = (free[0, 3:] == end).nonzero()[0, 0].item()
    assert stopped[0].tolist() == free[0, : 3 + int(first) + 1].tolist()


def test_streamers_get_each_token_as_it_comes() -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.pieces: list[list[int]] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.pieces.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    model, streamer = make_model(), Collect()
    output = model.generate(torch.tensor([[3, 1, 4]]), max_new_tokens=5, do_sample=False, streamer=streamer)
    assert streamer.ended and streamer.pieces == [[3, 1, 4], *[[t] for t in output[0, 3:].tolist()]]


def test_generation_goes_on_from_a_state() -> None:
    """What a chat does: the answer's state is kept, and only the new turn is read."""
    model = make_model()
    first = model.generate(torch.tensor([[3, 1, 4]]), max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    state = first.past_key_values
    assert isinstance(state, BDHState) and state.length == 7  # the last token written has not been read
    longer = torch.cat([first.sequences, torch.tensor([[9, 2, 6]])], dim=1)
    expected = model.generate(longer, max_new_tokens=6, do_sample=False)
    found = model.generate(longer, past_key_values=state.clone(), max_new_tokens=6, do_sample=False)
    assert torch.equal(found, expected)
    chunked = model.generate(longer, past_key_values=state, max_new_tokens=6, do_sample=False, prefill_chunk_size=2)
    assert torch.equal(chunked, expected)


def test_only_the_last_logits_are_made_in_prefill() -> None:
    model = make_model()
    tokens = torch.randint(V, (2, 9))
    assert model(tokens, logits_to_keep=1).logits.shape == (2, 1, V)
    assert torch.allclose(model(tokens, logits_to_keep=2).logits, model(tokens).logits[:, -2:])


def test_inputs_embeds_write_the_same_as_tokens() -> None:
    model = make_model()
    prompt = torch.tensor([[3, 1, 4]])
    embeds = model.get_input_embeddings()(prompt)
    expected = model.generate(prompt, max_new_tokens=5, do_sample=False)[:, 3:]
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=5, do_sample=False), expected)
