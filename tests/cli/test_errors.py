"""Every mistake a user can make with a command: one line on stderr, exit code 2, nothing half-written."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from bdh.cli.main import main
from bdh.data.tokenizer import byte_tokenizer, save_tokenizer
from bdh.data.vocabulary import train_tokenizer
from tests.conftest import TEXT, TINY, Run, environment


def prepare(folder: Path, finished: Path) -> None:
    """What the mistakes below need around them."""
    (folder / "text.txt").write_text(TEXT)
    (folder / "short.txt").write_text("too short")
    (folder / "empty.txt").write_text("")
    (folder / "two.jsonl").write_text('{"a": "x", "b": "y"}')
    (folder / "torn.jsonl").write_text('{"text": "x')
    for name in "xy":
        (folder / "set" / name).mkdir(parents=True)
        (folder / "set" / name / "train.jsonl").write_text(json.dumps({"text": TEXT}))
    configs = "".join(f"- {{config_name: {name}, data_files: {name}/*}}\n" for name in "xy")
    (folder / "set" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    save_tokenizer(train_tokenizer("bytes", (), 0), folder / "special")
    plain = byte_tokenizer(end_of_text=False)
    save_tokenizer(plain, folder / "plain")
    shutil.copytree(finished / "model", folder / "plain_model")
    plain.save_pretrained(folder / "plain_model")
    (folder / "one.txt").write_text("x")
    (folder / "emptydir").mkdir()
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("years")
    (folder / "junk.pt").write_bytes(b"not a checkpoint")
    (folder / "junk.safetensors").write_bytes(b"not one either")
    torch.save({"weight": torch.zeros(2)}, folder / "other.pt")
    (folder / "gpt2").mkdir()
    (folder / "gpt2" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (folder / "bad.yaml").write_text("model: {n_lyer: 3}\n")
    (folder / "torn.yaml").write_text("model: [\n")
    (folder / "run").symlink_to(finished)
    shutil.copytree(finished, folder / "damaged", symlinks=True)
    for shard in (folder / "damaged").glob("checkpoints/*/*.safetensors"):
        os.truncate(shard, 10)
    shutil.copytree(finished / "model", folder / "torn_model")
    (folder / "torn_model" / "model.safetensors").write_bytes(b"torn")
    (folder / "torn_model" / "tokenizer.json").write_bytes(b"torn")


CASES: dict[str, str] = {
    # the command itself
    "trian": "bdh: error: trian is not a command; did you mean train?",
    "xyzzy": "bdh: error: xyzzy is not a command; there are quickstart, train,",
    # settings (all kinds are in tests/training/test_config.py; here through the command)
    "train --model.n_lyer 3": "bdh train: error: --model.n_lyer is not an option; did you mean --model.n_layer?",
    "train --config bad.yaml": "model.n_lyer is not a setting; did you mean model.n_layer?",
    "train --config torn.yaml": "bdh train: error: Problems parsing config",
    "train --config quickstrat": "--config quickstrat does not exist; did you mean quickstart?",
    "train --model.n_head 3": "model.n_head is 3; it must divide the 32768 neurons",
    "train --training.learning_rate -1": "training.learning_rate is -1.0; it must be above 0",
    "train --model.vocab_size 100": "model.vocab_size is 100; it must be at least 256, the tokens of the tokenizer",
    "train --training.device cuda": "the device is to be cuda, which this machine lacks; it has cpu",
    # text
    "train --data.path nowhere.txt": "data.path nowhere.txt does not exist",
    "train --data.path empty.txt": "data.path empty.txt is empty",
    "train --data.path other.pt": "data.path other.pt is of no known format; known are ",
    "train --data.path two.jsonl": "two.jsonl has several text columns: a, b; name one: --data.text_column",
    "train --data.path two.jsonl --data.text_column c": "data.text_column c is not a text column of two.jsonl; it has",
    "train --data.path torn.jsonl": "torn.jsonl is not JSON lines at byte 0",
    "train --data.path torn.jsonl --data.streaming true": "torn.jsonl is not JSON lines at byte 0",
    "train --data.path *.nothing": "data.path *.nothing matches no file",
    "train --data.path text.txt --data.validation_split test": "text.txt has no split test; only datasets have splits",
    "train --data.path text.txt --data.text_column x": "data.text_column is x, but text.txt is plain text",
    "train --data.path set": "set has several configurations; choose one with --data.config: x, y",
    "train --data.path set --data.config z": "data.config z is not a configuration of set; there are x, y",
    "train --data.path set --data.config x --data.split dev": "data.split dev is not a split of set; there are train",
    "train --data.path owner/unheard-of": "owner/unheard-of is not in the cache, and HF_HUB_OFFLINE forbids",
    "train --data.streaming true": "data.streaming true needs data.path or data.mixture",
    "train --data.path text.txt --data.mixture [{path:text.txt}]": "bdh train: error: ",
    "train --data.path text.txt --data.cross_documents false --data.tokenizer plain": "has no end-of-text token",
    "train --training.carry_state true --data.tokenizer plain": "take one that has, as --data.tokenizer bytes, or",
    "train --training.carry_state true --training.compile true": "are both true; choose one",
    "train --data.num_workers -1": "data.num_workers is -1; it must be at least 0",
    "train --data.tokenizer nowhere": "data.tokenizer nowhere is no folder here and cannot be loaded from the hub",
    "train --data.tokenizer mine": "data.tokenizer mine has no tokenizer.json",
    "train --data.tokenizer text.txt": "data.tokenizer text.txt is a file; give the folder it lies in",
    "train --data.tokenizer torn_model": "data.tokenizer torn_model cannot be loaded: ",
    "train --data.tokenizer special --model.vocab_size 256": "model.vocab_size is 256; it must be at least 261",
    "train --resume run --data.tokenizer special": "data.tokenizer special is not the tokenizer of ",
    "train --data.path emptydir": "data.path emptydir holds no text",
    "train --data.path short.txt": "data.block_size is 512, but the training part of short.txt has 10 tokens; use a "
    "block of at most 9",
    "train --data.corpus shakespeare": "cannot be reached",
    # runs
    "train --run_dir run": "run_dir run already holds a run; go on with it: bdh train --resume run, or name another",
    "train --run_dir mine --data.path text.txt --data.block_size 16": "run_dir mine holds something that is not a run",
    "train --run_dir text.txt --data.path text.txt --data.block_size 16": "run_dir text.txt cannot be written: ",
    "train --resume nowhere": "nowhere does not exist; give a run's folder or one of its checkpoints",
    "train --resume emptydir": "emptydir holds no whole checkpoint",
    "train --resume damaged": "damaged holds no whole checkpoint",
    "train --logging.trackers [wandbx]": "it must be one of tensorboard, wandb, trackio, mlflow; did you mean wandb?",
    "train --logging.peak_tflops 0": "logging.peak_tflops is 0.0; it must be above 0",
    "report nowhere": "bdh report: error: nowhere does not exist; give the folder of a run, as runs/quickstart",
    "report emptydir": "emptydir holds no run: it has neither metrics.jsonl nor config.yaml",
    "report run run": "run is given twice; leave one out",
    "report run --output emptydir": "--output emptydir is a folder; name a file, as report.html",
    "train --resume damaged/checkpoints/checkpoint-0000040": "checkpoint-0000040 is damaged: ",
    "train --resume run --model.n_layer 3 --model.n_embd 32": "the checkpoint has another architecture: "
    "model.n_layer 2 -> 3, model.n_embd 16 -> 32",
    "train --resume run --training.optimizer muon": "the checkpoint has the state of another optimizer: training."
    "optimizer adamw -> muon; keep this setting, or begin a new run with the weights: --init_from DIR",
    "quickstart --training.max_steps 0": "bdh quickstart: error: training.max_steps is 0; it must be at least 1",
    # exports
    "export nowhere out": "nowhere does not exist",
    "export run mine": "mine holds something that is not an export",
    "export run text.txt": "text.txt is a file; name a folder for the export",
    "export damaged out": "damaged holds no whole checkpoint",
    "export run": "bdh export: error: ",
    "generate --model nowhere --prompt x": "nowhere does not exist; give the folder of an export",
    "generate --model run --prompt x": "run has no config.json; bdh export run DIR makes an export of it",
    "generate --model emptydir --prompt x": "emptydir has no config.json; give the folder of an export",
    "generate --model text.txt --prompt x": "text.txt is a file; give the folder of an export",
    "generate --model gpt2 --prompt x": "gpt2 is a gpt2 model, not a bdh one",
    "generate --model torn_model --prompt x": "the weights in torn_model cannot be loaded",
    "generate --model run/model --prompt=": "the prompt is empty",
    "generate --model run/model --prompt x --temperature -1": "temperature is -1.0; it must be at least 0",
    "generate --model run/model --prompt x --top_p 2": "top_p is 2.0; it must be above 0 and at most 1",
    "generate --model run/model --prompt x --max_new_tokens 0": "max_new_tokens is 0; it must be at least 1",
    "generate --model run/model --prompt x --top_kk 3": "--top_kk is not an option; did you mean --top_k?",
    "generate --model run/model": "bdh generate: error: ",
    "generate --model run/model --prompt x --device cuda": "the device is to be cuda, which this machine lacks",
    "eval --model run/model --data.path nowhere.txt": "data.path nowhere.txt does not exist",
    "eval --model plain_model --data.path one.txt": "one.txt has 1 tokens; at least 2 are needed",
    "eval --model run/model --data.tokenizer special": "data.tokenizer special is not the tokenizer of run/model",
    "eval --model plain_model --carry_state": "plain_model has a tokenizer without an end-of-text token",
    "eval --model run/model --data.block_size 0": "data.block_size is 0; it must be at least 1",
    "eval --model run/model --batch_size 0": "batch_size is 0; it must be at least 1",
    "convert nowhere.pt out": "nowhere.pt does not exist",
    "convert emptydir out": "emptydir is not a file",
    "convert junk.pt out": "junk.pt cannot be read as a checkpoint",
    "convert junk.safetensors out": "junk.safetensors cannot be read as a checkpoint",
    "convert other.pt out": "is not a published BDH checkpoint: it lacks embed.weight, encoder",
    "convert other.pt mine": "mine holds something that is not an export",
    "convert run/model out.bin --to-published": "out.bin should end in .safetensors or .pt",
    "convert nowhere out.pt --to-published": "nowhere does not exist",
    "average run --output out": "only run is given; averaging takes two checkpoints or more",
    "average run nowhere --output out": "nowhere does not exist",
    "average run run": "bdh average: error: ",
    # tokenizers
    "tokenizer trian": "trian is not a command of bdh tokenizer; did you mean train?",
    "tokenizer train --output mine --kind bytes": "mine holds something that is not a tokenizer",
    "tokenizer train --output text.txt --kind bytes": "text.txt is a file; name a folder for the tokenizer",
    "tokenizer train --output out --vocab_size 10": "vocab_size is 10; it must be at least 262",
    "tokenizer train --output out --data.path empty.txt": "data.path empty.txt is empty",
    "tokenizer train --output out --max_bytes 0": "max_bytes is 0.0; it must be at least 1",
    "tokenizer train --output out --kind word": "bdh tokenizer: error: ",
    "tokenizer train": "bdh tokenizer: error: ",
    "tokenizer info nowhere": "data.tokenizer nowhere is no folder here",
    "tokenizer info bytes --data.path nowhere.txt": "data.path nowhere.txt does not exist",
    "tokenizer decode bytes 300": "300 is not an id of bytes, which has 256 tokens",
    "tokenizer decode bytes x": "bdh tokenizer: error: ",
    "info nowhere": "nowhere does not exist",
    "info emptydir": "emptydir has no config.json",
}


@pytest.fixture(scope="module")
def around(tmp_path_factory: pytest.TempPathFactory, finished_run: Path) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    prepare(folder, finished_run)
    return folder


@pytest.fixture
def mistake(
    around: Path, bdh: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, str]]:
    """Gives a command line; returns the exit code and what stood on stderr.

    Every sixth runs as users run it, in a process of its own; the others are spared the seconds that imports take.
    """
    variables = {"BDH_SHAKESPEARE_URL": "http://127.0.0.1:9/x", "HOME": str(around)}

    def give(line: str) -> tuple[int, str]:
        if list(CASES).index(line) % 6 == 0:
            done = bdh(*line.split(), cwd=around, env=environment(**variables))
            return done.returncode, done.stderr
        monkeypatch.chdir(around)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        transformers.utils.logging.disable_progress_bar()  # as the command does before it loads transformers
        capfd.readouterr()
        return main(line.split()), capfd.readouterr().err

    return give


@pytest.mark.parametrize("line", list(CASES))
def test_one_line_exit_code_two_and_nothing_left_behind(
    line: str, around: Path, mistake: Callable[[str], tuple[int, str]]
) -> None:
    before = sorted(path.name for path in around.iterdir())
    code, errors = mistake(line)
    assert code == 2, errors
    lines = errors.splitlines()
    assert len(lines) == 1 and CASES[line] in lines[0], errors
    assert lines[0].startswith("bdh") and ": error: " in lines[0]
    assert sorted(path.name for path in around.iterdir()) == before
    assert (around / "mine" / "thesis.txt").read_text() == "years"


def test_text_that_is_no_text(finished_run: Path, bdh: Run) -> None:
    prompt = ["generate", "--model", finished_run / "model", "--prompt"]
    done = bdh(*prompt, os.fsdecode(b"caf\xe9"))
    assert done.returncode == 2 and "the prompt is not valid text: character 3" in done.stderr
    done = bdh(*prompt, "-", text=None, input=b"caf\xe9")
    assert done.returncode == 2 and "the prompt on stdin is not UTF-8 text: byte 3" in str(done.stderr)


def test_an_export_that_does_not_fit_on_the_disk(finished_run: Path, tmp_path: Path) -> None:
    command = f"ulimit -f 20; exec {sys.executable} -m bdh export {finished_run} out"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "out cannot be written: " in done.stderr and not list(tmp_path.iterdir())


def test_averaging_different_architectures(finished_run: Path, tmp_path: Path, bdh: Run) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    assert bdh("train", "--data.path", "text.txt", "--run_dir", "wide", *TINY, "--model.n_embd", 32).returncode == 0
    done = bdh("average", finished_run, "wide", "--output", "out")
    assert done.returncode == 2 and "have different architectures: n_embd 16 and 32" in done.stderr
    assert not (tmp_path / "out").exists()


def test_ctrl_c_before_training_is_quiet(tmp_path: Path) -> None:
    """Interrupted while it waits for a download that does not come."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/input.txt"
        process = subprocess.Popen(
            [sys.executable, "-m", "bdh", "train", "--data.corpus", "shakespeare", "--data.cache_dir", "cache"],
            cwd=tmp_path,
            env=environment(BDH_SHAKESPEARE_URL=address),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite run with & ignores it
        )
        server.settimeout(120)
        connection, _ = server.accept()
        assert connection.recv(65536).startswith(b"GET /input.txt")
        time.sleep(0.5)  # it has asked, and now it does nothing but wait
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        connection.close()
    assert (process.returncode, stderr.strip()) == (130, "interrupted")
    assert list(tmp_path.iterdir()) == []


def test_names_too_long_for_the_file_system(bdh: Run) -> None:
    for command in (["info"], ["export"], ["train", "--resume"], ["generate", "--prompt", "x", "--model"]):
        rest = ["out"] if command == ["export"] else []
        done = bdh(*command, "x" * 300, *rest)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "File name too long" in done.stderr


@pytest.mark.parametrize("command", ["--help", "train --help", "export --help", "train --print_config"])
def test_output_into_a_full_disk(command: str) -> None:
    with Path("/dev/full").open("w") as full:
        arguments = [sys.executable, "-m", "bdh", *command.split()]
        done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, env=environment())
    assert done.returncode == 2
    assert re.fullmatch(r"bdh( \w+)?: error: (the output cannot be written: )?No space left on device\n", done.stderr)
