"""Published checkpoints: there and back without losing a bit."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from bdh.data.tokenizer import byte_tokenizer
from bdh.errors import BDHError
from bdh.model import BDHConfig, BDHForCausalLM
from bdh.model.export import load_export, load_model_only, save_export
from bdh.model.published import NAMES, convert, save_published, work_out_config
from tests.conftest import GOLDEN


def published(
    h: int = 2, D: int = 8, N: int = 16, V: int = 256, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    shapes = {
        "embed.weight": (V, D),
        "encoder": (h, D, N),
        "encoder_v": (h, D, N),
        "decoder": (h * N, D),
        "lm_head": (D, V),
    }
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    return {**tensors, "attn.freqs": torch.zeros(1, 1, 1, N)}


@settings(max_examples=15, deadline=None)
@given(
    h=st.integers(1, 4),
    D=st.integers(1, 6).map(lambda d: 4 * d),
    multiplier=st.integers(1, 3).map(lambda m: 4 * m),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    suffix=st.sampled_from([".safetensors", ".pt"]),
)
def test_round_trip_is_exact(
    tmp_path_factory: pytest.TempPathFactory, h: int, D: int, multiplier: int, dtype: torch.dtype, suffix: str
) -> None:
    if (D * multiplier) % (2 * h):
        h = 2
    folder = tmp_path_factory.mktemp("published")
    tensors = published(h, D, D * multiplier // h, 256, dtype)
    source = folder / f"source{suffix}"
    save_file(tensors, source) if suffix == ".safetensors" else torch.save(tensors, source)
    convert(source, folder / "export", {"n_layer": 3})
    target = folder / f"back{suffix}"
    save_published(folder / "export", target)
    back = load_file(target) if suffix == ".safetensors" else torch.load(target, weights_only=True)
    assert set(back) == {*NAMES, "attn.freqs"}
    for name in NAMES:
        assert back[name].dtype == dtype and torch.equal(back[name], tensors[name])
    convert(target, folder / "again", {"n_layer": 3})
    first, second = load_model_only(folder / "export"), load_model_only(folder / "again")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("golden", ["tiny", "small"])
def test_a_converted_golden_checkpoint_gives_the_golden_logits(golden: str, tmp_path: Path) -> None:
    stored = load_file(GOLDEN / f"{golden}.safetensors")
    weights = {name.removeprefix("weights."): t for name, t in stored.items() if name.startswith("weights.")}
    torch.save(
        {"model": {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}, "step": 7}, tmp_path / "g.pt"
    )
    layers = {"tiny": 2, "small": 3}[golden]
    convert(tmp_path / "g.pt", tmp_path / "export", {"n_layer": layers, "dropout": 0.0})
    model = load_model_only(tmp_path / "export")
    assert (model(stored["tokens"]).logits - stored["logits"]).abs().max() <= 1e-4


def test_configuration_comes_from_metadata_then_shapes(tmp_path: Path) -> None:
    tensors = published()
    save_file(tensors, tmp_path / "a.safetensors", metadata={"config": json.dumps({"n_layer": 4, "dropout": 0.25})})
    assert convert(tmp_path / "a.safetensors", tmp_path / "a", {}, byte_tokenizer()) == []
    config = load_export(tmp_path / "a")[0].config
    assert (config.n_layer, config.dropout, config.n_head, config.n_embd) == (4, 0.25, 2, 8)
    assert (config.mlp_internal_dim_multiplier, config.vocab_size) == (4, 256)

    save_file(tensors, tmp_path / "b.safetensors")
    notes = convert(tmp_path / "b.safetensors", tmp_path / "b", {})
    assert len(notes) == 1 and "6 assumed" in notes[0]
    assert load_model_only(tmp_path / "b").config.n_layer == 6


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_another_rope_base_makes_the_round_trip(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(0)
    config = BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=8, rope_theta=100.0)
    model = BDHForCausalLM(config).eval()
    save_export(model, None, tmp_path / "export", "card")
    save_published(tmp_path / "export", tmp_path / f"published{suffix}")
    convert(tmp_path / f"published{suffix}", tmp_path / "again", {"n_layer": 2})
    again = load_model_only(tmp_path / "again")
    assert again.config.rope_theta == 100.0
    tokens = torch.randint(256, (1, 30))
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("synapses", [{"decay": "fixed"}, {"write": "delta"}])
def test_a_model_with_gates_is_no_published_one(tmp_path: Path, synapses: dict[str, Any]) -> None:
    config = BDHConfig(n_layer=1, n_embd=16, n_head=2, mlp_internal_dim_multiplier=8, **synapses)
    save_export(BDHForCausalLM(config), None, tmp_path / "export", "card")
    words = f"has decay {config.decay} and write {config.write}, which the published format cannot say; use the export"
    with pytest.raises(BDHError, match=words):
        save_published(tmp_path / "export", tmp_path / "published.safetensors")
    assert not (tmp_path / "published.safetensors").exists()


def test_marks_of_other_trainers_and_whole_numbers_are_no_obstacle(tmp_path: Path) -> None:
    marked = {f"_orig_mod.module.{name}": tensor for name, tensor in published().items()}
    torch.save({"state_dict": marked, "config": {"n_layer": 2, "dropout": 0}}, tmp_path / "a.pt")
    assert convert(tmp_path / "a.pt", tmp_path / "a", {}) == []
    assert load_model_only(tmp_path / "a").config.dropout == 0.0


def test_frequencies_for_the_reference_code_follow_from_the_sizes(tmp_path: Path) -> None:
    save_file(published(N=16), tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "export", {"n_layer": 1})
    save_published(tmp_path / "export", tmp_path / "b.safetensors")
    freqs = load_file(tmp_path / "b.safetensors")["attn.freqs"]
    assert freqs.shape == (1, 1, 1, 16)
    expected = torch.tensor([65536.0 ** (-(j - j % 2) / 16) / (2 * torch.pi) for j in range(16)])
    assert torch.allclose(freqs.flatten(), expected, rtol=1e-6)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"encoder": Trap()}, tmp_path / "evil.pt")
    with pytest.raises(BDHError, match="cannot be read as a checkpoint"):
        convert(tmp_path / "evil.pt", tmp_path / "export", {})
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("change", "given_fields", "message"),
    [
        (lambda t: t.pop("decoder"), {}, "it lacks decoder"),
        (lambda t: t.update(decoder=torch.zeros(3, 3)), {}, r"decoder has shape \(3, 3\); \(32, 8\) is expected"),
        (lambda t: t.update(encoder=torch.zeros(8, 32)), {}, "encoder has shape"),
        (lambda t: None, {"n_head": 4}, "n_head is given as 4, but the shapes say 2"),
        (lambda t: t.update(encoder=torch.zeros(2, 8, 16, dtype=torch.int64)), {}, "no plain floating-point tensor"),
        (lambda t: (t.clear(), t.update({0: torch.zeros(2)})), {}, "it lacks embed.weight"),
        (lambda t: None, {"n_layer": "four"}, "no such model"),
        (lambda t: None, {"n_layer": 0}, "n_layer is 0"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: Any, given_fields: dict[str, Any], message: str) -> None:
    tensors = published()
    change(tensors)
    torch.save(tensors, tmp_path / "a.pt")
    with pytest.raises(BDHError, match=message):
        convert(tmp_path / "a.pt", tmp_path / "export", given_fields)
    assert not (tmp_path / "export").exists()


def test_odd_neurons_are_refused() -> None:
    tensors = published(h=1, D=4, N=4)
    tensors |= {"encoder": torch.zeros(4, 4, 1), "encoder_v": torch.zeros(4, 4, 1)}
    with pytest.raises(BDHError, match="must be even"):
        work_out_config(tensors, {}, {"n_layer": 1})


def test_a_small_vocabulary_gets_no_byte_tokenizer(tmp_path: Path) -> None:
    torch.save(published(V=48), tmp_path / "a.pt")
    notes = convert(tmp_path / "a.pt", tmp_path / "export", {"n_layer": 1}, byte_tokenizer())
    assert notes == ["no tokenizer is written: it has 256 tokens, the model 48"]
    assert not (tmp_path / "export" / "tokenizer.json").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_full_disk_is_named_as_such(tmp_path: Path, suffix: str) -> None:
    save_export(
        BDHForCausalLM(BDHConfig(n_layer=1, n_embd=32, n_head=2)), byte_tokenizer(), tmp_path / "export", "card"
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(BDHError, match=r"back\S+ cannot be written: .*([Ff]ile too large|File size)") as raised:
            save_published(tmp_path / "export", tmp_path / f"back{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "pos" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
