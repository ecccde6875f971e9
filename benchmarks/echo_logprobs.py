"""The time of scoring prompts over HTTP: echo and log-probabilities, against the same prompts without.

    python -m benchmarks.echo_logprobs [--model DIR] [--tokens 1000] [--batch 8] [--rounds 7]

What evaluation harnesses ask: the log-probability of each token of a batch of prompts, and of one token after it. A
server of the model (`bdh serve`, on the CPU) answers both requests in turn, with new prompts in every round. It keeps
no beginnings of prompts. The ratio is that of wall times, by the median round, and of the processor times of the
server and its engine, which do not count what other work on the machine takes. Without --model: a model of the
quickstart's size with random weights.
Writes results/echo_logprobs.json.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from bdh import BDHConfig, BDHForCausalLM
from bdh.data.tokenizer import byte_tokenizer
from bdh.model.export import save_export
from benchmarks.record import save

SECONDS = 120.0  # for the server to be ready, and for an answer


@contextmanager
def serving(model: Path, folder: Path) -> Iterator[tuple[str, int]]:
    """A server of a model; its address and its process."""
    log = folder / "serve.log"
    command = [sys.executable, "-m", "bdh", "serve", "--model", f"scored={model}", "--port", "0", "--device", "cpu"]
    with log.open("wb") as file:
        process = subprocess.Popen([*command, "--serve.prefix_cache_bytes", "0"], stderr=file)
    try:
        deadline = time.monotonic() + SECONDS
        while not (found := re.search(r"serving .* at (http://[^\s\"]+)", log.read_text())) or not ready(found[1]):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server does not get ready: {log.read_text()}")
            time.sleep(0.1)
        yield found[1], process.pid
    finally:
        process.terminate()
        process.wait()


def ready(url: str) -> bool:
    return httpx.get(f"{url}/health/ready").status_code == 200


def small_export(folder: Path) -> Path:
    """A byte model of the quickstart's size with random weights."""
    torch.manual_seed(0)
    config = BDHConfig(vocab_size=256, n_layer=3, mlp_internal_dim_multiplier=16)
    save_export(BDHForCausalLM(config), byte_tokenizer(), folder / "model", "Random weights, for a benchmark.\n")
    return folder / "model"


def processor_seconds(pid: int) -> float:
    """What a process and its children have used of all cores."""
    pids = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    stats = [Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split() for one in pids]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / os.sysconf("SC_CLK_TCK")


def ask(client: httpx.Client, pid: int, prompts: list[list[int]], **more: Any) -> tuple[float, float]:
    """The wall seconds and the processor seconds that an answer took."""
    body = {"model": "scored", "prompt": prompts, "max_tokens": 1, "temperature": 0, **more}
    used, started = processor_seconds(pid), time.perf_counter()
    answer = client.post("/v1/completions", json=body)
    seconds = time.perf_counter() - started, processor_seconds(pid) - used
    answer.raise_for_status()
    choices = answer.json()["choices"]
    if more and not all(len(one["logprobs"]["tokens"]) >= len(prompts[0]) for one in choices):
        raise RuntimeError("there are tokens without a log-probability")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    draw = np.random.default_rng(0)
    plain: list[tuple[float, float]] = []
    echoed: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = args.model or small_export(folder)
        with serving(model, folder) as (url, pid), httpx.Client(base_url=url, timeout=SECONDS) as client:
            for number in range(-1, args.rounds):
                prompts = draw.integers(97, 123, (args.batch, args.tokens)).tolist()
                pair = ask(client, pid, prompts), ask(client, pid, prompts, echo=True, logprobs=1)
                if number >= 0:  # the first round warms up
                    plain.append(pair[0])
                    echoed.append(pair[1])
                    print(
                        f"without echo {pair[0][0]:.2f} s, with echo and log-probabilities {pair[1][0]:.2f} s",
                        flush=True,
                    )
    ratios = [two[0] / one[0] for one, two in zip(plain, echoed, strict=True)]
    figures = {
        "model": "given" if args.model else "quickstart's size, random weights",
        "tokens": args.tokens,
        "batch": args.batch,
        "seconds_plain": statistics.median(seconds for seconds, _ in plain),
        "seconds_echo_logprobs": statistics.median(seconds for seconds, _ in echoed),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "ratio_processor_time": sum(used for _, used in echoed) / sum(used for _, used in plain),
    }
    print(f"{figures['ratio']:.2f} times the time without; {save('echo_logprobs', figures)}")


if __name__ == "__main__":
    main()
