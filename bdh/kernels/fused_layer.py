"""A layer between a token's vector and its decoder's output, forward and backward, head by head.

    X = relu(x E^T), R = rope(X), A_t = sum over s<t of (R_t . R_s) x_s (+ R_t S),
    y = sum over heads of dropout(X o relu(LN(A) Ev^T)) Dec^T

(for A with decay and the delta rule see `bdh.kernels.gated_attention`).

It is the function of `BDHLayer.forward`, made so that nothing of size (B, T, N) is there for more than one head at a
time, and for the backward pass nothing of that size is kept: X, R, Y and Z are worked out again. Kept are x and, for
each head, LN(A), the scores, and the synapses before each chunk. A reading may ask for X, R and Z to be kept too. Only
the delta rule over several chunks has X and R of all heads of a layer at once, on a GPU.

Shapes as in `bdh.kernels.forward_context`; M = G * C. Synapses are held in the frame of a chunk, in which its first
token has phase 0; those that come in and go out are turned from and to the phases of their positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bdh.kernels.attention import Attention, PlainAttention
from bdh.kernels.forward_context import Reading
from bdh.kernels.gated_attention import ChunkedGates, GatedAttention
from bdh.kernels.layer_operations import Dropout, Past
from bdh.kernels.products import add_product_, product_into
from bdh.kernels.torch.gated_operations import turn_rows
from bdh.kernels.torch.operations import TorchOperations
from bdh.kernels.torch.single_chunk import SingleChunkAttention
from bdh.model.modeling_bdh import Gates, synapse_dtype

NO_GATES = Gates(None, None)  # the published model


def neurons(
    reading: Reading,
    x: Tensor,
    S: Tensor | None,
    encoder: Tensor,
    encoder_v: Sequence[Tensor],
    decoder: Tensor,
    gates: Gates = NO_GATES,
) -> tuple[Tensor, Tensor | None]:
    """What a layer's neurons make of x: y, what its decoder says, and the synapses after these tokens if any came in.

    Sums, and the gradients of the weights, are float32 at least. With dropout a seed is drawn from torch's generator of
    the CPU.

    Args:
        reading: Of (B, T) tokens.
        x: (B, T, D).
        S: Synapses of the tokens before, (B, h, N, D), or None; the reading then knows the positions.
        encoder: (n, D). The three are what gradients are for; `reading.weights` is what is computed with.
        encoder_v: h x (N, D).
        decoder: (D, n).
        gates: Retention and write strength of each head at each token.

    Returns:
        y (B, T, D) in x's dtype; the synapses after, (B, h, N, D) float32 or float64, or None.
    """
    B, T, D = x.shape
    C = reading.C
    c = -(-T // C)
    if S is not None:
        assert reading.first_phases is not None
        cos, sin = reading.first_phases  # (B, 1, N/2)
        S = turn_rows(S.to(cos.dtype), cos, -sin)  # (B, h, N, D)
    weights = (encoder, decoder, *encoder_v)
    inputs = (*weights, x, S, *gates)
    keep = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in inputs)
    seed = int(torch.randint(2**63 - 1, (), device="cpu")) if reading.dropout > 0 else 0
    padded = F.pad(x, (0, 0, 0, c * C - T)) if c * C > T else x  # (B, c * C, D)
    with torch.autocast(x.device.type, enabled=False):
        y, S = Neurons.apply(reading, seed, keep, padded.view(B, c, C, D), S, *gates, *weights)
    if S is not None:
        assert reading.next_phases is not None
        S = turn_rows(S, *reading.next_phases)  # (B, h, N, D)
    return y.view(B, c * C, D)[:, :T], S


def join(reading: Reading, x: Tensor, y: Tensor) -> Tensor:
    """The next x of a layer, LN(x + LN(y)), from this one and what its neurons made of it: (B, T, D)."""
    result: Tensor = Join.apply(reading, x, y)
    return result


class Join(torch.autograd.Function):
    """x and y -> LN(x + LN(y)), (B, T, D). Not differentiable twice."""

    @staticmethod
    def forward(ctx: Any, reading: Reading, x: Tensor, y: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        a, b = x.to(wide).contiguous(), y.to(wide).contiguous()  # (B, T, D)
        result, kept = reading.operations.join(a, b, reading.eps)  # (B, T, D)
        ctx.reading, ctx.dtypes, ctx.wide = reading, (x.dtype, y.dtype), wide
        ctx.save_for_backward(*kept)
        return result.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        op, gradient = ctx.reading.operations, gradient.to(ctx.wide).contiguous()
        dx, dy = op.join_backward(gradient, ctx.saved_tensors, ctx.reading.eps)  # (B, T, D) twice
        of_x, of_y = ctx.dtypes
        return None, dx.to(of_x), dy.to(of_y)


class Neurons(torch.autograd.Function):
    """x, S, gates and weights -> y and the synapses after, both in the frames of chunks. Not differentiable twice."""

    @staticmethod
    def forward(
        ctx: Any,
        reading: Reading,
        seed: int,
        keep: bool,  # whether a backward pass may come
        x: Tensor,  # (B, c, C, D), of any dtype
        S: Tensor | None,  # (B, h, N, D), in the frame of the first chunk
        log_decay: Tensor | None,  # (B, h, T)
        write_strength: Tensor | None,  # (B, h, T)
        encoder: Tensor,  # (n, D)
        decoder: Tensor,  # (D, n)
        *encoder_v: Tensor,  # h x (N, D)
    ) -> tuple[Tensor, Tensor | None]:
        op, phases = reading.operations, reading.token_phases
        all_neurons = keep and reading.keeps
        B, c, C, D = x.shape
        xs = x.to(phases[0].dtype).view(B * c, C, D)  # (G, C, D)
        y = xs.new_zeros(B * c, C, D, dtype=synapse_dtype(xs.dtype))  # (G, C, D)
        attention = attention_of(reading, xs, B, Gates(log_decay, write_strength), S is not None)
        if not isinstance(attention, PlainAttention):
            attention.wants_decay = keep and ctx.needs_input_grad[5]
        saved: list[Tensor | None] = []
        ends = []
        for heads in blocks_of_heads(attention, reading):
            X, R = excite_heads(reading, xs, heads, all_neurons)  # k x (G, C, N), (k * G, C, N)
            before = None if S is None else S[:, heads].transpose(0, 1).flatten(0, 1).contiguous()  # (k * B, N, D)
            A, end, of_attention = attention.forward(heads, R, before)  # (k * G, C, D), (k * B, N, D)
            A, rstd = op.norm(A, reading.eps)  # (k * G, C, D), (k * G, C, 1)
            Zs = []
            for head, X_k, A_k in zip(range(heads.start, heads.stop), X, A.split(len(xs)), strict=True):
                _, Ev, Dec = reading.weights.head(head)
                dropout = Dropout(reading.dropout, seed, head)
                Zs.append(op.gate(A_k, Ev, X_k, dropout, Dec, y, all_neurons))  # (G, C, N)
            if keep:
                saved += [A, rstd, *of_attention]
            if all_neurons:
                saved += [R, *X, *Zs]
            if end is not None:
                ends.append(end.unflatten(0, (-1, B)).transpose(0, 1))  # (B, k, N, D)
        if keep:
            ctx.reading, ctx.seed, ctx.attention, ctx.dtypes = reading, seed, attention, (x.dtype, encoder.dtype)
            ctx.tokens = None if log_decay is None and write_strength is None else tokens_of(log_decay, write_strength)
            ctx.save_for_backward(xs, *saved)
        if reading.dropout > 0:
            y *= Dropout(reading.dropout).scale
        return y.view(x.shape).to(x.dtype), None if S is None else torch.cat(ends, 1)  # (B, h, N, D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dS: Tensor | None) -> tuple[Tensor | None, ...]:
        reading, (xs, *saved) = ctx.reading, ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            backward = LayerBackward(reading, ctx.attention, ctx.seed, xs, dy, dS)
            blocks = blocks_of_heads(ctx.attention, reading)
            each = len(saved) // len(blocks)
            for i, heads in enumerate(blocks):
                backward.accumulate_heads(heads, saved[i * each : (i + 1) * each])
        of_x, of_weights = ctx.dtypes
        dx = backward.dx.view(dy.shape).to(of_x)  # (B, c, C, D)
        of_S = None
        if ctx.needs_input_grad[4]:
            of_S = torch.cat([before.unflatten(0, (-1, len(dy))).transpose(0, 1) for before in backward.dS], 1)
        gradients = (backward.dE.flatten(0, 1), backward.dDec, *backward.dEv)
        of_gates = gate_gradients(ctx, len(dy))  # 2 x (B, h, T)
        return None, None, None, dx, of_S, *of_gates, *(gradient.to(of_weights) for gradient in gradients)


def attention_of(
    reading: Reading, xs: Tensor, B: int, gates: Gates, with_state: bool
) -> PlainAttention | GatedAttention | SingleChunkAttention:
    """The attention of a layer that reads xs (G, C, D), of B sequences."""
    if gates.log_decay is None and gates.write_strength is None:
        return PlainAttention(reading, xs, B)
    chunked = ChunkedGates.cut(gates, reading, with_state)
    if isinstance(reading.operations, TorchOperations) and len(xs) == B and not with_state:
        same_decay = gates.log_decay is None or gates.log_decay.stride(0) == 0
        return SingleChunkAttention(reading, chunked, xs, reading.operations.workspace, same_decay)
    return GatedAttention(reading, chunked, xs, B, with_state)


def tokens_of(log_decay: Tensor | None, write_strength: Tensor | None) -> int:
    """T of gates (B, h, T)."""
    some = log_decay if log_decay is not None else write_strength
    assert some is not None
    return some.shape[-1]


def gate_gradients(ctx: Any, B: int) -> list[Tensor | None]:
    """The gradients of log_decay and of the write strength, (B, h, T), where these are needed."""
    attention = ctx.attention
    if isinstance(attention, PlainAttention):
        return [None, None]
    wants_decay, wants_beta = ctx.needs_input_grad[5:7]
    gradients = (
        attention.decay_gradient() if wants_decay else None,  # (h, B, c * C)
        attention.d_beta.unflatten(1, (B, -1)).flatten(2) if wants_beta else None,  # (h, B, c * C)
    )
    return [None if each is None else each.transpose(0, 1)[..., : ctx.tokens] for each in gradients]  # (B, h, T)


def blocks_of_heads(attention: Attention, reading: Reading) -> list[slice]:
    """The heads that an attention computes together."""
    k = attention.heads_at_once
    return [slice(start, start + k) for start in range(0, reading.weights.n_head, k)]


def excite_heads(reading: Reading, xs: Tensor, heads: slice, keep: bool = False) -> tuple[list[Tensor], Tensor]:
    """X of each head, k x (G, C, N), and R of all of them, (k * G, C, N)."""
    op, E, phases = reading.operations, reading.weights.E[heads], reading.token_phases
    if len(E) == 1:
        X, R = op.excite(xs, E[0], *phases, keep)  # (G, C, N) twice
        return [X], R
    Rs = xs.new_empty(len(E), *xs.shape[:2], len(E[0]))  # (k, G, C, N)
    Xs = [op.excite(xs, E_k, *phases, True, R_k)[0] for E_k, R_k in zip(E, Rs, strict=True)]  # k x (G, C, N)
    return Xs, Rs.flatten(0, 1)


class LayerBackward:
    """The backward pass through a layer's neurons, accumulated over heads.

    Args:
        reading: That of the forward pass.
        attention: That of the forward pass.
        seed: Of dropout.
        xs: (G, C, D) dt.
        dy: Gradient of what the forward pass returned, (B, c, C, D).
        dS: Of the synapses after, (B, h, N, D), None for none.

    Attributes:
        dx: (G, C, D), a sum over heads.
        dE: (h, N, D).
        dEv: (h, N, D).
        dDec: (D, n).
        dS: Of the synapses before, by block of heads (k * B, N, D), where any come in or chunks follow each other.
    """

    def __init__(self, reading: Reading, attention: Attention, seed: int, xs: Tensor, dy: Tensor, dS: Tensor | None):
        self.reading, self.attention, self.seed = reading, attention, seed
        if reading.dropout > 0:
            dy = dy * Dropout(reading.dropout).scale  # (B, c, C, D)
        self.x, self.dy, self.dS_after = xs, dy.to(xs.dtype).view(xs.shape), dS  # (G, C, D) twice
        h, N, D = reading.weights.n_head, len(reading.weights.E[0]), xs.shape[-1]
        wide = synapse_dtype(xs.dtype)
        self.dx = xs.new_zeros(xs.shape, dtype=wide)  # (G, C, D)
        self.dE, self.dEv = (xs.new_empty(h, N, D, dtype=wide) for _ in range(2))  # (h, N, D)
        # (D, n), by columns on a GPU, where the sum over tokens is then one of rows
        self.dDec = xs.new_empty(h * N, D, dtype=wide).mT if xs.is_cuda else xs.new_empty(D, h * N, dtype=wide)
        self.dS: list[Tensor] = []

    def accumulate_heads(self, heads: slice, saved: Sequence[Tensor]) -> None:
        """The heads of a block, from what the forward pass has saved of it."""
        op, k, G = self.reading.operations, heads.stop - heads.start, len(self.x)
        A, rstd, *of_attention = saved  # (k * G, C, D), (k * G, C, 1)
        Zs: Sequence[Tensor | None]
        if self.reading.keeps:
            R, X, Zs = of_attention[-2 * k - 1], of_attention[-2 * k : -k], of_attention[-k:]
            of_attention = of_attention[: -2 * k - 1]
        else:
            X, R = excite_heads(self.reading, self.x, heads)  # k x (G, C, N), (k * G, C, N)
            Zs = [None] * k
        dXs, dA = [], torch.empty_like(A)  # (k * G, C, D)
        for head, X_k, A_k, Z, dA_k in zip(range(heads.start, heads.stop), X, A.split(G), Zs, dA.split(G), strict=True):
            dXs.append(self.back_through_gate(head, A_k, X_k, Z, dA_k))  # (G, C, N)
        dA = op.norm_backward(dA, A, rstd)  # (k * G, C, D)
        after = self.dS_after
        if after is not None:
            after = after[:, heads].transpose(0, 1).flatten(0, 1).contiguous()  # (k * B, N, D)
        found = self.attention.backward(heads, R, dA, of_attention, after, self.dx)
        if found.S is not None:
            self.dS.append(found.S)
        for i, head in enumerate(range(heads.start, heads.stop)):
            part = slice(i * G, (i + 1) * G)
            past: Past | None = None
            if found.past is not None:
                read, states, values, of_written = (each[part] for each in found.past)
                past = (read, states, values, of_written)
            self.back_through_excite(head, found.scores[part], R[part], X[i], dXs[i], past)

    def back_through_gate(self, head: int, A: Tensor, X: Tensor, Z: Tensor | None, dA: Tensor) -> Tensor:
        """One head: dX (G, C, N) by the gate. The gradient of LN(A) is put into dA (G, C, D)."""
        op, (E, Ev, Dec) = self.reading.operations, self.reading.weights.head(head)
        dDec, dEv = self.dDec[:, head * len(E) : (head + 1) * len(E)], self.dEv[head]  # (D, N), (N, D)
        if Z is None:
            dropout = Dropout(self.reading.dropout, self.seed, head)
            dY, dX = op.gate_backward(self.dy, Dec, A, Ev, X, dropout, dDec, dEv)  # (G, C, N)
        else:
            dY, dX = op.gate_backward_kept(self.dy, Dec, A, X, Z, dDec, dEv)  # (G, C, N)
        torch.mm(dY.flatten(0, 1), Ev, out=dA.flatten(0, 1))  # (G * C, D)
        return dX

    def back_through_excite(self, head: int, dP: Tensor, R: Tensor, X: Tensor, dX: Tensor, past: Past | None) -> None:
        """One head: from the gradients of the scores (G, C, C), of X (G, C, N), and what comes by the synapses."""
        op, E = self.reading.operations, self.reading.weights.E[head]
        dX = op.excite_backward(dP, R, X, dX, *self.reading.token_phases, past)  # (G, C, N)
        product_into(self.dE[head], dX.flatten(0, 1).mT, self.x.flatten(0, 1))  # (N, D)
        add_product_(self.dx, dX, E)  # (G, C, D)
