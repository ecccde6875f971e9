"""What an engine tells of itself: its model's sizes, its load, its counts."""

from dataclasses import dataclass


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


@dataclass(frozen=True)
class ModelFigures:
    """A model at work.

    Attributes:
        n_layer, n_embd, n_head, n_neurons, vocab_size: Of its configuration; `n_neurons` are those of all heads.
        n_parameters: How many; 0 for a runner that keeps no model.
        state_nbytes: Bytes of one sequence's state.
        n_slots: Continuations that can be in work at once.
        device: "cpu", "cuda" or "mps".
        dtype: Of its weights, as "float32".
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
