"""The text of one continuation while its tokens come: whole characters, and nothing of a stop string."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string begins that is complete first; of several complete at once, the longest. None without."""
    found = [(start + len(word), start) for word in stop if (start := text.find(word)) >= 0]
    return min(found)[1] if found else None


def partial_stop_length(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of a text without a stop string may be the beginning of one."""
    longest = max(map(len, stop), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(word.startswith(text[-size:]) for word in stop):
            return size
    return 0


class Detokenizer:
    """Hands on text as soon as it is settled; the text ends before the stop string that is complete first.

    What could be the beginning of a stop string is held back until it is known to be none. All this depends on the text
    alone, not on how it is split into tokens.

    Attributes:
        stopped: Whether a stop string is complete: no text follows.
        tokens: All tokens taken.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", stop: Sequence[str] = (), strip: bool = False):
        """strip leaves out white space before the text; a text that is nothing else is kept."""
        from bdh.data.tokenizer import IncrementalDecoder

        self.decoder = IncrementalDecoder(tokenizer)
        self.stop = stop
        self.strip = strip
        self.stopped = False
        self.ends: list[int] = []  # how many characters were decoded after each token
        self.buffer = ""
        self.emitted = 0  # characters, those left out at the beginning not counted
        self.dropped = 0
        self.leading_space = ""  # white space before the text, as long as nothing was handed on

    @property
    def tokens(self) -> list[int]:
        return self.decoder.tokens

    def step(self, token: int) -> str:
        """The text that this token settles; often empty."""
        text = self.decoder.step(token)
        self.ends.append(self.decoder.length)
        return self._settle(text)

    def end(self) -> str:
        """The rest, when no token follows: what was held back, and replacement marks for half a character."""
        text = self._settle(self.decoder.end())
        buffer, self.buffer = self.buffer, ""
        return text + self._emit(buffer, last=True)

    def split_at(self, length: int) -> tuple[list[int], str]:
        """What the first `length` characters handed on are made of, for who goes on from there.

        Returns:
            The tokens before the cut, and the text from there to the cut, where a token reaches across it.
        """
        cut = length + self.dropped if length else 0
        whole = max((end for end in self.ends if end <= cut), default=0)  # characters
        count = self.ends.index(whole) + 1 if whole else 0
        return self.tokens[:count], self.decoder.written[whole:cut]

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
        """The text to hand on now; `last` says that no more follows, so that white space was all there is."""
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
