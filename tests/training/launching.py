"""`bdh train` in several processes, and what came of it."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bdh.training.run_log import read_metrics
from tests.conftest import environment

SMALL = [
    *("--model.n_layer", "2", "--model.n_embd", "16", "--model.n_head", "4", "--model.dropout", "0"),
    *("--model.mlp_internal_dim_multiplier", "8", "--data.block_size", "16", "--training.precision", "float32"),
    *("--training.batch_size", "8", "--training.warmup_steps", "5", "--training.max_steps", "50"),
    *("--training.eval_interval", "20", "--training.eval_windows", "9", "--checkpoint.interval", "20"),
    *("--checkpoint.keep", "5", "--logging.interval", "1", "--logging.sample_interval", "25"),
    *("--logging.sample_tokens", "8", "--training.learning_rate", "3e-3", "--training.seed", "1"),
]

# Forks the processes of one run after another, so that libraries are loaded once and not by each of them.
LAUNCHER = """
import json, os, sys
import bdh.training.loop
from bdh.cli.main import main

for processes, port, argv in json.load(sys.stdin):
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            if processes > 1:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                )
            code = main(["train", *argv])
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print("ended", codes, flush=True)
    if any(codes):
        sys.exit(1)
"""


def train_all(jobs: Sequence[tuple[int, Sequence[object]]], cwd: Path, before: str = "") -> str:
    """Runs `bdh train ARGV…` in so many processes each, one run after the other; what they said.

    Args:
        jobs: How many processes, and ARGV.
        cwd: Where they work.
        before: Python that is run first.
    """
    told = json.dumps([[processes, free_port(), [*map(str, argv)]] for processes, argv in jobs])
    done = subprocess.run(
        [sys.executable, "-c", before + LAUNCHER],
        cwd=cwd,
        env=surroundings(),
        input=told,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def torchrun(processes: int, *argv: object, options: Sequence[str] = ()) -> list[str]:
    """The command of `bdh train ARGV…` under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *launcher, *options, "-m", "bdh", "train", *map(str, argv)]


def surroundings() -> dict[str, str]:
    return environment(PYTHONPATH=os.pathsep.join(filter(None, sys.path)), OMP_NUM_THREADS="1")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def figures(run: Path) -> dict[int, tuple[float, float]]:
    """The loss and the gradient's norm of each step."""
    records: list[dict[str, Any]] = read_metrics(run / "metrics.jsonl")
    return {one["step"]: (one["loss"], one["gradient_norm"]) for one in records if "loss" in one}


def validations(run: Path) -> dict[int, float]:
    records = read_metrics(run / "metrics.jsonl")
    return {one["step"]: one["validation_loss"] for one in records if "validation_loss" in one}
