"""Validation: how well a model predicts a fixed set of windows."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bdh.data.blocks import ValidationWindows
from bdh.model import BDHForCausalLM


@dataclass(frozen=True)
class Evaluation:
    """Figures over all scored tokens.

    Attributes:
        loss: Mean cross-entropy, nats a token.
        perplexity: exp(loss).
        bits_per_byte: Cross-entropy in bits over the bytes the tokens stand for; comparable between vocabularies.
        accuracy: Share of tokens that were the model's likeliest guess.
        tokens: How many were scored.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    accuracy: float
    tokens: int


@torch.no_grad()
def evaluate(
    model: BDHForCausalLM,
    windows: ValidationWindows,
    bytes_per_token: float,
    batch_size: int,
    precision: Callable[[], AbstractContextManager[object]],
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Scores every window from its own beginning, without dropout; the model's mode is put back afterwards.

    Args:
        model: On the device to use.
        windows: What to score.
        bytes_per_token: Average bytes of a scored token.
        batch_size: Windows of one forward pass.
        precision: Makes the context of a forward pass.
        progress: Called with the number of windows done.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    nats = torch.zeros((), dtype=torch.float64, device="cpu")
    hits = tokens = done = 0
    for batch in windows.batches(batch_size):
        batch = batch.to(device)  # (B, T + 1)
        inputs, targets = batch[:, :-1], batch[:, 1:]  # (B, T) each
        with precision():
            logits = model(inputs, use_cache=False).logits.float()  # (B, T, V)
        nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").double().cpu()
        hits += int((logits.argmax(-1) == targets).sum())
        tokens += targets.numel()
        done += len(batch)
        progress(done)
    model.train(was_training)
    loss = nats.item() / tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return Evaluation(loss, perplexity, loss / math.log(2) / bytes_per_token, hits / tokens, tokens)
