"""Recall tasks: sequences of bytes in which some bytes can only be predicted by recalling earlier ones.

Tasks, with the distance in tokens from what is recalled to where it is needed:

`mqar`          multi-query associative recall: pairs of a key and a value, filler text, then the keys again in another
                order; each value is to be recalled.
`similar_keys`  the same with keys of four bytes that differ from one another in one or two of these bytes.
`passkey`       six digits after a marker byte in filler text; later the marker again, and the digits are to be
                recalled.
`induction`     a string of random bytes that repeats itself; all bytes of the repetition but its first ones.

Keys are bytes from 128, values bytes from 192, the marker is byte 1; the filler is text. Every function makes a batch
on the device of its generator.
"""

import random
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100  # label of a token that is not scored
KEYS, VALUES = (128, 192), (192, 256)  # ranges of bytes
MARKER, DIGITS = 1, 6  # of a passkey
SIMILAR_KEY = 4  # bytes of one similar key
CUE = 8  # bytes of a repetition that are not scored, since nothing says that it begins
PAIRS = {"mqar": 16, "similar_keys": 32}  # most keys of a sequence
TASKS = ("mqar", "similar_keys", "passkey", "induction")
RECITED = 64  # bytes of a repetition that are scored in evaluation


class Batch(NamedTuple):
    """Sequences of a task.

    Attributes:
        tokens: (B, T) int64.
        labels: (B, T) int64, `labels[:, t]` is the byte to be predicted from the tokens up to t, or IGNORED.
        distances: (B, T) int64, distance to what is recalled; meaningless where labels are IGNORED.
    """

    tokens: Tensor
    labels: Tensor
    distances: Tensor


class Source(NamedTuple):
    """Where random numbers and filler text come from; both on one device.

    Attributes:
        draw: Generator of random numbers.
        text: Filler, (bytes) uint8.
    """

    draw: torch.Generator
    text: Tensor

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Uniform in low ... high - 1: `shape` int64."""
        return torch.randint(low, high, shape, generator=self.draw, device=self.text.device)

    def permutations(self, rows: int, n: int) -> Tensor:
        """A random order of 0 ... n - 1 for each row: (rows, n) int64."""
        return torch.rand(rows, n, generator=self.draw, device=self.text.device).argsort(1)

    def filler(self, rows: int, length: int) -> Tensor:
        """Windows of the text at random places: (rows, length) int64."""
        starts = self.integers(0, len(self.text) - length, rows, 1)  # (rows, 1)
        return self.text[starts + torch.arange(length, device=self.text.device)].long()


def associative_recall(source: Source, keys: Tensor, gap: int) -> Batch:
    """Pairs of the given keys and random values, `gap` bytes of filler, then the pairs again in another order.

    Args:
        source: Where values, orders and filler come from.
        keys: (B, K, bytes of a key) int64, distinct in each row.
        gap: Bytes of filler.
    """
    B, K, width = keys.shape
    pair = width + 1
    values = source.integers(*VALUES, B, K, 1)  # (B, K, 1)
    pairs = torch.cat((keys, values), dim=2)  # (B, K, pair)
    order = source.permutations(B, K)  # (B, K)  which pair each query is of
    queries = pairs.gather(1, order[:, :, None].expand(-1, -1, pair))  # (B, K, pair)
    tokens = torch.cat((pairs.flatten(1), source.filler(B, gap), queries.flatten(1)), dim=1)  # (B, T)
    labels, distances = torch.full_like(tokens, IGNORED), torch.zeros_like(tokens)  # (B, T)
    at = torch.arange(K, device=tokens.device) * pair  # (K)  where a pair begins
    asked = K * pair + gap + at  # (K)  where a query begins
    labels[:, asked + width - 1] = queries[:, :, -1]
    distances[:, asked + width - 1] = asked - at[order]
    return Batch(tokens, labels, distances)


def distinct_keys(source: Source, rows: int, n: int) -> Tensor:
    """Keys of one byte: (rows, n, 1) int64; n at most 64."""
    low, high = KEYS
    return source.permutations(rows, high - low)[:, :n, None] + low


def similar_keys(source: Source, rows: int, n: int) -> Tensor:
    """Keys that each differ from a string of the row in one byte: (rows, n, SIMILAR_KEY) int64; n at most 252."""
    low, high = KEYS
    base = source.integers(0, high - low, rows, 1, SIMILAR_KEY)  # (rows, 1, SIMILAR_KEY)
    # A change is a place in the key and what is added to the byte there, modulo the alphabet.
    change = source.permutations(rows, SIMILAR_KEY * (high - low - 1))[:, :n]  # (rows, n)
    place, added = change % SIMILAR_KEY, change // SIMILAR_KEY + 1  # (rows, n)
    changed = torch.arange(SIMILAR_KEY, device=place.device) == place[:, :, None]  # (rows, n, SIMILAR_KEY)
    return (base + changed * added[:, :, None]) % (high - low) + low


def mqar(source: Source, rows: int, n: int, gap: int) -> Batch:
    """Associative recall with n keys of one byte."""
    return associative_recall(source, distinct_keys(source, rows, n), gap)


def mqar_similar(source: Source, rows: int, n: int, gap: int) -> Batch:
    """Associative recall with n similar keys."""
    return associative_recall(source, similar_keys(source, rows, n), gap)


def passkey(source: Source, rows: int, distance: int, before: int = 0) -> Batch:
    """The marker and random digits after `before` bytes of filler, asked for again `distance` bytes later."""
    digits = source.integers(ord("0"), ord("9") + 1, rows, DIGITS)  # (B, DIGITS)
    marker = torch.full_like(digits[:, :1], MARKER)  # (B, 1)
    gap = distance - DIGITS - 1
    key = torch.cat((marker, digits), dim=1)  # (B, 1 + DIGITS)
    tokens = torch.cat((source.filler(rows, before), key, source.filler(rows, gap), key), dim=1)  # (B, T)
    labels = torch.full_like(tokens, IGNORED)  # (B, T)
    labels[:, -DIGITS - 1 : -1] = digits
    return Batch(tokens, labels, torch.full_like(tokens, distance))


def induction(source: Source, rows: int, distance: int, length: int, alphabet: int = 256) -> Batch:
    """Random bytes that repeat themselves after `distance` bytes, `length` bytes in all.

    Args:
        source: Of random numbers.
        rows: Sequences.
        distance: Bytes of the string.
        length: Bytes of a sequence.
        alphabet: Different bytes that a string may have; each row draws its own.
    """
    known = source.permutations(rows, 256)[:, :alphabet]  # (B, alphabet)
    string = known.gather(1, source.integers(0, alphabet, rows, distance))  # (B, distance)
    tokens = string.repeat(1, length // distance + 1)[:, :length]  # (B, T)
    labels = torch.full_like(tokens, IGNORED)  # (B, T)
    labels[:, distance + CUE - 1 : -1] = tokens[:, distance + CUE :]
    return Batch(tokens, labels, torch.full_like(tokens, distance))


# ----------------------------------------------------------------------------------- for training and evaluation


def training_batches(source: Source, sizes: random.Random, rows: int, length: int) -> dict[str, Batch]:
    """One batch of each task, `rows` sequences of at most `length` bytes.

    Args:
        source: Of random numbers and filler.
        sizes: Of the numbers of keys, the distances and the alphabets, which are uniform in the logarithm, so that
            small ones are frequent.
        rows: Sequences of each task.
        length: Longest sequence.
    """

    def between(low: int, high: int) -> int:
        return min(high, int(low * ((high + 1) / low) ** sizes.random()))

    made: dict[str, Batch] = {}
    for name, make, pair in (("mqar", mqar, 2), ("similar_keys", mqar_similar, SIMILAR_KEY + 1)):
        n = between(4, min(PAIRS[name], length // (2 * pair)))
        made[name] = make(source, rows, n, between(1, length - 2 * n * pair + 1) - 1)
    distance = between(2 * DIGITS, length - DIGITS - 1)
    made["passkey"] = passkey(source, rows, distance, sizes.randint(0, length - distance - DIGITS - 1))
    # Strings of few different bytes are easier to begin with: they can be guessed from the bytes that were seen.
    made["induction"] = induction(source, rows, between(2 * CUE, length - 4 * CUE), length, between(8, 256))
    return made


def evaluation_batch(task: str, source: Source, rows: int, distance: int, scale: float = 1.0) -> Batch:
    """Sequences that recall over `distance` bytes; for associative recall, over at most that many.

    Args:
        task: One of TASKS.
        source: Of random numbers and filler.
        rows: Sequences.
        distance: The distance, of which the caller wants those in distance / 2 ... distance.
        scale: The share of the keys that PAIRS allows, for models trained on shorter sequences.
    """
    if task == "passkey":
        return passkey(source, rows, distance)
    if task == "induction":
        return induction(source, rows, distance, distance + CUE + min(RECITED, distance - CUE))
    make, pair = (mqar, 2) if task == "mqar" else (mqar_similar, SIMILAR_KEY + 1)
    n = max(4, round(PAIRS[task] * scale))
    return make(source, rows, n, max(0, distance - 2 * n * pair))
