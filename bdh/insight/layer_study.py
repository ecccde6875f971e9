"""Activity, reads and writes of one token in one layer, computed from the record by the equations.

Shapes in comments: D `n_embd`, h heads, N neurons of a head, n = h * N; C recorded tokens; t the token in question.
The token's *rows* are its active neurons and the rotary partners of these, r of them: whatever it writes into the
synapses or reads from them is in these rows of S.

Seen from token t, in its own rotary frame, the synapses are

    M = Rot_t^-1 S_t = sum over s < t of (Rot_(s-t) X_s)^T x_s + Rot_t^-1 S_0            A_t = X_t M

and what they mean between a neuron i that sends and a neuron j of the same head that receives is M(i,:) . E_v(:,j): a
positive number excites j when i fires. X_t(i) times that is what i brought j this time.

Where synapses decay, S_t is what the token reads, after its own decay: with u the cumulative sum of a head's log-decay
over the record, what token s wrote counts exp(u_t - u_s), and S_0 exp(u_t). With the delta rule, X / |X| of the head is
in the place of X, and U_s = beta_s (x_s - A_s), which differs by head, in the place of x_s.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bdh.insight.activity_record import Record
from bdh.model import BDHForCausalLM
from bdh.model.modeling_bdh import KEY_EPS, rotary_phases, rotate, synapse_dtype

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
    """Activity and synapses of a token in a layer. All lists begin with the strongest, by absolute value.

    Attributes:
        layer: From 0.
        active: How many neurons fired (X > 0).
        share: The same as a part of all.
        neurons: Which fired most, and their activity X.
        written: What the token added to synapses, X(i) * (x . E_v(:,j)); with the delta rule X(i) / |X| and U.
        read: What the past brought to neurons that it made fire (Y > 0), X(i) * (M(i,:) . E_v(:,j)).
        sources: Earlier tokens of the record, and how much of each the token takes up: the weight R_t . R_s of its x_s,
            summed over heads; times exp(u_t - u_s) where synapses decay. With the delta rule, the weight of U_s times
            |U_s| / sqrt(D), as sqrt(D) is the length of x_s.
        log_decay: Logarithm of the retention of each head at the token; None if the synapses do not decay.
        write_strength: beta of each head at the token; None without the delta rule.
    """

    layer: int
    active: int
    share: float
    neurons: list[tuple[int, float]]
    written: list[Synapse]
    read: list[Synapse]
    sources: list[tuple[int, float]]
    log_decay: list[float] | None = None
    write_strength: list[float] | None = None


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
        activity: X_t of each of them, (r); with the delta rule divided by the length of its head's, as a key is.
        brought: activity(i) M(i,:) for each of them, (r, D); complete when all pieces are read. Its sum over a head is
            A_t.
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
        self.heads = self.rows // model.config.neurons_per_head  # (r)
        self.key = self.X  # (n)
        if record.key_lengths is not None:
            lengths = self.recorded(record.key_lengths, slice(index, index + 1))[0] + KEY_EPS  # (h)
            self.key = (self.X.unflatten(0, (len(lengths), -1)) / lengths[:, None]).flatten()  # (n)
        self.activity = self.key[self.rows]  # (r)
        self.encoder = self.module.encoder.weight[self.rows]  # (r, D)
        self.scores = self.activity.new_zeros(index)  # (t)
        self.M = self.base()  # (r, D)

    def vectors(self, tokens: slice) -> Tensor:
        """The inputs of the layer, (C, D)."""
        return self.record.vectors[tokens, self.layer].to(self.model.device)

    def recorded(self, values: Tensor, tokens: slice) -> Tensor:
        """A record of the heads in the layer: (max_tokens, L, h, ...) -> (C, h, ...)."""
        return values[tokens, self.layer].to(self.model.device, self.dtype)

    def remains(self, tokens: slice) -> Tensor | None:
        """exp(u_t - u_s): the part of what tokens s wrote that token t finds, (C, h); None where nothing decays.

        Token -1 stands for all that was written before the record.
        """
        if self.record.log_decay is None:
            return None
        later = self.record.log_decay[tokens.start + 1 : self.index + 1, self.layer].double()  # (t - start, h)
        since = later.flip(0).cumsum(0).flip(0)[: tokens.stop - tokens.start]  # (C, h)
        return since.exp().to(self.model.device, self.dtype)  # (C, h)

    def written_vectors(self, tokens: slice) -> Tensor | None:
        """U of the delta rule, (C, h, D); None where tokens write their x."""
        if self.record.write_strength is None or self.record.attention is None:
            return None
        beta = self.recorded(self.record.write_strength, tokens)  # (C, h)
        A = self.recorded(self.record.attention, tokens)  # (C, h, D)
        return beta[:, :, None] * (self.vectors(tokens).to(self.dtype)[:, None] - A)  # (C, h, D)

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
        remains = self.remains(slice(-1, 0))  # (1, h)
        if remains is not None:
            S = S * remains[0, self.heads, None]  # (r, D)
        back = torch.tensor([-self.record.start - self.index], device=S.device)  # (1)
        return self.turned(S.mT, back).mT.contiguous()  # (r, D)

    @torch.inference_mode()
    def read_past(self, piece: slice) -> None:
        """Takes account of some earlier tokens."""
        x = self.vectors(piece)  # (C, D)
        X = F.relu(F.linear(x, self.encoder)).to(self.dtype)  # (C, r)
        distance = torch.arange(piece.start, piece.stop, device=x.device) - self.index  # (C)
        G = self.turned(X, distance)  # (C, r)
        if (remains := self.remains(piece)) is not None:
            G = G * remains[:, self.heads]  # (C, r)
        U = self.written_vectors(piece)  # (C, h, D)
        if U is None or self.record.key_lengths is None:
            self.scores[piece] = G @ self.activity  # (C)
            self.M.addmm_(G.mT, x.to(self.dtype))  # (r, D)
            return
        G = G / (self.recorded(self.record.key_lengths, piece) + KEY_EPS)[:, self.heads]  # (C, r)
        lengths = U.norm(dim=-1) / U.shape[-1] ** 0.5  # (C, h)
        self.scores[piece] = ((G * self.activity) * lengths[:, self.heads]).sum(1)  # (C)
        for k, U_k in enumerate(U.unbind(1)):  # (C, D)
            head = self.heads == k  # (r)
            self.M[head] += G[:, head].mT @ U_k  # (rows of the head, D)

    @property
    def brought(self) -> Tensor:
        return self.activity[:, None] * self.M  # (r, D)

    @torch.inference_mode()
    def view(self) -> LayerView:
        """Returns the results."""
        active = int((self.X > 0).sum())
        log_decay, beta = self.record.log_decay, self.record.write_strength
        return LayerView(
            layer=self.layer,
            active=active,
            share=active / len(self.X),
            neurons=strongest(self.X, NEURONS),
            written=self.written(),
            read=self.read(),
            sources=strongest(self.scores, SOURCES),
            log_decay=None if log_decay is None else log_decay[self.index, self.layer].tolist(),
            write_strength=None if beta is None else beta[self.index, self.layer].tolist(),
        )

    def written(self) -> list[Synapse]:
        found = Strongest()
        N = self.model.config.neurons_per_head
        U = self.written_vectors(slice(self.index, self.index + 1))  # (1, h, D)
        for k, encoder_v in enumerate(self.module.encoder_v):
            sent = self.key[k * N : (k + 1) * N]  # (N)
            vector = self.x if U is None else U[:, k].to(self.x.dtype)  # (1, D)
            received = encoder_v(vector)[0].to(self.dtype)  # (N)
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
            head = (self.heads == k) & (self.activity > 0)  # (r)
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
        """The strength that a synapse must exceed to enter the list."""
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
    """The activity X of one neuron of a layer for each recorded token: (tokens), on the CPU."""
    x = record.vectors[: len(record), layer].to(model.device)  # (tokens, D)
    weight = model.model.layer.encoder.weight[neuron : neuron + 1]  # (1, D)
    return F.relu(F.linear(x, weight))[:, 0].to(synapse_dtype(model.dtype)).cpu()  # (tokens)
