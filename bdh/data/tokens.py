"""Token ids in a row, wherever they lie: in memory, or mapped from files that are never read as a whole.

A token that is read and not predicted, as all of a conversation but the answers, stands as ~id, which is negative: so
the mask is where the token is, through every cut and shuffle. Arrays with such tokens are of a signed type.
"""

import zlib
from collections.abc import Sequence

import numpy as np


class Tokens:
    """A sequence of token ids made of several arrays, read as one.

    Args:
        arrays: Token ids, 1-dimensional, all of one integer type.
    """

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays = [array for array in arrays if len(array)] or [np.empty(0, dtype=np.uint8)]
        self.starts = np.concatenate([[0], np.cumsum([len(array) for array in self.arrays])])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def dtype(self) -> np.dtype:
        return self.arrays[0].dtype

    def num_target_tokens(self) -> int:
        """The number of tokens that are targets."""
        return sum(len(array) if array.dtype.kind == "u" else int((array >= 0).sum()) for array in self.arrays)

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` ids from `start` on, (count,); fewer at the end."""
        stop = min(start + count, len(self))
        i = min(int(np.searchsorted(self.starts, start, side="right")), len(self.arrays)) - 1
        begin = start - int(self.starts[i])
        first = self.arrays[i][begin : begin + stop - start]
        if len(first) >= stop - start:
            return first
        found = [first]
        done = start + len(first)
        while done < stop:
            i += 1
            found.append(self.arrays[i][: stop - done])
            done += len(found[-1])
        return np.concatenate(found)

    def read_around(self, start: int, count: int) -> np.ndarray:
        """`count` ids from `start` on, going on at the beginning after the end."""
        start %= len(self)
        found = self.read(start, count)
        while len(found) < count:
            found = np.concatenate([found, self.read(0, count - len(found))])
        return found

    def slice(self, start: int, stop: int) -> "Tokens":
        """The ids from `start` to `stop`, sharing memory."""
        parts = []
        for array, begin in zip(self.arrays, self.starts[:-1].tolist(), strict=True):
            low, high = max(start - begin, 0), min(stop - begin, len(array))
            if low < high:
                parts.append(array[low:high])
        return Tokens(parts or [np.empty(0, dtype=self.dtype)])

    def checksum(self) -> int:
        """A number that tells one text's tokens from another's: CRC-32 of the length and of samples spread evenly."""
        count, samples = len(self), 4096
        total = zlib.crc32(str(count).encode())
        size = 4096
        places = [0] if count <= size else np.linspace(0, count - size, min(samples, count // size + 1)).astype(int)
        for place in places:
            total = zlib.crc32(self.read(int(place), size).astype(np.uint32).tobytes(), total)
        return total


class Documents:
    """Tokens, and where their documents begin.

    Args:
        tokens: All documents, one after another, each with its ending.
        starts: Where each document begins, ascending from 0, (documents,) int64.
    """

    def __init__(self, tokens: Tokens, starts: np.ndarray):
        self.tokens = tokens
        self.starts = starts

    def slice(self, start: int, stop: int) -> "Documents":
        """The part from `start` to `stop`; what a cut leaves of a document counts as one."""
        inside = self.starts[(self.starts > start) & (self.starts < stop)] - start
        return Documents(self.tokens.slice(start, stop), np.concatenate([[0], inside]).astype(np.int64))


class InOrder:
    """Documents read one after another in another order, as one sequence.

    Args:
        documents: The documents.
        order: Their numbers in the order to read them in, (documents,).
    """

    def __init__(self, documents: Documents, order: np.ndarray):
        lengths = np.diff(documents.starts, append=len(documents.tokens))  # (documents,)
        self.tokens = documents.tokens
        self.begins = documents.starts[order]
        self.ends = np.cumsum(lengths[order])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` ids from `start` on, (count,); fewer at the end."""
        stop = min(start + count, len(self))
        i = int(np.searchsorted(self.ends, start, side="right"))
        found = []
        while start < stop:
            length = min(int(self.ends[i]), stop) - start
            before = int(self.ends[i - 1]) if i else 0
            found.append(self.tokens.read(int(self.begins[i]) + start - before, length))
            start += length
            i += 1
        return found[0] if len(found) == 1 else np.concatenate(found or [np.empty(0, self.tokens.dtype)])
