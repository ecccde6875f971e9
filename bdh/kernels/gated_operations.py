"""Interface of the operations of `bdh.kernels.gated_attention`, implemented in PyTorch and in Triton.

Shapes: G chunks of C tokens (of all heads that one call computes), D `n_embd`, N neurons of one head. `dt` is the dtype
of the computation; gates and values derived from them are float32 at least, "wide".
"""

from typing import Protocol

from torch import Tensor


class GatedOperations(Protocol):
    """Operations of attention with gates, see the equations of `bdh.kernels.gated_attention`.

    Attributes:
        all_heads_per_call: Whether one call computes all heads of a layer if chunks depend on each other.
    """

    all_heads_per_call: bool

    def add_scores(self, R: Tensor, u: Tensor, documents: Tensor | None) -> Tensor:
        """Compute M_ts = exp(u_t - u_s) (R_t . R_s) for s < t of the same document, else 0.

        Args:
            R: (G, C, N) dt.
            u: Cumulative log-decay, (G, C) wide.
            documents: (G, C) integers, or None for one document.

        Returns:
            M, (G, C, C) dt.
        """

    def delta_scores(
        self, R: Tensor, u: Tensor, beta: Tensor, documents: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute M_ts = a_t a_s exp(u_t - u_s) (R_t . R_s) for s < t of a document, else 0, with a = 1 / (|R| + eps).

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
        """Compute the gradient of R R^T plus its transpose, with `diagonal` (G, C) wide on the diagonal, (G, C, C) dt.

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
            those over columns of dM * M, (G, C) wide, or None. Rows and columns have the same rounded products, so that
            their sum over a chunk is 0 in any dtype.
        """

    def scaled_matrix(self, X: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Compute diag(rows) X diag(columns) of X (G, C, C) dt, lower triangular; rows and columns (G, C) wide."""

    def scaled_difference(self, w: Tensor, x: Tensor, r: Tensor | None = None, Q: Tensor | None = None) -> Tensor:
        """Compute w (x - r Q), or w x: w and r (G, C) wide scale rows of x and Q (G, C, D) dt. Returns (G, C, D) dt.

        Chunks are contiguous; G may have any stride. k heads may share the chunks of x, (G / k, C, D).
        """

    def add_scaled_(self, A: Tensor, Q: Tensor, r: Tensor) -> None:
        """Add r Q to A: A and Q (G, C, D) dt, r (G, C) wide; chunks are contiguous, G may have any stride."""

    def scan_delta(
        self,
        R: Tensor,
        W: Tensor,
        Y: Tensor,
        retention: Tensor,
        state: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        back: bool,
    ) -> tuple[Tensor, Tensor]:
        """Scan the state over chunks: Q = R state, Y -= W Q, state = rope_(-C)(retention state + R^T Y).

        Args:
            R: (B, c, C, N) dt.
            W: (B, c, C, C) dt, or its transpose in memory.
            Y: (B, c, C, D) dt; changed in place.
            retention: (B, c) wide.
            state: Before the first chunk, (B, N, D) wide; overwritten with the one after the last. None for zeros, if
                the last state is not needed.
            cos: Of C tokens, (N/2) wide.
            sin: (N/2) wide.
            back: Whether to scan from the last chunk to the first.

        Returns:
            The state before each chunk, (B, c, N, D) dt, and Q, (B, c, C, D) dt.
        """

    def delta_rows_backward(
        self, dA: Tensor, V: Tensor, A: Tensor, U: Tensor, x: Tensor, beta: Tensor, squares: Tensor, dx: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute E = dA - beta V, and the sums over D for the gradients of the gates and of the lengths of keys.

        Args:
            dA: (k * G, C, D) dt, for k heads, contiguous, and so V, A and U.
            V: Gradient of U.
            A: Result of the attention.
            U: Written vectors, beta (x - A).
            x: (G, C, D) dt.
            beta: (k * G, C) wide.
            squares: |R|^2, (k * G, C) wide.
            dx: (G, C, D) wide, to which the sum over heads of beta V is added.

        Returns:
            E (k * G, C, D) dt; twice the gradient of the diagonal of R R^T through the lengths of keys,
            -(A . E + U . V) / (|R| (|R| + eps)), (k * G, C) wide; and that of beta, V . (x - A), (k * G, C) wide.
        """

    def difference_of_dots(self, r: Tensor, E: Tensor, Q: Tensor, w: Tensor, U: Tensor, P: Tensor) -> Tensor:
        """Compute r (E . Q) - w (U . P), (G, C) wide; r and w (G, C) wide, the others (G, C, D) dt, all contiguous."""
