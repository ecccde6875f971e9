"""What the training kernels are made of: the steps of one head, implemented in PyTorch, in Triton, and
in Gluon for Hopper.

Shapes: G chunks of C tokens (B sequences of c chunks each, a sequence's chunks next to each other), D `n_embd`, N
neurons of one head. `dt` is the dtype that is computed in; sums are float32 at least. Tensors are contiguous unless
said otherwise. Neurons lie as in the model: a rotary pair is columns 2i and 2i + 1. Token t of a chunk has the phases
of position t, as scores depend on differences only.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bdh.kernels.gated_operations import GatedOperations


@dataclass(frozen=True)
class Dropout:
    """Which of a head's products Z are dropped: it depends on seed, head, token (number in G * C) and neuron alone.

    What is kept stays as it is: `scale` comes to the sums of it, which are smaller.

    Attributes:
        p: Probability; 0 keeps all.
        seed: Of this pass through a layer, 0 to 2^63 - 1.
        head: From 0.
    """

    p: float = 0.0
    seed: int = 0
    head: int = 0

    @property
    def scale(self) -> float:
        """What all that is kept has to be multiplied by, 1 / (1 - p)."""
        return 1 / (1 - self.p)


SMALLEST = 2.0**-126  # normal number of float32 and bfloat16: of smaller ones the reciprocal may be infinite

# How the synapses tell in the gradient of R: dA (G, C, D), of what each token read of them; S (G, N, D), before each
# chunk; values (G, C, D), what each token has written; dS (G, N, D), of what each chunk has written. All dt.
SynapseTerms = tuple[Tensor, Tensor, Tensor, Tensor]


class Operations(Protocol):
    """The steps of one head.

    Attributes:
        gated_attention: The steps of attention with decay and with the delta rule.
    """

    gated_attention: GatedOperations

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether it can be computed in."""

    def excite(
        self, x: Tensor, E: Tensor, cos: Tensor, sin: Tensor, keep: bool = False, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """X = relu(x E^T) and R = rope(X).

        Args:
            x: (G, C, D) dt.
            E: (N, D) dt.
            cos: (C, N/2) dt.
            sin: (C, N/2) dt.
            keep: Whether they are to last; else they do until the next head's turn.
            out: Where R is written, (G, C, N) dt, contiguous; None allocates it.

        Returns:
            X and R, (G, C, N) dt.
        """

    def scores(self, R: Tensor, documents: Tensor | None) -> Tensor:
        """tril(R R^T, -1), and 0 where `documents` (G, C), whole numbers, differ. Returns (G, C, C) dt."""

    def scores_backward(self, dA: Tensor, x: Tensor, documents: Tensor | None) -> Tensor:
        """The gradient of the scores, tril(dA x^T, -1) and 0 where documents differ, plus its transpose.

        dA (G, C, D), x (G, C, D) -> (G, C, C), all dt.
        """

    def gate(
        self, A: Tensor, Ev: Tensor, X: Tensor, dropout: Dropout, Dec: Tensor, y: Tensor, keep: bool = False
    ) -> Tensor | None:
        """y += Z Dec^T, Z = X o relu(A Ev^T), dropped. Returns Z, (G, C, N) dt, if it is to be kept.

        A (G, C, D), Ev (N, D), X (G, C, N), all dt; Dec (D, N) dt, of any strides; y (G, C, D) float32 at least.
        """

    def gate_backward(
        self,
        dy: Tensor,
        Dec: Tensor,
        A: Tensor,
        Ev: Tensor,
        X: Tensor,
        dropout: Dropout,
        dDec: Tensor,
        dEv: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """From dy (G, C, D), the gradient of Z Dec^T, and Dec (D, N), of any strides; the others as in `gate`.

        All heads of a layer give the same dy, unchanged: what is made of it for the first may serve the others.

        With Y = relu(A Ev^T) and dZ = dy Dec, dropped like Z, and sums over all tokens:

        Args:
            dDec: dy^T Z, (D, N) float32 at least, of any strides: filled.
            dEv: dY^T A, (N, D) float32 at least: filled.

        Returns:
            dY = dZ o X where Y > 0, the gradient before that relu, and dX = dZ o Y. (G, C, N) dt.
        """

    def should_save_activations(self, C: int, N: int, D: int, dtype: torch.dtype) -> bool:
        """Whether a way back takes less time if X, R and Z of every head are kept for it."""

    def gate_backward_saved(
        self, dy: Tensor, Dec: Tensor, A: Tensor, X: Tensor, Z: Tensor, dDec: Tensor, dEv: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `gate_backward`, from Z (G, C, N): Y, with what was dropped 0, is Z / X where X is at least SMALLEST.

        Where X is 0, dX is 0: what is made of it goes through X's relu next. Between 0 and SMALLEST it is that or less.
        """

    def excite_backward(
        self, dP: Tensor, R: Tensor, X: Tensor, dX: Tensor, cos: Tensor, sin: Tensor, past: SynapseTerms | None
    ) -> Tensor:
        """The gradient before the relu of `excite`: dX + rope^-1(dR) where X > 0, (G, C, N) dt. May overwrite dX.

        dR = dP R, and with a past + dA S^T + values dS^T. `dP` (G, C, C) is the gradient of the scores and its
        transpose, added up.
        """

    def scan(self, U: Tensor, S: Tensor | None, cos: Tensor, sin: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """The synapses as they grow: S^(c+1) = rope_(-C)(kept_c S^c + U_c), each in the frame of its chunk.

        Args:
            U: What each chunk writes, (B, c, N, D) dt; may be overwritten.
            S: S^0, (B, N, D) float32, None for none.
            cos: Of C tokens, (N/2) float32.
            sin: (N/2) float32.
            kept: (B, c) float32, 0 where a chunk forgets the synapses before it; None keeps all.

        Returns:
            S^c, the synapses before each chunk, (B, c, N, D) dt, and after the last one, (B, N, D) float32.
        """

    def scan_backward(
        self, V: Tensor, dS: Tensor | None, cos: Tensor, sin: Tensor, kept: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The way back: G_c = rope_C(g^(c+1)); g^c = kept_c G_c + V_c, from g of the end, dS.

        Args:
            V: Gradient of each S^c by what was read of it, (B, c, N, D) dt; may be overwritten.
            dS: Gradient of the synapses after the last chunk, (B, N, D) float32, None for none.
            cos: As for `scan`, and so `sin` and `kept`.

        Returns:
            G_c, the gradient of each U_c, (B, c, N, D) dt, and g^0, that of S^0, (B, N, D) float32.
        """

    def norm(self, A: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Layer norm: (G, C, D) dt -> (G, C, D) dt, and 1 / deviation, (G, C, 1), float32 at least."""

    def norm_backward(self, gradient: Tensor, A: Tensor, rstd: Tensor) -> Tensor:
        """Back through the `norm` that gave A and rstd: (G, C, D) dt -> (G, C, D) dt."""

    def add_norm(self, x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, tuple[Tensor, ...]]:
        """LN(x + LN(y)), (B, T, D) float32 at least, and what the way back needs."""

    def add_norm_backward(self, gradient: Tensor, kept: tuple[Tensor, ...], eps: float) -> tuple[Tensor, Tensor]:
        """Back through the `join` that kept this: the gradients of x and y, (B, T, D)."""
