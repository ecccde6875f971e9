"""The operations of `bdh.kernels.gated_attention`, implemented in PyTorch and in Triton.

Shapes: G chunks of C tokens (of several heads, where these are computed together), D `n_embd`, N neurons of one head.
`dt` is the dtype of the computation; gates and what is computed of them are float32 at least, "wide".
"""

from typing import Protocol

from torch import Tensor


class GatedOperations(Protocol):
    """See the equations of `bdh.kernels.gated_attention`.

    Attributes:
        all_heads_per_call: Whether all heads of a layer are computed together where chunks follow each other.
    """

    all_heads_per_call: bool

    def add_scores(self, R: Tensor, u: Tensor, documents: Tensor | None) -> Tensor:
        """M_ts = exp(u_t - u_s) (R_t . R_s) for s < t of the same document, else 0.

        Args:
            R: (G, C, N) dt.
            u: Cumulative log-decay, (G, C) wide.
            documents: (G, C) integers, or None: all tokens are of one.

        Returns:
            M, (G, C, C) dt.
        """

    def delta_scores(
        self, R: Tensor, u: Tensor, beta: Tensor, documents: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """M_ts = a_t a_s exp(u_t - u_s) (R_t . R_s) for s < t of the same document, else 0, with a = 1 / (|R| + eps).

        Returns:
            M (G, C, C) dt; (I + diag(beta) M)^-1, (G, C, C) dt, of the write strength beta (G, C) wide; and |R|^2,
            (G, C) wide.
        """

    def gated_scores_backward(
        self,
        E: Tensor,
        U: Tensor,
        u: Tensor,
        squares: Tensor | None,
        documents: Tensor | None,
        diagonal: Tensor | None,
        M: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient of R R^T plus its transpose, with `diagonal` (G, C) wide on the diagonal, (G, C, C) dt.

        Args:
            E: (G, C, D) dt. The gradient of M is dM = tril(E U^T, -1).
            U: (G, C, D) dt.
            u: As for `add_scores`, and so `documents`.
            squares: |R|^2, (G, C) wide, where keys have unit length, else None.
            documents: (G, C) integers, or None.
            diagonal: (G, C) wide, or None.
            M: (G, C, C) dt, or None where the gradient of u is not needed.

        Returns:
            dM * dM/d(R R^T) plus its transpose, (G, C, C) dt; and the gradient of u through M, the sums over rows minus
            those over columns of dM * M, (G, C) wide, or None. Each product of a row is the one of a column, to the
            last bit, so that their sum over a chunk is 0 whatever the dtype is.
        """

    def scaled_matrix(self, X: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """diag(rows) X diag(columns) of X (G, C, C) dt, lower triangular, and rows and columns (G, C) wide."""

    def scaled_difference(self, w: Tensor, x: Tensor, r: Tensor | None = None, Q: Tensor | None = None) -> Tensor:
        """w (x - r Q), or w x: w and r (G, C) wide scale rows of x and Q (G, C, D) dt. Returns (G, C, D) dt.

        A chunk is contiguous in all of them; G may have any stride.
        x may have the chunks of one head, (G / k, C, D), for those of k heads.
        """

    def add_scaled_(self, A: Tensor, Q: Tensor, r: Tensor) -> None:
        """A += r Q: A and Q (G, C, D) dt, r (G, C) wide; a chunk is contiguous in all, G may have any stride."""

    def scan_delta(
        self,
        R: Tensor,
        W: Tensor,
        Y: Tensor,
        remains: Tensor,
        state: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        back: bool,
    ) -> tuple[Tensor, Tensor]:
        """The state from chunk to chunk: Q = R state, Y -= W Q, state = rope_(-C)(remains state + R^T Y).

        Args:
            R: (B, c, C, N) dt.
            W: (B, c, C, C) dt, or its transpose in memory.
            Y: (B, c, C, D) dt; changed in place.
            remains: (B, c) wide.
            state: Before the first chunk, (B, N, D) wide; left as after the last one. None is zeros, and the last state
                is not needed.
            cos: Of C tokens, (N/2) wide.
            sin: (N/2) wide.
            back: Whether the last chunk is the first and the first the last.

        Returns:
            The state before each chunk, (B, c, N, D) dt, and Q, (B, c, C, D) dt.
        """

    def delta_rows_backward(
        self, dA: Tensor, V: Tensor, A: Tensor, U: Tensor, x: Tensor, beta: Tensor, squares: Tensor, dx: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """E = dA - beta V, and what the gates and the lengths of keys need, sums over D.

        Args:
            dA: (k * G, C, D) dt, for k heads, contiguous, and so V, A and U.
            V: Gradient of U.
            A: What was read.
            U: What was written, beta (x - A).
            x: (G, C, D) dt.
            beta: (k * G, C) wide.
            squares: |R|^2, (k * G, C) wide.
            dx: (G, C, D) wide, to which the sum over heads of beta V is added.

        Returns:
            E (k * G, C, D) dt; the gradient of R R^T on its diagonal, twice, by the length of keys,
            -(A . E + U . V) / (|R| (|R| + eps)), (k * G, C) wide; and that of beta, V . (x - A), (k * G, C) wide.
        """

    def difference_of_dots(self, r: Tensor, E: Tensor, Q: Tensor, w: Tensor, U: Tensor, P: Tensor) -> Tensor:
        """r (E . Q) - w (U . P), (G, C) wide, of r and w (G, C) wide and the others (G, C, D) dt, all contiguous."""
