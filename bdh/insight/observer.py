"""Reads tokens with a model as it is, and keeps a record of what its neurons did."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bdh.insight.record import Record, raster_of
from bdh.model import BDHForCausalLM, BDHState
from bdh.model.modeling_bdh import synapse_dtype


class Observer:
    """Goes along with a text, with a state of its own: what `BDHForCausalLM.forward` does, and seen while it does it.

    The layer's encoder is where it looks: what comes in is x, what goes out is the activity before the relu. It does so
    only while it reads, so that the model is the same as ever for all others.

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
        """How many more tokens the record has room for."""
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
        if not len(self.record) and start:
            self.record.base, self.record.start = self.state, start
            self.state, self._borrowed = self.state.clone(), False
        vectors, rasters, shares = [], [], []

        def look(encoder: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            X = F.relu(output[0])  # (T, n)
            vectors.append(inputs[0][0])  # (T, D)
            rasters.append(raster_of(X, self.model.config.n_embd))  # (T, bins)
            shares.append((X > 0).float().mean(-1))  # (T)

        hook = self.model.model.layer.encoder.register_forward_hook(look)
        try:
            x = self._forward(tokens)  # (T, D)
        finally:
            hook.remove()
        self.record.add(tokens, torch.stack(vectors, 1), torch.stack(rasters, 1), torch.stack(shares, 1))
        return x

    def _forward(self, tokens: Sequence[int]) -> Tensor:
        ids = torch.tensor([tokens], device=self.model.device)  # (1, T)
        return self.model.model(input_ids=ids, past_key_values=self.state, use_cache=True).last_hidden_state[0]
