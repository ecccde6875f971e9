"""Fair scheduling of slots: the queue of waiting sequences, and the choice of the client to preempt."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count

from torch import Tensor

from bdh.inference.constraint import Constraint
from bdh.inference.request import PromptLogprobs, Request
from bdh.model import BDHState


@dataclass(eq=False)
class Sequence:
    """One continuation of a request in the engine."""

    request: Request
    index: int
    seed: int
    constraint: Constraint | None
    slot: int = -1
    read: int = 0  # number of prompt tokens read
    cached: int = 0  # number of these from the prefix cache
    keep_at: int | None = None  # number of tokens after which to cache the state
    output: list[int] = field(default_factory=list)
    scores: list[PromptLogprobs] = field(default_factory=list)  # of the prompt tokens read so far, if requested
    saved: BDHState | None = None  # its state while it is preempted

    def unread(self, chunk: int) -> list[int]:
        """Return the next prompt tokens to read, up to the end of the chunk or `keep_at`.

        Chunk boundaries do not depend on other sequences, so rounding does not either.
        """
        stop = min(self.read + chunk - self.read % chunk, len(self.request.prompt))
        if self.keep_at is not None and self.read < self.keep_at < stop:
            stop = self.keep_at
        return list(self.request.prompt[self.read : stop])

    @property
    def position(self) -> int:
        """Length of the sequence, including the tokens read by the state of the request."""
        before = 0 if self.request.state is None else self.request.state.length
        return before + self.read + len(self.output)

    @property
    def prompt_is_read(self) -> bool:
        return self.read == len(self.request.prompt)

    def forbidden(self) -> list[int] | None:
        """Return the end tokens while the text has fewer than `min_new_tokens`."""
        ends = self.request.ends
        return sorted(ends) if ends and len(self.output) < self.request.params.min_new_tokens else None

    @property
    def wants_logprob(self) -> bool:
        params = self.request.params
        return params.logprobs is not None or (params.best_of or params.n) > params.n


@dataclass(eq=False)
class SequenceGroup:
    """The continuations of one request. The first to get a slot reads the prompt for all of them."""

    sequences: list[Sequence]
    reader: Sequence | None = None
    after_prompt: tuple[BDHState, Tensor] | None = None  # state and logits (V,), while others need them


class WaitingQueue:
    """Sequences that wait for a slot, in a queue for each client.

    Attributes:
        queues: The sequences by client; no queue is empty.
        preempted: Number of preempted sequences.
    """

    def __init__(self) -> None:
        self.queues: dict[str | None, deque[Sequence]] = {}
        self.preempted = 0
        self._last_turns: dict[str | None, int] = {}  # the turn in which a waiting client got its last slot
        self._turns = count(1)

    def __len__(self) -> int:
        return sum(map(len, self.queues.values()))

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for queue in self.queues.values() for sequence in queue)

    def extend(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            self._queue_of(sequence).append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Put a preempted sequence at the head of its client's queue."""
        self._queue_of(sequence).appendleft(sequence)
        self.preempted += 1

    def remove(self, sequence: Sequence) -> None:
        client = sequence.request.client
        self.preempted -= sequence.saved is not None
        self.queues[client].remove(sequence)
        if not self.queues[client]:
            del self.queues[client]
            self._last_turns.pop(client, None)

    def take(self, sequence: Sequence) -> None:
        """Remove a sequence that gets a slot."""
        self._last_turns[sequence.request.client] = next(self._turns)
        self.remove(sequence)

    def clear(self) -> None:
        self.queues.clear()
        self.preempted = 0
        self._last_turns.clear()

    def next(self, running: Mapping[str | None, int], is_ready: Callable[[Sequence], bool]) -> Sequence | None:
        """Return the sequence that gets the next slot, or None if none is ready.

        It is the first one of the client with the fewest slots, among equals the one whose last turn is longest ago.

        Args:
            running: Number of slots of each client.
            is_ready: Returns whether a sequence could use a slot now.
        """
        clients = sorted(self.queues, key=lambda client: (running.get(client, 0), self._last_turns.get(client, 0)))
        for client in clients:
            sequence = next((sequence for sequence in self.queues[client] if is_ready(sequence)), None)
            if sequence is not None:
                return sequence
        return None

    def _queue_of(self, sequence: Sequence) -> deque[Sequence]:
        return self.queues.setdefault(sequence.request.client, deque())


def client_to_preempt(waiting: Sequence, slots: Mapping[str | None, int]) -> tuple[bool, str | None]:
    """Return whether a client must give up a slot to share the slots more evenly, and which one.

    It must have at least two slots more than the client of the waiting sequence, or slots would be exchanged forever.

    Args:
        waiting: The next sequence.
        slots: Number of slots of each client.
    """
    if len(slots) < 2 and waiting.request.client in slots:
        return False, None
    client, most = max(slots.items(), key=lambda item: item[1])
    return most >= slots.get(waiting.request.client, 0) + 2, client
