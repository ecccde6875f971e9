"""LoRA: adapters alone are trained and saved, survive kills, and are merged or kept apart at the end."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bdh.model.export import load_export
from bdh.training import checkpoint
from bdh.training.checkpoint import find_checkpoint
from bdh.training.export import load_model
from bdh.training.loop import Trainer
from tests.conftest import TEXT
from tests.training.test_init_from import SHORT, Command, command, same_weights, trainer, write_chat
from tests.training.test_loop import assert_same_end
from tests.training.test_survival import start, wait_until

__all__ = ["command"]  # the fixture

TOKENS = torch.arange(40).view(2, 20) * 5 % 256
LORA = [*SHORT, "--init_from", "base", "--lora.rank", "3", "--lora.dropout", "0.1", "--model.dropout", "0.1"]


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory, finished_run: Path) -> Path:
    """A finished run with adapters, beside its base. Do not change it."""
    from bdh.cli.main import main

    folder = tmp_path_factory.mktemp("lora")
    shutil.copytree(finished_run / "model", folder / "base")
    (folder / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", *LORA, "--run_dir", "run", "--training.max_steps", "200"]) == 0
    return folder / "run"


def copied(lora_run: Path, folder: Path) -> Path:
    shutil.copytree(lora_run.parent / "base", folder / "base")
    return Path(shutil.copytree(lora_run, folder / "run", symlinks=True))


def test_a_checkpoint_holds_the_adapters_and_their_moments_alone(lora_run: Path) -> None:
    path = find_checkpoint(lora_run)
    names = {name for file in path.glob("*.safetensors") for name in load_file(file)}
    assert all("lora_" in name for name in names)
    kept = {name for name in names if name.startswith("model.")}
    assert kept == {
        f"model.model.layer.{module}.lora_{side}.default.weight"
        for module in ("encoder", "encoder_v.0", "encoder_v.1", "decoder")
        for side in "AB"
    }
    assert checkpoint.read_state(path)["base"]


def test_merged_and_apart_are_the_same_model(command: Command, lora_run: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    code, said, wrong = command("export", lora_run, "adapter", "--adapter")
    assert code == 0 and said.startswith("adapter holds the adapters of "), wrong
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "| fine-tuned from | base |" in card and "LoRA of rank 3, alpha 16, on encoder, encoder_v, decoder" in card
    assert str(lora_run.parent) not in card + (tmp_path / "adapter" / "adapter_config.json").read_text()
    base = AutoModelForCausalLM.from_pretrained(lora_run.parent / "base").eval()
    with torch.no_grad():
        untuned = base(TOKENS).logits
        apart = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(TOKENS).logits
        merged = load_export(lora_run / "model")[0](TOKENS).logits
    assert torch.allclose(apart, merged, atol=1e-5) and not torch.allclose(apart, untuned, atol=1e-2)

    assert command("export", lora_run, "adapter", "--adapter")[0] == 0  # one of ours is replaced
    code, _, wrong = command("export", lora_run, ".", "--adapter")
    assert code == 2 and "holds something that is no adapter" in wrong
    code, _, wrong = command("eval", "--model", "adapter", "--data.path", "text.txt")
    assert code == 2 and "it is an adapter; bdh export RUN DIR, without --adapter, merges one" in wrong


def test_commands_take_a_run_with_adapters(command: Command, lora_run: Path, tmp_path: Path) -> None:
    assert command("info", lora_run)[0] == 0
    one, other = sorted(path for path in (lora_run / "checkpoints").glob("checkpoint-*"))[:2]
    assert command("average", one, other, "--output", "mean")[0] == 0
    a, b = (load_model(path)[0].state_dict() for path in (one, other))
    mean = load_export(tmp_path / "mean")[0].state_dict()
    assert all(torch.allclose(mean[name], (a[name] + b[name]) / 2, atol=1e-6) for name in mean)
    code, said, _ = command("eval", "--model", lora_run / "model", "--data.path", "text.txt", "--data.block_size", 64)
    assert code == 0 and "text.txt: loss " in said


def test_a_kill_changes_no_bit(command: Command, lora_run: Path, tmp_path: Path) -> None:
    shutil.copytree(lora_run.parent / "base", tmp_path / "base")
    process = start(tmp_path, *LORA, "--run_dir", "run", "--training.max_steps", "200")
    assert wait_until(process, tmp_path / "run", 70), process.communicate()[0]
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before the kill"
    code, said, wrong = command("train", "--resume", "run")
    assert code == 0 and "going on from step" in said, wrong
    assert_same_end(lora_run, tmp_path / "run")


def test_the_base_is_known_again(command: Command, lora_run: Path, finished_run: Path, tmp_path: Path) -> None:
    copied(lora_run, tmp_path)
    saved = find_checkpoint(lora_run)
    shutil.rmtree(tmp_path / "run" / "model")
    other = ["train", "--resume", "run", "--training.max_steps", 205]
    code, _, wrong = command(*other, "--init_from", finished_run / "checkpoints" / "checkpoint-0000030")
    assert code == 2 and "is not the model that the adapters of this run were trained beside" in wrong
    for changed in ("--lora.rank 4", "--lora.alpha 8", "--lora.targets [decoder]", "--lora.rank 0"):
        code, _, wrong = command(*other, *changed.split())
        assert code == 2 and f"the checkpoint has other adapters: {changed.split()[0][2:]} " in wrong
    (tmp_path / "base").rename(tmp_path / "moved")
    code, said, wrong = command(*other, "--init_from", "moved")
    assert code == 0 and "200 of 205" in said and "and is now" in said, wrong
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert find_checkpoint(lora_run) == saved


def test_a_base_that_is_gone_is_asked_for(command: Command, finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run / "model", tmp_path / "base")
    assert command("train", *LORA, "--run_dir", "run")[0] == 0
    (tmp_path / "base").rename(tmp_path / "moved")
    for line in ("export run out", "average run run --output out", "train --resume run --training.max_steps 25"):
        code, _, wrong = command(*line.split())
        assert code == 2 and f"belong to {tmp_path / 'base'}, which is gone; tell where it is now: --init" in wrong
    assert not (tmp_path / "out").exists()
    assert command("export", "run", "out", "--init_from", "moved")[0] == 0
    assert same_weights(load_export(tmp_path / "out")[0], load_export(tmp_path / "run" / "model")[0])


def adapted(folder: Path, finished_run: Path, rank: int = 3, **training: Any) -> Trainer:
    write_chat(folder / "chat.jsonl")
    data = {"path": str(folder / "chat.jsonl"), "chat": True}
    return trainer(folder / "run", finished_run / "model", data, lora={"rank": rank}, **training)


def test_only_adapters_learn_and_recomputing_changes_nothing(finished_run: Path, tmp_path: Path) -> None:
    found = []
    for recompute in (False, True):
        run = adapted(tmp_path, finished_run, gradient_checkpointing=recompute)
        run.model.config.dropout = 0.0
        before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
        for _ in range(3):
            run.step()
        run.evaluate()
        run.evaluator.samples(3)
        changed = {name for name, weight in run.model.state_dict().items() if not torch.equal(weight, before[name])}
        assert changed and all("lora_" in name for name in changed)
        found.append(torch.cat([weight.flatten() for name, weight in run.model.state_dict().items() if "lora" in name]))
    assert torch.allclose(found[0], found[1], atol=1e-5)


def test_without_peft_the_install_line_is_given(command: Command, lora_run: Path, tmp_path: Path) -> None:
    shutil.copytree(lora_run.parent / "base", tmp_path / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "peft", None)
        code, _, wrong = command("train", *LORA, "--run_dir", "x")
    assert code == 2 and wrong.endswith("lora.rank needs the package peft: pip install 'bdh[lora]'\n")
    assert not (tmp_path / "x").exists()


def test_a_run_without_adapters_has_none_to_export(command: Command, finished_run: Path, tmp_path: Path) -> None:
    code, _, wrong = command("export", finished_run, "out", "--adapter")
    assert code == 2 and "has no adapters, its run trained all weights; leave --adapter out" in wrong


@pytest.mark.slow
def test_compiled_adapters_learn_the_same(finished_run: Path, tmp_path: Path) -> None:
    losses = []
    for compile in (False, True):
        run = adapted(tmp_path, finished_run, compile=compile)
        run.model.config.dropout = 0.0
        losses.append([run.accumulator.accumulate(run.data.next_batch()) for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
