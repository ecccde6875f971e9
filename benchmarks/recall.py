"""Trains a model of each variant on recall tasks at one block length and measures its accuracy by distance."""

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bdh.model import BDHForCausalLM, BDHState
from bdh.model.modeling_bdh import state_of
from benchmarks.recall_tasks import IGNORED, TASKS, Batch, Source, evaluation_batch, training_batches
from benchmarks.variants import TimeLimit, Trainer, Variant

SHORTEST = 64  # distance in tokens; from there they double
REPORT_EVERY = 100  # steps
PASSKEY_ROWS = 4  # times as many sequences of this task, of which each has few scored bytes
SHORT_SHARE = (
    0.5  # of the steps, the first ones, train on sequences of a quarter of the block: recall is learned sooner
)


def padded(batches: list[Batch], length: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels of all batches, padded on the right: 2 x (rows of all, length)."""
    tokens = [F.pad(batch.tokens, (0, length - batch.tokens.shape[1])) for batch in batches]  # (B, length)
    labels = [F.pad(batch.labels, (0, length - batch.labels.shape[1]), value=IGNORED) for batch in batches]
    return torch.cat(tokens), torch.cat(labels)


def train(trainer: Trainer, source: Source, rows: int, length: int) -> dict[str, Any]:
    """Trains on all tasks at once; all tasks weigh the same.

    Args:
        trainer: Holds the model.
        source: Of random numbers and filler.
        rows: Sequences of each task in a step, of `length` tokens; of shorter sequences as many more.
        length: The block length.

    Returns:
        The trainer's figures, and for some steps the accuracy on each task's batch.
    """
    curve: dict[int, dict[str, float]] = {}
    steps, sizes = trainer.recipe.max_steps, random.Random(0)
    short = max(SHORTEST, length // 4)
    for step in range(1, steps + 1):
        T = short if step <= SHORT_SHARE * steps else length
        B = rows * length // T
        made = training_batches(source, sizes, B, T)
        tokens, labels = padded(list(made.values()), T)  # (tasks * B, T)
        with trainer.autocast():
            hidden = trainer.model.model(tokens, use_cache=False).last_hidden_state  # (tasks * B, T, D)
        parts = []
        reported = step % REPORT_EVERY == 0 or step == steps
        for name, h, wanted in zip(made, hidden.split(B), labels.split(B), strict=True):
            scored = wanted != IGNORED  # (B, T)
            with trainer.autocast():
                logits = trainer.model.lm_head(h[scored]).float()  # (scored, V)
            parts.append(F.cross_entropy(logits, wanted[scored]))
            if reported:
                right = (logits.argmax(-1) == wanted[scored]).float().mean().item()
                curve.setdefault(step, {})[name] = round(right, 3)
        trainer.update(torch.stack(parts).mean())
        if reported:
            print(f"step {step}:", curve[step], flush=True)
    return {**trainer.figures(rows * length * len(TASKS)), "training_accuracy": curve}


@torch.no_grad()
def predictions(trainer: Trainer, batch: Batch, piece: int) -> Tensor:
    """The bytes predicted where labels are, in the order of `batch.tokens[scored]`: (scored) int64.

    Args:
        trainer: Holds the model.
        batch: Sequences of any length.
        piece: Tokens of all sequences read in one forward pass; the state is carried between passes.
    """
    model: BDHForCausalLM = trainer.model
    model.eval()
    B, T = batch.tokens.shape
    state = BDHState.zeros(model.config, B, trainer.device)
    width = max(256, piece // B // 256 * 256)
    predicted = torch.zeros_like(batch.tokens)  # (B, T)
    for start in range(0, T, width):
        now = slice(start, start + width)
        with trainer.autocast():
            outputs = model.model(batch.tokens[:, now], past_key_values=state, use_cache=True)
            state = state_of(outputs) or state
            scored = batch.labels[:, now] != IGNORED  # (B, width)
            if scored.any():
                logits = model.lm_head(outputs.last_hidden_state[scored])  # (scored, V)
                predicted[:, now][scored] = logits.argmax(-1)
    model.train()
    return predicted[batch.labels != IGNORED]


def evaluate(
    trainer: Trainer, text: Tensor, *, longest: int, rows: int, scale: float, piece: int
) -> dict[str, dict[str, Any]]:
    """Accuracy of each task by distance: the share of the scored bytes that are recalled.

    Args:
        trainer: Holds the model.
        text: Filler that was not trained on, (bytes) uint8.
        longest: Greatest distance.
        rows: Sequences for each task and distance; the same for every variant.
        scale: As for `evaluation_batch`.
        piece: As for `predictions`.
    """
    found: dict[str, dict[str, Any]] = {}
    distances = [SHORTEST << k for k in range((longest // SHORTEST).bit_length())]
    for task in TASKS:
        right, scored = dict.fromkeys(distances, 0), dict.fromkeys(distances, 0)
        for distance in distances:
            source = Source(torch.Generator(text.device).manual_seed(distance), text)
            number = PASSKEY_ROWS * rows if task == "passkey" else rows
            batch = evaluation_batch(task, source, number, distance, scale)
            marked = batch.labels != IGNORED  # (B, T)
            hit = predictions(trainer, batch, piece) == batch.labels[marked]  # (scored)
            at = batch.distances[marked]  # (scored)
            for one in distances:
                within = (at <= one) & (at > (one // 2 if one > SHORTEST else 0))  # (scored)
                scored[one] += int(within.sum())
                right[one] += int((hit & within).sum())
        found[task] = {str(one): round(right[one] / scored[one], 4) for one in distances if scored[one]}
        print(task, found[task], flush=True)
    return found


def measure(
    sizes: dict[str, Any],
    variant: Variant,
    text: tuple[Tensor, Tensor],
    device: torch.device,
    settings: dict[str, Any],
    limit: TimeLimit,
) -> dict[str, Any]:
    """Trains and evaluates one variant on `text`, filler for training and for evaluation."""
    trainer = Trainer(sizes, variant, device, settings["steps"], limit)
    source = Source(torch.Generator(device).manual_seed(0), text[0])
    figures = train(trainer, source, settings["rows"], settings["block"])
    accuracy = evaluate(
        trainer,
        text[1],
        longest=settings["longest"],
        rows=settings["evaluation_rows"],
        scale=settings["block"] / 512,
        piece=settings["piece"],
    )
    return {**figures, "accuracy": accuracy}
