"""Training speed of models with decay and with the delta rule, relative to the published one, in one process.

    python -m benchmarks.train_variants --device cuda
    python -m benchmarks.train_variants --device cpu --turns 9

The variants of a case are measured in turns of a few steps, so that other load on the machine affects all of them; a
ratio is the median over turns of the time of `none` divided by that of the variant. A step includes forward, backward,
clipping and AdamW. On a CPU the model is the quickstart's; on a GPU the default one.

Writes results/train_variants_DEVICE.json after each case.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from bdh.kernels.dispatch import use_kernels
from bdh.model import BDHConfig, BDHForCausalLM
from bdh.training.config import TrainingConfig
from bdh.training.optimizer import adamw
from benchmarks.record import save
from benchmarks.train_speed import QUICKSTART

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "fixed": {"decay": "fixed"},
    "gated": {"decay": "gated"},
    "gated-delta": {"decay": "gated", "write": "delta"},
}
CASES = {"cpu": ["8x128"], "cuda": ["32x512", "2x8192"]}
SIZES: dict[str, dict[str, Any]] = {"cpu": QUICKSTART, "cuda": {}}
STEPS = {"cpu": 2, "cuda": 5}  # of a turn
WARM = 3  # steps before the first turn


def training_step(variant: str, device: torch.device, rows: int, length: int) -> Callable[[], None]:
    """Return a training step of a new model of a variant, on tokens made from a seed."""
    torch.manual_seed(0)
    model = BDHForCausalLM(BDHConfig(**SIZES[device.type], **VARIANTS[variant])).to(device).train()
    use_kernels(model.model.layer, "auto", device)
    optimizer = adamw(model.named_parameters(), TrainingConfig())
    tokens = torch.randint(0, 256, (rows, length + 1), device=device)  # (B, T + 1)
    precision: Any = torch.autocast(device.type, torch.bfloat16) if bfloat16(device) else nullcontext()

    def step() -> None:
        with precision:
            logits = model(tokens[:, :-1], use_cache=False).logits  # (B, T, V)
            loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def bfloat16(device: torch.device) -> bool:
    return device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def seconds(device: torch.device, work: Callable[[], object], times: int) -> float:
    """Return the wall time of some calls, including the work on the device."""
    wait(device)
    started = time.perf_counter()
    for _ in range(times):
        work()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def compare(case: str, device: torch.device, turns: int) -> dict[str, Any]:
    """Measure a case, by variant."""
    rows, length = map(int, case.split("x"))
    steps = {name: training_step(name, device, rows, length) for name in VARIANTS}
    memory = {}
    for name, step in steps.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds(device, step, WARM)
        memory[name] = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    took: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(turns):
        for name in order:
            took[name].append(seconds(device, steps[name], STEPS[device.type]) / STEPS[device.type])
        order = [*order[1:], order[0]]
    return {
        name: {
            "tokens_per_second": rows * length / statistics.median(took[name]),
            "speed_over_none": statistics.median(a / b for a, b in zip(took["none"], took[name], strict=True)),
            "peak_bytes_with_other_variants_loaded": memory[name],
            "step_ms": [round(1e3 * each, 2) for each in took[name]],
        }
        for name in steps
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", nargs="+", metavar="ROWSxLENGTH")
    parser.add_argument("--turns", type=int, default=9)
    args = parser.parse_args()
    figures: dict[str, Any] = {"turns": args.turns, "steps_of_a_turn": STEPS[args.device]}
    for case in args.cases or CASES[args.device]:
        figures[case] = compare(case, torch.device(args.device), args.turns)
        for name, values in figures[case].items():
            print(case, name, f"{values['tokens_per_second']:,.0f} tokens/s, {values['speed_over_none']:.3f} of none")
        print(save(f"train_variants_{args.device}", figures), flush=True)


if __name__ == "__main__":
    main()
