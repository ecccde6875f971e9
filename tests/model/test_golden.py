"""Parity with the published model: logits, loss, every gradient, greedy continuation."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from bdh.model import BDHConfig, BDHForCausalLM
from bdh.model.published import NAMES, load_published
from tests.conftest import GOLDEN

PROMPT = 8  # tokens of `greedy` that were given, the rest was generated


def golden(name: str) -> tuple[BDHForCausalLM, dict[str, Tensor]]:
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        config = BDHConfig(**json.loads(file.metadata()["config"]))
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    model = BDHForCausalLM(config).eval()
    load_published(model, {key: tensors[f"weights.{key}"] for key in NAMES})
    return model, tensors


@pytest.mark.parametrize("name", ["tiny", "small"])
@pytest.mark.parametrize("chunk_size", [512, 7])
def test_logits_loss_and_gradients(name: str, chunk_size: int) -> None:
    model, tensors = golden(name)
    model.config.chunk_size = chunk_size
    logits = model(tensors["tokens"], use_cache=False).logits
    assert (logits - tensors["logits"]).abs().max() <= 1e-4
    loss = F.cross_entropy(logits.flatten(0, 1), tensors["targets"].flatten())
    assert abs(loss - tensors["loss"]) <= 1e-4
    targets = tensors["targets"]
    assert torch.allclose(model(tensors["tokens"], labels=targets, shift_labels=targets).loss, loss)

    loss.backward()
    layer = model.model.layer
    expected = {
        model.model.embed_tokens: tensors["grads.embed.weight"],
        layer.encoder: tensors["grads.encoder"].mT.flatten(0, 1),
        layer.decoder: tensors["grads.decoder"].T,
        model.lm_head: tensors["grads.lm_head"].T,
        **{linear: tensors["grads.encoder_v"][k].T for k, linear in enumerate(layer.encoder_v)},
    }
    assert len(expected) == len(list(model.parameters()))
    for module, gradient in expected.items():
        found = module.get_parameter("weight").grad
        assert found is not None and (found - gradient).abs().max() <= 1e-4
        assert torch.allclose(found, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["tiny", "small"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_continuation(name: str, use_cache: bool) -> None:
    model, tensors = golden(name)
    greedy = tensors["greedy"]
    written = model.generate(greedy[:, :PROMPT], max_length=greedy.shape[1], do_sample=False, use_cache=use_cache)
    assert written.tolist() == greedy.tolist()


def test_labels_are_shifted_like_the_library_does() -> None:
    model, tensors = golden("tiny")
    tokens = tensors["tokens"]
    ours = model(tokens, labels=tokens).loss
    logits = model(tokens).logits
    assert torch.allclose(ours, F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))
