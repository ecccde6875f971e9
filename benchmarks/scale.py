"""One GPU against several of one machine: speed of copies, memory of shards, heads that give the same losses.

    python -m benchmarks.scale --gpus 2

Starts torchrun with one process and with several, in turn, each measurement in processes of their own, on tokens made
from a seed. Writes benchmarks/results/scale_copies.json, scale_shards.json, scale_heads.json and scale_warmup.json:

* copies (DDP), default model, compiled, 32 x 512 tokens a GPU: tokens/s;
* shards (FSDP2), a model of 1 B parameters, layers recomputed, 1 x 512 tokens a GPU: peak memory a GPU, and tokens/s;
* heads (tensor parallel), the same model, 2 x 512 tokens, dropout off: losses of 20 steps in bfloat16, float32 and
  float64, with the usual warm-up: their differences by step, and tokens/s; beside them, in float32, one GPU whose heads
  lie in another order, which is the same function summed otherwise: what rounding alone does;
* warmup: the same in float32 at rates as large models are begun with, a peak of 3e-4 after 2000 steps of warm-up;
* checkpoints of the default model: how long the training waits, and how long the writing takes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.record import save

DEFAULT: dict[str, Any] = {}
LARGE = {"n_embd": 1664, "n_head": 8, "mlp_internal_dim_multiplier": 128}  # 1.06 B parameters: wider, as usual else
SMALL = {
    "n_embd": 64,
    "n_head": 4,
    "mlp_internal_dim_multiplier": 16,
    "n_layer": 2,
}  # to try this where there is no GPU


def worker(args: argparse.Namespace) -> None:
    """One process of a measurement; the first one prints what it found."""
    import torch
    import torch.nn.functional as F

    from bdh.distributed.config import DistributedConfig
    from bdh.distributed.parallel import ParallelModel
    from bdh.distributed.processes import Processes
    from bdh.model import BDHConfig, BDHForCausalLM
    from bdh.training.config import TrainingConfig
    from bdh.training.device_setup import recompute_layers
    from bdh.training.optimizer import build_optimizer, learning_rate_at

    given = json.loads(args.worker)
    distributed = DistributedConfig(**given["distributed"])
    with Processes.open(distributed, given["device"]) as processes:
        on_gpu = processes.device.type == "cuda"
        torch.manual_seed(0)
        model = BDHForCausalLM(BDHConfig(**given["model"]))
        if given["reverse_heads"]:
            reverse_heads(model)
        if given["precision"] == "float64":
            model.double()
        in_bfloat16 = given["precision"] == "bfloat16"
        compiled = torch.compile if given["compile"] else None
        parallel_model = ParallelModel(model, processes, in_bfloat16, compiled)
        del model
        if given["recompute"]:
            recompute_layers(parallel_model.model)
        settings = TrainingConfig(**given["training"])
        optimizer = build_optimizer(parallel_model.model, settings)
        parallel_model.model.train()
        autocast = torch.autocast(processes.device.type, torch.bfloat16) if in_bfloat16 else nullcontext()
        B, T = given["rows"], given["length"]
        losses, began, first = [], 0.0, given["warm"]
        for step in range(first + given["steps"]):
            if step == first:
                if on_gpu:
                    torch.cuda.synchronize()
                began = time.perf_counter()
            draw = torch.Generator().manual_seed(1000 * step + processes.share.rank)
            # Bytes that depend on the one before, so that there is something to learn.
            tokens = torch.randint(0, 16, (B, T + 1), generator=draw).cumsum(1).remainder(256).to(processes.device)
            with parallel_model.sync_gradients(is_last=True):
                with autocast:
                    logits = parallel_model.forward(tokens[:, :-1], use_cache=False).logits  # (B, T, V)
                    logits = logits if logits.dtype == torch.float64 else logits.float()
                    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
                loss.backward()
            parallel_model.clip(1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, settings)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        found: dict[str, Any] = {
            "tokens_per_second": round(B * T * processes.share.world * given["steps"] / seconds, 1),
            "losses": [loss.item() for loss in losses],
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
            "parameters": sum(p.numel() for p in parallel_model.model.parameters()),
            "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        }
        if given.get("checkpoints"):
            found["checkpoints"] = checkpoints(parallel_model, optimizer, processes)
        if processes.is_main:
            print("FOUND", json.dumps(found))


def reverse_heads(model: Any) -> None:
    """Puts the last head first, and so on: the same function."""
    import torch

    layer, h = model.model.layer, model.config.n_head
    with torch.no_grad():
        layer.encoder.weight.copy_(layer.encoder.weight.unflatten(0, (h, -1)).flip(0).flatten(0, 1))
        layer.decoder.weight.copy_(layer.decoder.weight.unflatten(1, (h, -1)).flip(1).flatten(1, 2))
    layer.encoder_v = torch.nn.ModuleList(reversed(layer.encoder_v))


def checkpoints(parallel_model: Any, optimizer: Any, processes: Any) -> list[dict[str, float]]:
    """How long some checkpoints hold up the training, and how long they take."""
    from bdh.data.tokenizer import byte_tokenizer
    from bdh.training.background_saver import Saver
    from bdh.training.checkpoint import CheckpointStore, collect

    def failed(error: OSError) -> None:
        raise error

    found = []
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(CheckpointStore(Path(folder), keep=1), byte_tokenizer(), processes)
        for step in range(1, 5):
            saver.save(
                step, collect(parallel_model.model, optimizer, None, parallel_model.names), {"random": {}}, failed
            )
            saver.wait()
            found.append({"pause_seconds": saver.pause_seconds, "write_seconds": saver.write_seconds})
        saver.close()
    return found[1:]  # the first makes the copies' room


def measure(processes: int, **given: Any) -> dict[str, Any]:
    """Runs a measurement in so many processes."""
    usual = {
        "model": DEFAULT,
        "distributed": {},
        "device": "auto",
        "compile": False,
        "recompute": False,
        "precision": "bfloat16",
        "reverse_heads": False,
        "training": {},
        "warm": 8,
        "steps": 40,
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, "-m", "benchmarks.scale", "--worker", json.dumps({**usual, **given})]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "8"})
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if not lines:
        raise SystemExit(f"{processes} processes, {given}: {done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    found: dict[str, Any] = json.loads(lines[0].removeprefix("FOUND "))
    print(processes, given, {**found, "losses": found["losses"][-1]}, flush=True)
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """Of the losses, by step."""
    return [float(f"{abs(a - b):.3g}") for a, b in zip(one["losses"], other["losses"], strict=True)]


def copies(gpus: int, sizes: dict[str, Any]) -> dict[str, Any]:
    given = {"rows": sizes["rows"], "length": sizes["length"], "model": sizes["usual"], "compile": sizes["compile"]}
    alone = measure(1, **given, checkpoints=True)
    together = measure(gpus, **given)
    again = measure(1, **given)
    speed = (alone["tokens_per_second"] + again["tokens_per_second"]) / 2
    pauses = [one["pause_seconds"] / one["write_seconds"] for one in alone["checkpoints"]]
    return {
        "device": alone["device"],
        "one_gpu_tokens_per_second": [alone["tokens_per_second"], again["tokens_per_second"]],
        "tokens_per_second": together["tokens_per_second"],
        "times_one_gpu": round(together["tokens_per_second"] / speed, 3),
        "checkpoints": alone["checkpoints"],
        "largest_pause_share_of_writing": round(max(pauses), 4),
    }


def shards(gpus: int, sizes: dict[str, Any]) -> dict[str, Any]:
    given = {"rows": 1, "length": sizes["length"], "model": sizes["large"], "recompute": True, "steps": 10}
    alone = measure(1, **given)
    together = measure(gpus, **given, distributed={"strategy": "fsdp"})
    memory = [alone["peak_memory_bytes"] or 1, together["peak_memory_bytes"] or 1]
    return {
        "parameters": alone["parameters"],
        "one_gpu_peak_bytes": memory[0],
        "peak_bytes_a_gpu": memory[1],
        "share_of_one_gpu": round(memory[1] / memory[0], 3),
        "one_gpu_tokens_per_second": alone["tokens_per_second"],
        "tokens_per_second": together["tokens_per_second"],
    }


def heads(gpus: int, sizes: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for precision in ("bfloat16", "float32", "float64"):
        model = {**sizes["large"], "dropout": 0.0}
        given = {"rows": 2, "length": sizes["length"], "model": model, "recompute": True, "precision": precision}
        given |= {"warm": 3, "steps": 17}
        alone = measure(1, **given)
        together = measure(gpus, **given, distributed={"tensor_parallel": gpus})
        found[precision] = {
            "largest_difference_of_losses": max(differences(alone, together)),
            "differences_by_step": differences(alone, together),
            "losses_of_one_gpu": alone["losses"],
            "one_gpu_tokens_per_second": alone["tokens_per_second"],
            "tokens_per_second": together["tokens_per_second"],
            "one_gpu_peak_bytes": alone["peak_memory_bytes"],
            "peak_bytes_a_gpu": together["peak_memory_bytes"],
        }
        if precision == "float32":
            itself = measure(1, **given, reverse_heads=True)
            found[precision]["one_gpu_with_heads_reversed_differs_by_step"] = differences(alone, itself)
    return found


def warmup(gpus: int, sizes: dict[str, Any]) -> dict[str, Any]:
    given = {"rows": 2, "length": sizes["length"], "model": {**sizes["large"], "dropout": 0.0}, "recompute": True}
    given |= {"precision": "float32", "warm": 3, "steps": 17}
    given |= {"training": {"learning_rate": 3e-4, "warmup_steps": 2000}}
    alone = measure(1, **given)
    together = measure(gpus, **given, distributed={"tensor_parallel": gpus})
    return {
        "largest_difference_of_losses": max(differences(alone, together)),
        "differences_by_step": differences(alone, together),
        "losses_of_one_gpu": alone["losses"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--only", choices=["copies", "shards", "heads", "warmup"], help="one of the measurements")
    parser.add_argument(
        "--small", action="store_true", help="tiny models, to try it where there is no GPU; saves nothing"
    )
    parser.add_argument("--worker", help="for this script's own use")
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    sizes: dict[str, Any] = {"usual": DEFAULT, "large": LARGE, "rows": 32, "length": 512, "compile": True}
    if args.small:
        sizes = {"usual": SMALL, "large": SMALL, "rows": 2, "length": 32, "compile": False}
    parts = {"copies": copies, "shards": shards, "heads": heads, "warmup": warmup}
    for name in [args.only] if args.only else list(parts):
        result = {"gpus": args.gpus, **parts[name](args.gpus, sizes)}
        print(json.dumps(result, indent=1), flush=True)
        if not args.small:
            print(save(f"scale_{name}", result), flush=True)


if __name__ == "__main__":
    main()
