"""From settings to batches: opens every source, tokenizes or streams it, and puts the parts together."""

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bdh.data.blocks import ALONE, BlockSource, Lanes, Mixture, PackedBlocks, Share
from bdh.data.chat import ChatEncoder, messages_of
from bdh.data.corpora import load_corpus
from bdh.data.encoding import Encoder
from bdh.data.path_resolution import counted, find
from bdh.data.prepare import (
    Counts,
    Prepared,
    characters,
    cut,
    cut_between,
    prepare,
    prepare_texts,
    rows_encoder,
    tally,
)
from bdh.data.settings import DataConfig, SourceConfig
from bdh.data.stream import CarriedLanes, Reader, StreamSettings, WindowedBlocks, is_held_out
from bdh.data.tokens import Documents, Tokens
from bdh.data.workers import RowStream, StreamRows
from bdh.errors import BDHError

VALIDATION_TOKENS = 1 << 20  # of a stream: what is held out and read before training begins
VALIDATION_READ = 200_000_000  # characters of a stream read to find them
POSITIONS = 2  # raise it when positions in a stream of files with columns become others
ROWS_CHECKED = 1000  # of a stream in which too little was held out


@dataclass
class Batch:
    """Rows of a step.

    Attributes:
        tokens: Ids, (B, T + 1) int64: columns 0..T-1 are inputs, 1..T their targets; ~id is read and not predicted
            (`inputs_and_targets` takes them apart).
        fresh: Whether a row begins anew, or goes on from the same row of the step before, (B,) bool.
    """

    tokens: Tensor
    fresh: Tensor

    @property
    def num_target_tokens(self) -> int:
        """The number of target tokens."""
        return int((self.tokens[:, 1:] >= 0).sum())


@dataclass
class TrainingData:
    """All that training asks of text.

    Attributes:
        source: Where the rows come from.
        batch_size: Rows of this process in a step.
        validation: The tokens to validate on.
        validation_bytes_per_token: UTF-8 bytes that a predicted validation token stands for, on average.
        train_tokens: Tokens of an epoch; None for a stream.
        identity: What tells this text from another; plain values.
        remarks: Lines about what was read.
    """

    source: BlockSource
    batch_size: int
    validation: Tokens
    validation_bytes_per_token: float
    train_tokens: int | None
    identity: dict[str, Any]
    remarks: list[str] = field(default_factory=list)

    def next_batch(self) -> Batch:
        rows, fresh = self.source.take(self.batch_size)
        return Batch(torch.from_numpy(rows.astype(np.int64)), torch.from_numpy(fresh))

    def close(self) -> None:
        """Ends the processes that read."""
        self.source.close()


@dataclass
class _Part:
    """One source, opened."""

    rows: Any  # a BlockSource
    validation: Tokens
    validation_bytes: int
    train_tokens: int | None
    identity: dict[str, Any]
    remarks: list[str]


def open_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int,
    seed: int,
    carry_state: bool = False,
    share: Share = ALONE,
    say: Callable[[str], None] = lambda line: None,
) -> TrainingData:
    """The training rows and the validation text of a configuration.

    Args:
        config: Which text, and how to cut it.
        tokenizer: Makes its tokens.
        batch_size: Rows of a step, all processes together.
        seed: Of every order.
        carry_state: Whether rows go on from step to step.
        share: Which of the processes this is.
        say: Told what takes its time.

    Raises:
        BDHError: A source cannot be read, or is too short for a block.
    """
    encoder = Encoder(tokenizer)
    apart = carry_state or not config.cross_documents
    if apart and encoder.end_of_text is None:
        setting = "training.carry_state true" if carry_state else "data.cross_documents false"
        raise BDHError(
            f"{setting} needs to know where documents end, and the tokenizer has no end-of-text token; take one that "
            "has, as --data.tokenizer bytes, or train one: bdh tokenizer train --output DIR"
        )
    if apart and config.has_chats() and ChatEncoder(tokenizer).ends_turns_with_documents:
        raise BDHError(
            f"the chat template ends turns with {tokenizer.eos_token}, which ends documents too, so conversations "
            "cannot be told apart; leave out data.cross_documents false and training.carry_state"
        )
    if batch_size % share.world:
        raise BDHError(f"training.batch_size is {batch_size}; it must be a multiple of the {share.world} processes")
    opener = _Opener(config, tokenizer, encoder, batch_size, seed, carry_state, share, say)
    sources = config.sources()
    parts = [opener.part(source, i + 1) for i, source in enumerate(sources)] or [opener.corpus()]
    weights = [source.weight for source in sources]
    rows = parts[0].rows if len(parts) == 1 else Mixture([part.rows for part in parts], weights, seed, share)
    validation = Tokens([array for part in parts for array in part.validation.arrays])
    return TrainingData(
        rows,
        batch_size // share.world,
        validation,
        sum(part.validation_bytes for part in parts) / max(validation.num_target_tokens(), 1),
        None if config.streaming else sum(part.train_tokens or 0 for part in parts),
        parts[0].identity if len(parts) == 1 else {"mixture": [part.identity for part in parts]},
        [line for part in parts for line in part.remarks],
    )


def read_text(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    say: Callable[[str], None] = lambda line: None,
    notify: Callable[[str], None] = lambda line: None,
) -> tuple[str, Tokens, int]:
    """The text to score a model on: a path as a whole (its validation split if one is named), or a corpus's validation
    part.

    Args:
        config: Which text.
        tokenizer: Makes its tokens.
        say: Called with lines about the progress.
        notify: Called with lines about files and rows that are not read.

    Returns:
        The name of the text, its tokens, and their UTF-8 bytes.

    Raises:
        BDHError: A source cannot be read, or no row of it can be used.
    """
    opener = _Opener(config, tokenizer, Encoder(tokenizer), 1, 0, False, ALONE, say)
    sources = config.sources()
    if not sources:
        corpus = opener.prepared_corpus()
        _, validation, size = cut(corpus, config.train_split, tokenizer, opener.encoder)
        return config.corpus, validation, size
    name = ", ".join(source.path for source in sources)
    if config.streaming:
        streams = [opener.whole_stream(source, notify) for source in sources]
        tokens = Tokens([array for stream in streams for array in stream[0].arrays])
        return f"{name} (the first {len(tokens):,} tokens)", tokens, sum(stream[1] for stream in streams)
    texts = [opener.prepared(source, source.validation_split or source.split) for source in sources]
    for source, text in zip(sources, texts, strict=True):
        for line in [*find(source.path).remarks, *text.counts.remarks(source.path)]:
            notify(line)
    tokens = Tokens([array for text in texts for array in text.tokens.arrays])
    return name, tokens, sum(int(text.row_bytes.sum()) for text in texts)


def training_texts(config: DataConfig, notify: Callable[[str], None] = lambda line: None) -> Iterator[str]:
    """The training part of a text, as it comes: what a tokenizer may learn from.

    Args:
        config: Which text.
        notify: Called with lines about files and rows that are not read.

    Raises:
        BDHError: A source cannot be read, or no row of it can be used.
    """
    sources = config.sources()
    if not sources:
        documents = load_corpus(config.corpus, config.cache_dir)
        room = int(sum(map(len, documents)) * config.train_split)
        for text in documents:
            yield text[:room]
            room -= len(text)
            if room <= 0:
                return
    for source in sources:
        yield from _texts_of(source, config, notify)


def _texts_of(source: SourceConfig, config: DataConfig, notify: Callable[[str], None]) -> Iterator[str]:
    from bdh.data.sources import explained, open_source

    location = find(source.path)
    for line in location.remarks:
        notify(line)
    rows: Any = open_source(source, config.streaming, location=location)
    share = 1.0 if source.validation_split else config.train_split
    counts = Counts()
    with explained(source):
        if config.streaming:
            room = math.inf
        elif source.chat:
            room = share * sum(len(said(row["text"], Counts())) for row in rows)
        else:
            room = share * characters(rows)
        for row in rows:
            if config.streaming and is_held_out(row.get("key", row["text"] or ""), share):
                continue
            text = said(row["text"], counts) if source.chat else _plain(row["text"], counts)
            yield text[: int(min(room, len(text)))]
            room -= len(text)
            if room <= 0 and text:
                break
    if not counts.documents:
        raise BDHError(counts.nothing_usable(source.path, source.text_column))
    for line in counts.remarks(source.path):
        notify(line)


def _plain(text: str | None, counts: Counts) -> str:
    counts.add(Counts(documents=1) if text else Counts(empty=1))
    return text or ""


def said(conversation: Any, counts: Counts) -> str:
    """The contents of a conversation, one message after another; empty if it cannot be used, which is counted."""
    if conversation is None:
        counts.empty += 1
        return ""
    try:
        text = "\n".join(message["content"] for message in messages_of(conversation))
    except BDHError as error:
        counts.add(Counts(unusable=1, problem=str(error)))
        return ""
    counts.documents += 1
    return text


@dataclass
class _Opener:
    """Opens sources with the settings they share."""

    config: DataConfig
    tokenizer: PreTrainedTokenizerFast
    encoder: Encoder
    batch_size: int
    seed: int
    carry_state: bool
    share: Share
    say: Callable[[str], None]

    def corpus(self) -> _Part:
        if self.config.streaming:
            raise BDHError("data.streaming true needs data.path or data.mixture; a corpus by name is read at once")
        return self._open_map_style(self.prepared_corpus(), None, self.config.corpus, 1, False)

    def encoder_of(self, source: SourceConfig) -> Encoder:
        return ChatEncoder(self.tokenizer) if source.chat else self.encoder

    def prepared_corpus(self) -> Prepared:
        return prepare_texts(load_corpus(self.config.corpus, self.config.cache_dir), self.encoder)

    def part(self, source: SourceConfig, stream: int) -> _Part:
        if self.config.streaming:
            return self._streamed(source, stream)
        text = self.prepared(source, source.split)
        held_out = self.prepared(source, source.validation_split) if source.validation_split else None
        part = self._open_map_style(text, held_out, source.path, stream, source.chat)
        part.remarks = [*find(source.path).remarks, *part.remarks]
        return part

    def prepared(self, source: SourceConfig, split: str) -> Prepared:
        """All tokens of a split, from the cache or made now."""
        from bdh.data.sources import explained, open_source

        location = find(source.path)
        rows: Any = open_source(source, streaming=False, split=split, location=location)
        with explained(source):
            text = prepare(rows, self.encoder_of(source), self.config.num_proc)
        if not text.counts.documents:
            raise BDHError(text.counts.nothing_usable(source.path, source.text_column))
        how = "found tokenized in the cache" if text.cached else "tokenized"
        sizes = [location.size(source.path), "" if location.kind == "text" else counted(len(rows), "row")]
        sizes.append(f"{len(text.tokens):,} tokens {how}")
        self.say(f"{source.path} ({split}): {', '.join(filter(None, sizes))}")
        return text

    def _open_map_style(self, text: Prepared, held_out: Prepared | None, name: str, stream: int, chat: bool) -> _Part:
        """A source that lies still: all of it tokenized."""
        config = self.config
        remarks = text.counts.remarks(name)
        if held_out is None and chat:
            train, validation, size = cut_between(text, config.train_split)
        elif held_out is None:
            train, validation, size = cut(text, config.train_split, self.tokenizer, self.encoder)
        else:
            train, validation, size = text.documents, held_out.tokens, int(held_out.row_bytes.sum())
        self._check_length(train.tokens, "training", name)
        self._check_length(validation, "validation", name)
        rows: BlockSource
        if self.carry_state:
            rows = self._lanes(train, name)
        else:
            rows = PackedBlocks(train.tokens, config.block_size, self.seed, self.share, stream)
        identity = {
            "train_tokens": len(train.tokens),
            "train_checksum": train.tokens.checksum(),
            "validation_checksum": validation.checksum(),
        }
        return _Part(rows, validation, size, len(train.tokens), identity, remarks)

    def _lanes(self, documents: Documents, name: str) -> Lanes:
        if len(documents.tokens) // self.batch_size <= self.config.block_size:
            raise BDHError(
                f"training.carry_state needs more than data.block_size {self.config.block_size} tokens for each of "
                f"training.batch_size {self.batch_size} rows, but {name} has {len(documents.tokens):,} tokens to train "
                "on; make either smaller"
            )
        return Lanes(documents, self.config.block_size, self.batch_size, self.seed, self.share)

    def _check_length(self, tokens: Tokens, which: str, name: str) -> None:
        if len(tokens) <= self.config.block_size:
            raise BDHError(
                f"data.block_size is {self.config.block_size}, but the {which} part of {name} has {len(tokens)} tokens"
                f"; use a block of at most {max(len(tokens) - 1, 0)}, a longer text, or another data.train_split"
            )

    def _streamed(self, source: SourceConfig, stream: int) -> _Part:
        from bdh.data.sources import open_source

        config = self.config
        split = source.validation_split
        share = 1.0 if split else config.train_split
        location = find(source.path)
        open_source(source, streaming=True, location=location)  # an error in it is one now, not in another process
        settings = StreamSettings(
            source, self.encoder_of(source), config.block_size, config.shuffle_blocks, share, self.seed, stream
        )
        readers = 1 if self.carry_state else max(config.num_workers, 1)
        total = self.share.world * readers
        streams: list[RowStream] = []
        for worker in range(readers):
            reader = Reader(settings, self.share.rank * readers + worker, total)
            lanes = self.batch_size // self.share.world
            streams.append(CarriedLanes(reader, lanes) if self.carry_state else WindowedBlocks(reader))
        files = location.size(source.path)
        self.say(f"{source.path}: {files + ', ' if files else ''}reading the validation text")
        validation, size, remarks = self.held_out(source, share, total)
        if len(validation) <= config.block_size:
            self._check_usable(source)
            raise BDHError(
                f"data.block_size is {config.block_size}, but {len(validation)} tokens of {source.path} are held out "
                "to validate on; try a smaller data.train_split, data.validation_split, or no data.streaming"
            )
        name = source.path.rstrip("/").rsplit("/", 1)[-1]  # a run may be taken up from another folder
        identity: dict[str, Any] = {"stream": [name, source.config, source.split, source.revision]}
        identity["validation_checksum"] = validation.checksum()
        in_folder = location.kind == "json" and Path(source.path).expanduser().is_dir()
        if location.kind in ("parquet", "csv", "arrow") or in_folder:  # earlier versions had other positions in these
            identity["positions"] = POSITIONS
        return _Part(
            StreamRows(streams, source.path, config.num_workers > 0),
            validation,
            size,
            None,
            identity,
            [*location.remarks, *remarks],
        )

    def whole_stream(self, source: SourceConfig, notify: Callable[[str], None]) -> tuple[Tokens, int]:
        """A stream from its beginning, up to VALIDATION_TOKENS, and its UTF-8 bytes. Raises BDHError if it is empty."""
        tokens, size, remarks = self.held_out(source, 1.0, 1)
        for line in [*find(source.path).remarks, *remarks]:
            notify(line)
        if not len(tokens):
            self._check_usable(source)
        return tokens, size

    def _check_usable(self, source: SourceConfig) -> None:
        """Raises BDHError if the first rows of a stream are all empty or unusable, whether held out or not."""
        from bdh.data.sources import explained, open_source

        encode, counts = rows_encoder(self.encoder_of(source)), Counts()
        rows: Any = open_source(source, True, ask_hub=False)
        with explained(source), closing(iter(rows)) as texts:
            for row in islice(texts, ROWS_CHECKED):
                tally(counts, encode({name: [value] for name, value in row.items()}))
        if not counts.documents and not (rows.features and "ends" in rows.features):
            raise BDHError(counts.nothing_usable(source.path, source.text_column))

    def held_out(self, source: SourceConfig, share: float, readers: int) -> tuple[Tokens, int, list[str]]:
        """The validation data of a stream: its own split or the documents held out, and their UTF-8 bytes.

        VALIDATION_TOKENS at the most, and as many as are found in the first VALIDATION_READ characters.
        """
        from bdh.data.sources import explained, open_source

        encode, counts = rows_encoder(self.encoder_of(source)), Counts()
        arrays: list[np.ndarray] = []
        total = size = read = 0
        rows: Any = open_source(source, True, source.validation_split, ask_hub=False, readers=readers)
        with explained(source), closing(iter(rows)) as texts:
            for row in texts:
                if total >= VALIDATION_TOKENS or read >= VALIDATION_READ:
                    break
                read += len(row["text"] or "")
                if share < 1 and not is_held_out(row.get("key", row["text"]) or "", share):
                    continue
                encoded = encode({name: [value] for name, value in row.items()})
                tally(counts, encoded)
                ids = encoded["tokens"][0]
                kept = min(len(ids), VALIDATION_TOKENS - total)
                arrays.append(ids[:kept])
                total += kept
                size += encoded["bytes"][0] * kept // max(len(ids), 1)
        return Tokens(arrays), size, counts.remarks(f"{source.path}, validation")
