"""A layer from a token's vector to its decoder's output, forward and backward, head by head.

    X = relu(x E^T), R = rope(X), A_t = sum over s<t of (R_t . R_s) x_s (+ R_t S),
    y = sum over heads of dropout(X o relu(LN(A) Ev^T)) Dec^T

(for A with decay and the delta rule see `bdh.kernels.gated_attention`).

It computes the function of `BDHLayer.forward` with tensors of size (B, T, N) for one head at a time only. None of these
are saved for the backward pass, which recomputes X, R, Y and Z; x and, for each head, LN(A), the scores, and the
synapses before each chunk are saved. A context may ask for X, R and Z to be saved too. Only the delta rule over several
chunks, on a GPU, computes X and R of all heads of a layer at once.

Shapes as in `bdh.kernels.forward_context`; M = G * C. Synapses are in the frame of a chunk, in which its first token
has phase 0; those that come in and go out are rotated from and to the phases of their positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from bdh.distributed.head_sharding import local_shard
from bdh.distributed.tensor_parallel import LocalShardLinear
from bdh.kernels.attention import Attention, PlainAttention
from bdh.kernels.forward_context import DocumentMasks, ForwardContext, HeadWeights, chunk_phases, pair_phases
from bdh.kernels.gated_attention import ChunkedGates, GatedAttention
from bdh.kernels.layer_operations import Dropout, Operations, SynapseTerms
from bdh.kernels.products import add_product_, product_into
from bdh.kernels.torch.gated_operations import rotate_rows
from bdh.kernels.torch.operations import TorchOperations
from bdh.kernels.torch.single_chunk import SingleChunkAttention
from bdh.model.modeling_bdh import BDHLayer, BDHState, Gates, synapse_dtype

NO_GATES = Gates(None, None)  # the published model


class FusedLayer:
    """Implementation of `bdh.model.modeling_bdh.LayerKernels`.

    It leaves little work, and single tokens that continue a state, to the layer's own code, which is faster then; also
    padded rows, and layers whose linear layers have adapters, quantized weights or hooks.

    Args:
        operations: Backend.
        min_products: Least number of products X o Y of a head and a pass.
        dtype: The only dtype to compute in; None for any.
        max_saved_bytes: Memory for the neurons' activations of all layers of a pass.
    """

    def __init__(self, operations: Operations, min_products: int, dtype: torch.dtype | None, max_saved_bytes: int):
        self.operations, self.min_products, self.dtype = operations, min_products, dtype
        self.max_saved_bytes = max_saved_bytes

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(
        self, layer: BDHLayer, embeds: Tensor, mask: Tensor | None, state: BDHState | None, documents: Tensor | None
    ) -> ForwardContext | None:
        """Return the context of a forward pass over embeds (B, T, D), or None for the layer's own code.

        Args:
            layer: The layer.
            embeds: (B, T, D).
            mask: 0 at padding, (B, T), or None.
            state: State to continue, or None.
            documents: As for `attention_quadratic`, (B, T), or None.
        """
        (B, T, D), config, op = embeds.shape, layer.config, self.operations
        h, N, theta = config.n_head, config.neurons_per_head, config.rope_theta
        dtype = computation_dtype(embeds)
        if B * T * N < self.min_products or (state is not None and T == 1) or not is_plain(layer):
            return None
        if self.dtype not in (None, dtype) or not op.supports(dtype) or not (mask is None or bool(mask.all())):
            return None
        encoder, *encoder_v, decoder = local_weights(layer)
        C = min(T, config.chunk_size)
        padded = -(-T // C) * C
        first = following = None
        if state is not None:
            start, wide = state.position[:, None], synapse_dtype(dtype)  # (B, 1)
            first = pair_phases(start, N, theta, wide)  # 2 x (B, 1, N/2)
            following = pair_phases(start + padded, N, theta, wide)  # 2 x (B, 1, N/2)
        saved_bytes = 3 * B * padded * h * N * dtype.itemsize  # of X, R and Z of a layer
        fits = saved_bytes <= self.max_saved_bytes // config.n_layer
        gates: Gates | None = NO_GATES
        if layer.gates is not None:
            gates = None if layer.gates.depends_on_tokens else layer.gates(embeds)
        return ForwardContext(
            op,
            HeadWeights.split(encoder, encoder_v, decoder, dtype),
            C,
            config.layer_norm_eps,
            config.dropout if layer.training else 0.0,
            *chunk_phases(C, N, theta, dtype, embeds.device),
            first,
            following,
            None if documents is None else DocumentMasks.separate_documents(documents, C, dtype),
            fits and op.should_save_activations(C, N, D, dtype),
            gates,
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def neurons(
        self, layer: BDHLayer, context: ForwardContext, x: Tensor, S: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the decoder's output and the synapses after these tokens, if any came in.

        Sums, and the gradients of the weights, are float32 at least. With dropout a seed is drawn from torch's
        generator of the CPU.

        Args:
            layer: Its parameters receive the gradients; `context.weights` has their values.
            context: Of this forward pass.
            x: (B, T, D).
            S: Synapses before, (B, h, N, D), or None.

        Returns:
            y (B, T, D) in x's dtype; the synapses after, (B, h, N, D) float32 or float64, or None.
        """
        B, T, D = x.shape
        C = context.C
        c = -(-T // C)
        encoder, *encoder_v, decoder = local_weights(layer)
        gates = context.constant_gates
        if gates is None:
            assert layer.gates is not None
            gates = layer.gates(x)
        if S is not None:
            assert context.first_phases is not None
            cos, sin = context.first_phases  # (B, 1, N/2)
            S = rotate_rows(S.to(cos.dtype), cos, -sin)  # (B, h, N, D)
        weights = (encoder, decoder, *encoder_v)
        inputs = (*weights, x, S, *gates)
        differentiable = torch.is_grad_enabled() and any(i is not None and i.requires_grad for i in inputs)
        seed = int(torch.randint(2**63 - 1, (), device="cpu")) if context.dropout > 0 else 0
        padded = F.pad(x, (0, 0, 0, c * C - T)) if c * C > T else x  # (B, c * C, D)
        with torch.autocast(x.device.type, enabled=False):
            y, S = FusedNeurons.apply(context, seed, differentiable, padded.view(B, c, C, D), S, *gates, *weights)
        if S is not None:
            assert context.next_phases is not None
            S = rotate_rows(S, *context.next_phases)  # (B, h, N, D)
        return y.view(B, c * C, D)[:, :T], S

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def add_norm(self, context: ForwardContext, x: Tensor, y: Tensor) -> Tensor:
        """Return the layer's output LN(x + LN(y)): (B, T, D) twice -> (B, T, D)."""
        result: Tensor = FusedAddNorm.apply(context, x, y)
        return result


def local_weights(layer: BDHLayer) -> list[Tensor]:
    """Return this process's weights: encoder, encoder_v of each head, decoder."""
    return [local_shard(linear.get_parameter("weight")) for linear in linear_layers(layer)]


def linear_layers(layer: BDHLayer) -> list[nn.Module]:
    return [layer.encoder, *layer.encoder_v, layer.decoder]


def is_plain(layer: BDHLayer) -> bool:
    """Return whether the linear layers have plain weights and no hooks."""
    return all(
        type(linear) in (nn.Linear, LocalShardLinear)
        and isinstance(linear.weight, nn.Parameter)
        and type(linear.weight.data) in (Tensor, DTensor)
        and linear.bias is None
        and not (linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks)
        for linear in linear_layers(layer)
    )


def computation_dtype(x: Tensor) -> torch.dtype:
    """Return autocast's dtype where autocast is on, else x's."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


class FusedAddNorm(torch.autograd.Function):
    """x and y -> LN(x + LN(y)), (B, T, D). Not differentiable twice."""

    @staticmethod
    def forward(ctx: Any, context: ForwardContext, x: Tensor, y: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        a, b = x.to(wide).contiguous(), y.to(wide).contiguous()  # (B, T, D)
        result, saved = context.operations.add_norm(a, b, context.eps)  # (B, T, D)
        ctx.context, ctx.dtypes, ctx.wide = context, (x.dtype, y.dtype), wide
        ctx.save_for_backward(*saved)
        return result.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        op, gradient = ctx.context.operations, gradient.to(ctx.wide).contiguous()
        dx, dy = op.add_norm_backward(gradient, ctx.saved_tensors, ctx.context.eps)  # (B, T, D) twice
        x_dtype, y_dtype = ctx.dtypes
        return None, dx.to(x_dtype), dy.to(y_dtype)


class FusedNeurons(torch.autograd.Function):
    """x, S, gates and weights -> y and the synapses after, both in the frames of chunks. Not differentiable twice."""

    @staticmethod
    def forward(
        ctx: Any,
        context: ForwardContext,
        seed: int,
        differentiable: bool,  # whether a backward pass may follow
        x: Tensor,  # (B, c, C, D), of any dtype
        S: Tensor | None,  # (B, h, N, D), in the frame of the first chunk
        log_decay: Tensor | None,  # (B, h, T)
        write_strength: Tensor | None,  # (B, h, T)
        encoder: Tensor,  # (n, D)
        decoder: Tensor,  # (D, n)
        *encoder_v: Tensor,  # h x (N, D)
    ) -> tuple[Tensor, Tensor | None]:
        op, weights = context.operations, context.weights
        save_activations = differentiable and context.save_activations
        B, c, C, D = x.shape
        xs = x.to(context.token_phases[0].dtype).view(B * c, C, D)  # (G, C, D)
        y = xs.new_zeros(B * c, C, D, dtype=synapse_dtype(xs.dtype))  # (G, C, D)
        attention = make_attention(context, xs, B, Gates(log_decay, write_strength), S is not None)
        if not isinstance(attention, PlainAttention):
            attention.needs_decay_gradient = differentiable and ctx.needs_input_grad[5]
        saved: list[Tensor | None] = []
        ends = []
        for heads in head_blocks(attention, context):
            X, R = excite_heads(context, xs, heads, save_activations)  # k x (G, C, N), (k * G, C, N)
            before = None if S is None else S[:, heads].transpose(0, 1).flatten(0, 1).contiguous()  # (k * B, N, D)
            A, end, attention_saved = attention.forward(heads, R, before)  # (k * G, C, D), (k * B, N, D)
            A, rstd = op.norm(A, context.eps)  # (k * G, C, D), (k * G, C, 1)
            Zs = []
            for head, X_k, A_k in zip(range(heads.start, heads.stop), X, A.split(len(xs)), strict=True):
                dropout = Dropout(context.dropout, seed, head)
                Zs.append(op.gate(A_k, weights.Ev[head], X_k, dropout, weights.Dec[head], y, save_activations))
            if differentiable:
                saved += [A, rstd, *attention_saved]
            if save_activations:
                saved += [R, *X, *Zs]
            if end is not None:
                ends.append(end.unflatten(0, (-1, B)).transpose(0, 1))  # (B, k, N, D)
        if differentiable:
            ctx.context, ctx.seed, ctx.attention, ctx.dtypes = context, seed, attention, (x.dtype, encoder.dtype)
            ctx.tokens = next((gate.shape[-1] for gate in (log_decay, write_strength) if gate is not None), None)
            ctx.save_for_backward(xs, *saved)
        if context.dropout > 0:
            y *= Dropout(context.dropout).scale
        return y.view(x.shape).to(x.dtype), None if S is None else torch.cat(ends, 1)  # (B, h, N, D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dS: Tensor | None) -> tuple[Tensor | None, ...]:
        context, (xs, *saved) = ctx.context, ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            backward = LayerBackward(context, ctx.attention, ctx.seed, xs, dy, dS)
            blocks = head_blocks(ctx.attention, context)
            block_size = len(saved) // len(blocks)
            for i, heads in enumerate(blocks):
                backward.accumulate_heads(heads, saved[i * block_size : (i + 1) * block_size])
        x_dtype, weight_dtype = ctx.dtypes
        dx = backward.dx.view(dy.shape).to(x_dtype)  # (B, c, C, D)
        dS_before = None
        if ctx.needs_input_grad[4]:
            blocks_of_dS = [block.unflatten(0, (-1, len(dy))).transpose(0, 1) for block in backward.dS]
            dS_before = torch.cat(blocks_of_dS, 1)  # (B, h, N, D)
        weight_gradients = (backward.dE.flatten(0, 1), backward.dDec, *backward.dEv)
        return (
            *(None, None, None, dx, dS_before),
            *gate_gradients(ctx, len(dy)),  # 2 x (B, h, T)
            *(gradient.to(weight_dtype) for gradient in weight_gradients),
        )


def make_attention(
    context: ForwardContext, xs: Tensor, B: int, gates: Gates, with_state: bool
) -> PlainAttention | GatedAttention | SingleChunkAttention:
    """Return the attention of a layer over xs (G, C, D), of B sequences."""
    if gates.log_decay is None and gates.write_strength is None:
        return PlainAttention(context, xs, B)
    chunked_gates = ChunkedGates.split(gates, context, with_state)
    if isinstance(context.operations, TorchOperations) and len(xs) == B and not with_state:
        same_decay = gates.log_decay is None or gates.log_decay.stride(0) == 0
        return SingleChunkAttention(context, chunked_gates, xs, context.operations.workspace, same_decay)
    return GatedAttention(context, chunked_gates, xs, B, with_state)


def gate_gradients(ctx: Any, B: int) -> list[Tensor | None]:
    """Return the gradients of log_decay and of the write strength, (B, h, T), where these are needed."""
    attention = ctx.attention
    if isinstance(attention, PlainAttention):
        return [None, None]
    needs_decay, needs_beta = ctx.needs_input_grad[5:7]
    gradients = (
        attention.decay_gradient() if needs_decay else None,  # (h, B, c * C)
        attention.d_beta.unflatten(1, (B, -1)).flatten(2) if needs_beta else None,  # (h, B, c * C)
    )
    return [None if each is None else each.transpose(0, 1)[..., : ctx.tokens] for each in gradients]  # (B, h, T)


def head_blocks(attention: Attention, context: ForwardContext) -> list[slice]:
    """Return the heads in blocks that an attention computes in one call."""
    k = attention.heads_per_call
    return [slice(start, start + k) for start in range(0, len(context.weights.E), k)]


def excite_heads(context: ForwardContext, xs: Tensor, heads: slice, save: bool = False) -> tuple[list[Tensor], Tensor]:
    """Return X of each head, k x (G, C, N), and R of all of them, (k * G, C, N)."""
    op, E, phases = context.operations, context.weights.E[heads], context.token_phases
    if len(E) == 1:
        X, R = op.excite(xs, E[0], *phases, save)  # (G, C, N) twice
        return [X], R
    Rs = xs.new_empty(len(E), *xs.shape[:2], len(E[0]))  # (k, G, C, N)
    Xs = [op.excite(xs, E_k, *phases, True, R_k)[0] for E_k, R_k in zip(E, Rs, strict=True)]  # k x (G, C, N)
    return Xs, Rs.flatten(0, 1)


class LayerBackward:
    """Backward pass through a layer's neurons, accumulated over heads.

    Args:
        context: Of the forward pass.
        attention: Of the forward pass.
        seed: Of dropout.
        xs: (G, C, D) dt.
        dy: Gradient of the output, (B, c, C, D).
        dS: Gradient of the synapses after, (B, h, N, D), or None.

    Attributes:
        dx: (G, C, D), a sum over heads.
        dE: (h, N, D).
        dEv: (h, N, D).
        dDec: (D, n).
        dS: Gradient of the synapses before, by block of heads (k * B, N, D); empty without state and past chunks.
    """

    def __init__(
        self, context: ForwardContext, attention: Attention, seed: int, xs: Tensor, dy: Tensor, dS: Tensor | None
    ):
        self.context, self.attention, self.seed = context, attention, seed
        if context.dropout > 0:
            dy = dy * Dropout(context.dropout).scale  # (B, c, C, D)
        self.x, self.dy, self.dS_after = xs, dy.to(xs.dtype).view(xs.shape), dS  # (G, C, D) twice
        h, (N, D) = len(context.weights.E), context.weights.E[0].shape
        wide = synapse_dtype(xs.dtype)
        self.dx = xs.new_zeros(xs.shape, dtype=wide)  # (G, C, D)
        self.dE, self.dEv = (xs.new_empty(h, N, D, dtype=wide) for _ in range(2))  # (h, N, D)
        # (D, n), by columns on a GPU, where the sum over tokens is then one of rows
        self.dDec = xs.new_empty(h * N, D, dtype=wide).mT if xs.is_cuda else xs.new_empty(D, h * N, dtype=wide)
        self.dS: list[Tensor] = []

    def accumulate_heads(self, heads: slice, saved: Sequence[Tensor]) -> None:
        """Add the gradients of a block of heads, from the tensors that the forward pass saved for it."""
        op, k, G = self.context.operations, heads.stop - heads.start, len(self.x)
        A, rstd, *attention_saved = saved  # (k * G, C, D), (k * G, C, 1)
        Zs: Sequence[Tensor | None]
        if self.context.save_activations:
            R, X, Zs = attention_saved[-2 * k - 1], attention_saved[-2 * k : -k], attention_saved[-k:]
            attention_saved = attention_saved[: -2 * k - 1]
        else:
            X, R = excite_heads(self.context, self.x, heads)  # k x (G, C, N), (k * G, C, N)
            Zs = [None] * k
        dXs, dA = [], torch.empty_like(A)  # (k * G, C, D)
        for head, X_k, A_k, Z, dA_k in zip(range(heads.start, heads.stop), X, A.split(G), Zs, dA.split(G), strict=True):
            dXs.append(self.gate_backward(head, A_k, X_k, Z, dA_k))  # (G, C, N)
        dA = op.norm_backward(dA, A, rstd)  # (k * G, C, D)
        dS = self.dS_after
        if dS is not None:
            dS = dS[:, heads].transpose(0, 1).flatten(0, 1).contiguous()  # (k * B, N, D)
        gradient = self.attention.backward(heads, R, dA, attention_saved, dS, self.dx)
        if gradient.S is not None:
            self.dS.append(gradient.S)
        for i, head in enumerate(range(heads.start, heads.stop)):
            of_head = slice(i * G, (i + 1) * G)
            terms: SynapseTerms | None = None
            if gradient.synapse_terms is not None:
                dA_i, S_i, values_i, dS_i = (term[of_head] for term in gradient.synapse_terms)
                terms = (dA_i, S_i, values_i, dS_i)
            self.excite_backward(head, gradient.scores[of_head], R[of_head], X[i], dXs[i], terms)

    def gate_backward(self, head: int, A: Tensor, X: Tensor, Z: Tensor | None, dA: Tensor) -> Tensor:
        """Return dX (G, C, N) of one head through the gate, and fill dA (G, C, D) with the gradient of LN(A)."""
        op, Ev, Dec = self.context.operations, self.context.weights.Ev[head], self.context.weights.Dec[head]
        dDec, dEv = self.dDec[:, head * len(Ev) : (head + 1) * len(Ev)], self.dEv[head]  # (D, N), (N, D)
        if Z is None:
            dropout = Dropout(self.context.dropout, self.seed, head)
            dY, dX = op.gate_backward(self.dy, Dec, A, Ev, X, dropout, dDec, dEv)  # (G, C, N)
        else:
            dY, dX = op.gate_backward_saved(self.dy, Dec, A, X, Z, dDec, dEv)  # (G, C, N)
        torch.mm(dY.flatten(0, 1), Ev, out=dA.flatten(0, 1))  # (G * C, D)
        return dX

    def excite_backward(
        self, head: int, dP: Tensor, R: Tensor, X: Tensor, dX: Tensor, terms: SynapseTerms | None
    ) -> None:
        """Add the gradients of one head's E and of x, from those of the scores (G, C, C), X (G, C, N) and synapses."""
        op, E = self.context.operations, self.context.weights.E[head]
        dX = op.excite_backward(dP, R, X, dX, *self.context.token_phases, terms)  # (G, C, N)
        product_into(self.dE[head], dX.flatten(0, 1).mT, self.x.flatten(0, 1))  # (N, D)
        add_product_(self.dx, dX, E)  # (G, C, D)
