"""How models with and without decay and the delta rule use a long past: loss by position, and recall by distance.

    python -m benchmarks.long_context --device cuda --size default --measure loss --variants none gated-delta
    python -m benchmarks.long_context --device cuda --measure recall
    python -m benchmarks.long_context --device cpu

`loss` trains a model of each variant (see variants.py) on the same bytes of the standard library's source in the same
order, with the same seed: warm-up, learning rate 1e-3 on a cosine to 1e-4, dropout 0.1. Then, on bytes held out: loss
by position with carried state, and the loss of the last tokens of windows with a past of 512 tokens, of 4096, and with
all of the window. `recall` trains a smaller model of each variant on the tasks of recall_tasks.py, all at once, and
measures the share of bytes that it recalls at each distance, inside the training block and beyond.

Writes results/long_context_DEVICE_SIZE.json and results/recall_DEVICE.json, anew after each variant, and a picture
beside each. Variants that the file has already, of the same settings and hardware, are kept unless they are measured
again, so that several commands may share the work.
"""

import argparse
import datetime
import json
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import recall, text_loss
from benchmarks.record import RESULTS, processor, save
from benchmarks.variants import VARIANTS, OutOfTimeError, TimeLimit

SIZES: dict[tuple[str, str], dict[str, Any]] = {
    ("cuda", "default"): {},
    ("cuda", "small"): {"mlp_internal_dim_multiplier": 64},
    ("cpu", "default"): {},
    ("cpu", "small"): {"n_layer": 3, "mlp_internal_dim_multiplier": 16},  # the quickstart's
}
LOSS: dict[str, dict[str, Any]] = {
    "cuda": {"rows": 32, "block": 512, "longest": 131072, "evaluation_rows": 64, "past_windows": 8},
    "cpu": {"rows": 8, "block": 128, "longest": 16384, "evaluation_rows": 8, "past_windows": 2},
}
TOKENS = {"cuda": 25_000_000, "cpu": 600_000}
HELD_OUT_WINDOWS = 8
RECALL_SIZES: dict[str, dict[str, Any]] = {
    "cuda": {"n_layer": 4, "mlp_internal_dim_multiplier": 32, "dropout": 0.0},
    "cpu": {"n_layer": 2, "n_embd": 64, "n_head": 2, "mlp_internal_dim_multiplier": 8, "dropout": 0.0},
}
RECALL: dict[str, dict[str, Any]] = {
    "cuda": {"steps": 3000, "rows": 16, "block": 512, "longest": 32768, "evaluation_rows": 16, "piece": 65536},
    "cpu": {"steps": 3000, "rows": 8, "block": 128, "longest": 1024, "evaluation_rows": 8, "piece": 4096},
}
RECALL_VARIANTS = ["none", "gated-delta", "fixed", "gated"]

Measure = Callable[[str, TimeLimit], dict[str, Any]]


def measure_variants(
    name: str, settings: dict[str, Any], variants: list[str], measure: Measure, limit: TimeLimit, folder: Path
) -> dict[str, Any]:
    """Measures one variant after the other, and writes the result file after each.

    Args:
        name: Of the result file.
        settings: All that two variants have to share to be compared.
        variants: Names of variants, in order.
        measure: Measures one.
        limit: Wall time; what does not fit into it is left out.
        folder: Where the result file is.

    Returns:
        The results by variant, with those that the file had already; of those that failed, none.
    """
    gpu = torch.cuda.get_device_name() if settings["device"] == "cuda" else None
    shared = {"hardware": gpu or processor(), "settings": settings}
    results = earlier_results(folder / f"{name}.json", shared)
    longest = 0.0
    for variant in variants:
        print(f"--- {name}: {variant}", flush=True)
        began = time.perf_counter()
        try:
            limit.require(longest)
            found = measure(variant, limit)
        except OutOfTimeError as error:
            print(f"{variant} left out: {error}", flush=True)
            continue
        except Exception:  # one variant that fails leaves the others to be measured
            traceback.print_exc()
            continue
        finally:
            if settings["device"] == "cuda":
                torch.cuda.empty_cache()
        seconds = time.perf_counter() - began
        longest = max(longest, seconds)
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        results[variant] = {"date": date, "seconds": round(seconds, 1), **found}
        ordered = {key: results[key] for key in VARIANTS if key in results}
        complete = all(key in results for key in variants)
        print(save(name, {"complete": complete, **shared, "variants": ordered}, folder), flush=True)
        print(json.dumps(results[variant]), flush=True)
    return {key: results[key] for key in VARIANTS if key in results}


def earlier_results(path: Path, shared: Mapping[str, Any]) -> dict[str, Any]:
    """The variants of a result file that was measured alike; none if there is no such file."""
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text())
    alike = all(earlier.get(key) == json.loads(json.dumps(value)) for key, value in shared.items())
    return dict(earlier["variants"]) if alike else {}


def draw_loss(results: Mapping[str, Any], block: int, path: Path) -> None:
    """Bits per byte by position."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for variant, found in results.items():
        edges = [int(edge) for edge in found["by_position"]]
        axes.plot(edges, list(found["by_position"].values()), "o-", label=variant)
    axes.axvline(block, color="grey", linestyle=":", label="training block")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position up to, tokens", ylabel="bits per byte, held-out text")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def draw_recall(results: Mapping[str, Any], block: int, path: Path) -> None:
    """Accuracy by distance, one panel per task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    tasks = list(next(iter(results.values()))["accuracy"])
    for axes, task in zip(figure.subplots(2, 2).flat, tasks, strict=True):
        for variant, found in results.items():
            by_distance = found["accuracy"][task]
            axes.plot([int(distance) for distance in by_distance], list(by_distance.values()), "o-", label=variant)
        axes.axvline(block, color="grey", linestyle=":", label="training block")
        axes.set_xscale("log", base=2)
        axes.set(title=task, xlabel="distance up to, tokens", ylabel="share recalled", ylim=(-0.03, 1.03))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=["small", "default"], help="of the model of `loss`; default on a GPU")
    parser.add_argument("--measure", nargs="+", choices=["loss", "recall"], default=["loss", "recall"])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    parser.add_argument("--tokens", type=int, help="bytes of text that each variant is trained on")
    parser.add_argument("--recall_steps", type=int, help="steps that each variant is trained for recall")
    parser.add_argument("--longest", type=int, help="greatest position and distance")
    parser.add_argument("--minutes", type=float, help="wall time; variants that do not fit are left out")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result files")
    args = parser.parse_args()
    limit, device = TimeLimit(args.minutes), torch.device(args.device)
    size = args.size or ("default" if args.device == "cuda" else "small")
    longest = {} if args.longest is None else {"longest": args.longest}
    args.output.mkdir(parents=True, exist_ok=True)

    if "loss" in args.measure:
        sizes, settings = SIZES[args.device, size], {**LOSS[args.device], **longest}
        tokens = TOKENS[args.device] if args.tokens is None else args.tokens
        settings["steps"] = max(1, tokens // (settings["rows"] * settings["block"]))
        text = text_loss.standard_library(HELD_OUT_WINDOWS * settings["longest"] + 1)
        shared = {"device": args.device, "model": sizes, "training_bytes": len(text.train), **settings}

        def measure_loss(variant: str, limit: TimeLimit) -> dict[str, Any]:
            return text_loss.measure(sizes, VARIANTS[variant], text, device, settings, limit)

        name = f"long_context_{args.device}_{size}"
        found = measure_variants(name, shared, args.variants or list(VARIANTS), measure_loss, limit, args.output)
        if found:
            draw_loss(found, settings["block"], args.output / f"{name}.png")

    if "recall" in args.measure:
        recall_settings = {**RECALL[args.device], **longest}
        if args.recall_steps is not None:
            recall_settings["steps"] = args.recall_steps
        recall_sizes = RECALL_SIZES[args.device]
        filler = text_loss.standard_library(1 << 20)

        def measure_recall(variant: str, limit: TimeLimit) -> dict[str, Any]:
            texts = filler.train.to(device), filler.held_out.to(device)
            return recall.measure(recall_sizes, VARIANTS[variant], texts, device, recall_settings, limit)

        shared = {"device": args.device, "model": recall_sizes, **recall_settings}
        name = f"recall_{args.device}"
        variants = args.variants or RECALL_VARIANTS
        found = measure_variants(name, shared, variants, measure_recall, limit, args.output)
        if found:
            draw_recall(found, recall_settings["block"], args.output / f"{name}.png")


if __name__ == "__main__":
    main()
