"""What an engine tells of itself: its model's sizes, its load, its counts."""

from dataclasses import dataclass, field


@dataclass
class EngineStats:
    """The present load, and counts since the engine was made."""

    running: int = 0
    waiting: int = 0
    finished: int = 0
    cancelled: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefix_hits: int = 0
    prefix_tokens_saved: int = 0
    prefix_nbytes: int = 0  # bytes of the states kept of prompts' beginnings
    preempted: int = 0
    preempted_nbytes: int = 0  # bytes of the states of those that gave up their slot and wait for another
    slots_nbytes: int = 0  # bytes that the slots take, in use or not
    waiting_of: dict[str | None, int] = field(default_factory=dict)  # by client, also of those that only run


def queue_has_room(stats: EngineStats, client: str | None, count: int, queue_size: int, free: int) -> bool:
    """Whether a client may have so many continuations more in the queue.

    A full queue still takes those of a client that has less than its share, which is the same for all clients at work:
    nobody is locked out by another. So it holds, of n clients, 1 + 1/2 + … + 1/n times `queue_size` at most.

    Args:
        stats: The load.
        client: Whose they are.
        count: Of the continuations.
        queue_size: How many may wait.
        free: Slots that are free: who gets one does not wait.
    """
    if stats.waiting + count <= queue_size + free:
        return True
    others = stats.waiting_of.keys() - {client}
    share = max(1, queue_size // (len(others) + 1))
    return bool(others) and stats.waiting_of.get(client, 0) + count <= share


@dataclass(frozen=True)
class ModelInfo:
    """A model at work.

    Attributes:
        n_layer, n_embd, n_head, n_neurons, vocab_size: Of its configuration; `n_neurons` are those of all heads.
        n_parameters: How many; 0 for a runner that keeps no model.
        state_nbytes: Bytes of one sequence's state.
        n_slots: Continuations that can be in work at once.
        device: "cpu", "cuda" or "mps".
        dtype: Of its weights, as "float32".
        loaded_nbytes: Memory that the engine's own process had when the model was loaded; 0 if it has none.
    """

    n_layer: int
    n_embd: int
    n_head: int
    n_neurons: int
    vocab_size: int
    n_parameters: int
    state_nbytes: int
    n_slots: int
    device: str
    dtype: str
    loaded_nbytes: int = 0
