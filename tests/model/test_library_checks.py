"""What the model tests of transformers check of every model, as far as other tests here do not.

`test_library_coverage.py` lists all of them, and why some do not apply.
"""

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bdh.model import BDHConfig, BDHForCausalLM, BDHModel
from tests.inference.small import random_gates

V = 23
TOKENS = torch.arange(18).view(2, 9) * 5 % V


@pytest.fixture(params=[{}, {"decay": "gated", "write": "delta"}], ids=["add", "delta"])
def model(request: pytest.FixtureRequest) -> BDHForCausalLM:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "mlp_internal_dim_multiplier": 8, "vocab_size": V}
    return random_gates(BDHForCausalLM(BDHConfig(initializer_range=0.3, **sizes, **request.param)).eval())


def test_a_configuration_survives_json_and_files(model: BDHForCausalLM, tmp_path: Path) -> None:
    config = model.config
    assert BDHConfig.from_dict(json.loads(config.to_json_string(use_diff=False))).to_dict() == config.to_dict()
    config.to_json_file(tmp_path / "one.json")
    assert BDHConfig.from_json_file(tmp_path / "one.json").to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    assert BDHConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path / "below")
    assert BDHConfig.from_pretrained(tmp_path, subfolder="below").to_dict() == config.to_dict()
    assert copy.deepcopy(config).to_dict() == config.to_dict() and BDHConfig().to_dict() == BDHConfig().to_dict()
    with pytest.raises(OSError, match="nowhere"):
        BDHConfig.from_pretrained(tmp_path / "nowhere")


def test_the_common_names_of_sizes_read_and_write_ours() -> None:
    config = BDHConfig(hidden_size=32, num_attention_heads=8, num_hidden_layers=3)
    assert (config.n_embd, config.n_head, config.n_layer) == (32, 8, 3)
    config.num_hidden_layers = 5
    assert config.n_layer == config.num_hidden_layers == 5 and "num_hidden_layers" not in config.to_dict()
    labelled = BDHConfig(num_labels=5)
    assert len(labelled.id2label) == len(labelled.label2id) == 5
    labelled.num_labels = 3
    assert labelled.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"} and len(labelled.label2id) == 3


def test_fields_that_every_configuration_has_are_kept() -> None:
    fields: dict[str, Any] = {
        "return_dict": False,
        "output_hidden_states": True,
        "chunk_size_feed_forward": 5,
        "architectures": ["BertModel"],
        "id2label": {0: "label"},
        "label2id": {"label": "0"},
        "problem_type": "regression",
    }
    config = BDHConfig(**fields, dtype="float16")
    assert {name: getattr(config, name) for name in fields} == fields and config.dtype == torch.float16
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "mlp_internal_dim_multiplier": 8}
    plain = BDHModel(BDHConfig(**sizes, pad_token_id=0, eos_token_id=0, bos_token_id=0))
    assert plain(TOKENS, attention_mask=torch.ones_like(TOKENS)).last_hidden_state.shape == (2, 9, 16)


def test_tied_embeddings_are_refused(model: BDHForCausalLM) -> None:
    with pytest.raises(ValueError, match="tie_word_embeddings is true; a BDH has separate embeddings"):
        BDHConfig(tie_word_embeddings=True)
    model.config.tie_word_embeddings = True
    with pytest.raises(ValueError, match="tie_word_embeddings is true; a BDH has separate embeddings"):
        BDHForCausalLM(model.config)


def test_a_model_is_saved_and_loaded_exactly(model: BDHForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded, report = BDHForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    base = BDHModel.from_pretrained(tmp_path)
    assert torch.equal(base(TOKENS).last_hidden_state, model.model(TOKENS).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    headed = BDHForCausalLM.from_pretrained(tmp_path / "base")  # its head is drawn anew
    assert torch.equal(headed.model(TOKENS).last_hidden_state, base(TOKENS).last_hidden_state)


def test_weights_are_taken_from_a_dictionary_or_a_checkpoint(model: BDHForCausalLM, tmp_path: Path) -> None:
    weights = model.state_dict()
    torch.save(weights, tmp_path / "weights.pt")
    other = BDHForCausalLM(model.config)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    for loaded in (BDHForCausalLM.from_pretrained(None, config=model.config, state_dict=weights), other):
        assert loaded.state_dict().keys() == weights.keys()
        assert all(torch.equal(p, weights[name]) for name, p in loaded.state_dict().items())
        assert all(p.is_contiguous() for p in loaded.parameters())


def test_a_model_made_of_a_configuration_is_initialized(model: BDHForCausalLM) -> None:
    missing = BDHForCausalLM.from_pretrained(None, config=model.config, state_dict={})
    for made in (AutoModelForCausalLM.from_config(model.config), missing):
        assert all(p.device.type == "cpu" and p.isfinite().all() for p in made.parameters())
        for name, p in made.named_parameters():
            expected = 0.3 if ".gates." not in name else p.std() if name.endswith("decay_rate") else 0.0
            assert abs(p.std() - expected) < 0.05, name
    fresh = BDHForCausalLM(model.config).state_dict()
    assert all(torch.equal(p, fresh[name]) for name, p in missing.state_dict().items() if ".gates." in name)


def test_every_tensor_of_a_module_is_a_parameter(model: BDHForCausalLM) -> None:
    assert not [name for name, module in model.named_modules() for x in vars(module).values() if torch.is_tensor(x)]
    assert not list(model.buffers())


def test_devices_are_those_asked_for(model: BDHForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        assert all(p.is_meta for p in BDHForCausalLM(model.config).parameters())
        with pytest.raises(RuntimeError, match="meta device context manager"):
            BDHForCausalLM.from_pretrained(tmp_path)
    with torch.device("cpu"):
        assert torch.equal(BDHForCausalLM.from_pretrained(tmp_path)(TOKENS).logits, model(TOKENS).logits)


def test_layers_can_be_left_on_the_disk(model: BDHForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    places = {"model.embed_tokens": "cpu", "model.layer": "disk", "lm_head": "cpu"}
    loaded = BDHForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    assert all(p.is_meta for p in loaded.model.layer.encoder_v.parameters())
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_weights_of_other_sizes_are_refused_unless_allowed(model: BDHForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        BDHForCausalLM.from_pretrained(tmp_path, vocab_size=10)
    loaded = BDHForCausalLM.from_pretrained(tmp_path, vocab_size=10, ignore_mismatched_sizes=True)
    assert loaded(TOKENS % 10).logits.shape == (2, 9, 10)
    assert torch.equal(loaded.model.layer.encoder.weight, model.model.layer.encoder.weight)


def test_the_model_with_its_head_holds_the_model_without(model: BDHForCausalLM) -> None:
    assert model.base_model is model.model and model.main_input_name == model.model.main_input_name == "input_ids"


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_checkpointing_is_switched_on_and_off(model: BDHForCausalLM, adapted: bool) -> None:
    model._hf_peft_config_loaded = adapted  # adapters need inputs with gradients then
    for made in (model, model.model):
        assert not made.is_gradient_checkpointing
        made.gradient_checkpointing_enable()
        switches = [m.gradient_checkpointing for m in made.modules() if hasattr(m, "gradient_checkpointing")]
        assert made.is_gradient_checkpointing and len(switches) == 2 and all(switches)
        made.gradient_checkpointing_disable()
        assert not made.is_gradient_checkpointing
    config = copy.deepcopy(model.config)
    config.gradient_checkpointing = True
    assert BDHForCausalLM(config).is_gradient_checkpointing


def test_the_signature_begins_as_of_every_model() -> None:
    for kind in (BDHModel, BDHForCausalLM):
        assert list(inspect.signature(kind.forward).parameters)[1:3] == ["input_ids", "attention_mask"]


def test_embeddings_can_be_resized(model: BDHForCausalLM) -> None:
    before = model(TOKENS).logits
    model.resize_token_embeddings(V + 7)
    assert model.config.vocab_size == V + 7 and model.get_output_embeddings().weight.shape[0] == V + 7
    after = model(TOKENS).logits
    assert after.shape == (2, 9, V + 7) and torch.allclose(after[..., :V], before, atol=1e-6)
    assert model(TOKENS + 7, labels=TOKENS + 7).loss.isfinite()
    head = model.get_output_embeddings().weight.clone()
    model.post_init()
    assert torch.equal(model.get_output_embeddings().weight, head)
    model.model.resize_token_embeddings(V + 3)
    model.resize_token_embeddings(V)
    assert torch.allclose(model(TOKENS).logits, before, atol=1e-6)


def test_embeddings_can_be_given_instead_of_tokens(model: BDHForCausalLM) -> None:
    embeds = model.get_input_embeddings()(TOKENS)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(TOKENS).logits)
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(torch.zeros(V, 16)))
    assert not torch.equal(model(TOKENS).logits, model(inputs_embeds=embeds).logits)


def test_a_row_computes_the_same_in_any_batch(model: BDHForCausalLM) -> None:
    together = model(TOKENS).logits
    assert torch.allclose(model(TOKENS[1:]).logits, together[1:], atol=1e-5)
    assert torch.equal(model(TOKENS).logits, together)


@pytest.mark.parametrize("reentrant", [True, False])
def test_every_weight_learns_with_and_without_checkpointing(model: BDHForCausalLM, reentrant: bool) -> None:
    model.config.dropout = 0.0
    model.train()
    expected = torch.autograd.grad(model(TOKENS, labels=TOKENS).loss, list(model.parameters()))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(TOKENS).requires_grad
    model(TOKENS, labels=TOKENS).loss.backward()
    for (name, p), gradient in zip(model.named_parameters(), expected, strict=True):
        assert p.grad is not None and torch.allclose(p.grad, gradient, atol=1e-6), name
        assert gradient.abs().max() > 0, name


def test_gradients_of_hidden_states_can_be_kept(model: BDHForCausalLM) -> None:
    outputs = model(TOKENS, output_hidden_states=True)
    for x in outputs.hidden_states:
        x.retain_grad()
    outputs.logits[0, -1].sum().backward()
    assert all(x.grad is not None for x in outputs.hidden_states)


def test_half_precision_keeps_the_gates_whole(model: BDHForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = BDHForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for dtype in ("bfloat16", torch.float16, "auto"):
        pairs = (BDHForCausalLM.from_pretrained(tmp_path, **{key: dtype}) for key in ("dtype", "torch_dtype"))
        assert len({tuple((p.dtype, p.sum().item()) for p in made.parameters()) for made in pairs}) == 1
    for name, p in loaded.named_parameters():
        assert p.dtype == (torch.float32 if ".gates." in name else torch.bfloat16), name
    assert loaded.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (2, 12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gates_are_made_in_float32_whatever_the_dtype(model: BDHForCausalLM, dtype: torch.dtype) -> None:
    made = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    for name, p in made.named_parameters():
        assert p.dtype == (torch.float32 if ".gates." in name else dtype), name
    assert made(TOKENS, labels=TOKENS).loss.isfinite()


@pytest.mark.parametrize("decay", ["none", "fixed", "gated"])
@pytest.mark.parametrize("write", ["add", "delta"])
def test_modules_kept_in_float32_are_in_the_model(decay: str, write: str) -> None:
    config = BDHConfig(n_layer=1, n_embd=16, n_head=2, mlp_internal_dim_multiplier=8, decay=decay, write=write)
    for kind in (BDHModel, BDHForCausalLM):
        made = kind(config)
        has_parameters = any("gates" in name.split(".") for name in made.state_dict())
        assert made._keep_in_fp32_modules_strict == ({"gates"} if has_parameters else set())
