"""Inference with decay and the delta rule: engine, prefix cache, beams, sessions."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from bdh.errors import BDHError
from bdh.inference.llm import LLM
from bdh.inference.runner import ModelRunner
from bdh.inference.runner_cpu import CPURunner
from bdh.inference.sampling_params import SamplingParams
from bdh.model.export import save_export
from bdh.model.model_card import model_card
from tests.inference.small import BYTES, letters, small_llm, small_model

VARIANTS: dict[str, dict[str, Any]] = {
    "delta": {"write": "delta"},
    "fixed": {"decay": "fixed", "decay_half_lives": [None, 9.0]},
    "fixed-delta": {"decay": "fixed", "decay_half_lives": [30.0, 3.0], "write": "delta"},
    "gated": {"decay": "gated", "decay_half_lives": [None, 9.0]},
    "gated-delta": {"decay": "gated", "decay_half_lives": [None, 40.0], "write": "delta"},
}
all_variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


def reference(**changes: Any) -> LLM:
    """The same model through its own forward, one sequence at a time, nothing kept."""
    return LLM(ModelRunner(small_model(**changes), 1), BYTES, prefix_cache_bytes=0)  # type: ignore[arg-type]


@all_variants
def test_batches_and_common_beginnings_give_the_texts_of_the_model(variant: dict[str, Any]) -> None:
    llm = small_llm(**variant)
    assert isinstance(llm.runner, CPURunner)
    common = "It is said that dragons hatch when nobody looks, and that they are small. " * 2
    prompts = [common + tail for tail in ("One", "The other", "And", "Nobody", "Here")] + ["A", "Bee"]
    params = [letters(max_new_tokens=20 + 7 * i, seed=i) for i in range(len(prompts))]
    got = [completion.choices[0].tokens for completion in llm.generate(prompts, params)]
    assert llm.engine.stats.prefix_hits > 0
    plain = reference(**variant)
    assert got == [
        plain.generate([prompt], one)[0].choices[0].tokens for prompt, one in zip(prompts, params, strict=True)
    ]


@all_variants
def test_several_texts_of_one_prompt(variant: dict[str, Any]) -> None:
    params = letters(n=3, max_new_tokens=40)
    got, wanted = (llm.generate(["Dragons"], params)[0] for llm in (small_llm(**variant), reference(**variant)))
    assert [choice.tokens for choice in got.choices] == [choice.tokens for choice in wanted.choices]


@all_variants
def test_beams_are_the_models(variant: dict[str, Any]) -> None:
    params = SamplingParams(max_new_tokens=12, num_beams=3, n=2)
    choices = small_llm(**variant).generate(["Dragons are"], params)[0].choices
    ids = torch.tensor([list(b"Dragons are")])
    wanted = small_model(**variant).generate(
        ids, max_new_tokens=12, num_beams=3, num_return_sequences=2, do_sample=False, eos_token_id=[256], pad_token_id=0
    )
    assert [list(choice.tokens) for choice in choices] == wanted[:, ids.shape[1] :].tolist()


@all_variants
def test_a_long_session_saved_and_resumed_writes_what_the_unbroken_one_does(
    variant: dict[str, Any], tmp_path: Path
) -> None:
    params = letters(max_new_tokens=73)  # so that a different number of tokens is pending at each save
    unbroken, parted = (
        small_llm(**variant).session("A dragon.", params),
        small_llm(**variant).session("A dragon.", params),
    )
    document = "In the beginning there was a number, and it was large. " * 3
    for session in (unbroken, parted):
        session.read(document)
    turn = 0
    while unbroken.position < 1100:
        said = ["".join(delta.text for delta in session.send(f"{turn}?")) for session in (unbroken, parted)]
        assert said[0] == said[1]
        turn += 1
        parted.save(tmp_path / "session")
        parted = small_llm(**variant).load_session(tmp_path / "session")
        assert parted.position == unbroken.position
    assert unbroken.transcript == parted.transcript and turn > 8


def test_a_session_of_another_decay_or_write_is_refused(tmp_path: Path) -> None:
    """Though the weights are the same, where these have no gates of their own."""
    models: dict[str, dict[str, Any]] = {
        "none": {},
        "4 and 9": {"decay": "fixed", "decay_half_lives": [4, 9]},
        "other half-lives": {"decay": "fixed", "decay_half_lives": [4, None]},
        **VARIANTS,
    }
    llms = {name: small_llm(n_slots=1, **changes) for name, changes in models.items()}
    assert len({llm.fingerprint for llm in llms.values()}) == len(llms)
    session = llms["4 and 9"].session()
    session.read("abc")
    session.save(tmp_path / "s")
    for name, llm in llms.items():
        if name != "4 and 9":
            with pytest.raises(BDHError, match="s is the state of another model"):
                llm.load_session(tmp_path / "s")
    same = small_llm(n_slots=1, decay="fixed", decay_half_lives=[4.0, 9.0])  # numbers, however they are written
    assert same.load_session(tmp_path / "s").position == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_is_the_model_it_was_in_any_dtype(tmp_path: Path, dtype: str) -> None:
    model = small_model(**VARIANTS["gated-delta"])
    saved = copy.deepcopy(model)
    save_export(saved, BYTES, tmp_path / "model", model_card("a test", saved.config, []))
    llms = [LLM(tmp_path / "model", dtype=dtype), LLM(copy.deepcopy(model), BYTES, dtype=dtype)]
    assert llms[0].fingerprint == llms[1].fingerprint == LLM(copy.deepcopy(model), BYTES).fingerprint
    texts = [llm.generate(["Dragons"], letters(max_new_tokens=50))[0].choices[0].tokens for llm in llms]
    assert texts[0] == texts[1]
    for llm in llms:
        assert llm.model is not None and llm.model.model.layer.gates is not None
        kept, wanted = llm.model.model.layer.gates.state_dict(), model.model.layer.gates.state_dict()  # type: ignore[union-attr]
        assert all(torch.equal(kept[name], wanted[name]) for name in wanted)
