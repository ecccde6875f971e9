"""Incremental detokenization with stop strings."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Return the start of the stop string that is complete first, of several the longest; None if there is none."""
    found = [(start + len(word), start) for word in stop if (start := text.find(word)) >= 0]
    return min(found)[1] if found else None


def partial_stop_length(text: str, stop: Sequence[str]) -> int:
    """Return the length of the longest suffix of a text that may be the beginning of a stop string."""
    longest = max(map(len, stop), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(word.startswith(text[-size:]) for word in stop):
            return size
    return 0


class Detokenizer:
    """Detokenizes one continuation; emits complete characters, and no part of a stop string.

    Text that may be the beginning of a stop string is buffered until it is known not to be one. The result depends on
    the text alone, not on its split into tokens.

    Attributes:
        stopped: Whether a stop string is complete; no more text is emitted.
        tokens: All tokens so far.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", stop: Sequence[str] = (), strip: bool = False):
        """Strip leading white space with `strip`, unless the text has nothing else."""
        from bdh.data.tokenizer import IncrementalDecoder

        self.decoder = IncrementalDecoder(tokenizer)
        self.stop = stop
        self.strip = strip
        self.stopped = False
        self.ends: list[int] = []  # number of characters decoded after each token
        self.buffer = ""
        self.emitted = 0  # characters, without those dropped at the beginning
        self.dropped = 0
        self.leading_space = ""  # leading white space, while nothing was emitted

    @property
    def tokens(self) -> list[int]:
        return self.decoder.tokens

    def step(self, token: int) -> str:
        """Add a token; return the text to emit, which is often empty."""
        text = self.decoder.step(token)
        self.ends.append(self.decoder.length)
        return self._settle(text)

    def end(self) -> str:
        """End the text; return the buffered rest, with replacement characters for an incomplete one."""
        text = self._settle(self.decoder.end())
        buffer, self.buffer = self.buffer, ""
        return text + self._emit(buffer, last=True)

    def split_at(self, length: int) -> tuple[list[int], str]:
        """Split the continuation after the first `length` emitted characters.

        Returns:
            The complete tokens before the split, and the text between their end and the split.
        """
        cut = length + self.dropped if length else 0
        complete = max((end for end in self.ends if end <= cut), default=0)  # characters
        count = self.ends.index(complete) + 1 if complete else 0
        return self.tokens[:count], self.decoder.written[complete:cut]

    def _settle(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self.buffer + text
        start = find_stop(text, self.stop)
        self.stopped = start is not None
        settled = len(text) - partial_stop_length(text, self.stop) if start is None else start
        self.buffer = "" if self.stopped else text[settled:]
        return self._emit(text[:settled], last=self.stopped)

    def _emit(self, text: str, last: bool = False) -> str:
        """Return the text to emit; `last` means that no more follows, so that a text of white space is kept."""
        if self.strip and not self.emitted:
            text = self.leading_space + text
            stripped = text.lstrip()
            self.leading_space = text[: len(text) - len(stripped)]
            if stripped or not last:
                self.dropped, text = len(self.leading_space), stripped
            else:
                self.dropped, self.leading_space = 0, ""
        self.emitted += len(text)
        return text
