"""A layer between a token's vector and its decoder's output, forward and backward, head by head.

    X = relu(x E^T), R = rope(X), A_t = sum over s<t of (R_t . R_s) x_s (+ R_t S),
    y = sum over heads of dropout(X o relu(LN(A) Ev^T)) Dec^T

It is the function of `BDHLayer.forward`, made so that nothing of size (B, T, N) is there for more than one head at a
time, and for the backward pass nothing of that size is kept: X, R, Y and Z are worked out again. Kept are x and, for
each head, LN(A), the scores, and the synapses before each chunk. A reading may ask for X, R and Z to be kept too.

Shapes as in `bdh.kernels.reading`; M = G * C. Synapses are held in the frame of a chunk, in which its first token has
phase 0; those that come in and go out are turned from and to the phases of their positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bdh.kernels.operations import Dropout, Past
from bdh.kernels.products import add_product_, product_into
from bdh.kernels.reading import Reading
from bdh.kernels.torch_operations import turn_rows
from bdh.model.modeling_bdh import synapse_dtype


def neurons(
    reading: Reading, x: Tensor, S: Tensor | None, encoder: Tensor, encoder_v: Sequence[Tensor], decoder: Tensor
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
    inputs = weights + ((x,) if S is None else (x, S))
    keep = torch.is_grad_enabled() and any(one.requires_grad for one in inputs)
    seed = int(torch.randint(2**63 - 1, (), device="cpu")) if reading.dropout > 0 else 0
    padded = F.pad(x, (0, 0, 0, c * C - T)) if c * C > T else x  # (B, c * C, D)
    with torch.autocast(x.device.type, enabled=False):
        y, S = Neurons.apply(reading, seed, keep, padded.view(B, c, C, D), S, *weights)
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
    """x, S and weights -> y and the synapses after, both in the frames of chunks. Not differentiable twice."""

    @staticmethod
    def forward(
        ctx: Any,
        reading: Reading,
        seed: int,
        keep: bool,  # whether a backward pass may come
        x: Tensor,  # (B, c, C, D), of any dtype
        S: Tensor | None,  # (B, h, N, D), in the frame of the first chunk
        encoder: Tensor,  # (n, D)
        decoder: Tensor,  # (D, n)
        *encoder_v: Tensor,  # h x (N, D)
    ) -> tuple[Tensor, Tensor | None]:
        op, phases, documents = reading.operations, reading.token_phases, reading.documents
        all_neurons = keep and reading.keeps
        B, c, C, D = x.shape
        xs = x.to(phases[0].dtype).view(B * c, C, D)  # (G, C, D)
        y = xs.new_zeros(B * c, C, D, dtype=synapse_dtype(xs.dtype))  # (G, C, D)
        values = xs if documents is None else xs * documents.writes  # (G, C, D)
        saved, ends = [xs], []
        for head in range(reading.weights.n_head):
            E, Ev, Dec = reading.weights.head(head)
            X, R = op.excite(xs, E, *phases, all_neurons)  # (G, C, N)
            P = op.scores(R, None if documents is None else documents.of)  # (G, C, C)
            A = P @ xs  # (G, C, D)
            U = None
            if S is not None or c > 1:
                U = (R.mT @ values).unflatten(0, (B, c))  # (B, c, N, D)
                before = None if S is None else S[:, head].contiguous()  # (B, N, D)
                kept = None if documents is None else documents.kept  # (B, c)
                U, end = op.scan(U, before, *reading.chunk_phases, kept)  # (B, c, N, D), (B, N, D)
                ends.append(end)
                U = U.flatten(0, 1)  # (G, N, D)  S before each chunk
                if documents is None:
                    add_product_(A, R, U)  # (G, C, D)
                else:
                    A += (R @ U) * documents.sees_past  # (G, C, D)
            A, rstd = op.norm(A, reading.eps)  # (G, C, D), (G, C, 1)
            Z = op.gate(A, Ev, X, Dropout(reading.dropout, seed, head), Dec, y, all_neurons)  # (G, C, N)
            if keep:
                saved += [P, A, rstd, *([] if U is None else [U])]
            if Z is not None:
                saved += [X, R, Z]
        if keep:
            ctx.reading, ctx.seed, ctx.dtypes = reading, seed, (x.dtype, encoder.dtype)
            ctx.save_for_backward(*saved)
        if reading.dropout > 0:
            y *= Dropout(reading.dropout).scale
        return y.view(x.shape).to(x.dtype), None if S is None else torch.stack(ends, 1)  # (B, h, N, D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dS: Tensor | None) -> tuple[Tensor | None, ...]:
        reading, (xs, *saved) = ctx.reading, ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            way_back = WayBack(reading, ctx.seed, xs, dy, dS)
            each = len(saved) // reading.weights.n_head
            for head in range(reading.weights.n_head):
                one = saved[head * each : (head + 1) * each]
                kept = tuple(one[-3:]) if reading.keeps else None
                way_back.through(head, kept, *(one[:-3] if kept else one))
        of_x, of_weights = ctx.dtypes
        dx = way_back.dx.view(dy.shape).to(of_x)  # (B, c, C, D)
        of_S = torch.stack(way_back.dS, 1) if ctx.needs_input_grad[4] else None  # (B, h, N, D)
        gradients = (way_back.dE.flatten(0, 1), way_back.dDec, *way_back.dEv)
        return None, None, None, dx, of_S, *(gradient.to(of_weights) for gradient in gradients)


class WayBack:
    """A backward pass through a layer's neurons, to be led `through` each head.

    Args:
        reading: That of the forward pass.
        seed: Of dropout.
        xs: (G, C, D) dt.
        dy: Gradient of what the forward pass returned, (B, c, C, D).
        dS: Of the synapses after, (B, h, N, D), None for none.

    Attributes:
        dx: (G, C, D), a sum over heads.
        dE: (h, N, D).
        dEv: (h, N, D).
        dDec: (D, n).
        dS: Of the synapses before, h x (B, N, D), where there are any or chunks go on from each other.
    """

    def __init__(self, reading: Reading, seed: int, xs: Tensor, dy: Tensor, dS: Tensor | None):
        self.reading, self.seed = reading, seed
        self.B, self.c, _, D = dy.shape
        if reading.dropout > 0:
            dy = dy * Dropout(reading.dropout).scale  # (B, c, C, D)
        self.x, self.dy, self.dS_after = xs, dy.to(xs.dtype).view(xs.shape), dS  # (G, C, D) twice
        h, N = reading.weights.n_head, len(reading.weights.E[0])
        wide = synapse_dtype(xs.dtype)
        self.dx = xs.new_zeros(xs.shape, dtype=wide)  # (G, C, D)
        self.dE, self.dEv = (xs.new_empty(h, N, D, dtype=wide) for _ in range(2))  # (h, N, D)
        # (D, n), by columns on a GPU, where the sum over tokens is then one of rows
        self.dDec = xs.new_empty(h * N, D, dtype=wide).mT if xs.is_cuda else xs.new_empty(D, h * N, dtype=wide)
        self.dS: list[Tensor] = []

    def through(
        self, head: int, kept: tuple[Tensor, ...] | None, P: Tensor, A: Tensor, rstd: Tensor, S: Tensor | None = None
    ) -> None:
        """One head: X, R and Z if they were kept, 3 x (G, C, N), scores (G, C, C), LN(A) (G, C, D), its 1 / deviation
        (G, C, 1), synapses (G, N, D) or None."""
        op, phases, x, documents = self.reading.operations, self.reading.token_phases, self.x, self.reading.documents
        E, Ev, Dec = self.reading.weights.head(head)
        dDec, dEv = self.dDec[:, head * len(E) : (head + 1) * len(E)], self.dEv[head]  # (D, N), (N, D)
        if kept is None:
            X, R = op.excite(x, E, *phases)  # (G, C, N)
            dropout = Dropout(self.reading.dropout, self.seed, head)
            dY, dX = op.gate_backward(self.dy, Dec, A, Ev, X, dropout, dDec, dEv)  # (G, C, N)
        else:
            X, R, Z = kept
            dY, dX = op.gate_backward_kept(self.dy, Dec, A, X, Z, dDec, dEv)  # (G, C, N)
        dA = op.norm_backward(dY @ Ev, A, rstd)  # (G, C, D)
        add_product_(self.dx, P.mT, dA)  # (G, C, D)
        past = None if S is None else self.past(R, dA, S)
        dP = op.scores_backward(dA, x, None if documents is None else documents.of)  # (G, C, C)
        dX = op.excite_backward(dP, R, X, dX, *phases, past)  # (G, C, N)
        product_into(self.dE[head], dX.flatten(0, 1).mT, x.flatten(0, 1))  # (N, D)
        add_product_(self.dx, dX, E)  # (G, C, D)

    def past(self, R: Tensor, dA: Tensor, S: Tensor) -> Past:
        """What comes by the synapses: back through the chunks, and to what was written."""
        documents = self.reading.documents
        head = len(self.dS)
        dA = dA if documents is None else dA * documents.sees_past  # (G, C, D)
        values = self.x if documents is None else self.x * documents.writes  # (G, C, D)
        V = (R.mT @ dA).unflatten(0, (self.B, self.c))  # (B, c, N, D)
        after = None if self.dS_after is None else self.dS_after[:, head].contiguous()  # (B, N, D)
        kept = None if documents is None else documents.kept  # (B, c)
        V, before = self.reading.operations.scan_backward(V, after, *self.reading.chunk_phases, kept)
        self.dS.append(before)  # (B, N, D)
        V = V.flatten(0, 1)  # (G, N, D)  now the gradient of what each chunk wrote
        if documents is None:
            add_product_(self.dx, R, V)  # (G, C, D)
        else:
            self.dx += (R @ V) * documents.writes  # (G, C, D)
        return dA, S, values, V
