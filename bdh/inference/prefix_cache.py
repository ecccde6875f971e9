"""Prefix cache: states after common prefixes of prompts."""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bdh.model import BDHState

MAX_PROMPTS = 128  # recent prompts that a new one is compared with


def key_of(tokens: Sequence[int]) -> bytes:
    """Return tokens as bytes, four per token, for fast comparison of prefixes."""
    return np.asarray(tokens, dtype=np.int32).tobytes()


def common_tokens(one: bytes, other: bytes) -> int:
    """Return the number of tokens in the common prefix of two keys."""
    size = min(len(one), len(other)) // 4
    differs = np.flatnonzero(np.frombuffer(one, np.int32, size) != np.frombuffer(other, np.int32, size))
    return int(differs[0]) if differs.size else size


@dataclass(frozen=True)
class Hit:
    """A cached state and the number of tokens it has read."""

    length: int
    state: BDHState


class PrefixCache:
    """Least-recently-used cache of exact states after prefixes of prompts, limited in bytes.

    States are large, so a prefix is cached only when a second prompt shares it (`worth_keeping`), or when the caller
    knows that it will be continued. Entries belong to one owner, because cache hits reveal the prompts of others.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self.nbytes = 0
        self.states: OrderedDict[tuple[str | None, bytes], BDHState] = OrderedDict()
        self.prompts: deque[tuple[str | None, bytes]] = deque(maxlen=MAX_PROMPTS)

    def fits(self, state_nbytes: int) -> bool:
        """Return whether a state of this size fits into the cache at all."""
        return state_nbytes <= self.budget

    def find(self, prompt: Sequence[int], owner: str | None = None) -> Hit | None:
        """Return the longest cached prefix that leaves at least one token of the prompt to read."""
        if not self.states:
            return None
        key = key_of(prompt[:-1])
        fitting = (prefix for holder, prefix in self.states if holder == owner and key.startswith(prefix))
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
        shared = max((common_tokens(key, earlier) for holder, earlier in self.prompts if holder == owner), default=0)
        if (owner, key) not in self.prompts:
            self.prompts.append((owner, key))
        length = min(shared, len(prompt) - 1)
        length -= length % prefill_alignment
        return length or None

    def keep(self, tokens: Sequence[int], state: BDHState, owner: str | None = None) -> None:
        """Cache a state (without a copy) that has read these tokens; evict the least recently used ones."""
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
