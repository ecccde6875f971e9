"""Loss by position: how well a model predicts tokens far from the beginning of a text.

A window of many tokens is read in pieces, with the state carried from piece to piece, so memory does not grow with the
length of the window. The position of a predicted token is the number of tokens that were read before it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bdh.data.blocks import ValidationWindows, document_ids, inputs_and_targets
from bdh.errors import BDHError
from bdh.model import BDHForCausalLM, BDHState, state_of

PIECE_SIZE = 512  # tokens of one forward pass, at most
SMALLEST_PIECE = 64  # tokens; shorter ones would be many calls
FIRST_BIN = 128  # positions of the first bin, unless the window is short
LONG_BLOCKS = 8  # training blocks of a window that measures beyond the block
LONG_WINDOWS = 32  # such windows, at most

Precision = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class PositionBin:
    """Mean loss of the tokens predicted at positions `after` < position <= `up_to`.

    Attributes:
        after: The largest position before the bin.
        up_to: The largest position of the bin.
        loss: Mean cross-entropy, nats per token.
        bits_per_byte: Cross-entropy in bits per byte of the text.
        tokens: Tokens scored.
    """

    after: int
    up_to: int
    loss: float
    bits_per_byte: float
    tokens: int


@dataclass(frozen=True)
class PastScore:
    """Mean loss of a fixed set of tokens, predicted from a limited past.

    Attributes:
        past: The smallest number of tokens read before each scored token; None for all tokens of the window.
        loss: Mean cross-entropy, nats per token.
        bits_per_byte: Cross-entropy in bits per byte of the text.
        tokens: Tokens scored.
    """

    past: int | None
    loss: float
    bits_per_byte: float
    tokens: int


@dataclass(frozen=True)
class ScoredTokens:
    """The losses of some consecutive tokens of a batch of windows, on the CPU.

    Attributes:
        nats: Cross-entropy of each token, 0 where it is not scored: (B, C) float64.
        positions: Tokens of the same document that were read before it: (B, C) int64.
        scored: Whether the token is scored: (B, C) bool.
    """

    nats: Tensor
    positions: Tensor
    scored: Tensor


def bin_edges(length: int, first: int | None = None) -> list[int]:
    """The largest position of each bin: `first`, twice that, and so on, up to `length`.

    Args:
        length: Tokens predicted in a window.
        first: Positions of the first bin. None: 128, or less where that leaves fewer than three bins.
    """
    if first is None:
        first = FIRST_BIN
        while first > 1 and 4 * first > length:
            first //= 2
    edges = []
    while first < length:
        edges.append(first)
        first *= 2
    return [*edges, length]


def piece_size_of(model: BDHForCausalLM) -> int:
    """Tokens to read in one forward pass: a training block, as the cost of a token grows with them; at most a chunk."""
    block = max(model.config.training_block_size or PIECE_SIZE, SMALLEST_PIECE)
    return min(model.config.chunk_size, PIECE_SIZE, block)


def read_in_pieces(
    model: BDHForCausalLM, batch: Tensor, precision: Precision = nullcontext, end_of_text: int | None = None
) -> Iterator[ScoredTokens]:
    """Reads windows from their beginning to their end, with carried state; yields the losses of each piece.

    Args:
        model: In eval mode.
        batch: Windows (B, T + 1) int64 on the model's device; ~id is read and not scored.
        precision: Makes the context of a forward pass.
        end_of_text: The token that begins a document, which is then read from an empty state; None reads across
            documents.
    """
    inputs, targets = inputs_and_targets(batch)  # (B, T) each
    size = piece_size_of(model)
    state: BDHState | None = None
    read = torch.zeros(len(batch), 1, dtype=torch.int64)  # (B, 1)  tokens of the present document
    for start in range(0, inputs.shape[1], size):
        tokens, labels = inputs[:, start : start + size], targets[:, start : start + size]  # (B, C) each
        here = torch.arange(1, tokens.shape[1] + 1).expand(len(batch), -1)  # (B, C)
        positions, documents = read + here, None  # (B, C)
        if end_of_text is not None:
            begins = tokens.cpu() == end_of_text  # (B, C)
            first = torch.where(begins, here, 0).cummax(1).values  # (B, C)  where the document begins; 0: before
            positions = torch.where(first > 0, here - first + 1, positions)  # (B, C)
            documents = document_ids(tokens, end_of_text)  # (B, C)
        with torch.no_grad(), precision():
            outputs = model(tokens, past_key_values=state, use_cache=True, document_ids=documents)
        state, logits = state_of(outputs), outputs.logits.float()  # (B, C, V)
        nats = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # (B, C)
        yield ScoredTokens(nats.cpu().double(), positions, labels.cpu() >= 0)
        read = positions[:, -1:]  # (B, 1)


def score_by_position(
    model: BDHForCausalLM,
    windows: ValidationWindows,
    bytes_per_token: float,
    batch_size: int = 8,
    *,
    edges: Sequence[int] | None = None,
    precision: Precision = nullcontext,
    end_of_text: int | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> list[PositionBin]:
    """The loss of held-out windows by position, read with carried state; the model's mode is restored afterwards.

    Args:
        model: On the device to use.
        windows: The windows to score.
        bytes_per_token: Average bytes of a scored token.
        batch_size: Windows of one forward pass.
        edges: The largest position of each bin, ascending; None takes `bin_edges` of the windows' length. Tokens
            beyond the last are not scored.
        precision: Makes the context of a forward pass.
        end_of_text: As for `read_in_pieces`.
        progress: Called with the number of tokens read so far.

    Returns:
        The bins in which tokens were scored.

    Raises:
        BDHError: No token is to be scored.
    """
    edges = list(edges or bin_edges(windows.block_size))
    nats = torch.zeros(len(edges) + 1, dtype=torch.float64)  # (bins + 1)
    counts = torch.zeros(len(edges) + 1, dtype=torch.int64)  # (bins + 1)
    done = 0
    for piece in read_windows(model, windows.batches(batch_size), precision, end_of_text):
        numbers = torch.bucketize(piece.positions[piece.scored], torch.tensor(edges))  # (scored)
        nats += torch.bincount(numbers, piece.nats[piece.scored], len(edges) + 1)  # (bins + 1)
        counts += torch.bincount(numbers, minlength=len(edges) + 1)  # (bins + 1)
        done += piece.nats.numel()
        progress(done)
    bins = []
    for number, (after, up_to) in enumerate(zip([0, *edges[:-1]], edges, strict=True)):
        if tokens := int(counts[number]):
            loss = float(nats[number]) / tokens
            bins.append(PositionBin(after, up_to, loss, bits_per_byte(loss, bytes_per_token), tokens))
    if not bins:
        raise BDHError("there is no token to score in the windows; use a longer text, or more windows")
    return bins


def score_with_past(
    model: BDHForCausalLM,
    windows: ValidationWindows,
    bytes_per_token: float,
    pasts: Sequence[int | None],
    batch_size: int = 8,
    *,
    skip: int | None = None,
    stride: int | None = None,
    precision: Precision = nullcontext,
    progress: Callable[[int], None] = lambda tokens: None,
) -> list[PastScore]:
    """The loss of the same held-out tokens, predicted from pasts of different lengths.

    Scored are the tokens of each window at positions after `skip`. With a past of None a window is read once, from its
    beginning. With a past of p, the scored tokens are taken `stride` at a time, and each such group is predicted by a
    model that begins p tokens before the group: each token has at least p and less than p + stride tokens of past.

    Args:
        model: On the device to use.
        windows: The windows.
        bytes_per_token: Average bytes of a scored token.
        pasts: Numbers of tokens; None for the whole window.
        batch_size: Rows of one forward pass.
        skip: Positions that are not scored; at least the longest of the pasts, which is the default.
        stride: None takes a quarter of each past; less comes closer to exactly p tokens and costs more.
        precision: Makes the context of a forward pass.
        progress: Called with the number of tokens read so far, of all pasts.

    Raises:
        BDHError: The windows have no token after `skip`, or `skip` is less than a past.
    """
    longest = max((past for past in pasts if past is not None), default=0)
    skip = longest if skip is None else skip
    if any(past is not None and past < 1 for past in pasts) or (stride is not None and stride < 1):
        raise BDHError("a past and a stride are numbers of tokens; they must be at least 1")
    if skip < longest:
        raise BDHError(f"skip is {skip}; it must be at least {longest}, the longest of the pasts")
    if windows.block_size <= skip:
        raise BDHError(f"the windows have {windows.block_size} tokens; they must have more than skip, {skip}")
    scores = []
    done = 0
    for past in pasts:
        if past is None:
            rows, first = windows.batches(batch_size), skip
        else:
            rows, first = groups(windows, skip, past, stride or max(past // 4, 1), batch_size), past
        nats, count = 0.0, 0
        for piece in read_windows(model, rows, precision, None):
            scored = piece.scored & (piece.positions > first)  # (B, C)
            nats += float(piece.nats[scored].sum())
            count += int(scored.sum())
            done += piece.nats.numel()
            progress(done)
        if not count:
            raise BDHError(f"there is no token to score after position {skip} of the windows; use a longer text")
        scores.append(PastScore(past, nats / count, bits_per_byte(nats / count, bytes_per_token), count))
    return scores


def groups(windows: ValidationWindows, skip: int, past: int, stride: int, batch_size: int) -> Iterator[Tensor]:
    """Rows (up to batch_size, past + scored + 1) whose tokens after position `past` are each window's after `skip`.

    Rows of a batch are equally long: the last group of a window, which may be shorter, comes with its likes.
    """
    sizes = [stride] * ((windows.block_size - skip) // stride)
    if rest := (windows.block_size - skip) % stride:
        sizes.append(rest)
    for size in dict.fromkeys(sizes):
        begins = [skip - past + number * stride for number, its in enumerate(sizes) if its == size]
        starts = [int(start) + begin for start in windows.starts for begin in begins]
        for i in range(0, len(starts), batch_size):
            rows = [windows.tokens.read(start, past + size + 1) for start in starts[i : i + batch_size]]
            yield torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, past + size + 1)


def read_windows(
    model: BDHForCausalLM, batches: Iterable[Tensor], precision: Precision, end_of_text: int | None
) -> Iterator[ScoredTokens]:
    """`read_in_pieces` of each batch, without dropout; the model's mode is restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            yield from read_in_pieces(model, batch.to(next(model.parameters()).device), precision, end_of_text)
    finally:
        model.train(was_training)


def long_length(tokens: int, block_size: int) -> int | None:
    """Tokens of a window that measures beyond the training block: 8 blocks, or as many as the text has.

    Args:
        tokens: Tokens of the text.
        block_size: Tokens of a training block.

    Returns:
        None for a text that is too short: with fewer than two blocks.
    """
    blocks = min(LONG_BLOCKS, (tokens - 1) // block_size)
    return blocks * block_size if blocks >= 2 else None


def score_beyond_block(
    model: BDHForCausalLM,
    windows: ValidationWindows,
    block_size: int,
    bytes_per_token: float,
    batch_size: int = 8,
    *,
    precision: Precision = nullcontext,
    end_of_text: int | None = None,
) -> PositionBin | None:
    """The loss at positions beyond the training block; None where no document is that long.

    Args:
        model: On the device to use.
        windows: Windows of several blocks.
        block_size: Tokens of a training block.
        bytes_per_token: Average bytes of a scored token.
        batch_size: Windows of one forward pass.
        precision: Makes the context of a forward pass.
        end_of_text: As for `read_in_pieces`.
    """
    bins = score_by_position(
        model,
        windows,
        bytes_per_token,
        batch_size,
        edges=[block_size, windows.block_size],
        precision=precision,
        end_of_text=end_of_text,
    )
    return bins[-1] if bins[-1].after == block_size else None


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Nats per token as bits per byte."""
    return loss / math.log(2) / bytes_per_token if bytes_per_token else math.inf


def table(bins: Sequence[PositionBin], block_size: int | None) -> list[str]:
    """The bins as lines of text, with a mark at those beyond the training block, if its length is known."""
    lines = [f"{'position':>12}  {'loss':>9}  {'bits per byte':>13}  {'tokens':>12}"]
    for entry in bins:
        beyond = "  beyond the training block" if block_size is not None and entry.after >= block_size else ""
        position = f"<= {entry.up_to}"
        lines.append(f"{position:>12}  {entry.loss:9.4f}  {entry.bits_per_byte:13.4f}  {entry.tokens:12,}{beyond}")
    return lines
