"""Training speed and memory, by implementation of the layer and by length of the sequences.

    python -m benchmarks.train_speed --device cpu
    python -m benchmarks.train_speed --device cuda --gpus 2

Forms: `published`, the equations written in PyTorch for all heads and all pairs of tokens, with one tensor for each
weight; and the values of `model.kernels`: `reference`, `torch`, `triton`. Each measurement is a separate process, which
trains on tokens made from a seed; forms are measured in turn, several times, so that other load on the machine affects
all of them. A form that runs out of memory is reported as such. After a form's name, `+compile` compiles the model with
torch.compile, `+layer` its layer alone, and `+graph` records the whole step as a CUDA graph.

Writes results/train_speed_DEVICE.json after each case, and in the end a plot: tokens/s of the median step, and its
ratio to the first form, by turn; peak memory (on a CPU that of the process, less its memory before the model was
created); on a GPU the FLOP/s of the model's products, without recomputation, as a share of those of a large matrix
product.

A case is ROWSxLENGTH, or ROWSxLENGTH@WIDTH for another n_embd. On a CPU the model is the quickstart's; on a GPU it is
the default one. With several GPUs each takes another case, and all forms of a case go to the same.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from queue import SimpleQueue
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdh.kernels.dispatch import use_kernels
from bdh.model import BDHConfig, BDHForCausalLM
from bdh.training.config import TrainingConfig
from bdh.training.optimizer import adamw
from bdh.training.throughput import flops_per_token
from benchmarks.record import RESULTS, save, visible

QUICKSTART = {"n_layer": 3, "n_embd": 256, "n_head": 4, "mlp_internal_dim_multiplier": 16, "dropout": 0.0}
CASES = {
    "cpu": ["8x128"],
    "cuda": ["32x512", "2x8192", "16x512@512", "8x2048", "1x32768", "1x131072"],
}
FORMS = {"cpu": ["published", "reference", "torch"], "cuda": ["published+compile", "triton"]}
SIZES: dict[str, dict[str, Any]] = {"cpu": QUICKSTART, "cuda": {}}
LONGEST = {"published": 8192}  # tokens; the memory that it takes grows with the square of that


class Published(nn.Module):
    """The equations of the model in plain PyTorch; see the module's docstring."""

    def __init__(self, config: BDHConfig):
        super().__init__()
        D, h, N = config.n_embd, config.n_head, config.neurons_per_head
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, D)
        self.encoder = nn.Parameter(torch.empty(h, D, N))
        self.encoder_v = nn.Parameter(torch.empty(h, D, N))
        self.decoder = nn.Parameter(torch.empty(h * N, D))
        self.lm_head = nn.Parameter(torch.empty(D, config.vocab_size))
        for weight in self.parameters():
            nn.init.normal_(weight, std=config.initializer_range)
        pair = torch.arange(N) // 2 * 2  # (N)
        self.frequencies: Tensor
        self.register_buffer("frequencies", config.rope_theta ** (-pair / N) / (2 * torch.pi))  # (N), turns a token

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> logits (B, T, V)."""
        T, D = tokens.shape[1], self.config.n_embd
        x = F.layer_norm(self.embed(tokens), (D,))[:, None]  # (B, 1, T, D)
        for _ in range(self.config.n_layer):
            X = F.relu(x @ self.encoder)  # (B, h, T, N)
            R = self.rotated(X)  # (B, h, T, N)
            A = F.layer_norm((R @ R.mT).tril(-1) @ x, (D,))  # (B, h, T, D)
            Z = F.dropout(X * F.relu(A @ self.encoder_v), self.config.dropout, self.training)  # (B, h, T, N)
            y = Z.transpose(1, 2).reshape(-1, 1, T, self.config.n_neurons) @ self.decoder  # (B, 1, T, D)
            x = F.layer_norm(x + F.layer_norm(y, (D,)), (D,))  # (B, 1, T, D)
        return x[:, 0] @ self.lm_head

    def rotated(self, X: Tensor) -> Tensor:
        """(B, h, T, N) -> (B, h, T, N)."""
        turns = torch.arange(X.shape[2], device=X.device)[:, None] * self.frequencies % 1  # (T, N)
        angle = turns * (2 * torch.pi)  # (T, N)
        partner = torch.stack((-X[..., 1::2], X[..., ::2]), dim=-1).view(X.shape)  # (B, h, T, N)
        return (X * angle.cos() + partner * angle.sin()).to(X.dtype)


def worker(job: dict[str, Any]) -> None:
    """Run one measurement in this process and print its result."""
    device, (form, *options) = torch.device(job["device"]), job["form"].split("+")
    before = resident()
    torch.manual_seed(0)
    config = BDHConfig(**job["model"])
    model: nn.Module = Published(config) if form == "published" else BDHForCausalLM(config)
    model.to(device).train()
    if isinstance(model, BDHForCausalLM):
        use_kernels(model.model.layer, form, device)
        if "layer" in options:
            model.model.layer.compile()
    optimizer = adamw(model.named_parameters(), TrainingConfig())
    forward: Any = torch.compile(model) if "compile" in options else model
    precision = torch.autocast(device.type, torch.bfloat16) if job["precision"] == "bfloat16" else nullcontext()
    B, T = job["rows"], job["length"]

    def train_step(tokens: Tensor) -> Tensor:
        with precision:
            logits = forward(tokens[:, :-1]) if form == "published" else forward(tokens[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    seconds, losses = [], []
    step_of: Callable[[Tensor], Tensor] = train_step
    for step in range(job["warm"] + job["steps"]):
        if step == job["warm"] and "graph" in options:
            step_of = record_graph(train_step, optimizer, torch.zeros(B, T + 1, dtype=torch.int64, device=device))
        draw = torch.Generator().manual_seed(step)
        # Bytes that depend on the one before, so that there is something to learn.
        tokens = torch.randint(0, 16, (B, T + 1), generator=draw).cumsum(1).remainder(256).to(device)
        started = time.perf_counter()
        losses.append(step_of(tokens).item())  # waits for the device
        if step >= job["warm"]:
            seconds.append(time.perf_counter() - started)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident() - before
    speed = B * T / statistics.median(seconds)
    found = {"tokens_per_second": speed, "peak_memory_bytes": memory, "last_loss": losses[-1]}
    if device.type == "cuda":
        del model, optimizer, forward, train_step, step_of
        found["share_of_ceiling"] = speed * flops_per_token(config, T) / ceiling()
        found["gpu"] = torch.cuda.get_device_name()
    print("FOUND", json.dumps(found))


def record_graph(
    train_step: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, tokens: Tensor
) -> Callable[[Tensor], Tensor]:
    """Record a whole step as one CUDA graph. Its dropout never changes, so it is for measurements of speed only."""
    for group in optimizer.param_groups:
        group["capturable"] = True
    for state in optimizer.state.values():
        state["step"] = state["step"].to(tokens.device)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        loss = train_step(tokens)

    def replay(job: Tensor) -> Tensor:
        tokens.copy_(job)
        graph.replay()
        return loss

    return replay


def ceiling() -> float:
    """Return this GPU's FLOP/s in products of two bfloat16 matrices, 8192 x 8192, measured for a second."""
    torch.cuda.empty_cache()
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    times = []
    until = time.perf_counter() + 1
    while time.perf_counter() < until:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            a @ b
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e4)  # seconds of one
    return 2 * 8192**3 / statistics.median(times)


def resident() -> int:
    """Return the peak memory of this process in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(job: dict[str, Any], gpu: int | None) -> dict[str, Any] | None:
    """Run a measurement in a new process; return None if it runs out of memory."""
    command = [sys.executable, "-m", "benchmarks.train_speed", "--worker", json.dumps(job)]
    env = os.environ if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": visible(gpu)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    found: dict[str, Any] | None = json.loads(lines[0].removeprefix("FOUND ")) if lines else None
    if found is None and "OutOfMemoryError" not in done.stderr and done.returncode != -9:
        raise SystemExit(f"{job}: {done.stderr[-4000:]}")
    print(job["form"], job["rows"], job["length"], job["model"], found or "out of memory", flush=True)
    return found


def measure_case(case: str, forms: list[str], job: dict[str, Any], turns: int, gpu: int | None) -> dict[str, Any]:
    """Measure all forms of a case, in turn."""
    shape, _, width = case.partition("@")
    rows, length = (int(size) for size in shape.split("x"))
    sizes = {**job["model"], **({"n_embd": int(width)} if width else {})}
    allowed = [form for form in forms if length <= LONGEST.get(form.split("+")[0], length)]
    job = {**job, "rows": rows, "length": length, "model": sizes}
    found = [{form: measure({**job, "form": form}, gpu) for form in allowed} for _ in range(turns)]
    return {"rows": rows, "length": length, **summary(allowed, found, forms[0])}


def summary(forms: list[str], turns: list[dict[str, dict[str, Any] | None]], first: str) -> dict[str, Any]:
    """Summarize the turns by form, with ratios to the first form."""
    result: dict[str, Any] = {}
    for form in forms:
        found = [(turn[form], turn.get(first)) for turn in turns]
        results = [one for one, _ in found if one is not None]
        if not results:
            result[form] = "out of memory"
            continue
        ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in found if a is not None and b is not None]
        result[form] = {
            "tokens_per_second": round(statistics.median(one["tokens_per_second"] for one in results), 1),
            "peak_memory_bytes": max(one["peak_memory_bytes"] for one in results),
            "last_loss": results[-1]["last_loss"],
        }
        if ratios:
            result[form][f"times_{first}"] = [round(ratio, 3) for ratio in ratios]
        if "gpu" in results[0]:
            result[form]["share_of_ceiling"] = round(statistics.median(one["share_of_ceiling"] for one in results), 3)
            result[form]["gpu"] = results[0]["gpu"]
    return result


def draw(cases: dict[str, dict[str, Any]], name: str) -> None:
    """Plot time and memory of a token against the length of a sequence, by form, for the default width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    cost, memory = figure.subplots(1, 2)
    default_width = sorted((one for case, one in cases.items() if "@" not in case), key=lambda one: one["length"])
    for form in dict.fromkeys(form for one in default_width for form in one if isinstance(one[form], dict)):
        measured = [one for one in default_width if isinstance(one.get(form), dict)]
        lengths = [one["length"] for one in measured]
        cost.plot(lengths, [1e6 / one[form]["tokens_per_second"] for one in measured], "o-", label=form)
        each = [one[form]["peak_memory_bytes"] / (one["rows"] * one["length"]) / 2**20 for one in measured]
        memory.plot(lengths, each, "o-", label=form)
    for axes, label in ((cost, "microseconds a token"), (memory, "peak memory a token of a step, MiB")):
        axes.set(ylim=(0, None), xlabel="tokens of a sequence", ylabel=label)
        axes.set_xscale("log", base=2)
        axes.legend()
    figure.savefig(RESULTS / f"{name}.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gpus", type=int, default=1, help="how many cases there may be at a time")
    parser.add_argument("--forms", nargs="+", help="the first is what the others are compared with")
    parser.add_argument("--cases", nargs="+", metavar="ROWSxLENGTH[@WIDTH]")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm", type=int, default=5, help="steps before those that count")
    parser.add_argument("--name", help="of the files written; train_speed_DEVICE if none is given")
    parser.add_argument("--worker", type=json.loads, help="for this script's own use")
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    forms = args.forms or FORMS[args.device]
    job = {name: getattr(args, name) for name in ("device", "precision", "steps", "warm")}
    job["model"] = SIZES[args.device]
    free_gpus: SimpleQueue[int | None] = SimpleQueue()
    for gpu in range(args.gpus) if args.device == "cuda" else [None]:
        free_gpus.put(gpu)

    names = args.cases or CASES[args.device]
    figures = {"device": args.device, "precision": args.precision, "model": job["model"], "steps": args.steps}
    name = args.name or f"train_speed_{args.device}"
    cases: dict[str, dict[str, Any]] = {}
    lock = Lock()

    def work(case: str) -> None:
        gpu = free_gpus.get()
        try:
            found = measure_case(case, forms, job, args.turns, gpu)
        finally:
            free_gpus.put(gpu)
        with lock:  # after each, so that what is cut short has lost nothing
            cases[case] = found
            measured = {case: cases[case] for case in names if case in cases}
            print(save(name, {"complete": len(cases) == len(names), **figures, "cases": measured}))

    with ThreadPoolExecutor(args.gpus) as pool:
        list(pool.map(work, names))
    print(json.dumps(cases, indent=1))
    draw(cases, name)


if __name__ == "__main__":
    main()
