"""Decoding one token a sequence on a CPU, in torch operations: each part of a layer in the form that is fastest there.

At one token a weight is used once, so the speed of the memory is the limit, and all here is about moving less of it:

* Matrices are laid out once as oneDNN wants them; it then reads them as fast as the memory goes, while a plain
  `F.linear` of one row takes up to five times as long.
* Sums over neurons (`sum_rows`) touch the rows of active neurons only, and take them where they lie.
* Writing into the synapses is put off: the last tokens' (R, x) are kept in a list that attention reads beside the
  synapses (`read_pending`),

      A = R S + sum over pending s of (R . R_s) x_s,

  and one matrix product adds the whole list to S (`flush`). What is summed is the same; only the order differs.
* With decay and the delta rule (`read_gated_pending`, `flush_gated`) the list holds (R, U) for each head, and the
  cumulative log-decay c since the last flush, c = 0 at the flush. A head that scales its keys by r = 1 / (|R| + eps)
  (delta; r = 1 for add) reads

      A = r (exp(c) R S + sum over pending s of exp(c - c_s) (R . R_s) U_s),

  and U = x for add, r beta (x - A) for delta. As c never rises, no exponent is above 0.
* Rotary phases (`Phases`) are a complex number a pair of neurons, the product of two that are kept.

Shapes in comments: B sequences, D `n_embd`, h heads, N neurons of a head, n = h * N, W tokens that may be pending.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bdh.model.modeling_bdh import BDHGates

# ------------------------------------------------------------------------------------------------ matrices

SMALL = 1 << 20  # numbers in a matrix up to which `SmallMatrices` may gain
FEW = 700_000  # products of numbers that take about as long as it takes to call oneDNN
INT4_GROUP = 32  # inputs that share a scale

Array = NDArray[np.float32]


class Matrices(ABC):
    """k matrices of one shape (out, in), for a few rows at a time, and a relu after if wanted.

    Args:
        weights: The matrices, k x (out, in), float32 or bfloat16.
        dtype: float32 or bfloat16: of the products, and of the weights where they are not quantised.
        relu: Whether the products go through relu.
    """

    def __init__(self, weights: Sequence[Tensor], dtype: torch.dtype, relu: bool = False):
        self.dtype, self.relu = dtype, relu
        self.post = "relu" if relu else "none"  # oneDNN's word for it
        self.pack([weight.detach() for weight in weights])

    @abstractmethod
    def pack(self, weights: list[Tensor]) -> None:
        """Keeps the weights, k x (out, in), in the layout of this class."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Rows (B, k, in), float32, x[:, i] through matrix i, the products side by side: (B, k * out) of `dtype`."""

    def after(self, products: list[Tensor]) -> Tensor:
        """Plain products, k x (B, out), side by side and through relu: (B, k * out)."""
        y = side_by_side(products).to(self.dtype)  # (B, k * out)
        return y.relu_() if self.relu else y


def side_by_side(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class PlainMatrices(Matrices):
    """As they are: the reference, and the way where there is no oneDNN."""

    def pack(self, weights: list[Tensor]) -> None:
        self.weights = [weight.to(self.dtype) for weight in weights]

    def __call__(self, x: Tensor) -> Tensor:
        parts = x.to(self.dtype).unbind(1)  # k x (B, in)
        return self.after([F.linear(part, weight) for part, weight in zip(parts, self.weights, strict=True)])


class PackedMatrices(Matrices):
    """In oneDNN's blocks."""

    def pack(self, weights: list[Tensor]) -> None:
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self.weights = [reorder(weight.to(self.dtype).contiguous()) for weight in weights]
        self.linear = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        parts = zip(x.to(self.dtype).unbind(1), self.weights, strict=True)
        return side_by_side([self.linear(part, weight, None, self.post, [], "") for part, weight in parts])


class SmallMatrices(PackedMatrices):
    """float32 matrices so small that calling oneDNN costs more than multiplying: few rows go through all k at once."""

    def pack(self, weights: list[Tensor]) -> None:
        super().pack(weights)
        self.stack = torch.stack(weights).to(self.dtype).mT.contiguous()  # (k, in, out)

    def __call__(self, x: Tensor) -> Tensor:
        B, _, width = x.shape
        if B * width * self.stack.shape[2] > FEW:
            return super().__call__(x)
        y = torch.bmm(x.transpose(0, 1), self.stack).transpose(0, 1).flatten(1)  # (B, k * out)
        return y.relu_() if self.relu else y


class Int8Matrices(Matrices):
    """Weights in int8 with a scale for each output, the rows rounded to 8 bits with a scale for each: oneDNN's sums."""

    def pack(self, weights: list[Tensor]) -> None:
        rounded = [round_rows(weight.float()) for weight in weights]  # (out, in) int8 and (out, 1)
        self.weights = [torch.ops.onednn.qlinear_prepack(whole, None) for whole, _ in rounded]
        self.scales = [scale[:, 0].contiguous() for _, scale in rounded]  # k x (out)
        self.zeros = torch.zeros_like(self.scales[0], dtype=torch.int32)  # (out)
        self.linear = torch.ops.onednn.qlinear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        scale = scale_of(x)  # (B, k, 1)
        whole = (x / scale).add_(128.5).to(torch.uint8)  # (B, k, in), 128 for 0; cut off, which rounds
        y = side_by_side([self.multiply(part, i) for i, part in enumerate(whole.unbind(1))])  # (B, k * out)
        return y.view(*x.shape[:2], -1).mul_(scale.to(self.dtype)).flatten(1)

    def multiply(self, whole: Tensor, i: int) -> Tensor:
        """Rows (B, in) uint8, 128 for 0, through matrix i: (B, out), to be multiplied by the rows' scales."""
        scales, zeros = self.scales[i], self.zeros
        return self.linear(whole, 1.0, 128, self.weights[i], scales, zeros, None, 1.0, 0, self.dtype, self.post, [], "")


class Int8WeightMatrices(Matrices):
    """Weights in int8 with a scale for each output, rows in bfloat16: for processors without int8 sums of products.

    `in` must be divisible by 16.
    """

    def pack(self, weights: list[Tensor]) -> None:
        rounded = [round_rows(weight.float()) for weight in weights]  # (out, in) int8 and (out, 1)
        self.weights = [whole for whole, _ in rounded]
        self.scales = [scale[:, 0].bfloat16() for _, scale in rounded]  # k x (out)

    def __call__(self, x: Tensor) -> Tensor:
        linear = torch.ops.aten._weight_int8pack_mm.default
        parts = x.transpose(0, 1).to(torch.bfloat16, memory_format=torch.contiguous_format)  # (k, B, in)
        return self.after([linear(*part) for part in zip(parts, self.weights, self.scales, strict=True)])


class Int4Matrices(Matrices):
    """Weights in 4 bits with a scale and an offset for each 32 inputs of an output, rows in bfloat16.

    `in` must be divisible by 32 and `out` by 16.
    """

    def pack(self, weights: list[Tensor]) -> None:
        rounded = [round_groups(weight.float()) for weight in weights]  # (out, in) int32 and (in / 32, out, 2)
        self.weights = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1) for whole, _ in rounded]
        self.scales = [scales for _, scales in rounded]

    def __call__(self, x: Tensor) -> Tensor:
        linear = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        parts = x.transpose(0, 1).to(torch.bfloat16, memory_format=torch.contiguous_format)  # (k, B, in)
        triples = zip(parts, self.weights, self.scales, strict=True)
        return self.after([linear(part, weight, INT4_GROUP, scales) for part, weight, scales in triples])


def scale_of(rows: Tensor) -> Tensor:
    """What the rows (..., in), float32, are to be divided by to lie between -127 and 127: (..., 1)."""
    return torch.linalg.vector_norm(rows, math.inf, dim=-1, keepdim=True).clamp_(min=1e-20).div_(127)


def round_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (..., in), float32, as whole numbers, int8, and their scales (..., 1): rows = whole * scale."""
    scale = scale_of(rows)  # (..., 1)
    return (rows / scale).round_().to(torch.int8), scale


def round_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (out, in), float32, in 4 bits, by groups of 32 inputs of an output.

    Returns:
        Whole numbers 0 to 15, (out, in) int32, and (in / 32, out, 2) bfloat16, a group's scale and offset:
        weight = (whole - 8) * scale + offset.
    """
    groups = weight.unflatten(1, (-1, INT4_GROUP))  # (out, G, 32)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)  # (out, G, 1)
    scale = ((high - low) / 15).clamp_(min=1e-20).bfloat16()  # (out, G, 1)
    offset = (low + 8 * scale.float()).bfloat16()  # (out, G, 1)
    whole = ((groups - offset.float()) / scale.float()).round_().add_(8).clamp_(0, 15)  # (out, G, 32)
    return whole.flatten(1).to(torch.int32), torch.cat((scale, offset), dim=-1).transpose(0, 1).contiguous()


def make_matrices(
    weights: Sequence[Tensor], dtype: torch.dtype, quantization: str | None = None, relu: bool = False
) -> Matrices:
    """The matrices, in the form that is fastest on this processor; `quantization` is None, "int8" or "int4"."""
    return form(weights[0].numel(), dtype, quantization)(weights, dtype, relu)


def form(size: int, dtype: torch.dtype, quantization: str | None) -> type[Matrices]:
    """The form for matrices of `size` numbers each."""
    onednn = torch.backends.mkldnn.is_available()
    if quantization == "int4":
        return Int4Matrices
    if quantization == "int8":
        return Int8Matrices if onednn and torch.cpu._is_vnni_supported() else Int8WeightMatrices
    if dtype == torch.float32 and onednn:
        return SmallMatrices if size <= SMALL else PackedMatrices
    return PackedMatrices if onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported() else PlainMatrices


# ------------------------------------------------------------------------------------------------ sums over neurons


def sum_rows(activity: Tensor, table: Tensor, starts: Sequence[int]) -> Tensor:
    """Each head's sum of a table's rows, weighted by the activity of the head's neurons; silent neurons cost nothing.

    Args:
        activity: (B, h, N), contiguous, of the table's dtype.
        table: (rows, D), contiguous: one row a neuron, n rows a sequence.
        starts: The row of neuron 0, by sequence; B numbers.

    Returns:
        (B, h, D).
    """
    B, h, N = activity.shape
    flat = activity.view(-1)  # (B * n)
    bits = flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat  # numpy has no bfloat16
    active = np.flatnonzero(bits.numpy() != 0)  # over all sequences
    cuts = active.searchsorted(np.arange(B * h + 1) * N)  # where each head's begin
    weights = flat.index_select(0, torch.from_numpy(active))
    for b, start in enumerate(starts):  # from neurons to rows of the table
        if start != b * h * N:
            active[cuts[b * h] : cuts[(b + 1) * h]] += start - b * h * N
    rows, offsets = torch.from_numpy(active), torch.from_numpy(cuts[:-1])
    sums = torch.embedding_bag(table, rows, offsets, False, 0, False, weights)  # 0: sums, not means
    return sums[0].view(B, h, -1)


# ------------------------------------------------------------------------------------------------ pending tokens


@dataclass(frozen=True)
class Run:
    """Rows of a batch whose slots follow each other, so that one slice of a pool holds them.

    Attributes:
        rows: Of the batch.
        slots: Of the pool.
        longest: Pending tokens of the slot that has the most.
        is_pending: (rows, 1, longest) bool, which places hold a pending token; None if all do.
    """

    rows: slice
    slots: slice
    longest: int
    is_pending: Tensor | None


def runs_of(slots: Sequence[int], counts: Sequence[int]) -> list[Run]:
    """A batch in runs. Its rows are in `slots`, and `counts` tokens are pending in each of these."""
    cuts = [b for b in range(1, len(slots)) if slots[b] != slots[b - 1] + 1]
    runs = []
    for start, stop in zip([0, *cuts], [*cuts, len(slots)], strict=True):
        longest = max(counts[start:stop])
        is_pending = None
        if min(counts[start:stop]) < longest:
            is_pending = torch.arange(longest) < torch.tensor(counts[start:stop])[:, None, None]  # (rows, 1, longest)
        runs.append(Run(slice(start, stop), slice(slots[start], slots[stop - 1] + 1), longest, is_pending))
    return runs


def read_pending(R: Tensor, A: Tensor, pending_R: Tensor, pending_x: Tensor, runs: Sequence[Run]) -> None:
    """Adds the pending tokens to A: the sum over them of (R . R_s) x_s.

    Args:
        R: (B, h, N), float32.
        A: (B, h, D), float32.
        pending_R: (slots, h, W, N), float32.
        pending_x: (slots, W, D), float32.
        runs: The batch's.
    """
    for run in runs:
        if run.longest == 0:
            continue
        past = pending_R[run.slots, :, : run.longest].flatten(0, 1)  # (rows * h, longest, N)
        scores = torch.bmm(R[run.rows].flatten(0, 1)[:, None], past.mT)  # (rows * h, 1, longest)
        scores = scores.view(-1, R.shape[1], run.longest)  # (rows, h, longest)
        if run.is_pending is not None:
            scores = scores.where(run.is_pending, 0)  # (rows, h, longest)
        A[run.rows].baddbmm_(scores, pending_x[run.slots, : run.longest])  # (rows, h, D)


def flush(S: Tensor, pending_R: Tensor, pending_x: Tensor) -> None:
    """Adds pending tokens to the synapses: S (h, N, D) += R^T x, of R (h, w, N) and x (w, D), all float32."""
    S.baddbmm_(pending_R.mT, pending_x.expand(S.shape[0], -1, -1))  # (h, N, D)


class TokenGates:
    """Computes the gates of one token a row: `BDHGates` with one matrix product for all gates of all heads.

    Gates are a few numbers a token, so they are computed by numpy, whose calls take a fraction of the time of torch's.
    As sigmoid(z) = (1 + tanh(z / 2)) / 2, no number overflows.

    Args:
        gates: Of the model, float32; copied.
    """

    def __init__(self, gates: BDHGates):
        config = gates.config
        self.h = h = config.n_head
        self.gated, self.delta = config.decay == "gated", config.write == "delta"
        rates = torch.tensor([rate or 0.0 for rate in gates.rates()])  # (h)
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        scales: list[Tensor] = []
        if self.gated:
            decays = torch.tensor([float(rate is not None) for rate in gates.rates()])  # (h)
            weights.append(gates.decay_weight)
            biases.append(gates.decay_bias)
            scales.append(-gates.decay_rate.exp() * decays)
        if self.delta:
            weights.append(gates.write_weight)
            biases.append(gates.write_bias)
            scales.append(torch.ones(h))
        self.fixed = -rates.numpy() if config.decay == "fixed" else None  # (h)
        if weights:
            self.weight = (torch.cat(weights) / 2).detach().mT.contiguous().numpy()  # (D, h or 2h)
            self.bias = (torch.cat(biases) / 2).detach().numpy()  # (h or 2h)
            self.scale = (torch.cat(scales) / 2).detach().numpy()  # (h or 2h)

    def __call__(self, x: Tensor) -> tuple[Array | None, Array | None]:
        """The logarithm of the retention and the write strength of tokens x (B, D), float32: (B, h) each.

        Either is None if the model does not have it.
        """
        fixed = None if self.fixed is None else np.broadcast_to(self.fixed, (len(x), self.h))  # (B, h)
        if not self.gated and not self.delta:
            return fixed, None
        gates = x.numpy() @ self.weight  # (B, h or 2h)
        gates += self.bias
        np.tanh(gates, out=gates)
        gates += 1
        gates *= self.scale
        if not self.gated:
            return fixed, gates
        return gates[:, : self.h], gates[:, self.h :] if self.delta else None  # (B, h)


class Decays:
    """The cumulative log-decay of each slot's pending tokens, by layer and head.

    Args:
        n_layer: Layers (L).
        n_slots: Slots of the pool.
        n_head: Heads.
        max_pending: Tokens that may be pending (W).
    """

    def __init__(self, n_layer: int, n_slots: int, n_head: int, max_pending: int):
        # c since the last flush: 0 at place 0, and that of pending token s at place 1 + s.
        self.c = np.zeros((n_slots, n_layer, n_head, 1 + max_pending), np.float32)  # (slots, L, h, 1 + W)

    def begin(self, slots: Sequence[int], counts: Sequence[int]) -> "DecayStep":
        """Prepares a step of a token in each of these slots, in which `counts` tokens are pending."""
        longest = max(counts)
        rows, places = np.array(slots), np.array(counts)  # (B)
        c = self.c[rows, :, :, : 1 + longest]  # (B, L, h, 1 + longest)
        last = self.c[rows, :, :, places]  # (B, L, h)
        before = last[..., None] - c  # (B, L, h, 1 + longest)
        if min(counts) < longest:
            before[np.broadcast_to(np.arange(1 + longest) > places[:, None, None, None], before.shape)] = -math.inf
        return DecayStep(rows, places, last, before)

    def end(self, step: "DecayStep") -> None:
        """Keeps the cumulative log-decay of the tokens of a step."""
        self.c[step.slots, :, :, 1 + step.counts] = step.last + np.stack(step.log_decays, axis=1)  # (B, L, h)

    def since(self, slot: int, count: int) -> Tensor:
        """Retention from the last flush (place 0), and from each of `count` pending tokens, to the last of these.

        Returns:
            (L, h, 1 + count), each at most 1.
        """
        c = self.c[slot, :, :, : 1 + count]  # (L, h, 1 + count)
        return torch.from_numpy(np.exp(c[..., -1:] - c))  # (L, h, 1 + count)


@dataclass
class DecayStep:
    """The decays of a decoding step.

    Attributes:
        slots: Of the rows, (B) int64.
        counts: Pending tokens of these slots, (B) int64.
        last: Cumulative log-decay of the token before each row's token, (B, L, h).
        before: Log-decay to that token from the last flush (place 0) and from each pending token; -inf at places
            without a token: (B, L, h, 1 + longest).
        log_decays: Of the rows' tokens, one (B, h) a layer, as the layers compute them.
    """

    slots: NDArray[np.int64]
    counts: NDArray[np.int64]
    last: Array
    before: Array
    log_decays: list[Array] = field(default_factory=list)

    def since(self, i: int, log_decay: Array) -> Tensor:
        """Retention from the last flush and from each pending token to the rows' tokens, in layer i.

        Args:
            i: The layer; layers come in order.
            log_decay: Of the rows' tokens, (B, h).

        Returns:
            (B, h, 1 + longest), each at most 1; 0 at places without a token.
        """
        self.log_decays.append(log_decay)
        since = self.before[:, i] + log_decay[:, :, None]  # (B, h, 1 + longest)
        return torch.from_numpy(np.exp(since, out=since))  # (B, h, 1 + longest)


def read_gated_pending(
    R: Tensor, A: Tensor, since: Tensor | None, pending_R: Tensor, pending_U: Tensor, runs: Sequence[Run]
) -> None:
    """Makes g A + the sum over pending tokens of g_s (R . R_s) U_s out of A, where g is the retention since then.

    Args:
        R: (B, h, N), float32.
        A: (B, h, D), float32.
        since: g of the synapses (place 0) and of the pending tokens, (B, h, 1 + longest), float32; None if all are 1.
        pending_R: (slots, h, W, N), float32.
        pending_U: The vectors to be written, scaled as their keys are: (slots, h, W, D), float32.
        runs: The batch's.
    """
    h = R.shape[1]
    if since is not None:
        A.mul_(since[:, :, :1])  # (B, h, D)
    for run in runs:
        longest = run.longest
        if longest == 0:
            continue
        past = pending_R[run.slots, :, :longest].flatten(0, 1)  # (rows * h, longest, N)
        scores = torch.bmm(R[run.rows].flatten(0, 1)[:, None], past.mT)  # (rows * h, 1, longest)
        if since is not None:
            scores.view(-1, h, longest).mul_(since[run.rows, :, 1 : 1 + longest])  # (rows, h, longest)
        elif run.is_pending is not None:
            scores = scores.view(-1, h, longest).where(run.is_pending, 0).view(-1, 1, longest)  # (rows * h, 1, longest)
        values = pending_U[run.slots, :, :longest].flatten(0, 1)  # (rows * h, longest, D)
        A[run.rows].flatten(0, 1)[:, None].baddbmm_(scores, values)  # (rows * h, 1, D)


def flush_gated(S: Tensor, pending_R: Tensor, pending_U: Tensor, since: Tensor | None) -> None:
    """Writes pending tokens into the synapses: S (h, N, D) <- g S + sum over s of R_s^T g_s U_s, all float32.

    Args:
        S: Synapses, (h, N, D).
        pending_R: (h, w, N).
        pending_U: (h, w, D).
        since: g of the synapses and of the tokens, (h, 1 + w); None if all are 1.
    """
    if since is None:
        S.baddbmm_(pending_R.mT, pending_U)  # (h, N, D)
        return
    U = pending_U * since[:, 1:, None]  # (h, w, D)
    for k, retained in enumerate(since[:, 0].tolist()):  # one pass over S; mul_ and baddbmm_ would take two
        S[k].addmm_(pending_R[k].mT, U[k], beta=retained)  # (N, D)


def lazy_zeros(*shape: int) -> Tensor:
    """Zeros (float32) whose memory is taken when first written, in huge pages where the system has them."""
    size = math.prod(shape)
    memory = np.zeros(size + 16, dtype=np.float32)
    start = -memory.ctypes.data % 64 // 4  # at the beginning of a cache line: matrix products are twice as fast
    return torch.from_numpy(memory[start : start + size]).view(shape)


# ------------------------------------------------------------------------------------------------ rotary phases


class Phases:
    """Rotary phases of the slots of a pool, as complex numbers cos + i sin, one a pair of neurons.

    A position is the last multiple of `span` before it and a rest. Exact phases (float64) of the rests are kept for all
    slots, those of the multiple for each slot as long as it holds; their product is the position's phase, and agrees
    with `rotary_phases` at any position.

    Args:
        n_slots: Slots of the pool.
        n: Neurons of one head (N).
        theta: Base of the phases.
        span: Positions from one multiple to the next.
    """

    def __init__(self, n_slots: int, n: int, theta: float, span: int):
        pair = torch.arange(0, n, 2, dtype=torch.float64)  # (N/2)
        self.turns_per_token = theta ** (-pair / n) / (2 * math.pi)  # (N/2)
        self.span = span
        self.rests = self.exact(torch.arange(span))  # (span, N/2) complex128
        self.multiple_of = [0] * n_slots
        self.multiples = self.exact(torch.zeros(n_slots))  # (slots, N/2) complex128

    def exact(self, positions: Tensor) -> Tensor:
        """(P,) -> (P, N/2) complex128."""
        turns = positions.double()[:, None] * self.turns_per_token  # (P, N/2)
        angle = (turns - turns.floor()) * (2 * math.pi)  # (P, N/2)
        return torch.complex(angle.cos(), angle.sin())

    def at(self, slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Phases of a token at each of these positions in these slots: (B, 1, N/2) complex64."""
        rests = [position % self.span for position in positions]
        for slot, position, rest in zip(slots, positions, rests, strict=True):
            if self.multiple_of[slot] != position - rest:
                self.multiple_of[slot] = position - rest
                self.multiples[slot] = self.exact(torch.tensor([position - rest]))[0]  # (N/2)
        phases = self.multiples[torch.tensor(slots)] * self.rests[torch.tensor(rests)]  # (B, N/2) complex128
        return phases.to(torch.complex64)[:, None]


def rotate_pairs(X: Tensor, phases: Tensor) -> Tensor:
    """Turns neurons 2i and 2i + 1 of each head by phase i. (B, h, N) float32, (B, 1, N/2) complex64 -> (B, h, N)."""
    pairs = torch.view_as_complex(X.unflatten(-1, (-1, 2)))  # (B, h, N/2) complex64
    return torch.view_as_real(pairs * phases).flatten(-2)  # (B, h, N)
