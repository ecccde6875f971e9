"""Decay for a model that was trained without it: found by calibration, and learned by training that continues.

    python -m benchmarks.calibration --text tinyshakespeare.txt
    python -m benchmarks.calibration --text tinyshakespeare.txt --device cpu --size tiny

The first 90 % of the text are training text, the rest is validation text. Its first 8 windows of 8 training blocks
belong to the calibration, which searches half-lives on every second of them; everything else is measured on windows of
32 blocks (16 384 tokens) that follow, so no token that is scored was searched on or trained on.

1. A model without decay is trained: AdamW 1e-3, constant, random blocks. Bits per byte of the same tokens with a short
   past alone (256 tokens) and with the whole past (4096 to 16 384 tokens), and by position, before and after
   calibration.
2. Training continues from its weights with decay switched on: AdamW 3e-4, constant after a warm-up of 20 steps, gates
   from their initial values. Bits per byte inside the block and beyond it, by step. The variant "none" continues
   without decay, to compare with.

Writes results/calibration_DEVICE.json, anew after each part.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bdh.data.blocks import ValidationWindows
from bdh.data.tokens import Tokens
from bdh.errors import BDHError
from bdh.evaluation.by_position import score_by_position, score_with_past
from bdh.evaluation.calibration import HEAD_RANGE, calibrate, set_decay
from bdh.training.init_from import load_start
from benchmarks.record import RESULTS, save
from benchmarks.variants import VARIANTS, TimeLimit, Trainer, half_lives, synchronize, use_checked_kernels

TINY: dict[str, Any] = {"n_layer": 1, "n_embd": 32, "n_head": 2, "mlp_internal_dim_multiplier": 8}
MODELS: dict[str, dict[str, Any]] = {"default": {}, "tiny": TINY}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"rows": 32, "block": 512, "steps": 500, "continue_steps": 300, "every": 50},
    "tiny": {"rows": 8, "block": 32, "steps": 50, "continue_steps": 10, "every": 5},
}
RECIPE: dict[str, Any] = {"learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0}
CONTINUED: dict[str, Any] = {"learning_rate": 3e-4, "schedule": "constant", "warmup_steps": 20}
WINDOW, SKIPPED, SEARCHED = 32, 8, 8  # training blocks of a scored window, those not scored, those of a search window
SEARCH_WINDOWS, SCORED_WINDOWS, EVALUATION_ROWS = 4, 4, 32


class Text(NamedTuple):
    """A text in three parts: to train on (bytes) uint8 on the device, to calibrate on, and to score."""

    train: Tensor
    calibration: Tokens
    scored: Tokens


def split_text(content: bytes, block: int, device: torch.device) -> Text:
    """The training text, and of the validation text the windows of the calibration and those that are scored.

    Raises:
        BDHError: The validation text has no window to score.
    """
    data = np.frombuffer(content, dtype=np.uint8).copy()  # (bytes)
    train, held_out = np.split(data, [len(data) * 9 // 10])
    calibration = 2 * SEARCH_WINDOWS * SEARCHED * block
    windows = min(SCORED_WINDOWS, (len(held_out) - calibration - 1) // (WINDOW * block))
    if windows < 1:
        needed = calibration + WINDOW * block + 1
        raise BDHError(
            f"the last tenth of the text has {len(held_out)} bytes; it must have {needed}; use a longer text"
        )
    tokens = Tokens([held_out])
    scored = tokens.slice(calibration, calibration + windows * WINDOW * block + 1)
    return Text(torch.from_numpy(train).to(device), tokens.slice(0, calibration + 1), scored)


def training_blocks(text: Tensor, rows: int, block: int, seed: int) -> Iterator[Tensor]:
    """Random blocks of the text without end, (rows, block + 1) int64 at a time."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.arange(block + 1, device=text.device)  # (block + 1)
    while True:
        starts = torch.randint(len(text) - block, (rows, 1), generator=generator).to(text.device)  # (rows, 1)
        yield text[starts + columns].long()  # (rows, block + 1)


def train_step(trainer: Trainer, tokens: Tensor) -> None:
    """One optimizer step on blocks (rows, block + 1)."""
    with trainer.autocast():
        logits = trainer.model(tokens[:, :-1], use_cache=False).logits  # (rows, block, V)
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    trainer.update(loss)


def bits_by_position(trainer: Trainer, tokens: Tokens, length: int, edges: list[int] | None = None) -> dict[str, float]:
    """Bits per byte by the largest position of the bin, in windows of a length side by side."""
    windows = ValidationWindows(tokens, length)
    bins = score_by_position(trainer.model, windows, 1.0, EVALUATION_ROWS, edges=edges, precision=trainer.autocast)
    return {str(entry.up_to): round(entry.bits_per_byte, 4) for entry in bins}


def score(trainer: Trainer, tokens: Tokens, block: int) -> dict[str, Any]:
    """Bits per byte by position, and of the same tokens with a short past alone and with the whole past."""
    past, skip = block // 2, SKIPPED * block
    windows = ValidationWindows(tokens, WINDOW * block)
    short, whole = score_with_past(
        trainer.model, windows, 1.0, [past, None], EVALUATION_ROWS, skip=skip, precision=trainer.autocast
    )
    return {
        "tokens": whole.tokens,
        f"past_{past}": round(short.bits_per_byte, 4),
        f"past_{skip}_to_{WINDOW * block}": round(whole.bits_per_byte, 4),
        "whole_past_above_short": round(whole.loss / short.loss - 1, 4),
        "by_position": bits_by_position(trainer, tokens, WINDOW * block),
    }


def inside_and_beyond(trainer: Trainer, tokens: Tokens, block: int) -> dict[str, float]:
    """Bits per byte inside the block, in all blocks of the text, and beyond it, in windows of 8 blocks."""
    beyond = bits_by_position(trainer, tokens, SKIPPED * block, [block, SKIPPED * block])
    return {
        "inside": bits_by_position(trainer, tokens, block, [block])[str(block)],
        "beyond": beyond[str(SKIPPED * block)],
    }


def measure_calibration(trainer: Trainer, text: Text, block: int) -> dict[str, Any]:
    """Scores before and after a calibration, which stays in the model; what it found, and its seconds.

    Where no half-life is better than no decay, "refused" holds the reason, and there are no scores after it.
    """
    model = trainer.model
    found: dict[str, Any] = {"before": score(trainer, text.scored, block)}
    print(f"before calibration: {found['before']}", flush=True)
    shortest, longest = (share * block for share in HEAD_RANGE)
    set_decay(model, [*half_lives(shortest, longest, model.config.n_head)])
    found["kernels"] = use_checked_kernels(model, trainer.device, trainer.autocast)  # with half-lives of any length
    set_decay(model, None)
    began = time.perf_counter()
    try:
        result = calibrate(
            model,
            text.calibration,
            1.0,
            block_size=block,
            length=SEARCHED * block,
            windows=SEARCH_WINDOWS,
            batch_size=SEARCH_WINDOWS,
            precision=trainer.autocast,
            say=lambda line: print(line, flush=True),
        )
    except BDHError as error:
        return {**found, "refused": str(error)}
    found |= {"seconds": round(time.perf_counter() - began, 1), "half_lives": result.half_lives}
    losses = {"nats_before": round(result.loss_before, 4), "nats_after": round(result.loss_after, 4)}
    found["search"] = {"windows": result.windows, **losses}
    found["after"] = score(trainer, text.scored, block)
    short, whole = f"past_{block // 2}", f"past_{SKIPPED * block}_to_{WINDOW * block}"
    found["whole_past_after_above_short_before"] = round(found["after"][whole] / found["before"][short] - 1, 4)
    print(f"after calibration: {found['after']}", flush=True)
    return found


def measure_continued(
    trainer: Trainer, start: Path, text: Text, settings: dict[str, Any], inside: float
) -> dict[str, Any]:
    """Bits per byte by step of training that continues from a model, and the steps until it is as good as that.

    Args:
        trainer: New, of the variant.
        start: The export of the model to continue from.
        text: Text to train on and to score.
        settings: As in SETTINGS.
        inside: Bits per byte of the model inside the block.
    """
    block, steps = settings["block"], settings["continue_steps"]
    load_start(trainer.model, start)
    by_step: dict[str, dict[str, float]] = {}
    seconds = 0.0
    blocks = training_blocks(text.train, settings["rows"], block, seed=1)
    for step in range(steps + 1):
        if step % settings["every"] == 0 or step == steps:
            by_step[str(step)] = inside_and_beyond(trainer, text.scored, block)
            print(f"step {step}: {by_step[str(step)]}", flush=True)
            synchronize(trainer.device)
            began = time.perf_counter()
        if step < steps:
            train_step(trainer, next(blocks))
            if (step + 1) % settings["every"] == 0 or step + 1 == steps:
                synchronize(trainer.device)
                seconds += time.perf_counter() - began
    figures = trainer.figures(settings["rows"] * block)
    reached = next((int(step) for step, bits in by_step.items() if bits["inside"] <= inside), None)
    figures = {key: figures[key] for key in ("kernels", "half_lives") if key in figures}
    return {"by_step": by_step, "steps_until_as_good_inside": reached, "training_seconds": round(seconds, 1), **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="tinyshakespeare, or another text")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=list(MODELS), default="default", help="of the model, blocks and runs")
    parser.add_argument("--steps", type=int, help="of the training without decay")
    parser.add_argument("--continue_steps", type=int, help="of each training that continues; 0 leaves part 2 out")
    names = [name for name, variant in VARIANTS.items() if not variant.carry]
    parser.add_argument("--variants", nargs="+", choices=names, default=["gated-delta", "gated"], help="to continue as")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args()
    device, limit, model = torch.device(args.device), TimeLimit(None), MODELS[args.size]
    given = {key: getattr(args, key) for key in ("steps", "continue_steps") if getattr(args, key) is not None}
    settings = {**SETTINGS[args.size], **given}
    block, name = settings["block"], f"calibration_{args.device}" + ("" if args.size == "default" else f"_{args.size}")
    try:
        text = split_text(args.text.read_bytes(), block, device)
    except (OSError, BDHError) as error:
        parser.error(f"--text {args.text}: {error}")
    results: dict[str, Any] = {"complete": False, "model": model, "settings": settings}

    def write() -> None:
        print(save(name, results, args.output), flush=True)

    trainer = Trainer(model, VARIANTS["none"], device, settings["steps"], limit, RECIPE)
    blocks = training_blocks(text.train, settings["rows"], block, seed=0)
    for step in range(settings["steps"]):
        train_step(trainer, next(blocks))
        if (step + 1) % 100 == 0:
            print(f"trained {step + 1} of {settings['steps']} steps", flush=True)
    results["training"] = trainer.figures(settings["rows"] * block)
    results["none"] = none = inside_and_beyond(trainer, text.scored, block)
    print(f"none: {none}, {results['training']}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder)
        trainer.model.save_pretrained(start)
        write()
        results["calibration"] = measure_calibration(trainer, text, block)
        write()
        results["continued"] = {}
        for variant in args.variants if settings["continue_steps"] else []:
            print(f"--- continued as {variant}", flush=True)
            if args.device == "cuda":
                torch.cuda.empty_cache()  # the kernels keep activations in a share of the memory that is free
            trainer = Trainer(model, VARIANTS[variant], device, settings["continue_steps"], limit, CONTINUED)
            results["continued"][variant] = measure_continued(trainer, start, text, settings, none["inside"])
            write()
    results["complete"] = True
    write()


if __name__ == "__main__":
    main()
