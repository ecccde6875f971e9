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
    """One continuation of a request."""

    request: Request
    index: int
    seed: int
    constraint: Constraint | None
    slot: int = -1
    read: int = 0  # tokens of the prompt that are in the slot
    cached: int = 0  # how many of these the prefix cache had
    keep_at: int | None = None  # after this many, the state goes into the prefix cache
    output: list[int] = field(default_factory=list)
    scores: list[PromptLogprobs] = field(default_factory=list)  # of the prompt's tokens read so far, if asked for
    saved: BDHState | None = None  # its state, if it was preempted

    def unread(self, chunk: int) -> list[int]:
        """The next tokens of the prompt to read: up to the chunk's end, and up to where the state is to be kept.

        Where chunks end does not depend on other sequences, or rounding would.
        """
        stop = min(self.read + chunk - self.read % chunk, len(self.request.prompt))
        if self.keep_at is not None and self.read < self.keep_at < stop:
            stop = self.keep_at
        return list(self.request.prompt[self.read : stop])

    @property
    def position(self) -> int:
        """Tokens that the slot has read, those of the request's state included, once the last written one is read."""
        before = 0 if self.request.state is None else self.request.state.length
        return before + self.read + len(self.output)

    @property
    def prompt_is_read(self) -> bool:
        return self.read == len(self.request.prompt)

    def forbidden(self) -> list[int] | None:
        """Tokens that may not come now: ends, while the text is too short."""
        ends = self.request.ends
        return sorted(ends) if ends and len(self.output) < self.request.params.min_new_tokens else None

    @property
    def wants_logprob(self) -> bool:
        params = self.request.params
        return params.logprobs is not None or (params.best_of or params.n) > params.n


@dataclass(eq=False)
class SequenceGroup:
    """The continuations of one request. The first to get a slot reads the prompt for all."""

    sequences: list[Sequence]
    reader: Sequence | None = None
    after_prompt: tuple[BDHState, Tensor] | None = None  # for those still waiting: the state, and the logits (V,)


class WaitingQueue:
    """Sequences that wait for a slot, in a queue for each client.

    Attributes:
        queues: None of them is empty.
        preempted: How many of the sequences had a slot before.
    """

    def __init__(self) -> None:
        self.queues: dict[str | None, deque[Sequence]] = {}
        self.preempted = 0
        self._last_turns: dict[str | None, int] = {}  # the turn in which each waiting client got its last slot
        self._turns = count(1)

    def __len__(self) -> int:
        return sum(map(len, self.queues.values()))

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for queue in self.queues.values() for sequence in queue)

    def extend(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            self._queue_of(sequence).append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Puts a preempted sequence at the head of its client's queue."""
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
        """Removes a sequence that gets a slot."""
        self._last_turns[sequence.request.client] = next(self._turns)
        self.remove(sequence)

    def clear(self) -> None:
        self.queues.clear()
        self.preempted = 0
        self._last_turns.clear()

    def next(self, running: Mapping[str | None, int], is_ready: Callable[[Sequence], bool]) -> Sequence | None:
        """The sequence to get the next slot: of the client with the fewest slots, among equals of the one whose last
        turn is the longest ago, the one that has waited longest. None if none is ready.

        Args:
            running: How many slots each client has.
            is_ready: Whether a sequence could use a slot now.
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
    """Whether a client has to give up a slot, so that clients share the slots more evenly, and which client.

    It has at least two slots more than the client of the waiting sequence, or slots would go to and fro.

    Args:
        waiting: The sequence that is next.
        slots: How many each client has.
    """
    if len(slots) < 2 and waiting.request.client in slots:
        return False, None
    client, most = max(slots.items(), key=lambda item: item[1])
    return most >= slots.get(waiting.request.client, 0) + 2, client
