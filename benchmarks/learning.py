"""What a form of the neurons' work, or an optimizer, does to what is learned: the shakespeare recipe, run by run.

    python -m benchmarks.learning [--runs NAME …] [--steps 500] [--gpus 2]

The default model in bfloat16 on the bytes of tinyshakespeare, 32 x 512 tokens a step, dropout 0.1, constant learning
rate, no warm-up, as in the configuration of that name; the last tenth of the text is validated on, in windows of 512.
All runs begin with the same weights and see the same rows; `again` is the reference with other neurons dropped, which
says how much of a difference is chance. Runs are processes of their own, one at a time on each GPU. Writes, anew after
each, results/learning.json: validation losses by step, and tokens and seconds to each of some losses (seconds of
training; what compiling takes and validation not counted). After the run `triton`: how many neurons are silent, and how
many tiles of tokens x neurons are so as a whole, which is what a kernel could skip.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bdh.data.corpora import load_corpus
from bdh.kernels.dispatch import use_kernels
from bdh.model import BDHConfig, BDHForCausalLM
from bdh.training.config import TrainingConfig
from bdh.training.optimizer import build_optimizer
from benchmarks.record import save, visible

RUNS: dict[str, dict[str, Any]] = {
    "reference": {"kernels": "reference"},
    "again": {"kernels": "reference", "dropping": 1},
    "triton": {"kernels": "triton"},
    "adamw 0.002": {"kernels": "triton", "training": {"learning_rate": 0.002}},
    "adamw 0.004": {"kernels": "triton", "training": {"learning_rate": 0.004}},
    "muon 0.001": {"kernels": "triton", "training": {"optimizer": "muon", "learning_rate": 0.001}},
    "muon 0.002": {"kernels": "triton", "training": {"optimizer": "muon", "learning_rate": 0.002}},
    "muon 0.004": {"kernels": "triton", "training": {"optimizer": "muon", "learning_rate": 0.004}},
}
T, ROWS, EVERY = 512, 32, 50
TARGETS = (2.0, 1.8, 1.7, 1.6, 1.55)
TILES = ((1, 64), (16, 16), (16, 64), (64, 64), (128, 128))


def worker(given: dict[str, Any]) -> None:
    """One run, in this process; prints what was found."""
    device = torch.device("cuda")
    text = torch.tensor(list("".join(load_corpus("shakespeare")).encode()), device=device)  # (bytes)
    held_out = len(text) // 10
    train, validation = text[:-held_out], text[-held_out:]
    torch.manual_seed(0)
    model = BDHForCausalLM(BDHConfig()).to(device).train()
    use_kernels(model.model.layer, given["kernels"], device)
    optimizer = build_optimizer(model, TrainingConfig(**given.get("training", {})))
    forward: Any = torch.compile(model) if given["kernels"] == "reference" else model
    draw = torch.Generator().manual_seed(1)
    losses: dict[int, float] = {}
    spent: list[float] = []
    torch.manual_seed(given.get("dropping", 0))
    for step in range(given["steps"]):
        began = time.perf_counter()
        starts = torch.randint(len(train) - T, (ROWS,), generator=draw).to(device)
        rows = train[starts[:, None] + torch.arange(T + 1, device=device)]  # (ROWS, T + 1)
        loss_of(forward, rows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        spent.append(time.perf_counter() - began)
        if step + 1 == 2:  # what came before was compiled for
            spent = [min(spent)] * 2
        if (step + 1) % EVERY == 0:
            losses[step + 1] = validated(model, validation)
            print(step + 1, round(sum(spent), 2), losses[step + 1], file=sys.stderr, flush=True)
    seconds = sum(spent)
    found: dict[str, Any] = {"validation_loss": losses, "training_seconds": round(seconds, 2)}
    found["tokens_per_second"] = round(given["steps"] * ROWS * T / seconds)
    if given.get("silent"):
        found["silent"] = silent(model, validation)
    print("FOUND", json.dumps(found))


def loss_of(forward: Any, rows: Tensor) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        logits = forward(rows[:, :-1], use_cache=False).logits  # (B, T, V)
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def validated(model: BDHForCausalLM, tokens: Tensor) -> float:
    """The loss over all windows of T."""
    model.eval()
    windows = tokens[: (len(tokens) - 1) // T * T + 1]
    rows = torch.stack([windows[start : start + T + 1] for start in range(0, len(windows) - 1, T)])  # (windows, T + 1)
    with torch.no_grad():
        total = sum(loss_of(model, some).item() * len(some) for some in rows.split(ROWS))
    model.train()
    return round(total / len(rows), 4)


def silent(model: BDHForCausalLM, tokens: Tensor) -> list[dict[str, Any]]:
    """By layer, of X and of Z: the share of numbers that are 0, and of tiles that are 0 as a whole."""
    model.eval()
    layer = model.model.layer
    use_kernels(layer, "reference", torch.device("cuda"))
    found: list[dict[str, Any]] = []

    def shares(values: Tensor) -> dict[str, float]:  # (B, T, n)
        off = (values <= 0).flatten(0, 1).float()  # (M, n)
        tiles = {f"{r} x {c}": off.unfold(0, r, r).unfold(1, c, c).amin((-1, -2)).mean().item() for r, c in TILES}
        return {name: round(share, 4) for name, share in {"1 x 1": off.mean().item(), **tiles}.items()}

    hooks = [
        layer.encoder.register_forward_hook(lambda module, given, out: found.append({"X": shares(out)})),
        layer.decoder.register_forward_pre_hook(lambda module, given: found[-1].update(Z=shares(given[0]))),
    ]
    with torch.no_grad():
        loss_of(model, tokens[: 4 * (T + 1)].view(4, T + 1))
    for hook in hooks:
        hook.remove()
    return found


def measure(name: str, steps: int, gpu: int) -> dict[str, Any]:
    """A run in a process of its own, on one GPU."""
    given = {**RUNS[name], "steps": steps, "silent": name == "triton"}
    command = [sys.executable, "-m", "benchmarks.learning", "--worker", json.dumps(given)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": visible(gpu)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if not lines:
        raise SystemExit(f"{name}: {done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(lines[0].removeprefix("FOUND "))
    each = found["training_seconds"] / steps
    for target in TARGETS:
        step = next((int(step) for step, loss in found["validation_loss"].items() if loss <= target), None)
        reached = None if step is None else {"tokens": step * ROWS * T, "seconds": round(step * each, 1)}
        found.setdefault("to_reach", {})[target] = reached
    print(name, found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--gpus", type=int, default=1, help="how many runs there may be at a time")
    parser.add_argument("--name", default="learning", help="of the file written")
    parser.add_argument("--worker", type=json.loads, help="for this script's own use")
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    free: SimpleQueue[int] = SimpleQueue()
    for gpu in range(args.gpus):
        free.put(gpu)

    results: dict[str, dict[str, Any]] = {}
    writing = Lock()

    def run(name: str) -> None:
        gpu = free.get()
        try:
            found = measure(name, args.steps, gpu)
        finally:
            free.put(gpu)
        with writing:  # after each, so that what is cut short has lost nothing
            results[name] = found
            runs = {name: results[name] for name in args.runs if name in results}
            whole = len(results) == len(args.runs)
            print(save(args.name, {"complete": whole, "steps": args.steps, "tokens_a_step": ROWS * T, "runs": runs}))

    with ThreadPoolExecutor(args.gpus) as pool:
        list(pool.map(run, args.runs))


if __name__ == "__main__":
    main()
