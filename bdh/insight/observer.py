"""Reads tokens with a model as it is, and keeps a record of what its neurons did."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor

from bdh.insight.activity_record import Record, raster_of
from bdh.model import BDHForCausalLM, BDHState
from bdh.model.modeling_bdh import Gates, synapse_dtype


class Observer:
    """Goes along with a text, with a state of its own: what `BDHForCausalLM.forward` does, and seen while it does it.

    The layer's encoder is where it looks: what comes in is x, what goes out is the activity before the relu. In a model
    with gates it looks at these too, and with the delta rule at the attention that passes through them. It does so only
    while it reads, so that the model is the same as ever for all others.

    Args:
        model: Put into evaluation mode. Nobody else may use it during a call.
        max_tokens: Of the record.
        state: Of one sequence, to go on from; None: from the beginning. It is kept and not changed, and nobody else may
            change it either.

    Attributes:
        record: Of the tokens that were read.
        state: After the last token read.
    """

    def __init__(self, model: BDHForCausalLM, max_tokens: int, state: BDHState | None = None):
        self.model = model.eval()
        self.record = Record(model.config, max_tokens, model.dtype)
        dtype = synapse_dtype(model.dtype)
        self._borrowed = state is not None  # then the first to read makes a copy
        if state is None:
            state = BDHState.zeros(model.config, 1, model.device, dtype)
        self.state = state.to(model.device, dtype)

    @property
    def room(self) -> int:
        """The number of tokens that still fit into the record."""
        return self.record.max_tokens - len(self.record)

    @torch.inference_mode()
    def skip(self, tokens: Sequence[int]) -> Tensor:
        """Reads tokens (at least one) that come before those of the record. Returns as `read`."""
        assert not len(self.record)
        if self._borrowed:
            self.state, self._borrowed = self.state.clone(), False
        return self._forward(tokens)

    @torch.inference_mode()
    def read(self, tokens: Sequence[int]) -> Tensor:
        """Reads tokens, from one to as many as there is `room` for, and records them.

        Returns:
            What leaves the last layer, (T, D); `lm_head` makes logits of it.
        """
        assert 0 < len(tokens) <= self.room
        start = int(self.state.position[0])
        if not len(self.record) and (start or self._borrowed):
            self.record.base, self.record.start = self.state, start
            self.state, self._borrowed = self.state.clone(), False
        config, layer = self.model.config, self.model.model.layer
        delta = config.write == "delta"
        seen: dict[str, list[Tensor]] = {}  # by name of an argument of `Record.add`, one tensor a layer

        def keep(name: str, values: Tensor) -> None:
            seen.setdefault(name, []).append(values)

        def look(encoder: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            X = F.relu(output[0])  # (T, n)
            keep("vectors", inputs[0][0])  # (T, D)
            keep("rasters", raster_of(X, config.n_embd))  # (T, bins)
            keep("shares", (X > 0).float().mean(-1))  # (T)
            if delta:
                heads = X.unflatten(-1, (config.n_head, -1))  # (T, h, N)
                keep("key_lengths", torch.linalg.vector_norm(heads, dim=-1, dtype=synapse_dtype(X.dtype)))  # (T, h)

        def look_at_gates(module: torch.nn.Module, inputs: tuple[Tensor, ...], gates: Gates) -> None:
            if gates.log_decay is not None:
                keep("log_decay", gates.log_decay[0].mT)  # (T, h)
            if gates.write_strength is not None:
                keep("write_strength", gates.write_strength[0].mT)  # (T, h)

        def look_at_attention(module: torch.nn.Module, inputs: tuple[Tensor], A: Tensor) -> None:
            keep("attention", A[0].transpose(0, 1))  # (T, h, D)

        with ExitStack() as hooks:
            handles = [layer.encoder.register_forward_hook(look)]
            if layer.gates is not None:
                handles.append(layer.gates.register_forward_hook(look_at_gates))
            if layer.gates is not None and delta:
                handles.append(layer.gates.attention.register_forward_hook(look_at_attention))
            for handle in handles:
                hooks.callback(handle.remove)
            x = self._forward(tokens)  # (T, D)
        self.record.add(tokens, **{name: torch.stack(values, 1) for name, values in seen.items()})
        return x

    def _forward(self, tokens: Sequence[int]) -> Tensor:
        ids = torch.tensor([tokens], device=self.model.device)  # (1, T)
        return self.model.model(input_ids=ids, past_key_values=self.state, use_cache=True).last_hidden_state[0]
