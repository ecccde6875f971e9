"""Streams: text that is read, tokenized and cut into blocks while training, and taken up again exactly.

A reader is one of `count` that share a stream: documents of its own, its own windows of blocks. A position is where
the source was before the first batch of text that is still needed, and how much of what follows is done: going on reads
that much again, never the beginning.
"""

import zlib
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from itertools import compress
from typing import Any

import numpy as np

from bdh.data.blocks import generator
from bdh.data.encoding import Encoder, encode_utf8
from bdh.data.prepare import Counts, rows_encoder, tally
from bdh.data.settings import SourceConfig
from bdh.data.tokens import Tokens
from bdh.errors import BDHError

BATCH_ROWS = 16  # rows handed to the tokenizer at a time
HELD_OUT_STEPS = 10_000  # how finely `train_split` divides
LONGEST = 1 << 22  # tokens of a document that a lane holds; a longer one ends there and begins anew


@dataclass(frozen=True)
class StreamSettings:
    """Settings that turn a stream into rows.

    Attributes:
        source: What to read.
        encoder: Of the tokenizer.
        block_size: T.
        shuffle_blocks: Blocks of a window, within which they are put in random order.
        train_split: Share of the documents that is read; the others, by their checksum, are held out.
        seed: Of the orders.
        stream: Tells this source's random numbers from those of others.
    """

    source: SourceConfig
    encoder: Encoder
    block_size: int
    shuffle_blocks: int
    train_split: float
    seed: int
    stream: int


@dataclass(frozen=True)
class EncodedRows:
    """Some rows of text as token ids, and where the source was before and after them."""

    before: dict[str, Any]
    after: dict[str, Any]
    tokens: list[np.ndarray]
    ends: list[bool]


def is_held_out(text: str, train_split: float) -> bool:
    """Whether a document validates: decided by its text alone, so the same for every reader, run and repetition."""
    return zlib.crc32(encode_utf8(text)) % HELD_OUT_STEPS >= train_split * HELD_OUT_STEPS


class Reader:
    """Reader number `number` of `count`: endless batches of tokenized documents, epoch after epoch."""

    def __init__(self, settings: StreamSettings, number: int = 0, count: int = 1):
        self.settings = settings
        self.number = number
        self.count = count
        self.encode = rows_encoder(settings.encoder)

    def start(self) -> dict[str, Any]:
        """The position before everything."""
        return {"epoch": 0, "source": None, "counts": asdict(Counts())}

    def batches(self, position: dict[str, Any]) -> Iterator[EncodedRows]:
        """Batches from a position on."""
        from bdh.data.sources import explained, open_source

        source = open_source(self.settings.source, streaming=True, ask_hub=False, readers=self.count)
        source = self._share(source)
        with explained(self.settings.source):
            while True:
                position = yield from self._epoch(source, position)

    def _epoch(self, source: Any, before: dict[str, Any]) -> Generator[EncodedRows, None, dict[str, Any]]:
        """Batches to the end of an epoch; returns the position at the beginning of the next."""
        settings = self.settings
        counts = Counts(**before["counts"])
        epoch, whole = before["epoch"], before["source"] is None
        source.load_state_dict(before["source"])  # None: from the beginning, whatever was loaded before
        if settings.shuffle_blocks > 1:  # the order of the shards is drawn from this number
            source.set_epoch(int(generator(settings.seed, settings.stream, epoch).integers(1, 2**31)))
        read = False
        for rows in source.iter(batch_size=BATCH_ROWS):
            encoded = self.encode(self._kept(rows))
            if epoch == 0:
                tally(counts, encoded)
            after = {"epoch": epoch, "source": source.state_dict(), "counts": asdict(counts)}
            read = read or any(len(ids) for ids in encoded["tokens"])
            yield EncodedRows(before, after, encoded["tokens"], encoded["ends"])
            before = after
        if whole and not read:
            if counts.unusable:
                raise BDHError(counts.nothing_usable(settings.source.path, settings.source.text_column))
            raise BDHError(
                f"data: {settings.source.path} gives reader {self.number + 1} of {self.count} no text to train on; try "
                "a smaller data.num_workers, or no data.streaming"
            )
        return {"epoch": epoch + 1, "source": None, "counts": asdict(counts)}

    def _share(self, source: Any) -> Any:
        """This reader's part: shards where there are enough to be dealt out evenly, else every so-manyth row.

        Rows of plain text are no documents: its parts are always dealt out, and there are enough of them.
        """
        from datasets.distributed import split_dataset_by_node

        if self.count == 1:
            return source
        plain = source.features is not None and "ends" in source.features
        if source.num_shards >= 8 * self.count or (plain and source.num_shards >= self.count):
            return source.shard(num_shards=self.count, index=self.number, contiguous=False)
        return split_dataset_by_node(source, rank=self.number, world_size=self.count)

    def _kept(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The rows that are not held out."""
        if self.settings.train_split >= 1:
            return rows
        keys = rows.get("key", rows["text"])
        kept = [not is_held_out(key or "", self.settings.train_split) for key in keys]
        return {name: list(compress(values, kept)) for name, values in rows.items()}


class WindowedBlocks:
    """Rows of T + 1 tokens from one reader, in random order within windows.

    The stream is cut into blocks of T targets without a gap; a window of them is put into random order and handed out
    before the next is read.
    """

    def __init__(self, reader: Reader):
        self.reader = reader

    def start(self) -> dict[str, Any]:
        return {"reader": self.reader.start(), "skip": 0, "window": 0, "taken": 0}

    def rows(self, position: dict[str, Any]) -> Iterator[tuple[np.ndarray, bool, dict[str, Any]]]:
        """(row (T + 1,), whether it begins anew, the position after it), from a position on."""
        settings = self.reader.settings
        T, count = settings.block_size, settings.shuffle_blocks
        window, taken, skip = position["window"], position["taken"], position["skip"]
        held: deque[EncodedRows] = deque()  # what the window and what follows it lie in
        text = np.empty(0, dtype=settings.encoder.dtype)
        batches = self.reader.batches(position["reader"])
        while True:
            parts, size = [text], len(text)
            while size - skip < count * T + 1:
                held.append(next(batches))
                parts += held[-1].tokens
                size += sum(len(ids) for ids in held[-1].tokens)
            text = np.concatenate(parts)
            number = window * self.reader.count + self.reader.number
            order = generator(settings.seed, settings.stream + 2**32, number).permutation(count)
            here = {"reader": held[0].before, "skip": skip, "window": window}
            for i in range(taken, count):
                start = skip + int(order[i]) * T
                yield text[start : start + T + 1], True, {**here, "taken": i + 1}
            skip += count * T
            while (length := sum(len(ids) for ids in held[0].tokens)) <= skip:  # text is longer than skip
                skip -= length
                text = text[length:]
                held.popleft()
            window, taken = window + 1, 0


class CarriedLanes:
    """Rows that go on from step to step: each lane reads whole documents, one after another.

    A lane that runs short takes the next document of the reader, so lanes need no more memory than the documents they
    are in. The position tells from which batch on the documents are needed, and where in them each lane is.
    """

    def __init__(self, reader: Reader, lanes: int):
        self.reader = reader
        self.lanes = lanes

    def start(self) -> dict[str, Any]:
        return {"reader": self.reader.start(), "first": 0, "next": 0, "lanes": [[[], 0]] * self.lanes, "begun": False}

    def rows(self, position: dict[str, Any]) -> Iterator[tuple[np.ndarray, bool, dict[str, Any]]]:
        """(rows (lanes, T + 1), whether they begin anew, the position after them), from a position on."""
        T = self.reader.settings.block_size
        lanes: list[tuple[list[int], int]] = [(list(numbers), offset) for numbers, offset in position["lanes"]]
        documents = self._documents(position["reader"], position["first"])
        texts: dict[int, np.ndarray] = {}  # documents that lanes are in
        origin: dict[int, tuple[dict[str, Any], int]] = {}  # where each can be read again from
        live = {number for numbers, _ in lanes for number in numbers}
        for _ in range(position["first"], position["next"]):  # what was handed out before
            number, text, where = next(documents)
            if number in live:
                texts[number], origin[number] = text, where
        fresh, upcoming = not position["begun"], position["next"]
        while True:
            rows = []
            for i, (numbers, offset) in enumerate(lanes):
                while sum(len(texts[n]) for n in numbers) - offset < T + 1:
                    number, text, where = next(documents)
                    texts[number], origin[number] = text, where
                    numbers.append(number)
                    upcoming = number + 1
                rows.append(Tokens([texts[n] for n in numbers]).read(offset, T + 1))
                offset += T
                while len(texts[numbers[0]]) <= offset:
                    offset -= len(texts[numbers[0]])
                    texts.pop(numbers[0])
                    origin.pop(numbers.pop(0))
                lanes[i] = (numbers, offset)
            begin = origin[min(origin)]
            after = {"reader": begin[0], "first": begin[1], "next": upcoming, "begun": True}
            yield np.stack(rows), fresh, {**after, "lanes": [[list(numbers), offset] for numbers, offset in lanes]}
            fresh = False

    def _documents(
        self, position: dict[str, Any], number: int
    ) -> Iterator[tuple[int, np.ndarray, tuple[dict[str, Any], int]]]:
        """(number, ids, (position, number of the first document there)) of each document from a position on."""
        ending = self.reader.settings.encoder.ending
        parts: list[np.ndarray] = []
        size = 0
        where = (position, number)
        for batch in self.reader.batches(position):
            if not parts:
                where = (batch.before, number)
            for ids, last in zip(batch.tokens, batch.ends, strict=True):
                if len(ids):
                    parts.append(ids)
                    size += len(ids)
                if size and (last or size >= LONGEST):
                    yield number, np.concatenate(parts if last else [*parts, ending]), where
                    number += 1
                    parts, size = [], 0
            if not parts:
                where = (batch.after, number)
