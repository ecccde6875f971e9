"""Statistics of an engine, and sizes of its model."""

from dataclasses import dataclass, field


@dataclass
class EngineStats:
    """Present load of an engine, and counters since its creation."""

    running: int = 0
    waiting: int = 0
    finished: int = 0
    cancelled: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefix_hits: int = 0
    prefix_tokens_saved: int = 0
    prefix_nbytes: int = 0  # size of the prefix cache
    preempted: int = 0
    preempted_nbytes: int = 0  # size of the states of preempted sequences
    slots_nbytes: int = 0  # size of all slots, in use or not
    waiting_of: dict[str | None, int] = field(default_factory=dict)  # by client; 0 for one whose sequences all run


def queue_has_room(stats: EngineStats, client: str | None, count: int, queue_size: int, free: int) -> bool:
    """Return whether a client may add `count` continuations to the queue.

    A full queue still accepts those of a client with less than its equal share, so that no client locks out another.
    With n clients it therefore holds at most 1 + 1/2 + … + 1/n times `queue_size`.

    Args:
        stats: Present load.
        client: The client.
        count: Number of its new continuations.
        queue_size: Capacity of the queue.
        free: Number of free slots.
    """
    if stats.waiting + count <= queue_size + free:
        return True
    others = stats.waiting_of.keys() - {client}
    share = max(1, queue_size // (len(others) + 1))
    return bool(others) and stats.waiting_of.get(client, 0) + count <= share


@dataclass(frozen=True)
class ModelInfo:
    """Sizes of a loaded model.

    Attributes:
        n_layer, n_embd, n_head, n_neurons, vocab_size: Values of its configuration; `n_neurons` counts all heads.
        n_parameters: Number of parameters; 0 for a runner without a model.
        state_nbytes: Size of the state of one sequence.
        n_slots: Maximum number of running continuations.
        device: "cpu", "cuda" or "mps".
        dtype: Data type of its weights, such as "float32".
        loaded_nbytes: Memory of the engine's own process after loading; 0 if it has none.
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
