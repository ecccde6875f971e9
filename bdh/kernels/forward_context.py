"""Values that all layers of a model share in one forward pass: weights, chunks, rotary phases, documents.

Shapes: B sequences, T tokens, D `n_embd`, h heads, N neurons of one head, n = h * N. Sequences are padded with zeros to
c chunks of C tokens each; G = B * c.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bdh.kernels.layer_operations import Operations
from bdh.model.modeling_bdh import Gates, rotary_phases, synapse_dtype

Phases = tuple[Tensor, Tensor]  # cos and sin


@dataclass(frozen=True)
class HeadWeights:
    """Weights of a layer by head, in the dtype of the computation.

    Attributes:
        E: h x (N, D).
        Ev: h x (N, D).
        Dec: h x (D, N), of any strides.
    """

    E: Sequence[Tensor]
    Ev: Sequence[Tensor]
    Dec: Sequence[Tensor]

    @classmethod
    def split(cls, encoder: Tensor, encoder_v: Sequence[Tensor], decoder: Tensor, dtype: torch.dtype) -> "HeadWeights":
        """Split and convert the weights of a layer: (n, D), h x (N, D), (D, n)."""
        with torch.no_grad():
            h = len(encoder_v)
            Ev = [weight.to(dtype) for weight in encoder_v]  # h x (N, D)
            decoder = decoder.to(dtype)  # (D, n)
            if decoder.is_cuda:  # the kernels read it by columns
                decoder = decoder.mT.contiguous().mT  # (D, n)
            return cls(encoder.to(dtype).chunk(h), Ev, decoder.chunk(h, 1))


@dataclass(frozen=True)
class DocumentMasks:
    """Masks that separate the documents of packed sequences.

    Attributes:
        ids: Document of each token, (G, C).
        reads_state: 1 for tokens that read the synapses from before their chunk: (G, C, 1) dt.
        writes_state: 1 for tokens that remain in the synapses after their chunk: (G, C, 1) dt.
        keeps_state: 1 for chunks after which the synapses from before remain: (B, c), float32 at least.
    """

    ids: Tensor
    reads_state: Tensor
    writes_state: Tensor
    keeps_state: Tensor

    @classmethod
    def separate_documents(cls, ids: Tensor, C: int, dtype: torch.dtype) -> "DocumentMasks":
        """Compute the masks of `ids` (B, T), which never fall; document 0 continues the synapses that come in."""
        B, T = ids.shape
        c = -(-T // C)
        if c * C > T:
            ids = torch.cat((ids, ids[:, -1:].expand(B, c * C - T)), 1)  # (B, c * C)
        by_chunk = ids.view(B, c, C)
        last = by_chunk[:, :, -1:]  # (B, c, 1)
        previous = F.pad(last[:, :-1], (0, 0, 1, 0))  # (B, c, 1)
        return cls(
            by_chunk.flatten(0, 1).contiguous(),
            (by_chunk == previous).to(dtype).view(B * c, C, 1),
            (by_chunk == last).to(dtype).view(B * c, C, 1),
            (last == previous)[:, :, 0].to(synapse_dtype(dtype)),
        )


@dataclass(frozen=True)
class ForwardContext:
    """Context of one forward pass of a model, shared by its layers.

    Attributes:
        operations: Backend.
        weights: Weights in the dtype of the computation, dt.
        C: Tokens of a chunk.
        eps: Epsilon of the layer norm.
        dropout: Probability of dropping a product X o Y.
        token_phases: Phases of the tokens of a chunk, 2 x (C, N/2) dt.
        chunk_phases: Phases of C tokens, 2 x (N/2), float32 at least.
        first_phases: Phases of each sequence's first position, 2 x (B, 1, N/2); None if no synapses come in.
        next_phases: Phases of the position after the last chunk, likewise.
        documents: None if each sequence is one document.
        save_activations: Whether X, R and Z of all heads are saved for the backward pass instead of recomputed.
        constant_gates: The gates, if they do not depend on the tokens; else None.
    """

    operations: Operations
    weights: HeadWeights
    C: int
    eps: float
    dropout: float
    token_phases: Phases
    chunk_phases: Phases
    first_phases: Phases | None
    next_phases: Phases | None
    documents: DocumentMasks | None
    save_activations: bool
    constant_gates: Gates | None


@lru_cache(maxsize=16)
def chunk_phases(C: int, N: int, theta: float, dtype: torch.dtype, device: torch.device) -> tuple[Phases, Phases]:
    """Return the phases of C tokens, 2 x (C, N/2) dtype, interleaved in memory, and of position C, 2 x (N/2) wide."""
    with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be used in a backward pass
        tokens = torch.stack(pair_phases(torch.arange(C, device=device)[None], N, theta, dtype), -1)[0]  # (C, N/2, 2)
        cos, sin = pair_phases(torch.tensor([[C]], device=device), N, theta, synapse_dtype(dtype))  # 2 x (1, 1, N/2)
        return (tokens[..., 0], tokens[..., 1]), (cos[0, 0], sin[0, 0])


def pair_phases(positions: Tensor, N: int, theta: float, dtype: torch.dtype) -> Phases:
    """Return the phases of each pair of neurons: (B, T) int64 -> 2 x (B, T, N/2)."""
    cos, sin = rotary_phases(positions, N, theta, dtype)  # 2 x (B, 1, T, N)
    return cos[:, 0, :, 1::2].contiguous(), sin[:, 0, :, 1::2].contiguous()
