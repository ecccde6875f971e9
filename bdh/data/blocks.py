"""Tokens to blocks: the split, the training batches and the validation windows."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bdh.data.corpora import Corpus
from bdh.errors import BDHError


@dataclass(frozen=True)
class TokenSplit:
    """A corpus as token ids, split by position: the beginning to train on, the end to validate on.

    Attributes:
        train: Token ids, (tokens,) of the smallest unsigned integer type the vocabulary fits.
        validation: The same of the validation text.
        validation_bytes_per_token: UTF-8 bytes a validation token stands for, on average; 1.0 for byte tokens.
    """

    train: np.ndarray
    validation: np.ndarray
    validation_bytes_per_token: float


PIECE = 4096  # characters encoded at a time: bounded memory, and enough pieces to keep every core busy


def tokenize(text: str, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Token ids of a text, (tokens,) of the smallest unsigned type, without special tokens."""
    pieces = [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
    dtype = np.min_scalar_type(max(len(tokenizer) - 1, 0))
    encoded: list[np.ndarray] = []
    for i in range(0, len(pieces), 256):
        batch = tokenizer.backend_tokenizer.encode_batch_fast(pieces[i : i + 256], add_special_tokens=False)
        encoded.extend(np.array(piece.ids, dtype=dtype) for piece in batch)
    return np.concatenate(encoded) if encoded else np.empty(0, dtype=dtype)


def split_tokens(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, train_split: float, block_size: int) -> TokenSplit:
    """Cuts a corpus at `train_split` of its characters and tokenizes both parts.

    Raises:
        BDHError: A part is too short to cut a single block of `block_size` + 1 tokens from.
    """
    cut = int(len(corpus.text) * train_split)
    parts = {"training": corpus.text[:cut], "validation": corpus.text[cut:]}
    tokens = {name: tokenize(text, tokenizer) for name, text in parts.items()}
    for name, ids in tokens.items():
        if len(ids) <= block_size:
            raise BDHError(
                f"data.block_size is {block_size}, but the {name} part of {corpus.name} has {len(ids)} tokens; "
                f"use a block of at most {max(len(ids) - 1, 0)}, a longer text, or another data.train_split"
            )
    n_bytes = len(parts["validation"].encode("utf-8"))
    return TokenSplit(tokens["training"], tokens["validation"], n_bytes / len(tokens["validation"]))


def checksum(tokens: np.ndarray) -> int:
    """A number that tells one text's tokens from another's (CRC-32)."""
    return zlib.crc32(tokens.tobytes())


class RandomBlocks:
    """Endless training batches: blocks of T + 1 tokens cut from random places.

    Batch i is a pure function of (tokens, block size, batch size, seed, i): a counter-based generator draws it, so the
    position in the data is one number, a resumed run goes on exactly, and any process can draw its share of a batch.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, batch_size: int, seed: int):
        self.tokens = tokens
        self.block_size = block_size
        self.batch_size = batch_size
        self.seed = seed
        self.position = 0

    def next_batch(self) -> Tensor:
        """The next batch, (batch_size, block_size + 1) int64: columns 0..T-1 are inputs, 1..T their targets."""
        draw = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, self.position]))
        starts = draw.integers(0, len(self.tokens) - self.block_size, size=self.batch_size)
        self.position += 1
        return _cut(self.tokens, starts, self.block_size)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class ValidationWindows:
    """The validation split in windows of `block_size`, one after another; all of them, or a fixed sample.

    Args:
        tokens: Token ids, (tokens,).
        block_size: Tokens predicted in a window.
        limit: Use at most this many windows, spread evenly over the split; None for all.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, limit: int | None = None):
        self.tokens = tokens
        self.block_size = block_size
        count = (len(tokens) - 1) // block_size
        chosen = np.arange(count) if limit is None or limit >= count else np.linspace(0, count - 1, limit).astype(int)
        self.starts = chosen * block_size

    def __len__(self) -> int:
        return len(self.starts)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """The windows in order, (up to batch_size, block_size + 1) int64 at a time."""
        for i in range(0, len(self.starts), batch_size):
            yield _cut(self.tokens, self.starts[i : i + batch_size], self.block_size)


def _cut(tokens: np.ndarray, starts: np.ndarray, block_size: int) -> Tensor:
    blocks = tokens[starts[:, None] + np.arange(block_size + 1)]  # (B, T + 1)
    return torch.from_numpy(blocks.astype(np.int64))
