"""Exports: saved whole or not at all, loaded with and without `bdh`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from bdh.data.tokenizer import byte_tokenizer
from bdh.errors import BDHError
from bdh.model import BDHConfig, BDHForCausalLM, BDHModel
from bdh.model.card import architecture, model_card, parameter_count, state_bytes
from bdh.model.export import load_export, save_export
from tests.conftest import environment


@pytest.fixture
def export(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=8, initializer_range=0.3)
    model = BDHForCausalLM(config).eval()
    save_export(model, byte_tokenizer(), tmp_path / "model", model_card("a test", config, []))
    return tmp_path / "model"


def test_an_export_holds_code_weights_tokenizer_and_card(export: Path) -> None:
    names = {path.name for path in export.iterdir()}
    assert {"config.json", "model.safetensors", "modeling_bdh.py", "configuration_bdh.py", "tokenizer.json"} <= names
    card = (export / "README.md").read_text()
    assert "trust_remote_code=True" in card and "4,096" not in card and "8,192" not in card
    assert "14,336" in card  # parameters: 3 * 128 * 16 + 2 * 256 * 16
    config = json.loads((export / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_bdh.BDHForCausalLM"
    assert config["mlp_internal_dim_multiplier"] == 8 and config["model_type"] == "bdh"


def test_auto_classes_know_bdh(export: Path) -> None:
    assert isinstance(AutoConfig.from_pretrained(export), BDHConfig)
    assert isinstance(AutoModelForCausalLM.from_pretrained(export), BDHForCausalLM)
    assert isinstance(AutoModel.from_pretrained(export), BDHModel)


def test_weights_come_back_bit_for_bit(export: Path) -> None:
    model, tokenizer = load_export(export)
    torch.manual_seed(0)
    original = BDHForCausalLM(model.config)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))
    assert not model.training and tokenizer("é").input_ids == [0xC3, 0xA9]


def test_loads_in_a_process_without_bdh(export: Path, tmp_path: Path) -> None:
    """A process whose import of bdh fails, as where it is not installed."""
    script = tmp_path / "without.py"
    script.write_text(
        "import sys, json\n"
        "sys.modules['bdh'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"folder = {str(export)!r}\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\n"
        "prompt = tokenizer('The héron', return_tensors='pt')\n"
        "print(json.dumps([type(model).__module__, prompt.input_ids.tolist(), \n"
        "    model.generate(**prompt, max_new_tokens=12, do_sample=False).tolist()]))\n"
        "assert sys.modules['bdh'] is None\n"
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
    module, ids, written = json.loads(done.stdout.splitlines()[-1])
    assert module.startswith("transformers_modules")
    assert ids == [list("The héron".encode())]
    model, _ = load_export(export)
    assert written == model.generate(torch.tensor(ids), max_new_tokens=12, do_sample=False).tolist()


def test_our_own_loader_never_runs_the_code_in_the_folder(export: Path, tmp_path: Path) -> None:
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w').write('x')\n"
    for name in ("modeling_bdh.py", "configuration_bdh.py"):
        (export / name).write_text(trap + (export / name).read_text())
    load_export(export)
    assert not (tmp_path / "sprung").exists()


def test_the_tokenizer_is_standard(export: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(export)
    text = "naïve \x00\r\n\t 😀 שלום"
    assert tokenizer(text).input_ids == list(text.encode()) and tokenizer.decode(tokenizer(text).input_ids) == text


def test_nothing_else_is_overwritten(export: Path, tmp_path: Path) -> None:
    model, tokenizer = load_export(export)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(BDHError, match="holds something that is not an export"):
        save_export(model, tokenizer, tmp_path / "mine", "card")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(BDHError, match="holds something that is not an export"):
        save_export(model, tokenizer, tmp_path / "theirs", "card")
    shutil.copytree(export, tmp_path / "annotated")
    (tmp_path / "annotated" / "notes.txt").write_text("my own")
    with pytest.raises(BDHError, match="holds something that is not an export"):
        save_export(model, tokenizer, tmp_path / "annotated", "card")
    save_export(model, tokenizer, export, "a newer card")  # an export may replace an export
    assert (export / "README.md").read_text() == "a newer card"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".partial")]


@pytest.mark.parametrize(
    "synapses",
    [{}, {"decay": "fixed"}, {"decay": "gated"}, {"write": "delta"}, {"decay": "gated", "write": "delta"}],
)
def test_sizes_in_the_card_are_the_models(synapses: dict[str, Any]) -> None:
    config = BDHConfig(n_layer=3, n_embd=32, n_head=4, mlp_internal_dim_multiplier=16, **synapses)
    model = BDHForCausalLM(config)
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())
    state = model.eval()(torch.tensor([[1, 2]])).past_key_values
    assert state_bytes(config) == state.nbytes
    assert architecture(config)["neurons"] == "512 in all, 128 a head"


def test_the_card_says_how_synapses_decay_and_are_written() -> None:
    rows = architecture(BDHConfig(n_head=4))
    assert (rows["decay of synapses"], rows["write rule"]) == ("none, as published", "add, as published")
    rows = architecture(BDHConfig(n_head=4, decay="fixed", decay_half_lives=[16, 64.5, 1024, None], write="delta"))
    assert rows["decay of synapses"] == "fixed, half-lives 16, 64.5, 1024, never (tokens, by head)"
    assert rows["write rule"] == "delta rule"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "model.safetensors").write_bytes(b"junk"), "the weights in .* cannot be loaded"),
        (lambda d: (d / "model.safetensors").unlink(), "has no weights"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "the tokenizer in .* cannot be loaded"),
        (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda d: (d / "config.json").write_text('{"model_type": "gpt2"}'), "is a gpt2 model, not a bdh one"),
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json cannot be read"),
        (
            lambda d: (d / "config.json").write_text('{"model_type": "bdh", "n_layer": "x"}'),
            "config.json cannot be read",
        ),
    ],
)
def test_damage_is_named(export: Path, spoil: object, message: str) -> None:
    spoil(export)  # type: ignore[operator]
    with pytest.raises(BDHError, match=message):
        load_export(export)
