"""Text generation: settings, streaming, seeds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bdh.data.tokenizer import byte_tokenizer
from bdh.errors import BDHError
from bdh.inference.generation import SamplingSettings, TextStream, generate_text
from bdh.model import BDHConfig, BDHForCausalLM

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def model() -> BDHForCausalLM:
    torch.manual_seed(0)
    config = BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=8, initializer_range=0.4)
    return BDHForCausalLM(config)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_streams_hand_on_whole_characters_only(text: str) -> None:
    pieces: list[str] = []
    stream = TextStream(TOKENIZER, pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for byte in text.encode():
        stream.put(torch.tensor([byte]))
    stream.end()
    assert "".join(pieces) == text and all("\ufffd" not in p or "\ufffd" in text for p in pieces)


def test_pieces_of_a_stream_are_the_text(model: BDHForCausalLM) -> None:
    pieces: list[str] = []
    chosen = SamplingSettings(max_new_tokens=60, temperature=0.5, seed=3)
    plain = generate_text(model, TOKENIZER, "The ", chosen)
    text = generate_text(model, TOKENIZER, "The ", chosen, pieces.append)
    assert text == plain and len(text) > 0
    assert "".join(pieces) == text


def test_a_seed_repeats_and_leaves_the_process_as_it_was(model: BDHForCausalLM) -> None:
    chosen = SamplingSettings(max_new_tokens=20, seed=5)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = generate_text(model, TOKENIZER, "x", chosen)
    assert torch.equal(torch.rand(1), expected)
    assert generate_text(model, TOKENIZER, "x", chosen) == first
    assert generate_text(model, TOKENIZER, "x", SamplingSettings(max_new_tokens=20, seed=6)) != first


def test_temperature_zero_is_greedy_and_the_mode_is_put_back(model: BDHForCausalLM) -> None:
    model.train()
    greedy = SamplingSettings(max_new_tokens=10, temperature=0)
    text = generate_text(model, TOKENIZER, "ab", greedy)
    assert model.training
    model.eval()
    ids = torch.tensor([list(b"ab")])
    for _ in range(10):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert TOKENIZER.decode(ids[0, 2:].tolist()) == text
    top_one = SamplingSettings(max_new_tokens=10, temperature=2.0, top_k=1)
    assert generate_text(model, TOKENIZER, "ab", top_one) == text


@pytest.mark.parametrize("limits", [{"top_p": 0.3}, {"top_k": 3}])
def test_top_p_and_top_k_never_leave_the_likeliest(model: BDHForCausalLM, limits: dict[str, float]) -> None:
    model.eval()
    probabilities = model(torch.tensor([list(b"ab")])).logits[0, -1].softmax(-1).sort(descending=True)
    before = probabilities.values.cumsum(-1) - probabilities.values  # held by the likelier ones
    allowed = probabilities.indices[before < limits.get("top_p", 1.0)][: int(limits.get("top_k", 256))].tolist()
    ids = torch.tensor([list(b"ab")])
    config = SamplingSettings(max_new_tokens=1, temperature=1.0, **limits).generation_config()  # type: ignore[arg-type]
    torch.manual_seed(0)
    drawn = {int(model.generate(ids, generation_config=config)[0, -1]) for _ in range(200)}
    assert drawn <= set(allowed) and len(drawn) > min(2, len(allowed) - 1)


def test_a_temperature_too_small_to_divide_by_is_greedy(model: BDHForCausalLM) -> None:
    texts = [generate_text(model, TOKENIZER, "ab", SamplingSettings(10, t)) for t in (0.0, 1e-40)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"temperature": -0.5}, "temperature is -0.5; it must be at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_are_checked(change: dict[str, float], message: str) -> None:
    with pytest.raises(BDHError, match=message):
        SamplingSettings(**change)  # type: ignore[arg-type]


def test_an_empty_prompt_is_refused(model: BDHForCausalLM) -> None:
    with pytest.raises(BDHError, match="the prompt is empty"):
        generate_text(model, TOKENIZER, "", SamplingSettings())
