"""Trains a model of each variant on the standard library's source and measures its loss on text held out from it."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bdh.data.blocks import ValidationWindows
from bdh.data.corpora import load_corpus
from bdh.data.tokens import Tokens
from bdh.evaluation.by_position import bin_edges, score_by_position, score_with_past
from bdh.model import BDHState
from bdh.model.modeling_bdh import state_of
from benchmarks.variants import TimeLimit, Trainer, Variant

PASTS = (512, 4096)  # tokens, to compare the whole past with
SHORT, MEDIUM = 4096, 16384  # windows that show the first positions, and those far beyond the block
SCORED = 8192  # last tokens of a window that are scored with different pasts
EVERY = 100  # steps between two losses that are recorded


class Text(NamedTuple):
    """Bytes to train on and bytes held out, (bytes) uint8 on the CPU."""

    train: Tensor
    held_out: Tensor


def standard_library(held_out: int) -> Text:
    """The standard library's source in the order of its paths; the last `held_out` bytes are held out."""
    source = "".join(load_corpus("stdlib")).encode()
    text = torch.frombuffer(bytearray(source), dtype=torch.uint8)  # (bytes)
    return Text(text[:-held_out], text[-held_out:])


def training_rows(train: Tensor, step: int, rows: int, block: int) -> Tensor:
    """Blocks that continue, row by row, those of the step before: (rows, block + 1) int64.

    Every variant reads the same blocks in the same order, whether it carries its state or not.
    """
    starts = torch.arange(rows, device=train.device) * (len(train) // rows) + step * block  # (rows)
    at = starts[:, None] + torch.arange(block + 1, device=train.device)  # (rows, block + 1)
    return train[at % len(train)].long()


def train(trainer: Trainer, text: Tensor, rows: int, block: int) -> dict[str, Any]:
    """Trains for the trainer's steps; returns its figures and some losses in bits per byte."""
    model, device = trainer.model, trainer.device
    state = BDHState.zeros(model.config, rows, device) if trainer.variant.carry else None
    losses: dict[int, Tensor] = {}
    steps = trainer.recipe.max_steps
    for step in range(steps):
        tokens = training_rows(text, step, rows, block)  # (rows, block + 1)
        with trainer.autocast():
            outputs = model(tokens[:, :-1], past_key_values=state, use_cache=state is not None)
            loss = F.cross_entropy(outputs.logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        if state is not None:
            after = state_of(outputs)
            assert after is not None
            state = after.detach()
        if (step + 1) % EVERY == 0:
            losses[step + 1] = loss.detach() / torch.log(torch.tensor(2.0, device=device))
        trainer.update(loss)
    found = trainer.figures(rows * block)
    return {**found, "training_bits_per_byte": {step: round(float(bits), 3) for step, bits in losses.items()}}


def evaluate(trainer: Trainer, held_out: Tensor, *, longest: int, batch_size: int, past_windows: int) -> dict[str, Any]:
    """Bits per byte by position, and of the same tokens with different pasts.

    Args:
        trainer: Holds the model.
        held_out: Bytes that were not trained on, a multiple of `longest` and one more, (bytes) uint8 on the CPU.
        longest: Greatest position.
        batch_size: Windows of one forward pass, at most.
        past_windows: Windows whose last tokens are scored with different pasts.

    Returns:
        "by_position": bits per byte by the largest position of the bin. Bins up to SHORT are of windows of this length,
        bins up to MEDIUM of windows of that length, the others of the longest windows; windows of each length lie
        side by side over the whole text. "with_past": by the length of the window, bits per byte of its last tokens by
        the length of the past.
    """
    tokens = Tokens([held_out.numpy()])
    by_position: dict[str, float] = {}
    with_past: dict[str, dict[str, Any]] = {}
    lengths = sorted({min(length, longest) for length in (SHORT, MEDIUM, longest)})
    for shorter, length in zip([0, *lengths], lengths, strict=False):
        windows = ValidationWindows(tokens, length)
        wanted = [edge for edge in bin_edges(length) if edge > shorter]
        bins = score_by_position(trainer.model, windows, 1.0, batch_size, precision=trainer.autocast)
        by_position |= {str(entry.up_to): round(entry.bits_per_byte, 4) for entry in bins if entry.up_to in wanted}
        if length == SHORT and longest > SHORT:
            continue
        skip = max(length // 2, length - SCORED)
        scores = score_with_past(
            trainer.model,
            ValidationWindows(tokens, length, past_windows),
            1.0,
            [past for past in PASTS if past <= skip] + [None],
            batch_size,
            skip=skip,
            precision=trainer.autocast,
        )
        result: dict[str, Any] = {str(score.past or "whole"): round(score.bits_per_byte, 4) for score in scores}
        with_past[str(length)] = {"from_position": skip, "tokens": scores[0].tokens, **result}
    return {"by_position": by_position, "with_past": with_past}


def measure(
    sizes: dict[str, Any],
    variant: Variant,
    text: Text,
    device: torch.device,
    settings: dict[str, Any],
    limit: TimeLimit,
) -> dict[str, Any]:
    """Trains and evaluates one variant."""
    trainer = Trainer(sizes, variant, device, settings["steps"], limit)
    figures = train(trainer, text.train.to(device), settings["rows"], settings["block"])
    scores = evaluate(
        trainer,
        text.held_out,
        longest=settings["longest"],
        batch_size=settings["evaluation_rows"],
        past_windows=settings["past_windows"],
    )
    return {**figures, **scores}
