"""Attention of heads in training with decay and with the delta rule, forward and backward.

Equations and names as in `bdh.model.modeling_bdh`. Within a chunk, with u the cumulative sum of log_decay since it
began, a = 1 / (|R| + eps) for "delta" and 1 for "add":

    M_ts = a_t a_s exp(u_t - u_s) (R_t . R_s) for s < t,    P_t = a_t exp(u_t) R_t S
    add:    U = x                       delta:  (I + diag(beta) M) U = beta (x - P)
    A = P + M U
    S' = exp(u_C) S + sum over s of a_s exp(u_C - u_s) R_s^T U_s

For "add", U is known before S is, so all chunks are computed at once and the synapses are scanned. For "delta", U
depends on S, so chunks follow each other; the inverses of I + diag(beta) M are computed before, all at once.

Backward, with V the gradient of U and G that of what a chunk writes (for "delta" from the last chunk to the first):

    add:    E = dA                      delta:  V = inverse^T (M^T dA + a exp(u_C - u) R G),  E = dA - beta V
    dM = tril(E U^T, -1),               dP = E
    dx = V for "add", beta V for "delta";    dbeta = V . (x - A)
    d log a = A . E + U . V

and the gradient of log_decay_t is the sum over t' >= t of A . E - U . V, plus S . dS of the end: it scales what the
tokens from t on read, and its inverse what they write. The rounding errors of A . E and of U . V
would add up over many tokens, so the difference is computed in parts,

    A . E - U . V = sums over rows minus sums over columns of dM * M, plus a exp(u) (R S) . E - a exp(u_C - u) (R G) . U

of which the first two have the same products, so that they cancel exactly within a chunk, and the last two are as small
as the retention of the synapses between the tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bdh.kernels.attention import AttentionGradient
from bdh.kernels.forward_context import ForwardContext
from bdh.kernels.layer_operations import SynapseTerms
from bdh.kernels.products import add_product_
from bdh.kernels.torch.gated_operations import rotate_rows
from bdh.model.modeling_bdh import KEY_EPS, Gates


@dataclass(frozen=True)
class ChunkedGates:
    """The gates of a layer by chunk; float32 at least, contiguous.

    Attributes:
        u: Cumulative log-decay since the beginning of the chunk, (h, G, C).
        beta: Write strength, (h, G, C); None for "add".
        reads: exp(u), 0 for tokens that do not see the synapses before their chunk: (h, G, C).
        writes: exp(u_C - u), 0 for tokens that do not remain in the synapses after their chunk: (h, G, C).
        retention: exp(u_C), 0 for chunks that begin a document: (h, B, c).

    The last three are u for single chunks without a state.
    """

    u: Tensor
    beta: Tensor | None
    reads: Tensor
    writes: Tensor
    retention: Tensor

    @classmethod
    def split(cls, gates: Gates, context: ForwardContext, with_state: bool) -> "ChunkedGates":
        """Split gates of (B, h, T) tokens; padding of the last chunk neither decays nor writes."""
        any_gate = gates.log_decay if gates.log_decay is not None else gates.write_strength
        assert any_gate is not None
        (B, h, T), C = any_gate.shape, context.C
        c = -(-T // C)

        def chunks(gate: Tensor) -> Tensor:
            padded = F.pad(gate, (0, c * C - T)) if c * C > T else gate  # (B, h, c * C)
            return padded.transpose(0, 1).contiguous().view(h, B * c, C)  # (h, G, C)

        log_decay = any_gate.new_zeros(h, B * c, C) if gates.log_decay is None else chunks(gates.log_decay)  # (h, G, C)
        beta = None if gates.write_strength is None else chunks(gates.write_strength)  # (h, G, C)
        u = log_decay.cumsum(-1)  # (h, G, C)
        if c == 1 and not with_state:
            return cls(u, beta, u, u, u)
        last = u[..., -1:]  # (h, G, 1)
        reads, writes, retention = u.exp(), (last - u).exp(), last.exp().view(h, B, c)
        if (documents := context.documents) is not None:
            reads = reads * documents.reads_state[..., 0]  # (h, G, C)
            writes = writes * documents.writes_state[..., 0]  # (h, G, C)
            retention = retention * documents.keeps_state  # (h, B, c)
        return cls(u, beta, reads, writes, retention)


class GatedAttention:
    """`bdh.kernels.attention.Attention` with decay and the delta rule.

    Args:
        context: Of the forward pass.
        gates: Of the layer.
        x: Values, (G, C, D) dt.
        B: Number of sequences.
        with_state: Whether synapses come in.

    Attributes:
        d_beta: After the backward pass, the gradient of the write strength, (h, G, C), for "delta".
        needs_decay_gradient: Whether the gradient of log_decay is needed.
    """

    def __init__(self, context: ForwardContext, gates: ChunkedGates, x: Tensor, B: int, with_state: bool):
        self.op, self.gated_op = context.operations, context.operations.gated_attention
        self.document_ids = None if context.documents is None else context.documents.ids  # (G, C)
        self.chunk_phases = context.chunk_phases
        self.gates, self.x, self.B, self.c = gates, x, B, len(x) // B
        self.with_state = with_state
        self.has_past = with_state or self.c > 1
        self.delta = gates.beta is not None
        h = len(gates.u)
        # The products of one chunk at a time are small, so on a GPU each step computes all heads.
        sequential = self.delta and self.has_past
        self.heads_per_call = h if sequential and self.gated_op.all_heads_per_call else 1
        self.needs_decay_gradient = False
        self.difference = torch.empty_like(gates.u)  # (h, G, C)  A . E - U . V
        self.d_beta = torch.empty_like(gates.u)  # (h, G, C)

    def of_heads(self, per_head: Tensor, heads: slice) -> Tensor:
        """Select heads: (h, G, C) -> (k * G, C), and (h, B, c) -> (k * B, c)."""
        return per_head[heads.start] if self.heads_per_call == 1 else per_head[heads].flatten(0, 1)

    def key_scales(self, heads: slice, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Return a exp(u) and a exp(u_C - u) of heads, from |R|^2: (k * G, C) -> twice (k * G, C)."""
        a = 1 / (squares.sqrt() + KEY_EPS)  # (k * G, C)
        return self.of_heads(self.gates.reads, heads) * a, self.of_heads(self.gates.writes, heads) * a

    def documents_of_heads(self, heads: slice) -> Tensor | None:
        """Return the documents of the tokens, repeated for each head: (k * G, C)."""
        ids, k = self.document_ids, heads.stop - heads.start
        return ids if ids is None or k == 1 else ids.repeat(k, 1)

    # --------------------------------------------------------------------------------------------------- forward

    def forward(
        self, heads: slice, R: Tensor, S: Tensor | None
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
        u = self.of_heads(self.gates.u, heads)  # (k * G, C)
        if self.gates.beta is None:
            return self.forward_add(heads, R, self.gated_op.add_scores(R, u, self.document_ids), S)
        beta = self.of_heads(self.gates.beta, heads)  # (k * G, C)
        M, inverse, squares = self.gated_op.delta_scores(
            R, u, beta, self.documents_of_heads(heads)
        )  # 2 x (k * G, C, C)
        if self.has_past:
            A, U, Q, states, end = self.forward_chunks(heads, R, M, inverse, beta, squares, S)
            for_decay = (Q, end) if self.needs_decay_gradient else (None, None)
            return A, end, (M, A, inverse, U, squares, states, *for_decay)
        U = inverse @ self.gated_op.scaled_difference(beta, self.x)  # (G, C, D)
        A = M @ U  # (G, C, D)
        return A, None, (M, A, inverse, U, squares, None, None, None)

    def forward_add(
        self, heads: slice, R: Tensor, M: Tensor, S: Tensor | None
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
        A = M @ self.x  # (G, C, D)
        if not self.has_past:
            return A, None, (M, None, None, None)
        values = self.gated_op.scaled_difference(self.of_heads(self.gates.writes, heads), self.x)  # (G, C, D)
        written = (R.mT @ values).unflatten(0, (self.B, self.c))  # (B, c, N, D)
        retention = self.of_heads(self.gates.retention, heads)  # (B, c)
        states, end = self.op.scan(written, S, *self.chunk_phases, retention)  # (B, c, N, D), (B, N, D)
        states = states.flatten(0, 1)  # (G, N, D)  S before each chunk
        Q = R @ states  # (G, C, D)
        self.gated_op.add_scaled_(A, Q, self.of_heads(self.gates.reads, heads))  # (G, C, D)
        return A, end, (M, states, *((Q, end) if self.needs_decay_gradient else (None, None)))

    def forward_chunks(
        self, heads: slice, R: Tensor, M: Tensor, inverse: Tensor, beta: Tensor, squares: Tensor, S: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Return A, U and Q (k * G, C, D), S before each chunk (k * B, c, N, D), and the last S, for the delta rule.

        With r = a exp(u), w = a exp(u_C - u) and Q = R S, a chunk writes w U = w inverse (beta (x - r Q)) = Y - W Q, of
        which all but Q is independent of the synapses.
        """
        op = self.gated_op
        reads, writes = self.key_scales(heads, squares)  # (k * G, C)
        Y = op.scaled_difference(writes, inverse @ op.scaled_difference(beta, self.x))  # (k * G, C, D)
        W = op.scaled_matrix(inverse, writes, beta * reads)  # (k * G, C, C)
        state = None if S is None else S.clone()  # (k * B, N, D)
        states, Q = self.scan(heads, R, W, Y, state, *self.chunk_phases, back=False)  # (k * B, c, N, D), (k * G, C, D)
        U = inverse @ op.scaled_difference(beta, self.x, reads, Q)  # (k * G, C, D)
        A = M @ U  # (k * G, C, D)
        op.add_scaled_(A, Q, reads)  # (k * G, C, D)
        return A, U, Q, states, state

    def scan(
        self, heads: slice, R: Tensor, W: Tensor, Y: Tensor, state: Tensor | None, cos: Tensor, sin: Tensor, back: bool
    ) -> tuple[Tensor, Tensor]:
        """Call `GatedOperations.scan_delta`: (k * G, ...) -> the states (k * B, c, N, D) and Q (k * G, C, D)."""
        retention = self.of_heads(self.gates.retention, heads)  # (k * B, c)
        R, W, Y = (each.unflatten(0, (-1, self.c)) for each in (R, W, Y))  # (k * B, c, ...)
        states, Q = self.gated_op.scan_delta(R, W, Y, retention, state, cos, sin, back)
        return states, Q.flatten(0, 1)

    # -------------------------------------------------------------------------------------------------- backward

    def backward(
        self, heads: slice, R: Tensor, dA: Tensor, saved: Sequence[Tensor | None], dS: Tensor | None, dx: Tensor
    ) -> AttentionGradient:
        if not self.delta:
            return self.backward_add(heads, R, dA, saved, dS, dx)
        M, A, inverse, U, squares, states, Q, end = saved
        assert M is not None and A is not None and inverse is not None and U is not None and squares is not None
        assert self.gates.beta is not None
        beta, u = self.of_heads(self.gates.beta, heads), self.of_heads(self.gates.u, heads)  # (k * G, C)
        terms, dS_before, P = None, None, None
        if states is None:
            V = inverse.mT @ (M.mT @ dA)  # (G, C, D)
        else:
            reads, writes = self.key_scales(heads, squares)  # (k * G, C)
            V, P, terms, dS_before = self.backward_chunks(
                heads, R, dA, M, inverse, beta, reads, writes, U, states, dS
            )  # 2 x (k * G, C, D)
        E, diagonal, d_beta = self.gated_op.delta_rows_backward(
            dA, V, A, U, self.x, beta, squares, dx
        )  # (k * G, C, D), 2 x (k * G, C)
        self.d_beta[heads] = d_beta.view_as(self.d_beta[heads])  # (k, G, C)
        dP, of_u = self.gated_op.gated_scores_backward(
            E, U, u, squares, self.documents_of_heads(heads), diagonal, M if self.needs_decay_gradient else None
        )  # (k * G, C, C), (k * G, C)
        if of_u is not None and Q is not None and P is not None:
            of_u += self.gated_op.difference_of_dots(reads, E, Q, writes, U, P)  # (k * G, C)
        self.store_decay_gradient(heads, of_u, end, dS)
        return AttentionGradient(dP, terms, dS_before)

    def backward_add(
        self, heads: slice, R: Tensor, dA: Tensor, saved: Sequence[Tensor | None], dS: Tensor | None, dx: Tensor
    ) -> AttentionGradient:
        M, states, Q, end = saved
        assert M is not None
        add_product_(dx, M.mT, dA)  # (G, C, D)
        u = self.of_heads(self.gates.u, heads)  # (G, C)
        dP, of_u = self.gated_op.gated_scores_backward(
            dA, self.x, u, None, self.document_ids, None, M if self.needs_decay_gradient else None
        )  # (G, C, C), (G, C)
        terms, dS_before = None, None
        if states is not None:
            reads, writes = self.of_heads(self.gates.reads, heads), self.of_heads(self.gates.writes, heads)  # (G, C)
            read_gradient = self.gated_op.scaled_difference(reads, dA)  # (G, C, D)
            of_states = (R.mT @ read_gradient).unflatten(0, (self.B, self.c))  # (B, c, N, D)
            retention = self.of_heads(self.gates.retention, heads)  # (B, c)
            of_written, dS_before = self.op.scan_backward(of_states, dS, *self.chunk_phases, retention)
            of_written = of_written.flatten(0, 1)  # (G, N, D)
            P = R @ of_written  # (G, C, D)
            self.gated_op.add_scaled_(dx, P, writes)  # (G, C, D)
            terms = (read_gradient, states, self.gated_op.scaled_difference(writes, self.x), of_written)
            if of_u is not None and Q is not None:
                of_u += self.gated_op.difference_of_dots(reads, dA, Q, writes, self.x, P)  # (G, C)
        self.store_decay_gradient(heads, of_u, end, dS)
        return AttentionGradient(dP, terms, dS_before)

    def backward_chunks(
        self,
        heads: slice,
        R: Tensor,
        dA: Tensor,
        M: Tensor,
        inverse: Tensor,
        beta: Tensor,
        reads: Tensor,
        writes: Tensor,
        U: Tensor,
        states: Tensor,
        dS: Tensor | None,
    ) -> tuple[Tensor, Tensor, SynapseTerms, Tensor | None]:
        """Return V and R G (k * G, C, D), the terms of dR, and dS before, for the delta rule from the last chunk."""
        op = self.gated_op
        written = op.scaled_difference(writes, U)  # (k * G, C, D)
        W = op.scaled_matrix(inverse, writes, beta * reads).mT  # (k * G, C, C)
        V = inverse.mT @ (M.mT @ dA)  # (k * G, C, D)  without what the synapses add
        read_gradient = op.scaled_difference(reads, dA, beta, V)  # (k * G, C, D)  a exp(u) E, likewise
        cos, sin = self.chunk_phases
        state = None
        if dS is not None or self.with_state:
            state = states.new_zeros(len(states), *states.shape[2:], dtype=cos.dtype)  # (k * B, N, D)  G
            if dS is not None:
                state.copy_(rotate_rows(dS, cos, sin))
        of_written, P = self.scan(
            heads, R, W, read_gradient, state, cos, -sin, back=True
        )  # (k * B, c, N, D), (k * G, C, D)
        V.baddbmm_(inverse.mT, op.scaled_difference(writes, P))  # (k * G, C, D)
        dS_before = rotate_rows(state, cos, -sin) if state is not None and self.with_state else None  # (k * B, N, D)
        return V, P, (read_gradient, states.flatten(0, 1), written, of_written.flatten(0, 1)), dS_before

    def store_decay_gradient(
        self, heads: slice, difference: Tensor | None, end: Tensor | None, dS: Tensor | None
    ) -> None:
        """Store A . E - U . V (k * G, C) of heads, plus S . dS of the end at the last token."""
        if difference is None:  # the gradient of log_decay is not needed
            return
        by_sequence = self.difference[heads].view(-1, self.B, self.c * difference.shape[-1])  # (k, B, c * C)
        by_sequence.copy_(difference.view_as(by_sequence))
        if end is not None and dS is not None:
            by_sequence[:, :, -1] += (end * dS).sum((1, 2)).view(-1, self.B)  # (k, B)

    def decay_gradient(self) -> Tensor:
        """Return the gradient of log_decay after the backward pass, (h, B, c * C)."""
        return sums_over_later_tokens(self.difference, self.B)


def sums_over_later_tokens(difference: Tensor, B: int) -> Tensor:
    """Return cumulative sums from the end of each sequence: (h, G, C) -> (h, B, c * C)."""
    by_sequence = difference.view(len(difference), B, -1)  # (h, B, c * C)
    return by_sequence.flip(-1).cumsum(-1).flip(-1)
