"""Attention of heads in training, forward and backward: its interface, and the published model's, without gates.

    A_t = sum over s<t of (R_t . R_s) x_s + R_t S

Shapes as in `bdh.kernels.forward_context`: B sequences of c chunks of C tokens, G = B * c, D `n_embd`, N neurons of one
head. Tensors of k heads that one call computes are concatenated: (k * G, ...) and (k * B, ...).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from bdh.kernels.forward_context import ForwardContext
from bdh.kernels.layer_operations import SynapseTerms
from bdh.kernels.products import add_product_


@dataclass(frozen=True)
class AttentionGradient:
    """Gradients of the attention of some heads.

    Attributes:
        scores: Gradient of the scores R R^T, plus its transpose: (k * G, C, C) dt.
        synapse_terms: Of the gradient of R; None without synapses.
        S: Gradient of the synapses before, (k * B, N, D), float32 at least; None without synapses.
    """

    scores: Tensor
    synapse_terms: SynapseTerms | None
    S: Tensor | None


class Attention(Protocol):
    """Attention of one layer in one forward and one backward pass.

    Attributes:
        heads_per_call: Number of heads that one call computes; it divides the number of heads.
    """

    heads_per_call: int

    def forward(
        self, heads: slice, R: Tensor, S: Tensor | None
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
        """Compute A.

        Args:
            heads: The heads.
            R: (k * G, C, N) dt.
            S: Synapses before the first chunk, (k * B, N, D), float32 at least, contiguous, or None.

        Returns:
            A (k * G, C, D) dt; the synapses after the last chunk, (k * B, N, D), or None for one chunk without S; the
            tensors to save for the backward pass.
        """

    def backward(
        self, heads: slice, R: Tensor, dA: Tensor, saved: Sequence[Tensor | None], dS: Tensor | None, dx: Tensor
    ) -> AttentionGradient:
        """Compute gradients from dA (k * G, C, D) dt and that of the synapses after, dS (k * B, N, D) or None.

        Adds the gradient of the values to `dx` (G, C, D), float32 at least.
        """


class PlainAttention:
    """`Attention` without decay, in which tokens add their values to the synapses.

    Args:
        context: Of the forward pass.
        x: Values, (G, C, D) dt.
        B: Number of sequences.
    """

    heads_per_call = 1

    def __init__(self, context: ForwardContext, x: Tensor, B: int):
        self.op, self.chunk_phases = context.operations, context.chunk_phases
        self.documents = documents = context.documents
        self.document_ids = None if documents is None else documents.ids  # (G, C)
        self.retention = None if documents is None else documents.keeps_state  # (B, c)
        self.x, self.B, self.c = x, B, len(x) // B
        self.values = x if documents is None else x * documents.writes_state  # (G, C, D)

    def forward(
        self, heads: slice, R: Tensor, S: Tensor | None
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
        P = self.op.scores(R, self.document_ids)  # (G, C, C)
        A = P @ self.x  # (G, C, D)
        if S is None and self.c == 1:
            return A, None, (P, None)
        U = (R.mT @ self.values).unflatten(0, (self.B, self.c))  # (B, c, N, D)
        U, end = self.op.scan(U, S, *self.chunk_phases, self.retention)  # (B, c, N, D), (B, N, D)
        U = U.flatten(0, 1)  # (G, N, D)  S before each chunk
        if self.documents is None:
            add_product_(A, R, U)  # (G, C, D)
        else:
            A += (R @ U) * self.documents.reads_state  # (G, C, D)
        return A, end, (P, U)

    def backward(
        self, heads: slice, R: Tensor, dA: Tensor, saved: Sequence[Tensor | None], dS: Tensor | None, dx: Tensor
    ) -> AttentionGradient:
        P, S = saved
        assert P is not None
        add_product_(dx, P.mT, dA)  # (G, C, D)
        terms, before = (None, None) if S is None else self.synapses_backward(R, dA, S, dS, dx)
        return AttentionGradient(self.op.scores_backward(dA, self.x, self.document_ids), terms, before)

    def synapses_backward(
        self, R: Tensor, dA: Tensor, S: Tensor, dS: Tensor | None, dx: Tensor
    ) -> tuple[SynapseTerms, Tensor]:
        """Compute the gradients through the synapses, from the last chunk: the terms of dR, and dS before."""
        documents = self.documents
        dA = dA if documents is None else dA * documents.reads_state  # (G, C, D)
        V = (R.mT @ dA).unflatten(0, (self.B, self.c))  # (B, c, N, D)
        V, before = self.op.scan_backward(V, dS, *self.chunk_phases, self.retention)  # (B, c, N, D), (B, N, D)
        V = V.flatten(0, 1)  # (G, N, D)  the gradient of what each chunk wrote
        if documents is None:
            add_product_(dx, R, V)  # (G, C, D)
        else:
            dx += (R @ V) * documents.writes_state  # (G, C, D)
        return (dA, S, self.values, V), before
