"""A decoding step on a CPU: sums over active neurons, pending tokens, gates and rotary phases.

* Sums over neurons (`sum_rows`) read the table rows of active neurons only, without copying them.
* Synapses are written in blocks: the (R, x) of the last tokens are pending, and attention reads them beside the
  synapses (`read_pending`),

      A = R S + sum over pending s of (R . R_s) x_s,

  until one matrix product adds them to S (`flush`). The sums are the same, in another order.
* With decay and the delta rule (`read_gated_pending`, `flush_gated`) the pending tokens have (R, U) for each head, and
  the cumulative log-decay c since the last flush, where c = 0. A head that scales its keys by r = 1 / (|R| + eps)
  (delta; r = 1 for add) reads

      A = r (exp(c) R S + sum over pending s of exp(c - c_s) (R . R_s) U_s),

  and U = x for add, r beta (x - A) for delta. As c never rises, no exponent is above 0.
* A rotary phase (`SlotPhases`) is one complex number for each pair of neurons, the product of two cached ones.

Shapes: B sequences, D `n_embd`, h heads, N neurons of a head, n = h * N, W tokens that may be pending.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdh.model.modeling_bdh import BDHGates

Array = NDArray[np.float32]

# ------------------------------------------------------------------------------------------------ sums over neurons


def sum_rows(activity: Tensor, table: Tensor, starts: Sequence[int]) -> Tensor:
    """Return each head's sum of table rows, weighted by the activity of its neurons; inactive neurons are skipped.

    Args:
        activity: (B, h, N), contiguous, of the table's dtype.
        table: (rows, D), contiguous: a row for each neuron, n rows for each sequence.
        starts: The row of neuron 0, by sequence; B numbers.

    Returns:
        (B, h, D).
    """
    B, h, N = activity.shape
    flat = activity.view(-1)  # (B * n)
    bits = flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat  # numpy has no bfloat16
    active = np.flatnonzero(bits.numpy() != 0)  # over all sequences
    cuts = active.searchsorted(np.arange(B * h + 1) * N)  # first of each head
    weights = flat.index_select(0, torch.from_numpy(active))
    for b, start in enumerate(starts):  # from neurons to rows of the table
        if start != b * h * N:
            active[cuts[b * h] : cuts[(b + 1) * h]] += start - b * h * N
    rows, offsets = torch.from_numpy(active), torch.from_numpy(cuts[:-1])
    sums = torch.embedding_bag(table, rows, offsets, False, 0, False, weights)  # 0: sums, not means
    return sums[0].view(B, h, -1)


# ------------------------------------------------------------------------------------------------ pending tokens


@dataclass(frozen=True)
class SlotRun:
    """Rows of a batch in consecutive slots, so that they are one slice of a pool.

    Attributes:
        rows: Of the batch.
        slots: Of the pool.
        longest: Largest number of pending tokens of a slot.
        is_pending: (rows, 1, longest) bool, which places hold a pending token; None if all do.
    """

    rows: slice
    slots: slice
    longest: int
    is_pending: Tensor | None


def split_runs(slots: Sequence[int], counts: Sequence[int]) -> list[SlotRun]:
    """Split a batch into runs. Its rows are in `slots`, with `counts` pending tokens each."""
    cuts = [b for b in range(1, len(slots)) if slots[b] != slots[b - 1] + 1]
    runs = []
    for start, stop in zip([0, *cuts], [*cuts, len(slots)], strict=True):
        longest = max(counts[start:stop])
        is_pending = None
        if min(counts[start:stop]) < longest:
            is_pending = torch.arange(longest) < torch.tensor(counts[start:stop])[:, None, None]  # (rows, 1, longest)
        runs.append(SlotRun(slice(start, stop), slice(slots[start], slots[stop - 1] + 1), longest, is_pending))
    return runs


def read_pending(R: Tensor, A: Tensor, pending_R: Tensor, pending_x: Tensor, runs: Sequence[SlotRun]) -> None:
    """Add the sum over pending tokens of (R . R_s) x_s to A.

    Args:
        R: (B, h, N), float32.
        A: (B, h, D), float32.
        pending_R: (slots, h, W, N), float32.
        pending_x: (slots, W, D), float32.
        runs: Of the batch.
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
    """Add pending tokens to the synapses: S (h, N, D) += R^T x, of R (h, w, N) and x (w, D), all float32."""
    S.baddbmm_(pending_R.mT, pending_x.expand(S.shape[0], -1, -1))  # (h, N, D)


class TokenGates:
    """Computes `BDHGates` for one token of each row, with one matrix product for all gates of all heads.

    Gates are few numbers, and calls of numpy take a fraction of the time of calls of torch.
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
        """Return the log-decay and the write strength of tokens x (B, D), float32: (B, h) each.

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
        """Prepare a step of a token in each of these slots, in which `counts` tokens are pending."""
        longest = max(counts)
        rows, places = np.array(slots), np.array(counts)  # (B)
        c = self.c[rows, :, :, : 1 + longest]  # (B, L, h, 1 + longest)
        last = self.c[rows, :, :, places]  # (B, L, h)
        before = last[..., None] - c  # (B, L, h, 1 + longest)
        if min(counts) < longest:
            before[np.broadcast_to(np.arange(1 + longest) > places[:, None, None, None], before.shape)] = -math.inf
        return DecayStep(rows, places, last, before)

    def end(self, step: "DecayStep") -> None:
        """Store the cumulative log-decay of the tokens of a step."""
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
    R: Tensor, A: Tensor, since: Tensor | None, pending_R: Tensor, pending_U: Tensor, runs: Sequence[SlotRun]
) -> None:
    """Replace A by g A + the sum over pending tokens of g_s (R . R_s) U_s, where g is the retention since then.

    Args:
        R: (B, h, N), float32.
        A: (B, h, D), float32.
        since: g of the synapses (place 0) and of the pending tokens, (B, h, 1 + longest), float32; None if all are 1.
        pending_R: (slots, h, W, N), float32.
        pending_U: The vectors to be written, scaled as their keys are: (slots, h, W, D), float32.
        runs: Of the batch.
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
    """Write pending tokens into the synapses: S (h, N, D) <- g S + sum over s of R_s^T g_s U_s, all float32.

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
    """Return float32 zeros whose memory is allocated when first written, in huge pages where the system has them."""
    size = math.prod(shape)
    memory = np.zeros(size + 16, dtype=np.float32)
    start = -memory.ctypes.data % 64 // 4  # aligned to a cache line: matrix products are twice as fast
    return torch.from_numpy(memory[start : start + size]).view(shape)


# ------------------------------------------------------------------------------------------------ rotary phases


class SlotPhases:
    """Rotary phases of the slots of a pool, as complex numbers cos + i sin, one for each pair of neurons.

    A position is a multiple of `span` plus a remainder. Exact phases (float64) of the remainders are cached for all
    slots, and that of the current multiple for each slot; their product agrees with `rotary_phases` at any position.

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
        self.remainders = self.exact(torch.arange(span))  # (span, N/2) complex128
        self.multiple_of = [0] * n_slots
        self.multiples = self.exact(torch.zeros(n_slots))  # (slots, N/2) complex128

    def exact(self, positions: Tensor) -> Tensor:
        """(P,) -> (P, N/2) complex128."""
        turns = positions.double()[:, None] * self.turns_per_token  # (P, N/2)
        angle = (turns - turns.floor()) * (2 * math.pi)  # (P, N/2)
        return torch.complex(angle.cos(), angle.sin())

    def at(self, slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Return the phases of a token at each of these positions in these slots: (B, 1, N/2) complex64."""
        remainders = [position % self.span for position in positions]
        for slot, position, remainder in zip(slots, positions, remainders, strict=True):
            if self.multiple_of[slot] != position - remainder:
                self.multiple_of[slot] = position - remainder
                self.multiples[slot] = self.exact(torch.tensor([position - remainder]))[0]  # (N/2)
        phases = self.multiples[torch.tensor(slots)] * self.remainders[torch.tensor(remainders)]  # (B, N/2) complex128
        return phases.to(torch.complex64)[:, None]


def rotate_pairs(X: Tensor, phases: Tensor) -> Tensor:
    """Rotate neurons 2i and 2i + 1 of each head by phase i. (B, h, N) float32, (B, 1, N/2) complex64 -> (B, h, N)."""
    pairs = torch.view_as_complex(X.unflatten(-1, (-1, 2)))  # (B, h, N/2) complex64
    return torch.view_as_real(pairs * phases).flatten(-2)  # (B, h, N)
