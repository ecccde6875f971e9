"""On an NVIDIA GPU: parity, the forms, training in bfloat16, compiled, with recomputed layers, resumed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bdh.data.tokenizer import save_tokenizer
from bdh.data.vocabulary import train_tokenizer
from bdh.model import BDHConfig, BDHForCausalLM
from bdh.model.modeling_bdh import attention_chunked, attention_quadratic, attention_recurrent, rotary_phases, rotate
from bdh.training.device_setup import recompute_layers
from bdh.training.run_log import read_metrics
from tests.conftest import TEXT, TINY, environment
from tests.model.test_golden import golden

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_golden_parity(name: str) -> None:
    model, tensors = golden(name)
    model.cuda()
    logits = model(tensors["tokens"].cuda()).logits
    assert (logits.cpu() - tensors["logits"]).abs().max() <= 1e-4
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tensors["targets"].flatten().cuda()).backward()
    gradient = model.model.layer.decoder.weight.grad
    assert gradient is not None and (gradient.cpu() - tensors["grads.decoder"].T).abs().max() <= 1e-4
    greedy = tensors["greedy"]
    assert model.generate(greedy[:, :8].cuda(), max_length=32, do_sample=False).cpu().tolist() == greedy.tolist()


def test_three_forms_agree() -> None:
    torch.manual_seed(0)
    B, h, T, N, D = 2, 4, 700, 512, 64
    X, x = torch.randn(B, h, T, N, device="cuda").relu(), torch.randn(B, T, D, device="cuda")
    S = torch.randn(B, h, N, D, device="cuda")
    positions = torch.arange(10**6, 10**6 + T, device="cuda")[None]
    R = rotate(X, *rotary_phases(positions, N, 65536.0, torch.float32))
    with torch.no_grad():
        expected = attention_quadratic(R.double(), x.double(), S.double())
        for A in (
            attention_quadratic(R, x, S),
            attention_chunked(R, x, S.clone(), 128)[0],
            attention_recurrent(R, x, S.clone())[0],
        ):
            assert (A - expected).norm() / expected.norm() < 1e-4


def default_model() -> BDHForCausalLM:
    torch.manual_seed(0)
    return BDHForCausalLM(BDHConfig(dropout=0.0)).cuda()


def loss_and_memory(model: torch.nn.Module) -> tuple[float, float]:
    tokens = torch.randint(256, (8, 512), generator=torch.Generator().manual_seed(0)).cuda()
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    return loss.item(), torch.cuda.max_memory_allocated() / 1e9


def test_bfloat16_autocast_is_close_to_float32_and_recomputing_saves_memory() -> None:
    model = default_model().train()
    tokens = torch.randint(256, (8, 512), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        exact = model(tokens, labels=tokens).loss.item()
    loss, memory = loss_and_memory(model)
    assert abs(loss - exact) < 0.01
    recompute_layers(model)
    again, less = loss_and_memory(model)
    assert abs(again - loss) < 1e-3 and less < 0.6 * memory


def train(folder: Path, *argv: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "bdh", "train", *map(str, argv)]
    env = environment(PYTHONPATH=":".join(p for p in sys.path if p))
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=400)


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_training_and_resuming(tmp_path: Path, compiled: str) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    given = ["--data.path", "text.txt", *TINY, "--training.compile", compiled]
    done = train(tmp_path, *given, "--run_dir", "whole")
    assert done.returncode == 0, done.stderr
    assert "in bfloat16" in done.stdout and "CPU" not in done.stdout.splitlines()[1]
    whole = [r for r in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "loss" in r]
    assert whole[-1]["loss"] < whole[0]["loss"] - 1.0
    done = train(tmp_path, "--resume", "whole/checkpoints/checkpoint-0000030", "--run_dir", "resumed")
    assert done.returncode == 0, done.stderr
    end = [r for r in read_metrics(tmp_path / "resumed" / "metrics.jsonl") if "loss" in r][-1]
    assert abs(end["loss"] - whole[-1]["loss"]) < 0.01


def test_a_carried_state_trains_and_resumes_from_a_stream(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer("bytes", (), 0), tmp_path / "tokenizer")
    lines = [json.dumps({"text": line * (1 + n % 7)}) for n, line in enumerate(TEXT.splitlines())]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    given = ["--data.path", "a.jsonl", "--data.tokenizer", "tokenizer", "--data.streaming", "true", *TINY]
    done = train(tmp_path, *given, "--training.carry_state", "true", "--run_dir", "whole")
    assert done.returncode == 0, done.stderr
    whole = [r for r in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "loss" in r]
    assert whole[-1]["loss"] < whole[0]["loss"] - 1.0
    done = train(tmp_path, "--resume", "whole/checkpoints/checkpoint-0000030", "--run_dir", "resumed")
    assert done.returncode == 0 and "from its beginning" not in done.stdout, done.stderr
    end = [r for r in read_metrics(tmp_path / "resumed" / "metrics.jsonl") if "loss" in r][-1]
    assert abs(end["loss"] - whole[-1]["loss"]) < 0.01


def test_the_export_generates_on_the_gpu(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    assert train(tmp_path, "--data.path", "text.txt", *TINY, "--run_dir", "run").returncode == 0
    env = environment(PYTHONPATH=":".join(p for p in sys.path if p))
    written = {}
    for device in ("cpu", "cuda"):
        command = ["generate", "--model", "run/model", "--prompt", "The ", "--temperature", "0", "--device", device]
        done = subprocess.run(
            [sys.executable, "-m", "bdh", *command, "--max_new_tokens", "30"],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        written[device] = done.stdout
    assert written["cpu"] == written["cuda"]


def test_state_decoding_on_the_gpu_matches_recomputing() -> None:
    model = default_model().eval()
    prompt = torch.randint(256, (2, 100), device="cuda")
    with_state = model.generate(prompt, max_new_tokens=20, do_sample=False)
    without = model.generate(prompt, max_new_tokens=20, do_sample=False, use_cache=False)
    assert json.dumps(with_state.tolist()) == json.dumps(without.tolist())
