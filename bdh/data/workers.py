"""Streams read by processes of their own, taken up again exactly.

Reader i of W hands its pieces to the training process in turn: piece k comes from reader k modulo W. Each piece carries
the position after it, so the position of the whole is the position of every reader at its last piece that was used up.
What the processes have read ahead is simply read again.
"""

import os
import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from bdh.data.prepare import Counts
from bdh.errors import BDHError

ROWS = 16  # handed over at a time
Position = dict[str, Any]


class RowStream(Protocol):
    """`WindowedBlocks`, whose rows are single, or `CarriedLanes`, whose rows are whole batches."""

    def start(self) -> Position: ...

    def rows(self, position: Position) -> Iterator[tuple[np.ndarray, bool, Position]]: ...


@dataclass
class WorkerRows:
    """Rows from one reader, or what went wrong there.

    Attributes:
        rows: Ids, (rows, …).
        fresh: Whether each begins anew, (rows,) bool.
        after: The position after the last row.
        failure: A line for the user, None if all is well.
    """

    rows: np.ndarray
    fresh: np.ndarray
    after: Position
    failure: str | None = None


class WorkerDataset(IterableDataset):
    """Iterates over a reader's rows in a worker process, from its position on, ROWS at a time."""

    def __init__(self, streams: list[RowStream], positions: list[Position], first: int):
        self.streams = streams
        self.positions = positions
        self.first = first

    def __iter__(self) -> Iterator[WorkerRows]:
        worker = get_worker_info()
        number = (self.first + (worker.id if worker else 0)) % len(self.streams)
        try:
            rows: list[np.ndarray] = []
            fresh: list[bool] = []
            for row, anew, after in self.streams[number].rows(self.positions[number]):
                rows.append(row)
                fresh.append(anew)
                if len(rows) == ROWS or row.ndim > 1:
                    yield WorkerRows(np.stack(rows), np.array(fresh), after)
                    rows, fresh = [], []
        except Exception as error:  # the traceback of another process would tell the user nothing
            if worker is None or not isinstance(error, BDHError | OSError):
                raise
            yield WorkerRows(np.empty(0), np.empty(0), {}, " ".join(str(error).split()))


class StreamRows:
    """A `BlockSource` of one or several readers.

    Args:
        streams: One for each reader of this process.
        name: What messages call the source.
        workers: Whether each reader gets a process of its own; otherwise there is one, read between the steps.
    """

    def __init__(self, streams: list[RowStream], name: str, workers: bool):
        self.streams = streams
        self.name = name
        self.workers = workers
        self.positions = [stream.start() for stream in streams]
        self.next = 0  # the reader whose turn it is
        self.used = 0  # rows used of its piece
        self._pieces: Iterator[WorkerRows] | None = None
        self._piece: WorkerRows | None = None

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The next `count` rows; whole batches, of streams that make such, are passed on as they are."""
        if self._pieces is None:
            self._pieces = self._begin()
        rows: list[np.ndarray] = []
        fresh: list[bool] = []
        while len(rows) < count:
            if self._piece is None:
                self._piece = self._receive()
            piece = self._piece
            row = piece.rows[self.used]
            if row.ndim > 1:
                rows, fresh = list(row), [bool(piece.fresh[self.used])] * len(row)
            else:
                rows.append(row)
                fresh.append(bool(piece.fresh[self.used]))
            self.used += 1
            if self.used >= len(piece.rows):
                self.positions[self.next] = piece.after
                self.next = (self.next + 1) % len(self.streams)
                self.used, self._piece = 0, None
        return np.stack(rows), np.array(fresh)

    def pick(self, total: int, places: Sequence[int]) -> list[np.ndarray]:
        """As many rows as places: processes that share a stream read parts of their own of it."""
        return list(self.take(len(places))[0]) if places else []

    def _begin(self) -> Iterator[WorkerRows]:
        pieces = WorkerDataset(self.streams, list(self.positions), self.next)
        if not self.workers:
            return iter(pieces)
        loader = DataLoader(
            pieces,
            batch_size=None,
            num_workers=len(self.streams),
            prefetch_factor=4,
            generator=torch.Generator(),  # or the loader would take random numbers that dropout is to have
            worker_init_fn=_begin_worker,
            collate_fn=_as_it_is,
        )
        return iter(loader)

    def _receive(self) -> WorkerRows:
        assert self._pieces is not None
        try:
            piece = next(self._pieces)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise BDHError(
                "a process that reads the text has died; if memory ran out, try a smaller data.num_workers or "
                "data.shuffle_blocks"
            ) from error
        if piece.failure is not None:
            raise BDHError(piece.failure)
        return piece

    def state_dict(self) -> dict[str, Any]:
        return {"readers": list(self.positions), "next": self.next, "used": self.used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["readers"]) != len(self.streams):
            raise BDHError(
                f"the checkpoint's text was read by {len(state['readers'])} readers in each process, now there are "
                f"{len(self.streams)}; keep data.num_workers to go on exactly"
            )
        self.close()
        self.positions, self.next, self.used = list(state["readers"]), state["next"], state["used"]

    def remarks(self) -> list[str]:
        total = Counts()
        for position in self.positions:
            total.add(Counts(**position["reader"]["counts"]))
        return total.remarks(self.name)

    def close(self) -> None:
        """Ends the worker processes."""
        if isinstance(self._pieces, Generator):  # a stream left open would hold up the end of the process
            self._pieces.close()
        self._pieces = self._piece = None


def _begin_worker(number: int) -> None:
    """Leaves Ctrl-C to the training process, and the cores to the readers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def _as_it_is(piece: Any) -> Any:
    return piece
