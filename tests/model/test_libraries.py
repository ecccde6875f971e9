"""Libraries that look for nn.Linear find them and work: LoRA, torchao, bitsandbytes, FSDP2."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bdh.model import BDHConfig, BDHForCausalLM
from tests.conftest import environment


@pytest.fixture(params=["add", "delta"])
def model(request: pytest.FixtureRequest) -> BDHForCausalLM:
    torch.manual_seed(0)
    config = BDHConfig(n_layer=2, n_embd=64, n_head=2, mlp_internal_dim_multiplier=8, dropout=0.0)
    if request.param == "delta":
        config.decay, config.decay_half_lives, config.write = "gated", [16, 64], "delta"
    return BDHForCausalLM(config).eval()


def gates_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".gates." in name}


def same_gates(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = gates_of(model)
    return len(after) == len(before) and all(map(torch.equal, after.values(), before.values()))


TOKENS = torch.arange(40).view(2, 20) * 5 % 256


def test_every_matrix_is_a_plain_linear(model: BDHForCausalLM) -> None:
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert linears == {
        "model.layer.encoder",
        "model.layer.encoder_v.0",
        "model.layer.encoder_v.1",
        "model.layer.decoder",
        "lm_head",
    }


def test_lora_trains_and_merges(model: BDHForCausalLM) -> None:
    from peft import LoraConfig, get_peft_model

    before, gates = model(TOKENS).logits, gates_of(model)
    adapted = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_alpha=16)
    )
    names = [name for name, module in adapted.named_modules() if name.endswith("lora_A")]
    assert len(names) == 4
    assert torch.equal(adapted(input_ids=TOKENS).logits, before)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(15):
        loss = adapted(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3 and same_gates(adapted, gates)
    adapted.eval()
    tuned = adapted(input_ids=TOKENS).logits
    assert torch.allclose(adapted.merge_and_unload()(TOKENS).logits, tuned, atol=1e-4)


def test_torchao_quantizes_and_generates(model: BDHForCausalLM) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    exact, gates = model(TOKENS).logits, gates_of(model)
    quantize_(model, Int8WeightOnlyConfig())
    assert same_gates(model, gates)
    error = (model(TOKENS).logits - exact).norm() / exact.norm()
    assert 0 < error < 0.05
    assert model.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (2, 23)


def test_bitsandbytes_replaces_the_layers(model: BDHForCausalLM, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    exact, gates = model(TOKENS).logits, gates_of(model)
    model.save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, device_map="cpu")
    assert type(loaded.model.layer.encoder_v[1]).__name__ == "Linear4bit" and same_gates(loaded, gates)
    error = (loaded(TOKENS).logits - exact).norm() / exact.norm()
    assert 0 < error < 0.4


FSDP = """
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from bdh.model import BDHConfig, BDHForCausalLM

dist.init_process_group("gloo")
config = BDHConfig(n_layer=2, n_embd=32, n_head=2, mlp_internal_dim_multiplier=8, dropout=0.0)
tokens = torch.arange(40).view(2, 20) * 5 % 256

def train(shard):
    torch.manual_seed(0)
    model = BDHForCausalLM(config)
    if shard:
        fully_shard(model.model.layer)
        fully_shard(model)
        assert all(type(p).__name__ == "DTensor" for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    losses = []
    for _ in range(5):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)

plain, sharded = train(False), train(True)
assert torch.allclose(plain, sharded, atol=1e-4), (plain, sharded)
assert plain[-1] < plain[0] - 0.1
dist.destroy_process_group()
"""


def test_fsdp2_shards_and_learns_the_same(tmp_path: Path) -> None:
    script = tmp_path / "fsdp.py"
    script.write_text(FSDP)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        launch,
        env=environment(PYTHONPATH=os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
