"""States of prompts' beginnings, kept by content, so that a beginning that comes again is not read again."""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bdh.model import BDHState

REMEMBERED = 128  # prompts compared with a new one


def key_of(tokens: Sequence[int]) -> bytes:
    """Tokens as bytes, four a token, so that one compares beginnings at the speed of memory."""
    return np.asarray(tokens, dtype=np.int32).tobytes()


def common_tokens(one: bytes, other: bytes) -> int:
    """How many tokens two keys share from the beginning."""
    size = min(len(one), len(other)) // 4
    differs = np.flatnonzero(np.frombuffer(one, np.int32, size) != np.frombuffer(other, np.int32, size))
    return int(differs[0]) if differs.size else size


@dataclass(frozen=True)
class Hit:
    """A kept state and the number of tokens it has read."""

    length: int
    state: BDHState


class PrefixCache:
    """Exact states after beginnings of prompts, within a budget of bytes, the least recently used out first.

    A state is large, so not every prompt leaves one: a beginning is kept when a second prompt shares it
    (`worth_keeping`), and where the caller knows that it will be gone on from. What one owner's prompts left is for
    that owner alone: how much of a prompt was kept tells what others have asked.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self.nbytes = 0
        self.states: OrderedDict[tuple[str | None, bytes], BDHState] = OrderedDict()
        self.prompts: deque[tuple[str | None, bytes]] = deque(maxlen=REMEMBERED)

    def fits(self, state_nbytes: int) -> bool:
        """Whether a state of this size could be kept at all."""
        return state_nbytes <= self.budget

    def find(self, prompt: Sequence[int], owner: str | None = None) -> Hit | None:
        """The longest kept beginning that leaves at least one token of the prompt to read."""
        if not self.states:
            return None
        key = key_of(prompt[:-1])
        fitting = (kept for whose, kept in self.states if whose == owner and key.startswith(kept))
        best = max(fitting, key=len, default=None)
        if best is None:
            return None
        self.states.move_to_end((owner, best))
        return Hit(len(best) // 4, self.states[owner, best])

    def worth_keeping(
        self, prompt: Sequence[int], state_nbytes: int, prefill_alignment: int, owner: str | None = None
    ) -> int | None:
        """Remember a prompt, and return the length after which its state should be cached, or None.

        The length is a multiple of `prefill_alignment` within the prefix shared with an earlier prompt.
        """
        if not self.fits(state_nbytes):
            return None
        key = key_of(prompt)
        shared = max((common_tokens(key, earlier) for whose, earlier in self.prompts if whose == owner), default=0)
        if (owner, key) not in self.prompts:
            self.prompts.append((owner, key))
        length = min(shared, len(prompt) - 1)
        length -= length % prefill_alignment
        return length or None

    def keep(self, tokens: Sequence[int], state: BDHState, owner: str | None = None) -> None:
        """Keeps a state (not copied) that has read these tokens; what was used longest ago makes room."""
        if not self.fits(state.nbytes):
            return
        key = owner, key_of(tokens)
        if key not in self.states:
            self.states[key] = state
            self.nbytes += state.nbytes
        self.states.move_to_end(key)
        while self.nbytes > self.budget:
            _, oldest = self.states.popitem(last=False)
            self.nbytes -= oldest.nbytes

    def __len__(self) -> int:
        return len(self.states)
