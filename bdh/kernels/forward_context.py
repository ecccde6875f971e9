"""What all layers of a model share while it reads some tokens: the weights, the chunks, the phases, the documents.

Shapes: B sequences, T tokens, D `n_embd`, h heads, N neurons of one head, n = h * N; time is cut in chunks of C tokens,
c of a sequence, G = B * c in all, the last one filled up with zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bdh.kernels.layer_operations import Operations
from bdh.model.modeling_bdh import rotary_phases, synapse_dtype

Phases = tuple[Tensor, Tensor]  # cos and sin


@dataclass(frozen=True)
class Weights:
    """A layer's weights in the dtype to compute in, by head.

    Attributes:
        E: h x (N, D).
        Ev: h x (N, D).
        Dec: h x (D, N), of any strides.
    """

    E: Sequence[Tensor]
    Ev: Sequence[Tensor]
    Dec: Sequence[Tensor]

    @classmethod
    def of(cls, encoder: Tensor, encoder_v: Sequence[Tensor], decoder: Tensor, dtype: torch.dtype) -> "Weights":
        """From those of the layer's linear maps: (n, D), h x (N, D), (D, n)."""
        with torch.no_grad():
            h = len(encoder_v)
            Ev = [weight.to(dtype) for weight in encoder_v]  # h x (N, D)
            decoder = decoder.to(dtype)  # (D, n)
            if decoder.is_cuda:  # whose kernels take it by columns
                decoder = decoder.mT.contiguous().mT  # (D, n)
            return cls(encoder.to(dtype).chunk(h), Ev, decoder.chunk(h, 1))

    @property
    def n_head(self) -> int:
        return len(self.E)

    def head(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """E (N, D), Ev (N, D) and Dec (D, N) of a head."""
        return self.E[k], self.Ev[k], self.Dec[k]


@dataclass(frozen=True)
class Documents:
    """What keeps documents apart.

    Attributes:
        of: Which document each token is of, (G, C).
        sees_past: (G, C, 1) dt, 1 for tokens that see the synapses before their chunk.
        writes: (G, C, 1) dt, 1 for tokens that stay in the synapses after their chunk.
        kept: (B, c), float32 at least, 1 for chunks that leave what was there before.
    """

    of: Tensor
    sees_past: Tensor
    writes: Tensor
    kept: Tensor

    @classmethod
    def apart(cls, ids: Tensor, C: int, dtype: torch.dtype) -> "Documents":
        """Of `ids` (B, T), which never fall; document 0 is that of the synapses that come in."""
        B, T = ids.shape
        c = -(-T // C)
        if c * C > T:
            ids = torch.cat((ids, ids[:, -1:].expand(B, c * C - T)), 1)  # (B, c * C)
        by_chunk = ids.view(B, c, C)
        last = by_chunk[:, :, -1:]  # (B, c, 1)
        before = F.pad(last[:, :-1], (0, 0, 1, 0))  # (B, c, 1)
        return cls(
            by_chunk.flatten(0, 1).contiguous(),
            (by_chunk == before).to(dtype).view(B * c, C, 1),
            (by_chunk == last).to(dtype).view(B * c, C, 1),
            (last == before)[:, :, 0].to(synapse_dtype(dtype)),
        )


@dataclass(frozen=True)
class Reading:
    """How a model reads some tokens, the same for all its layers.

    Attributes:
        operations: The steps of a head.
        weights: In the dtype to compute in, dt.
        C: Tokens of a chunk.
        eps: Of the layer norm.
        dropout: Probability of dropping a product X o Y.
        token_phases: Of the tokens of a chunk, 2 x (C, N/2) dt.
        chunk_phases: Of a whole chunk, 2 x (N/2), float32 at least.
        first_phases: Of the position of each sequence's first token, 2 x (B, 1, N/2); None if no synapses come in.
        next_phases: Of the position after the last chunk.
        documents: None if all tokens are of one.
        keeps: Whether X, R and Z of all heads are kept for the way back, rather than worked out again.
    """

    operations: Operations
    weights: Weights
    C: int
    eps: float
    dropout: float
    token_phases: Phases
    chunk_phases: Phases
    first_phases: Phases | None = None
    next_phases: Phases | None = None
    documents: Documents | None = None
    keeps: bool = False

    @classmethod
    def begin(
        cls,
        operations: Operations,
        weights: Weights,
        shape: tuple[int, int],
        *,
        theta: float,
        eps: float,
        chunk_size: int,
        dropout: float = 0.0,
        start: Tensor | None = None,
        documents: Tensor | None = None,
        room: int = 0,
    ) -> "Reading":
        """A reading of (B, T) tokens.

        Args:
            operations: The steps of a head.
            weights: All layers'.
            shape: B and T.
            theta: Base of the rotary phases.
            eps: Of the layer norm.
            chunk_size: Longer sequences are read in chunks of this many tokens.
            dropout: Probability of dropping a product X o Y.
            start: Position of the first token of each sequence, (B,) int64, if synapses come in; else it is no matter.
            documents: As for `attention_quadratic`, (B, T), never falling.
            room: Bytes that X, R and Z of a layer may take, if they are worth keeping.
        """
        B, T = shape
        C = min(T, chunk_size)
        (N, D), dtype, device = weights.E[0].shape, weights.E[0].dtype, weights.E[0].device
        size = 3 * B * -(-T // C) * C * weights.n_head * N * dtype.itemsize  # of X, R and Z
        first = following = None
        if start is not None:
            first = each_pair(start[:, None], N, theta, synapse_dtype(dtype))  # 2 x (B, 1, N/2)
            following = each_pair(start[:, None] + -(-T // C) * C, N, theta, synapse_dtype(dtype))  # 2 x (B, 1, N/2)
        return cls(
            operations,
            weights,
            C,
            eps,
            dropout,
            *phases_of_a_chunk(C, N, theta, dtype, device),
            first,
            following,
            None if documents is None else Documents.apart(documents, C, dtype),
            size <= room and operations.worth_keeping(C, N, D, dtype),
        )


@lru_cache(maxsize=16)
def phases_of_a_chunk(C: int, N: int, theta: float, dtype: torch.dtype, device: torch.device) -> tuple[Phases, Phases]:
    """Of its tokens, 2 x (C, N/2) dtype, side by side in memory, and of all of it, 2 x (N/2), float32 at least."""
    with torch.inference_mode(False), torch.no_grad():  # or a backward pass could not use them
        each = torch.stack(each_pair(torch.arange(C, device=device)[None], N, theta, dtype), -1)[0]  # (C, N/2, 2)
        whole_cos, whole_sin = each_pair(torch.tensor([[C]], device=device), N, theta, synapse_dtype(dtype))
        return (each[..., 0], each[..., 1]), (whole_cos[0, 0], whole_sin[0, 0])


def each_pair(positions: Tensor, N: int, theta: float, dtype: torch.dtype) -> Phases:
    """The phases of each pair of neurons: (B, T) int64 -> 2 x (B, T, N/2)."""
    cos, sin = rotary_phases(positions, N, theta, dtype)  # 2 x (B, 1, T, N)
    return cos[:, 0, :, 1::2].contiguous(), sin[:, 0, :, 1::2].contiguous()
