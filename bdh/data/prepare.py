"""Rows of text to documents of token ids before training begins: in parallel, and once for a text and a tokenizer.

`datasets` maps the rows, keeps the result in its cache under a fingerprint of text and tokenizer, and maps the files
into memory; nothing here ever holds a whole text.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from bdh.data.chat import ChatEncoder, ChatRows
from bdh.data.encoding import Encoder, encode_utf8
from bdh.data.source_errors import cache_folder
from bdh.data.tokens import Documents, Tokens
from bdh.errors import BDHError

LAYOUT = 1  # goes into the fingerprint: raise it when the columns below change
MAP_BYTES = 2 << 20  # text handed to the tokenizer at a time
PARALLEL_BYTES = 8 << 20  # less text than this is not worth a second process


@dataclass
class Counts:
    """Counts of rows and documents read, and of irregular ones.

    Attributes:
        documents: Documents with text.
        empty: Rows without any, which are skipped.
        replaced: Rows in which U+FFFD stands, as for bytes that were not UTF-8.
        unusable: Conversations that cannot be used, which are skipped.
        problem: Why the first of them cannot.
    """

    documents: int = 0
    empty: int = 0
    replaced: int = 0
    unusable: int = 0
    problem: str = ""

    def add(self, other: "Counts") -> None:
        self.documents += other.documents
        self.empty += other.empty
        self.replaced += other.replaced
        self.unusable += other.unusable
        self.problem = self.problem or other.problem

    def nothing_usable(self, name: str, column: str | None) -> str:
        """The message for a text of which no row can be used."""
        if self.unusable:
            return f"data: {name} holds no conversation that can be used; {self.problem}"
        under = f" under data.text_column {column}" if column else ""
        return f"data: {name} holds no text{under}: {f'all {self.empty:,} rows are empty' if self.empty else 'no rows'}"

    def remarks(self, name: str) -> list[str]:
        """Lines about irregular rows, for the user."""
        lines = []
        if self.empty:
            lines.append(f"{name}: {self.empty:,} empty documents are skipped, {self.documents:,} are read")
        if self.replaced:
            lines.append(f"{name}: {self.replaced:,} pieces of text hold bytes that are not UTF-8, now U+FFFD")
        if self.unusable:
            lines.append(
                f"{name}: {self.unusable:,} conversations cannot be used and are skipped, {self.documents:,} are read; "
                f"the first: {self.problem}"
            )
        return lines


@dataclass
class Prepared:
    """A text as token ids.

    Attributes:
        documents: Tokens, and where documents begin.
        row_ends: Where each row of text ends among the tokens, (rows,) int64.
        row_bytes: UTF-8 bytes of each row, (rows,) int64.
        counts: What was read.
        cached: Whether it was found in the cache.
    """

    documents: Documents
    row_ends: np.ndarray
    row_bytes: np.ndarray
    counts: Counts = field(default_factory=Counts)
    cached: bool = False

    @property
    def tokens(self) -> Tokens:
        return self.documents.tokens


def rows_encoder(encoder: Encoder) -> "Rows | ChatRows":
    """The encoder of batches of rows: texts, or conversations."""
    return ChatRows(encoder) if isinstance(encoder, ChatEncoder) else Rows(encoder)


class Rows:
    """Encodes a batch of rows; what `datasets` maps with. It can be pickled."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """{"text": str or None, "ends": bool} -> {"tokens": ids, "bytes": UTF-8 bytes, "mark": 1 empty, 2 U+FFFD}."""
        strange = [text for text in batch["text"] if not isinstance(text, str | None)]
        if strange:
            raise BDHError(f"the text column holds {str(strange[0])[:40]!r}, which is not text")
        texts = [text or "" for text in batch["text"]]
        ends = batch.get("ends") or [True] * len(texts)
        tokens, sizes, marks = [], [], []
        for text, ids, last in zip(texts, self.encoder(texts), ends, strict=True):
            closing = self.encoder.ending if last and text else self.encoder.ending[:0]
            tokens.append(np.concatenate([ids, closing]))
            sizes.append(len(encode_utf8(text)) + (len(closing) if self.encoder.end_of_text is None else 0))
            marks.append(1 if not text else 2 if "\ufffd" in text else 0)
        return {"tokens": tokens, "bytes": sizes, "mark": marks, "ends": ends}


def tally(counts: Counts, encoded: dict[str, list[Any]]) -> None:
    """Adds a batch to what was read."""
    marks = encoded["mark"]
    counts.add(
        Counts(
            documents=sum(last and mark not in (1, 3) for last, mark in zip(encoded["ends"], marks, strict=True)),
            empty=marks.count(1),
            replaced=marks.count(2),
            unusable=marks.count(3),
            problem=next(filter(None, encoded.get("problem", [])), ""),
        )
    )


def prepare_texts(texts: list[str], encoder: Encoder) -> Prepared:
    """Documents that are in memory already."""
    rows = Rows(encoder)({"text": list(texts)})
    lengths = np.array([len(ids) for ids in rows["tokens"]], dtype=np.int64)
    return _prepared(rows["tokens"], lengths, rows["ends"], rows["bytes"], rows["mark"], encoder)


def prepare(dataset: Any, encoder: Encoder, num_proc: int | None) -> Prepared:
    """The rows of a `datasets.Dataset` with the columns `text` and perhaps `ends`, tokenized once and kept.

    Args:
        dataset: From `open_source`.
        encoder: Of the tokenizer.
        num_proc: Processes at work; None for one a core.
    """
    from datasets import Features, List, Value

    mean = max(dataset.data.nbytes // max(len(dataset), 1), 1)
    batch = int(np.clip(MAP_BYTES // mean, 1, 1000))
    workers = 1 if dataset.data.nbytes < PARALLEL_BYTES else num_proc or os.cpu_count() or 1
    workers = min(workers, max(len(dataset) // batch, 1))
    fingerprint = _fingerprint(dataset, encoder)
    target = _cache_file(dataset, fingerprint)
    cached = target is not None and any(target.parent.glob(f"{target.stem}*{target.suffix}"))
    kinds = {"tokens": List(Value(str(encoder.dtype))), "bytes": Value("int64"), "mark": Value("int8")}
    if isinstance(encoder, ChatEncoder):
        kinds["problem"] = Value("string")
    with _one_thread_each(workers > 1):
        mapped = dataset.map(
            rows_encoder(encoder),
            batched=True,
            batch_size=batch,
            writer_batch_size=batch,
            remove_columns=dataset.column_names,
            features=Features({**kinds, "ends": Value("bool")}),
            num_proc=workers if workers > 1 else None,
            new_fingerprint=fingerprint,
            cache_file_name=str(target) if target else None,
            desc="tokenizing",
        )
    arrays, lengths = [], []
    for chunk in mapped.data.column("tokens").chunks:
        arrays.append(chunk.flatten().to_numpy())
        lengths.append(np.diff(chunk.offsets.to_numpy()))
    ends, sizes, marks = (mapped.data.column(name).to_numpy() for name in ("ends", "bytes", "mark"))
    all_lengths = np.concatenate([np.empty(0, np.int64), *lengths])
    prepared = _prepared(arrays, all_lengths, ends, sizes, marks, encoder, cached)
    if unusable := np.flatnonzero(marks == 3).tolist():
        problem = f"row {unusable[0] + 1}: {mapped.data.column('problem')[unusable[0]]}"
        prepared.counts.add(Counts(unusable=len(unusable), problem=problem))
    return prepared


def _prepared(
    arrays: list[np.ndarray],
    lengths: np.ndarray,
    ends: Any,
    sizes: Any,
    marks: Any,
    encoder: Encoder,
    cached: bool = False,
) -> Prepared:
    tokens = Tokens(arrays)
    row_ends = np.cumsum(lengths, dtype=np.int64)
    sizes, marks, ends = np.array(sizes, dtype=np.int64), np.asarray(marks), np.asarray(ends, dtype=bool)
    last = ends & (lengths > 0)  # (rows,) rows that end a document
    text = not isinstance(encoder, ChatEncoder)
    if text and encoder.end_of_text is None and last.any() and np.flatnonzero(lengths)[-1] == np.flatnonzero(last)[-1]:
        extra = len(encoder.ending)  # an empty line between documents, none after the last
        tokens = tokens.slice(0, len(tokens) - extra)
        row_ends = np.minimum(row_ends, len(tokens))
        sizes[np.flatnonzero(last)[-1]] -= extra
    starts = np.concatenate([[0], row_ends[last]]).astype(np.int64)
    counts = Counts(int(last.sum()), int((marks == 1).sum()), int((marks == 2).sum()))
    return Prepared(Documents(tokens, starts[starts < max(len(tokens), 1)]), row_ends, sizes, counts, cached)


def characters(dataset: Any) -> int:
    """Characters of all texts of a `datasets.Dataset`."""
    import pyarrow.compute

    return pyarrow.compute.sum(pyarrow.compute.utf8_length(dataset.data.column("text"))).as_py() or 0


def cut(
    prepared: Prepared, share: float, tokenizer: PreTrainedTokenizerFast, encoder: Encoder
) -> tuple[Documents, Tokens, int]:
    """The first `share` of the tokens to train on, the rest to validate on, and the UTF-8 bytes of the rest.

    A document that is cut in two ends with the end-of-text token, if there is one, in both parts.
    """
    total = len(prepared.tokens)
    place = int(total * share)
    row = int(np.searchsorted(prepared.row_ends, place, side="right"))
    size = int(prepared.row_bytes[row + 1 :].sum())
    if row < len(prepared.row_ends):
        rest = prepared.tokens.slice(place, int(prepared.row_ends[row]))
        size += text_tokens(rest, encoder) if encoder.is_bytes else byte_count(rest, tokenizer)
    train = prepared.documents.slice(0, place)
    if encoder.end_of_text is not None and place and train.tokens.read(place - 1, 1)[0] != encoder.end_of_text:
        train = Documents(Tokens([*train.tokens.arrays, encoder.ending]), train.starts)
    return train, prepared.tokens.slice(place, total), size


def cut_between(prepared: Prepared, share: float) -> tuple[Documents, Tokens, int]:
    """As `cut`, of conversations, none of which is cut in two; the bytes are those of answers."""
    total = len(prepared.tokens)
    ends = prepared.documents.starts[1:]  # (documents - 1,) places between two of them
    if not len(ends):
        return prepared.documents, prepared.tokens.slice(total, total), 0
    place = int(ends[np.abs(ends - total * share).argmin()])
    row = int(np.searchsorted(prepared.row_ends, place, side="left"))  # the last one before the place
    size = int(prepared.row_bytes[row + 1 :].sum())
    return prepared.documents.slice(0, place), prepared.tokens.slice(place, total), size


def text_tokens(tokens: Tokens, encoder: Encoder) -> int:
    """The number of tokens of a text that do not end a document."""
    if encoder.end_of_text is None:
        return len(tokens)
    return sum(int((array != encoder.end_of_text).sum()) for array in tokens.arrays)


def byte_count(tokens: Tokens, tokenizer: PreTrainedTokenizerFast) -> int:
    """UTF-8 bytes that tokens stand for, as they are decoded; special tokens stand for none."""
    ids = tokens.read(0, len(tokens)).tolist()
    return len(encode_utf8(tokenizer.decode(ids, skip_special_tokens=True)))


def _fingerprint(dataset: Any, encoder: Encoder) -> str:
    from datasets.fingerprint import Hasher

    return Hasher.hash([dataset._fingerprint, *encoder.key, LAYOUT])


def _cache_file(dataset: Any, fingerprint: str) -> Path | None:
    """The file of cached tokens: beside the text in the cache of `datasets`; for other texts, in a folder there."""
    if not dataset.cache_files:
        return None
    place = Path(dataset.cache_files[0]["filename"]).parent
    if not place.resolve().is_relative_to(cache_folder().resolve()):
        place = cache_folder() / "bdh"
        place.mkdir(parents=True, exist_ok=True)
    return place / f"tokens-{fingerprint}.arrow"


@contextmanager
def _one_thread_each(several: bool) -> Iterator[None]:
    """Keeps the tokenizers of several processes from starting threads of their own."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    if several:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if several:
            os.environ.pop("TOKENIZERS_PARALLELISM")
            if before is not None:
                os.environ["TOKENIZERS_PARALLELISM"] = before
