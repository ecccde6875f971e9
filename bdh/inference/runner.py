"""Model runners: a model and a pool of state slots, from tokens to logits, without requests.

`ModelRunner` is the reference implementation with the model's own forward pass; `CPURunner` and `CUDARunner` are fast,
and tested against it.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from bdh.errors import BDHError
from bdh.kernels.dispatch import choose_decode_kernels
from bdh.model import BDHConfig, BDHForCausalLM, BDHState

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUANTIZATIONS = ("int8", "int4")
PREFILL_ALIGNMENT = 64  # prompt tokens that runners on a CPU read at once


class Runner(Protocol):
    """Interface of model runners. A slot holds the synapses and the position of one sequence.

    Attributes:
        config: Configuration of the model.
        device: Device of the logits.
        n_slots: Number of slots, numbered from 0.
        state_nbytes: Size of the state of one slot as `read_state` returns it.
        prefill_alignment: Splitting a prompt at multiples of this position does not change its results. On a CPU they
            are bit-identical, so a cached prefix gives exactly the numbers of a second prefill. (Generated tokens that
            were never prefilled, such as the turns of a chat, are equal up to rounding.)
        prefill_chunk: Tokens of a prompt to read in one step; a multiple of `prefill_alignment`. A larger chunk delays
            other sequences without being faster.
    """

    config: BDHConfig
    device: torch.device
    n_slots: int
    state_nbytes: int
    prefill_alignment: int
    prefill_chunk: int

    @property
    def slots_nbytes(self) -> int:
        """Memory that the slots take now, in use or not, in bytes."""

    def release(self) -> None:
        """Release the memory of the slots to the system if possible. No slot may be in use."""

    def clear(self, slot: int) -> None:
        """Reset a slot to the empty state."""

    def prefill(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """Read tokens, at least one, into a slot; return the logits after the last, (V,) float32."""

    def prefill_logits(self, slot: int, tokens: Sequence[int]) -> Iterator[Tensor]:
        """Read tokens as `prefill` does; yield the logits after each in chunks, (T, V) float32.

        All tokens are read when the iterator is exhausted.
        """

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Read one token into each of several different slots; return their logits, (B, V) float32.

        Later calls do not overwrite the returned tensor.
        """

    def read_state(self, slot: int) -> BDHState:
        """Return a copy of the state of a slot, a batch of one."""

    def write_state(self, slot: int, state: BDHState) -> None:
        """Replace the state of a slot with a copy of this one, a batch of one."""


def pieces(tokens: Sequence[int], position: int) -> Iterator[Sequence[int]]:
    """Split tokens at absolute positions divisible by `PREFILL_ALIGNMENT`, however they arrive."""
    start = 0
    while start < len(tokens):
        end = start + PREFILL_ALIGNMENT - (position + start) % PREFILL_ALIGNMENT
        yield tokens[start:end]
        start = end


class ModelRunner:
    """Reference runner: one sequence at a time through `BDHForCausalLM.forward`, on any device."""

    def __init__(self, model: BDHForCausalLM, n_slots: int):
        self.model = model.eval()
        self.config = model.config
        self.device = model.device
        self.n_slots = n_slots
        self.states: dict[int, BDHState] = {}  # made when first used
        self.prefill_alignment = self.prefill_chunk = PREFILL_ALIGNMENT
        self.state_nbytes = 4 * self.config.n_layer * self.config.n_neurons * self.config.n_embd

    def zeros(self) -> BDHState:
        return BDHState.zeros(self.config, 1, self.device)

    @property
    def slots_nbytes(self) -> int:
        return len(self.states) * self.state_nbytes

    def release(self) -> None:
        self.states.clear()

    def clear(self, slot: int) -> None:
        self.states[slot] = self.zeros()

    @torch.inference_mode()
    def prefill(self, slot: int, tokens: Sequence[int]) -> Tensor:
        state = self.states[slot]
        for piece in pieces(tokens, state.length):
            ids = torch.tensor([piece], device=self.device)  # (1, T)
            logits = self.model(ids, past_key_values=state, use_cache=True, logits_to_keep=1).logits  # (1, 1, V)
        return logits[0, 0].float()  # (V,)

    @torch.inference_mode()
    def prefill_logits(self, slot: int, tokens: Sequence[int]) -> Iterator[Tensor]:
        state = self.states[slot]
        for piece in pieces(tokens, state.length):
            ids = torch.tensor([piece], device=self.device)  # (1, T)
            yield self.model(ids, past_key_values=state, use_cache=True).logits[0].float()  # (T, V)

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        return torch.stack([self.prefill(slot, [token]) for slot, token in zip(slots, tokens, strict=True)])  # (B, V)

    @torch.inference_mode()
    def read_state(self, slot: int) -> BDHState:
        return self.states[slot].clone()

    @torch.inference_mode()
    def write_state(self, slot: int, state: BDHState) -> None:
        self.states[slot] = state.to(self.device, torch.float32).clone()


def choose_dtype(dtype: str, device: str, quantization: str | None = None) -> str:
    """Resolve "auto" to a dtype that is fast on the device. Raises BDHError for an unknown dtype."""
    if dtype == "auto":
        return "bfloat16" if device == "cuda" or quantization else "float32"
    if dtype not in DTYPES:
        raise BDHError(f"dtype is {dtype}; it must be one of auto, {', '.join(DTYPES)}")
    return dtype


def cast(model: BDHForCausalLM, dtype: torch.dtype) -> BDHForCausalLM:
    """Convert a model to another dtype in place, except for its gates, which need float32."""
    layer = model.model.layer
    gates = copy.deepcopy(layer.gates)
    model.to(dtype)
    layer.gates = gates
    return model


def make_runner(model: BDHForCausalLM, n_slots: int, dtype: str = "auto", quantization: str | None = None) -> Runner:
    """Create the fastest runner for the device of a model.

    Args:
        model: The model, which is converted to the dtype and must not be used elsewhere.
        n_slots: Maximum number of running sequences.
        dtype: "float32", "bfloat16", or "auto" (see `choose_dtype`).
        quantization: None, "int8" or "int4" weights, on the CPU only.

    Raises:
        BDHError: The device does not support the settings.
    """
    device = model.device.type
    dtype = choose_dtype(dtype, device, quantization)
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise BDHError(f"quantization is {quantization}; it must be one of {', '.join(QUANTIZATIONS)}")
    if quantization is not None and device != "cpu":
        raise BDHError(f"quantization {quantization} runs on the CPU only; leave it out on {device}")
    kernels = choose_decode_kernels(model.device)
    if kernels == "torch":
        from bdh.inference.runner_cpu import CPURunner

        return CPURunner(model, n_slots, DTYPES[dtype], quantization)
    model = cast(model, DTYPES[dtype])
    if kernels == "triton":
        from bdh.inference.runner_cuda import CUDARunner

        return CUDARunner(model, n_slots)
    return ModelRunner(model, n_slots)
