"""Validation: how well a model predicts a fixed set of windows."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bdh.data.blocks import ALONE, Share, ValidationWindows, document_ids, inputs_and_targets
from bdh.errors import BDHError
from bdh.evaluation.by_position import PositionBin
from bdh.model import BDHForCausalLM, state_of


@dataclass(frozen=True)
class Evaluation:
    """Figures over all scored tokens: of conversations, those of answers.

    Attributes:
        loss: Mean cross-entropy, nats a token.
        perplexity: exp(loss).
        bits_per_byte: Cross-entropy in bits over the bytes the tokens stand for; comparable between vocabularies.
        perplexity_per_byte: 2^bits_per_byte, comparable as well.
        accuracy: Share of tokens that were the model's likeliest guess.
        tokens: How many were scored.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    perplexity_per_byte: float
    accuracy: float
    tokens: int

    def figures(self) -> dict[str, float]:
        """The metrics to log, by name."""
        return {
            "validation_loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "perplexity_per_byte": self.perplexity_per_byte,
            "accuracy": self.accuracy,
        }


def beyond_block_figures(beyond: PositionBin) -> dict[str, float]:
    """The figures of the positions beyond the training block, by their names in metrics.jsonl."""
    return {
        "validation_long_loss": beyond.loss,
        "validation_long_bits_per_byte": beyond.bits_per_byte,
        "validation_long_length": beyond.up_to,
    }


def check_has_targets(windows: ValidationWindows, batch_size: int, carry_state: bool) -> None:
    """Raises BDHError if `evaluate` would find no token to predict in the windows."""
    batches = windows.lanes(batch_size) if carry_state else windows.batches(batch_size)
    if not any(bool((batch[:, 1:] >= 0).any()) for batch in batches):
        raise BDHError(
            f"no token of an answer is in the {len(windows)} windows of data.block_size {windows.block_size} to "
            "validate on; use more conversations, a smaller data.train_split, or training.eval_windows null"
        )


@torch.no_grad()
def evaluate(
    model: BDHForCausalLM,
    windows: ValidationWindows,
    bytes_per_token: float,
    batch_size: int,
    precision: Callable[[], AbstractContextManager[object]],
    progress: Callable[[int], None] = lambda done: None,
    end_of_text: int | None = None,
    carry_state: bool = False,
    share: Share = ALONE,
    together: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> Evaluation:
    """Scores the windows without dropout; the model's mode is put back afterwards.

    Each window is read from its own beginning, or, with `carry_state`, with the synapses of the window before it.

    Args:
        model: On the device to use.
        windows: What to score.
        bytes_per_token: Average bytes of a scored token.
        batch_size: Windows of one forward pass.
        precision: Makes the context of a forward pass.
        progress: Called with the number of windows done.
        end_of_text: The token that ends documents, to keep them apart; None reads across them.
        carry_state: Whether windows go on from each other.
        share: Which of the windows are this process's; all processes call this together.
        together: Adds up what each of them has counted.

    Raises:
        BDHError: No token is to be predicted.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    nats = torch.zeros((), dtype=torch.float64, device="cpu")
    hits = tokens = done = 0
    state = None
    for batch in windows.lanes(batch_size) if carry_state else windows.batches(batch_size, share):
        batch = batch.to(device)  # (B, T + 1)
        inputs, targets = inputs_and_targets(batch)  # (B, T) each
        documents = None if end_of_text is None else document_ids(inputs, end_of_text)  # (B, T)
        with precision():
            outputs = model(inputs, past_key_values=state, use_cache=carry_state, document_ids=documents)
        state, logits = state_of(outputs), outputs.logits.float()  # (B, T, V)
        nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").double().cpu()
        hits += int((logits.argmax(-1) == targets).sum())
        tokens += int((targets >= 0).sum())
        done += len(batch)
        progress(done)
    model.train(was_training)
    if carry_state:  # all have read all of it
        share = ALONE
    if share.world > 1:
        nats, *counts = together(torch.tensor([nats.item(), hits, tokens], dtype=torch.float64))
        hits, tokens = (round(float(count)) for count in counts)
    if not tokens:
        raise BDHError("there is no token of an answer to validate on; use more conversations, or more eval_windows")
    loss = nats.item() / tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf
    bits = loss / math.log(2) / bytes_per_token if bytes_per_token else math.inf
    per_byte = 2**bits if bits < 1000 else math.inf
    return Evaluation(loss, perplexity, bits, per_byte, hits / tokens, tokens)
