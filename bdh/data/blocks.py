"""Tokens to blocks of T + 1: every token is predicted once an epoch, from a text that lies still.

Rows of a batch are shared by several processes: each takes its own, all together take every block once. What a row
holds is a pure function of (text, settings, seed, number of the row), so a position is one number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bdh.data.tokens import Documents, InOrder, Tokens


@dataclass(frozen=True)
class Share:
    """Which of several processes this is: number `rank` of `world`."""

    rank: int = 0
    world: int = 1


ALONE = Share()
WINDOWS_SCANNED = 1024  # at a time


class BlockSource(Protocol):
    """Source of rows. All processes request the same row numbers in the same order."""

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The next `count` rows of this process: ids (count, T + 1), and which begin anew, (count,) bool."""

    def state_dict(self) -> dict[str, Any]:
        """The position: plain values, as JSON holds them."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def remarks(self) -> list[str]:
        """Lines about what was read so far, where that was not known beforehand."""

    def close(self) -> None: ...


class MixedSource(BlockSource, Protocol):
    """One that can be mixed with others."""

    def pick(self, total: int, places: Sequence[int]) -> list[np.ndarray]:
        """Of the next `total` rows of all processes those at these places, which are this one's: (T + 1,) each."""


class PackedBlocks:
    """Blocks of a text in random order, epoch by epoch.

    An epoch cuts the text, thought of as a ring, into blocks of T targets from a random place on, and goes through
    them in random order; what is left over, less than a block, lies elsewhere in the next epoch.

    Args:
        tokens: The text, more than T tokens.
        block_size: T.
        seed: Of the cuts and orders.
        share: Which rows are this process's.
        stream: Tells the random numbers of this source from those of others.
    """

    def __init__(self, tokens: Tokens, block_size: int, seed: int, share: Share = ALONE, stream: int = 1):
        self.tokens = tokens
        self.block_size = block_size
        self.seed = seed
        self.stream = stream
        self.share = share
        self.per_epoch = max(len(tokens) // block_size, 1)
        self.position = 0
        self._epoch = -1

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        first = self.position + self.share.rank * count
        self.position += self.share.world * count
        rows = np.stack([self.block(number) for number in range(first, first + count)])
        return rows, np.ones(count, dtype=bool)

    def pick(self, total: int, places: Sequence[int]) -> list[np.ndarray]:
        first = self.position
        self.position += total
        return [self.block(first + place) for place in places]

    def block(self, number: int) -> np.ndarray:
        """Row `number` of the whole run, all epochs and processes together: (T + 1,)."""
        epoch, i = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            draw = generator(self.seed, self.stream, epoch)
            self._shift = int(draw.integers(len(self.tokens)))
            self._order = draw.permutation(self.per_epoch)
            self._epoch = epoch
        start = self._shift + int(self._order[i]) * self.block_size
        return self.tokens.read_around(start, self.block_size + 1)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def remarks(self) -> list[str]:
        return []

    def close(self) -> None:
        pass


class Lanes:
    """Blocks that go on where those before stopped, for a state that is carried from step to step.

    An epoch puts the documents in random order and cuts the whole into as many lanes as the batch has rows; row i reads
    lane i from its beginning to its end.

    Args:
        documents: The text; each lane gets more than T tokens.
        block_size: T.
        lanes: Rows of the batch, all processes together.
        seed: Of the orders.
        share: Which lanes are this process's.
    """

    def __init__(self, documents: Documents, block_size: int, lanes: int, seed: int, share: Share = ALONE):
        self.documents = documents
        self.block_size = block_size
        self.lanes = lanes
        self.seed = seed
        self.share = share
        self.lane_size = len(documents.tokens) // lanes
        self.per_epoch = (self.lane_size - 1) // block_size
        self.position = 0
        self._epoch = -1

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, step = divmod(self.position, self.per_epoch)
        if epoch != self._epoch:
            order = generator(self.seed, 1, epoch).permutation(len(self.documents.starts))
            self._text = InOrder(self.documents, order)
            self._epoch = epoch
        first = self.share.rank * count
        starts = [lane * self.lane_size + step * self.block_size for lane in range(first, first + count)]
        self.position += 1
        rows = np.stack([self._text.read(start, self.block_size + 1) for start in starts])
        return rows, np.full(count, step == 0)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def remarks(self) -> list[str]:
        return []

    def close(self) -> None:
        pass


class Mixture:
    """Rows of several sources, each drawn with its weight: the weights are shares of the training tokens.

    Which source a row of all processes' is of does not depend on how many they are.
    """

    def __init__(self, sources: Sequence[MixedSource], weights: list[float], seed: int, share: Share = ALONE):
        self.sources = sources
        self.share = share
        self.shares = np.array(weights) / sum(weights)
        self.seed = seed
        self.position = 0

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        total, first = count * self.share.world, count * self.share.rank
        chosen = generator(self.seed, 0, self.position).choice(len(self.sources), size=total, p=self.shares)  # (total,)
        self.position += 1
        rows: list[Any] = [None] * count
        for i, source in enumerate(self.sources):
            places = np.flatnonzero(chosen == i)  # in the rows of all processes
            own = np.flatnonzero((places >= first) & (places < first + count)).tolist()
            for number, row in zip(own, source.pick(len(places), own), strict=True):
                rows[places[number] - first] = row
        return np.stack(rows), np.ones(count, dtype=bool)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "sources": [source.state_dict() for source in self.sources]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
        for source, position in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(position)

    def remarks(self) -> list[str]:
        return [line for source in self.sources for line in source.remarks()]

    def close(self) -> None:
        for source in self.sources:
            source.close()


def generator(seed: int, stream: int, number: int) -> np.random.Generator:
    """Random numbers that depend on these three alone; another stream or number has nothing in common with them."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], np.uint64), counter=[0, 0, 0, number]))


def inputs_and_targets(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Splits rows (B, T + 1) into inputs and targets, (B, T) each; the target is -100 where nothing is predicted."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]  # (B, T) each
    return torch.where(inputs < 0, ~inputs, inputs), torch.where(targets < 0, -100, targets)


def document_ids(inputs: Tensor, end_of_text: int) -> Tensor:
    """Which document each token is of, counted from the one that a row goes on with: 0, …; (B, T) -> (B, T) int64.

    The end-of-text token is the first of the document after it: what it predicts depends on nothing before.
    """
    return (inputs == end_of_text).cumsum(1)


class ValidationWindows:
    """The validation text in windows of `block_size`, one after another; all of them, or a fixed sample.

    Args:
        tokens: Token ids.
        block_size: Tokens predicted in a window.
        limit: Use at most this many windows, spread evenly over those of the text in which a token is to be predicted;
            None for all.
        whole: Score every token after the first one: also those after the last window, in a shorter window.
    """

    def __init__(self, tokens: Tokens, block_size: int, limit: int | None = None, whole: bool = False):
        self.tokens = tokens
        self.block_size = block_size
        self.count = (len(tokens) - 1) // block_size
        self.whole = whole
        chosen = np.arange(self.count)
        if limit is not None and limit < self.count:
            chosen = self._with_targets()
            if limit < len(chosen):
                chosen = chosen[np.linspace(0, len(chosen) - 1, limit).astype(int)]
        self.starts = chosen * block_size
        self.tail_size = len(tokens) - 1 - self.count * block_size if whole else 0

    def __len__(self) -> int:
        return len(self.starts) + (self.tail_size > 0)

    def _with_targets(self) -> np.ndarray:
        """The numbers of the windows in which a token is to be predicted, ascending; of all, if there are none."""
        if self.tokens.dtype.kind == "u":
            return np.arange(self.count)
        numbers_by_chunk = []
        for first in range(0, self.count, WINDOWS_SCANNED):
            count = min(WINDOWS_SCANNED, self.count - first)
            ids = self.tokens.read(first * self.block_size + 1, count * self.block_size)
            numbers_by_chunk.append(first + np.flatnonzero((ids.reshape(count, -1) >= 0).any(1)))
        numbers = np.concatenate(numbers_by_chunk)
        return numbers if len(numbers) else np.arange(self.count)

    def batches(self, batch_size: int, share: Share = ALONE) -> Iterator[Tensor]:
        """The windows in order, (up to batch_size, block_size + 1) int64 at a time; the shorter one is the last batch.

        Of several processes each gets as many batches as the others: where there are too few windows for that, empty
        ones, (0, block_size + 1).
        """
        size = -(-len(self.starts) // share.world)
        own = self.starts[share.rank * size : (share.rank + 1) * size]
        for i in range(0, size, batch_size):
            yield self._windows(own[i : i + batch_size])
        if self.tail_size:
            tail = self._tail()
            yield tail if share.rank == share.world - 1 else tail[:0]

    def lanes(self, batch_size: int) -> Iterator[Tensor]:
        """As many windows in another arrangement, for a state that is carried: each row goes on from batch to batch.

        The rows begin at places spread evenly over the text; (up to batch_size, block_size + 1) int64 at a time. What
        does not fill all rows, less than `batch_size` windows, is left out, or, of a whole text, read by the last row,
        while the others have nothing to predict.
        """
        rows = min(batch_size, len(self.starts))
        steps = len(self.starts) // rows
        first = np.arange(rows) * (self.count // rows)  # (rows,) windows
        for step in range(steps):
            yield self._windows((first + step) * self.block_size)
        if not self.whole:
            return
        for number in range(rows * steps, self.count):
            yield _in_last_row(self._windows(np.array([number * self.block_size])), rows)
        if self.tail_size:
            yield _in_last_row(self._tail(), rows)

    def _tail(self) -> Tensor:
        """The tokens after the last window and the one before them, (1, tail_size + 1) int64."""
        ids = self.tokens.read(self.count * self.block_size, self.tail_size + 1)
        return torch.from_numpy(ids.astype(np.int64))[None]

    def _windows(self, starts: np.ndarray) -> Tensor:
        rows = [self.tokens.read(int(start), self.block_size + 1) for start in starts]
        stacked = np.stack(rows) if rows else np.empty((0, self.block_size + 1))
        return torch.from_numpy(stacked.astype(np.int64))


def _in_last_row(window: Tensor, rows: int) -> Tensor:
    """A window (1, T + 1) as the last of `rows` rows; in the others nothing is to be predicted: (rows, T + 1)."""
    masked = torch.where(window < 0, window, ~window)
    return torch.cat([masked.expand(rows - 1, -1), window])
