"""Exports: saved whole or not at all, loaded with and without `bdh`."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from bdh.data.template_process import TemplateProcess
from bdh.data.tokenizer import byte_tokenizer
from bdh.data.vocabulary import train_tokenizer
from bdh.errors import BDHError
from bdh.model import BDHConfig, BDHForCausalLM, BDHModel
from bdh.model.export import load_export, save_export
from bdh.model.model_card import architecture, model_card, parameter_count, state_bytes
from bdh.model.published import save_published
from bdh.training.lora import save_adapter
from tests.conftest import environment
from tests.inference.small import CHAT


def small_config(**settings: Any) -> BDHConfig:
    return BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=8, initializer_range=0.3, **settings)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = small_config()
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
    assert config["auto_map"] == {
        "AutoConfig": "configuration_bdh.BDHConfig",
        "AutoModel": "modeling_bdh.BDHModel",
        "AutoModelForCausalLM": "modeling_bdh.BDHForCausalLM",
    }
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
        "from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer\n"
        f"folder = {str(export)!r}\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\n"
        "prompt = tokenizer('The héron', return_tensors='pt')\n"
        "print(json.dumps([type(model).__module__, prompt.input_ids.tolist(), \n"
        "    model.generate(**prompt, max_new_tokens=12, do_sample=False).tolist()]))\n"
        "base = AutoModel.from_pretrained(folder, trust_remote_code=True)\n"
        "assert type(base).__name__ == 'BDHModel' and type(base).__module__ == type(model).__module__\n"
        "assert base(**prompt).last_hidden_state.equal(model.model(**prompt).last_hidden_state)\n"
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
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_generate_of_transformers_stops_at_the_end_of_a_turn(tmp_path: Path) -> None:
    model = BDHForCausalLM(small_config(vocab_size=len(CHAT))).eval()
    save_export(model, CHAT, tmp_path / "model", "a card")
    end_of_text, end_of_turn = CHAT.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    config = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert config["eos_token_id"] == [end_of_text, end_of_turn]
    assert (config["bos_token_id"], config["pad_token_id"]) == (CHAT.bos_token_id, CHAT.pad_token_id)
    chat = pipeline("text-generation", model=str(tmp_path / "model"), device="cpu")
    for end in (end_of_text, end_of_turn):
        said = chat(
            [{"role": "user", "content": "Hi"}], max_new_tokens=9, sequence_bias=[[[end], 100.0]], return_tensors=True
        )
        assert said[0]["generated_token_ids"][-1] == end
        assert len(said[0]["generated_token_ids"]) == 1 + len(
            CHAT.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True).input_ids
        )


def test_a_hostile_template_does_not_stop_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdh.model.export.TemplateProcess", partial(TemplateProcess, cpu_seconds=0.3))
    tokenizer = train_tokenizer("bytes", (), 0)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    template = f"{{% if messages | length == 2 %}}{loop}{{% endif %}}{{{{ messages[1].content }}}}<|im_start|>x"
    assert isinstance(tokenizer.chat_template, str)
    tokenizer.chat_template = {"other": template, "default": tokenizer.chat_template}
    save_export(BDHForCausalLM(small_config(vocab_size=len(tokenizer))), tokenizer, tmp_path / "model", "a card")
    config = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert config["eos_token_id"] == tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>", "<|im_start|>"])


def test_ends_that_a_generation_config_names_stay(tmp_path: Path) -> None:
    model = BDHForCausalLM(small_config())
    for tokenizer, before, after in (
        (byte_tokenizer(end_of_text=False), None, 10),
        (byte_tokenizer(), [255, 10], [255, 10]),
    ):
        save_export(model, tokenizer, tmp_path / "model", "a card")
        assert model.generation_config.eos_token_id == before
        model.generation_config.eos_token_id = 10
        save_export(model, tokenizer, tmp_path / "model", "a card")
        assert load_export(tmp_path / "model")[0].generation_config.eos_token_id == after


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({"training_block_size": 32}, 32),
        ({"training_block_size": 32, "write": "delta"}, 32),
        ({"training_block_size": 32, "decay": "fixed"}, VERY_LARGE_INTEGER),
        ({}, VERY_LARGE_INTEGER),
    ],
)
def test_the_tokenizer_names_the_length_that_the_model_reads_reliably(
    tmp_path: Path, settings: dict[str, Any], length: int
) -> None:
    tokenizer = byte_tokenizer()
    save_export(BDHForCausalLM(small_config(**settings)), tokenizer, tmp_path / "model", "a card")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").model_max_length == length
    assert tokenizer.model_max_length == VERY_LARGE_INTEGER  # the caller's own is as it was


def test_a_model_that_decays_takes_no_limit_from_the_one_before(tmp_path: Path) -> None:
    limited = byte_tokenizer()
    limited.model_max_length = 16
    save_export(BDHForCausalLM(small_config(training_block_size=32, decay="fixed")), limited, tmp_path / "m", "a card")
    assert AutoTokenizer.from_pretrained(tmp_path / "m").model_max_length == VERY_LARGE_INTEGER


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_permissions_of_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        save_export(BDHForCausalLM(small_config()), byte_tokenizer(), tmp_path / "model", "a card")
        for name in ("published.safetensors", "published.pt"):
            save_published(tmp_path / "model", tmp_path / name)
        adapted = get_peft_model(BDHForCausalLM(small_config()), LoraConfig(target_modules=["decoder"]))
        save_adapter(adapted, tmp_path / "adapter", "a card")  # type: ignore[arg-type]
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 12 and {path.stat().st_mode & 0o777 for path in files} == {mode}
    assert not list(tmp_path.glob(".*"))


def test_templates_with_names_can_be_entered_and_replaced(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "other": "{{ messages[0].role }}"}
    for card in ("one", "two"):
        save_export(BDHForCausalLM(small_config()), tokenizer, tmp_path / "model", card)
    folder = tmp_path / "model" / "additional_chat_templates"
    assert folder.stat().st_mode & 0o111 == (tmp_path / "model").stat().st_mode & 0o111 != 0
    assert (tmp_path / "model" / "README.md").read_text() == "two"


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
