"""`bdh generate` in two processes that share a model's heads: the same text as one, and one end for both."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bdh.data.tokenizer import byte_tokenizer
from bdh.model import BDHConfig, BDHForCausalLM
from bdh.model.export import save_export
from bdh.model.model_card import model_card
from tests.training.launching import free_port, surroundings

PROMPTS = [
    {"prompt": "The 1 ", "max_new_tokens": 12},
    {"prompt": "The 2 ", "n": 2, "best_of": 3, "logprobs": 1},
    {"messages": [{"role": "user", "content": "hello"}], "temperature": 0},
    {"prompt": "x", "json_schema": {"const": True}},
    {"prompt": "The ", "num_beams": 3, "stop": "a"},
]

FIGURE = re.compile(rb"-?\d+\.\d+")


def alike(one: bytes, other: bytes) -> bool:
    """The same text; of log probabilities, the last digit shown may be rounded otherwise on some processors."""
    if FIGURE.split(one) != FIGURE.split(other):
        return False
    figures = zip(FIGURE.findall(one), FIGURE.findall(other), strict=True)
    return all(abs(float(a) - float(b)) < 2e-4 for a, b in figures)


# Forks the processes of one command after another, so that libraries are loaded once; what each says is in files. As
# torchrun does, it ends the others where one has failed.
LAUNCHER = """
import json, os, signal, sys
import bdh.distributed.processes
import bdh.inference.tensor_parallel
from bdh.cli.main import main

for name, processes, port, stdin, argv in json.load(sys.stdin):
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            if processes > 1:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                )
            os.dup2(os.open(stdin if rank == 0 else os.devnull, os.O_RDONLY), 0)
            for descriptor, kind in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{name}.{processes}.{rank}.{kind}", os.O_WRONLY | os.O_CREAT), descriptor)
            code = main(["generate", *argv])
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        children.append(child)
    codes = {}
    while len(codes) < processes:
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        for other in children if codes[child] else ():
            if other not in codes:
                os.kill(other, signal.SIGTERM)
    print(name, processes, *(codes[child] for child in children), flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of four heads and one of a single head."""
    folder = tmp_path_factory.mktemp("shared")
    for name, heads in (("model", 4), ("single", 1)):
        torch.manual_seed(0)
        config = BDHConfig(
            n_layer=2, n_embd=16, n_head=heads, mlp_internal_dim_multiplier=8, initializer_range=0.4, vocab_size=256
        )
        model = BDHForCausalLM(config).eval()
        save_export(model, byte_tokenizer(), folder / name, model_card("a test", config, []))
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    (folder / "stdin.txt").write_text("Größe of dragons")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    return folder


def test_the_text_is_what_one_process_writes_and_mistakes_are_said_once(folder: Path) -> None:
    asked: dict[str, list[str]] = {
        "sampled": ["--prompt", "The 7 ", "--seed", "5", "--max_new_tokens", "40", "--n", "2", "--logprobs", "2"],
        "stdin": ["--prompt", "-", "--temperature", "0", "--max_new_tokens", "40", "--stream"],
        "file": ["--prompts", "p.jsonl", "--seed", "3", "--max_new_tokens", "20", "--output"],
        "unseeded": ["--prompt", "The ", "--max_new_tokens", "40", "--ignore_eos", "--dtype", "bfloat16"],
    }
    jobs = []
    for name, argv in asked.items():
        for count in (1, 2):
            more = [f"{name}{count}.jsonl"] if name == "file" else []
            jobs.append([name, count, free_port(), "stdin.txt", ["--model", "model", *argv, *more]])
    jobs.append(["heads", 2, free_port(), os.devnull, ["--model", "single", "--prompt", "x"]])
    jobs.append(["bytes", 2, free_port(), "latin.txt", ["--model", "model", "--prompt", "-"]])
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER],
        cwd=folder,
        env={**surroundings(), "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr

    def said(name: str) -> bytes:
        return (folder / name).read_bytes()

    for name in asked:
        assert f"{name} 1 0\n" in done.stdout and f"{name} 2 0 0\n" in done.stdout, done.stdout
        assert said(f"{name}.2.1.out") == said(f"{name}.2.0.err") == said(f"{name}.2.1.err") == b""
        if name != "unseeded":
            assert said(f"{name}.2.0.out") != b""
            assert alike(said(f"{name}.1.0.out").replace(b"file1", b"file2"), said(f"{name}.2.0.out"))
    assert said("stdin.2.0.out").startswith("Größe of dragons".encode())
    assert alike(said("file1.jsonl"), said("file2.jsonl")) and said("file1.jsonl").count(b"\n") == len(PROMPTS)
    assert len(said("unseeded.2.0.out")) > 40
    for name, words in {
        "heads": "2 processes are to share the 1 heads of the model (model.n_head); their number, in training "
        "distributed.tensor_parallel, must divide that of the heads",
        "bytes": "the prompt on stdin is not UTF-8 text: byte 3",
    }.items():
        assert f"{name} 2 2 " in done.stdout and f"{name} 2 2 0" not in done.stdout
        assert said(f"{name}.2.0.err").decode() == f"bdh generate: error: {words}\n"
        assert said(f"{name}.2.0.out") == said(f"{name}.2.1.out") == said(f"{name}.2.1.err") == b""


@pytest.mark.slow
def test_ctrl_c_ends_both_and_says_so_once(folder: Path) -> None:
    (folder / "many.txt").write_text("".join(f"The {n} small\n" for n in range(99)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    argv = ["--model", "model", "--prompts", "many.txt", "--max_new_tokens", "100", "--output", "many.jsonl"]
    process = subprocess.Popen(
        [*launcher, "-m", "bdh", "generate", *argv],
        cwd=folder,
        env=surroundings(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a suite run with & ignores it
    )
    output, until = folder / "many.jsonl", time.monotonic() + 90
    while not output.exists() or output.read_bytes().count(b"\n") < 2:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - began < 20
    done = output.read_bytes().count(b"\n")
    said = [line for line in err.splitlines() if "interrupted" in line or line.startswith("bdh generate")]
    assert said == [f"interrupted: many.jsonl has {done} of 99 answers; the same command goes on from there"]
    assert "[rank" not in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--quantization", "int8"], "quantization int8 is for a model in one process; leave it out where several"),
        (["--device", "mps"], "the device is to be mps, on which heads are not shared; choose cpu"),
    ],
)
def test_settings_that_shared_heads_lack_are_refused(
    flags: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from bdh.cli.main import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["generate", "--model", "model", "--prompt", "x", *flags]) == 2
    assert words in capfd.readouterr().err
