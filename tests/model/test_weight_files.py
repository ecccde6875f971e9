"""Numbers and sizes that cannot be are refused when a model is loaded, before any memory is taken for them."""

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bdh.data.tokenizer import byte_tokenizer
from bdh.errors import BDHError
from bdh.inference.llm import LLM
from bdh.json_text import to_json
from bdh.model import BDHConfig
from bdh.model.export import load_export, save_export
from bdh.model.published import convert, to_published
from tests.inference.small import small_model

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def export(tmp_path: Path) -> Path:
    save_export(small_model(), byte_tokenizer(), tmp_path / "model", "A tiny model for tests.\n")
    return tmp_path / "model"


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Lets the process have 2 GiB more than it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def change_config(export: Path, **changes: Any) -> None:
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layer.encoder_v.1.weight", "lm_head.weight"])
def test_weights_that_are_not_finite_are_refused(export: Path, name: str, value: float) -> None:
    tensors = load_file(export / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, export / "model.safetensors", {"format": "pt"})
    with pytest.raises(BDHError, match=f"{name} in .* holds numbers that are not finite"):
        load_export(export)


def test_published_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tensors = to_published(small_model())
    tensors["encoder"][0, 0, 0] = NAN
    torch.save(tensors, tmp_path / "source.pt")
    with pytest.raises(BDHError, match=r"encoder in .*source\.pt holds numbers that are not finite"):
        convert(tmp_path / "source.pt", tmp_path / "export", {})
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_theta": NAN}, "rope_theta is nan"),
        ({"rope_theta": 0.0}, "rope_theta is 0"),
        ({"rope_theta": -65536.0}, "rope_theta is -65536"),
        ({"rope_theta": INF}, "rope_theta is inf"),
        ({"layer_norm_eps": -1e-5}, "layer_norm_eps is -1e-05"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps is 0"),
        ({"layer_norm_eps": NAN}, "layer_norm_eps is nan"),
        ({"initializer_range": -0.02}, "initializer_range is -0.02"),
        ({"dropout": NAN}, "dropout is nan"),
        ({"dropout": 1.0}, "dropout is 1"),
        ({"n_layer": 10**9}, "n_layer is 1000000000; it must be 1024 or less"),
        ({"n_head": 10**9}, "n_head is 1000000000"),
        ({"num_labels": 10**8}, "num_labels is 100000000"),
        ({"training_block_size": -1}, "training_block_size is -1"),
        ({"decay": "fixed", "decay_half_lives": [NAN, 16.0]}, "decay_half_lives holds nan"),
        ({"n_embd": 10**6}, r"embed_tokens.weight has shape \(256, 16\), config.json asks for \(256, 1000000\)"),
        ({"vocab_size": 10**9}, r"config.json asks for \(1000000000, 16\)"),
        ({"mlp_internal_dim_multiplier": 10**9}, r"encoder.weight has shape .*, config.json asks for"),
        ({"n_head": 4}, "they have 2 heads, n_head in config.json is 4"),
        ({"decay": "gated"}, "are incomplete: .*gates"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "was quantized when it was saved"),
    ],
)
def test_what_a_configuration_cannot_say_is_refused(
    export: Path, little_memory: None, changes: dict[str, Any], expected: str
) -> None:
    change_config(export, **changes)
    with pytest.raises(BDHError, match=expected) as raised:
        load_export(export)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.uint8])
def test_quantized_weights_are_refused(export: Path, dtype: torch.dtype) -> None:
    tensors = load_file(export / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(dtype)
    save_file(tensors, export / "model.safetensors", {"format": "pt"})
    with pytest.raises(BDHError, match=r"quantized or of an unknown type: lm_head\.weight"):
        load_export(export)


def test_an_end_token_is_a_number(export: Path) -> None:
    config = json.loads((export / "generation_config.json").read_text())
    (export / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": "</s>"}))
    with pytest.raises(BDHError, match=r"eos_token_id in generation_config\.json is '</s>'"):
        LLM(export, device="cpu")


def test_usual_settings_are_not_refused() -> None:
    BDHConfig(rope_theta=1.0, layer_norm_eps=1e-12, dropout=0.0, n_layer=1024, num_labels=3)


def test_json_is_always_json() -> None:
    value = {"loss": NAN, "all": [1.5, INF, (-INF, "NaN")], "text": "NaN", "whole": 3}
    assert to_json(value) == '{"loss": null, "all": [1.5, null, [null, "NaN"]], "text": "NaN", "whole": 3}'
    assert to_json({"a": 0.1}, indent=1) == '{\n "a": 0.1\n}'
