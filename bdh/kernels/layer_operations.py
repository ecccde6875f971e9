"""Interface of the backends of `bdh.kernels.fused_layer`: the operations of one head.

Implementations are in PyTorch, in Triton, and for Hopper GPUs in Gluon.

Shapes: G chunks of C tokens (B sequences of c chunks each, in order), D `n_embd`, N neurons of one head. `dt` is the
dtype of the computation; sums are float32 at least. Tensors are contiguous unless stated otherwise. A rotary pair is
columns 2i and 2i + 1, as in the model. Token t of a chunk has the phases of position t, because scores depend on
differences of positions only.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bdh.kernels.gated_operations import GatedOperations


@dataclass(frozen=True)
class Dropout:
    """Dropout of the products Z of a head: a function of seed, head, token (index in G * C) and neuron.

    The operations do not scale the products that are kept; the caller multiplies sums of them by `scale`.

    Attributes:
        p: Probability.
        seed: Of a pass through a layer, 0 to 2^63 - 1.
        head: From 0.
    """

    p: float = 0.0
    seed: int = 0
    head: int = 0

    @property
    def scale(self) -> float:
        return 1 / (1 - self.p)


SMALLEST_NORMAL = 2.0**-126  # of float32 and bfloat16; the reciprocal of a smaller number may be infinite

# Terms of the gradient of R through the synapses, all dt: dA (G, C, D), gradient of what each token read; S (G, N, D),
# before each chunk; values (G, C, D), written by each token; dS (G, N, D), gradient of what each chunk wrote.
SynapseTerms = tuple[Tensor, Tensor, Tensor, Tensor]


class Operations(Protocol):
    """The operations of one head.

    Attributes:
        gated_attention: The operations of attention with decay and with the delta rule.
    """

    gated_attention: GatedOperations

    def supports(self, dtype: torch.dtype) -> bool:
        """Return whether dt may be this dtype."""

    def excite(
        self, x: Tensor, E: Tensor, cos: Tensor, sin: Tensor, save: bool = False, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute X = relu(x E^T) and R = rope(X).

        Args:
            x: (G, C, D) dt.
            E: (N, D) dt.
            cos: (C, N/2) dt.
            sin: (C, N/2) dt.
            save: Whether the results stay valid; else until the next head's call.
            out: Result tensor for R, (G, C, N) dt; None allocates it.

        Returns:
            X and R, (G, C, N) dt.
        """

    def scores(self, R: Tensor, documents: Tensor | None) -> Tensor:
        """Compute tril(R R^T, -1), 0 where `documents` (G, C), integers, differ: (G, C, N) -> (G, C, C) dt."""

    def scores_backward(self, dA: Tensor, x: Tensor, documents: Tensor | None) -> Tensor:
        """Compute the gradient of the scores, tril(dA x^T, -1), 0 where documents differ, plus its transpose.

        dA (G, C, D), x (G, C, D) -> (G, C, C), all dt.
        """

    def gate(
        self, A: Tensor, Ev: Tensor, X: Tensor, dropout: Dropout, Dec: Tensor, y: Tensor, save: bool = False
    ) -> Tensor | None:
        """Add Z Dec^T to y, where Z = X o relu(A Ev^T) with dropout; return Z, (G, C, N) dt, if `save`.

        A (G, C, D), Ev (N, D), X (G, C, N), all dt; Dec (D, N) dt, of any strides; y (G, C, D) float32 at least.
        """

    def gate_backward(
        self, dy: Tensor, Dec: Tensor, A: Tensor, Ev: Tensor, X: Tensor, dropout: Dropout, dDec: Tensor, dEv: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradients of `gate` from dy (G, C, D), that of Z Dec^T; arguments as for `gate`.

        All heads of a layer pass the same tensor dy, so what is derived from it can be cached. With Y = relu(A Ev^T),
        and dZ = dy Dec with the same dropout, and sums over all tokens:

        Args:
            dDec: Filled with dy^T Z, (D, N) float32 at least, of any strides.
            dEv: Filled with dY^T A, (N, D) float32 at least.

        Returns:
            dY = dZ o X where Y > 0, the gradient before that relu, and dX = dZ o Y, both (G, C, N) dt.
        """

    def should_save_activations(self, C: int, N: int, D: int, dtype: torch.dtype) -> bool:
        """Return whether saving X, R and Z of every head is faster than recomputing them in the backward pass."""

    def gate_backward_saved(
        self, dy: Tensor, Dec: Tensor, A: Tensor, X: Tensor, Z: Tensor, dDec: Tensor, dEv: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute `gate_backward` from the saved Z (G, C, N): Y is Z / X where X is at least SMALLEST_NORMAL.

        Where X is 0, dX is 0, because the gradient of X's relu follows. For X between 0 and SMALLEST_NORMAL, dX is the
        same or smaller.
        """

    def excite_backward(
        self, dP: Tensor, R: Tensor, X: Tensor, dX: Tensor, cos: Tensor, sin: Tensor, terms: SynapseTerms | None
    ) -> Tensor:
        """Compute the gradient before the relu of `excite`: dX + rope^-1(dR) where X > 0, (G, C, N) dt.

        dR = dP R, and with terms + dA S^T + values dS^T. `dP` (G, C, C) is the gradient of the scores plus its
        transpose. May overwrite dX.
        """

    def scan(
        self, U: Tensor, S: Tensor | None, cos: Tensor, sin: Tensor, retention: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Scan the synapses over chunks: S^(c+1) = rope_(-C)(retention_c S^c + U_c), each in the frame of its chunk.

        Args:
            U: Written by each chunk, (B, c, N, D) dt; may be overwritten.
            S: S^0, (B, N, D) float32, or None for zeros.
            cos: Of C tokens, (N/2) float32.
            sin: (N/2) float32.
            retention: (B, c) float32; 0 where a chunk discards the synapses before it. None is 1.

        Returns:
            S^c, the synapses before each chunk, (B, c, N, D) dt, and after the last one, (B, N, D) float32.
        """

    def scan_backward(
        self, V: Tensor, dS: Tensor | None, cos: Tensor, sin: Tensor, retention: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradients of `scan`: G_c = rope_C(g^(c+1)); g^c = retention_c G_c + V_c, from g of the end, dS.

        Args:
            V: Gradient of each S^c by what was read of it, (B, c, N, D) dt; may be overwritten.
            dS: Gradient of the synapses after the last chunk, (B, N, D) float32, or None for zeros.
            cos: As for `scan`, and so `sin` and `retention`.

        Returns:
            G_c, the gradient of each U_c, (B, c, N, D) dt, and g^0, that of S^0, (B, N, D) float32.
        """

    def norm(self, A: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Layer norm: (G, C, D) dt -> (G, C, D) dt, and 1 / deviation, (G, C, 1), float32 at least."""

    def norm_backward(self, gradient: Tensor, A: Tensor, rstd: Tensor) -> Tensor:
        """Gradient of `norm`, of which A and rstd are the results: (G, C, D) dt -> (G, C, D) dt."""

    def add_norm(self, x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute LN(x + LN(y)), (B, T, D) float32 at least; return it and the tensors that its gradient needs."""

    def add_norm_backward(self, gradient: Tensor, saved: tuple[Tensor, ...], eps: float) -> tuple[Tensor, Tensor]:
        """Return the gradients of x and y, (B, T, D), from the tensors that `add_norm` returned."""
