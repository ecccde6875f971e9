"""What one token did in one layer, worked out from the record by the equations.

Shapes in comments: D `n_embd`, h heads, N neurons of a head, n = h * N; C recorded tokens; t the token in question.
The token's *rows* are its active neurons and the rotary partners of these, r of them: whatever it writes into the
synapses or reads from them is in these rows of S.

Seen from token t, in its own rotary frame, the synapses are

    M = Rot_t^-1 S_t = sum over s < t of (Rot_(s-t) X_s)^T x_s + Rot_t^-1 S_0            A_t = X_t M

and what they mean between a neuron i that sends and a neuron j of the same head that receives is M(i,:) . E_v(:,j): a
positive number excites j when i fires. X_t(i) times that is what i brought j this time.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bdh.insight.record import Record
from bdh.model import BDHForCausalLM
from bdh.model.modeling_bdh import rotary_phases, rotate, synapse_dtype

PIECE = 64  # earlier tokens looked at together
NEURONS, SYNAPSES, SOURCES = 32, 16, 16  # how many of the strongest are told
SENDERS = 256  # whose synapses are compared at once


@dataclass(frozen=True)
class Synapse:
    """A connection from one neuron to another of the same head, both numbered head * N + k.

    `strength` may be negative: then it keeps the receiver from firing.
    """

    sender: int
    receiver: int
    strength: float


@dataclass(frozen=True)
class LayerView:
    """What a token did in a layer. All lists begin with the strongest, by absolute value.

    Attributes:
        layer: From 0.
        active: How many neurons fired (X > 0).
        share: The same as a part of all.
        neurons: Which fired most, and their activity X.
        written: What the token added to synapses, X(i) * (x . E_v(:,j)).
        read: What the past brought to neurons that it made fire (Y > 0), X(i) * (M(i,:) . E_v(:,j)).
        sources: Earlier tokens of the record, and how much of each the token takes up: the weight R_t . R_s of its x_s,
            summed over heads.
    """

    layer: int
    active: int
    share: float
    neurons: list[tuple[int, float]]
    written: list[Synapse]
    read: list[Synapse]
    sources: list[tuple[int, float]]


class LayerStudy:
    """The work of finding a `LayerView`: `read_past` for each of `pieces`, then `view`.

    In pieces, so that others can use the model in between; nobody else may use it during a call.

    Args:
        model: That the record is of, in evaluation mode.
        record: May grow meanwhile.
        index: Of the token in the record.
        layer: From 0.

    Attributes:
        pieces: Earlier tokens, `PIECE` at a time.
        rows: The token's rows, ascending, (r) int64.
        brought: X_t(i) M(i,:) for each of them, (r, D); complete when all pieces are read. Its sum over a head is A_t.
    """

    @torch.inference_mode()
    def __init__(self, model: BDHForCausalLM, record: Record, index: int, layer: int):
        self.model, self.record, self.index, self.layer = model, record, index, layer
        self.module = model.model.layer
        self.dtype = synapse_dtype(model.dtype)
        self.pieces = [slice(start, min(start + PIECE, index)) for start in range(0, index, PIECE)]
        self.x = self.vectors(slice(index, index + 1))  # (1, D)
        self.X = F.relu(self.module.encoder(self.x))[0].to(self.dtype)  # (n)
        pairs = self.X.unflatten(0, (-1, 2)).any(1).nonzero()  # (r / 2, 1)
        self.rows = torch.cat((2 * pairs, 2 * pairs + 1), dim=1).flatten()  # (r)
        self.activity = self.X[self.rows]  # (r)
        self.encoder = self.module.encoder.weight[self.rows]  # (r, D)
        self.scores = self.activity.new_zeros(index)  # (t)
        self.M = self.base()  # (r, D)

    def vectors(self, tokens: slice) -> Tensor:
        """What came into the layer, (C, D)."""
        return self.record.vectors[tokens, self.layer].to(self.model.device)

    def turned(self, X: Tensor, positions: Tensor) -> Tensor:
        """Activity of the token's rows (C, r), turned as at these positions (C)."""
        config = self.model.config
        cos, sin = rotary_phases(positions[None], config.neurons_per_head, config.rope_theta, self.dtype)
        place = self.rows % config.neurons_per_head  # (r)
        return rotate(X, cos[0, 0][:, place], sin[0, 0][:, place])  # (C, r)

    def base(self) -> Tensor:
        """The part of M that comes from synapses before the record: (r, D)."""
        base = self.record.base
        if base is None:
            return self.activity.new_zeros(len(self.rows), self.model.config.n_embd)
        S = base.synapses[self.layer][0].flatten(0, 1)[self.rows].to(self.dtype)  # (r, D)
        back = torch.tensor([-self.record.start - self.index], device=S.device)  # (1)
        return self.turned(S.mT, back).mT.contiguous()  # (r, D)

    @torch.inference_mode()
    def read_past(self, piece: slice) -> None:
        """Takes account of some earlier tokens."""
        x = self.vectors(piece)  # (C, D)
        X = F.relu(F.linear(x, self.encoder)).to(self.dtype)  # (C, r)
        distance = torch.arange(piece.start, piece.stop, device=x.device) - self.index  # (C)
        G = self.turned(X, distance)  # (C, r)
        self.scores[piece] = G @ self.activity  # (C)
        self.M.addmm_(G.mT, x.to(self.dtype))  # (r, D)

    @property
    def brought(self) -> Tensor:
        return self.activity[:, None] * self.M  # (r, D)

    @torch.inference_mode()
    def view(self) -> LayerView:
        """What was found."""
        active = int((self.X > 0).sum())
        return LayerView(
            layer=self.layer,
            active=active,
            share=active / len(self.X),
            neurons=strongest(self.X, NEURONS),
            written=self.written(),
            read=self.read(),
            sources=strongest(self.scores, SOURCES),
        )

    def written(self) -> list[Synapse]:
        found = Strongest()
        N = self.model.config.neurons_per_head
        for k, encoder_v in enumerate(self.module.encoder_v):
            sent = self.X[k * N : (k + 1) * N]  # (N)
            received = encoder_v(self.x)[0].to(self.dtype)  # (N)
            # The largest products are those of the largest factors.
            senders = sent.topk(min(SYNAPSES, N)).indices
            receivers = received.abs().topk(min(SYNAPSES, N)).indices
            found.add(sent[senders, None] * received[receivers], senders + k * N, receivers + k * N)
        return found.synapses()

    def read(self) -> list[Synapse]:
        found = Strongest()
        N = self.model.config.neurons_per_head
        brought = self.brought  # (r, D)
        for k, encoder_v in enumerate(self.module.encoder_v):
            head = (self.rows // N == k) & (self.activity > 0)  # (r)
            P = brought[head]  # (senders, D)
            A = P.sum(0).to(self.x.dtype)  # (D)
            receivers = encoder_v(self.module.norm(A)).gt(0).nonzero()[:, 0]  # (receivers)
            if len(receivers):
                weights = encoder_v.get_parameter("weight")[receivers].to(self.dtype)  # (receivers, D)
                found.search(P, weights, self.rows[head], receivers + k * N)
        return found.synapses()


class Strongest:
    """The `SYNAPSES` strongest of all that are added, by absolute value."""

    def __init__(self) -> None:
        self.found: list[Synapse] = []

    @property
    def bar(self) -> float:
        """What a synapse must be above to count."""
        return abs(self.found[-1].strength) if len(self.found) == SYNAPSES else 0.0

    def add(self, strength: Tensor, senders: Tensor, receivers: Tensor) -> None:
        """Adds synapses: (senders, receivers), with the numbers of both."""
        flat = strength.flatten()
        best = flat.abs().topk(min(SYNAPSES, len(flat))).indices
        numbers = senders[best // len(receivers)].tolist(), receivers[best % len(receivers)].tolist()
        new = [Synapse(*values) for values in zip(*numbers, flat[best].tolist(), strict=True)]
        self.found += [synapse for synapse in new if synapse.strength]
        self.found.sort(key=lambda synapse: -abs(synapse.strength))
        del self.found[SYNAPSES:]

    def search(self, P: Tensor, weights: Tensor, senders: Tensor, receivers: Tensor) -> None:
        """Adds the synapses P weights^T, of P (senders, D) and weights (receivers, D), as far as they can count.

        |p . w| is at most |p| |w|: the senders come in the order of |p|, and most are never looked at.
        """
        bounds, order = (P.norm(dim=1) * weights.norm(dim=1).max()).sort(descending=True)  # (senders)
        for start in range(0, len(order), SENDERS):
            if float(bounds[start]) <= self.bar:
                break
            block = order[start : start + SENDERS]
            self.add(P[block] @ weights.mT, senders[block], receivers)

    def synapses(self) -> list[Synapse]:
        return self.found


def strongest(values: Tensor, count: int) -> list[tuple[int, float]]:
    """Numbers and values of the largest by absolute value, without zeros. values: (any)."""
    best = values.abs().topk(min(count, len(values))).indices
    pairs = zip(best.tolist(), values[best].tolist(), strict=True)
    return [(number, value) for number, value in pairs if value]


@torch.inference_mode()
def neuron_activity(model: BDHForCausalLM, record: Record, layer: int, neuron: int) -> Tensor:
    """How much each recorded token excited one neuron of a layer: X(neuron), (tokens), on the CPU."""
    x = record.vectors[: len(record), layer].to(model.device)  # (tokens, D)
    weight = model.model.layer.encoder.weight[neuron : neuron + 1]  # (1, D)
    return F.relu(F.linear(x, weight))[:, 0].to(synapse_dtype(model.dtype)).cpu()  # (tokens)
