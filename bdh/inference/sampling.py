"""Batched sampling of the next tokens.

The token of a row depends on its own logits, settings, seed and step only, never on other rows. Elementwise arithmetic
is in float64, and probabilities are summed as integers (see `weights_of`), whose sum does not depend on the order; so
kernels that differ by batch size do not change the result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bdh.inference.sampling_params import SamplingParams

UNIT = 2.0**40  # the weight of a row's likeliest token; 2^22 tokens of it still fit a signed 64-bit integer

# Features used by the request of a slot, as bits; a batch computes those that any of its rows uses.
SAMPLED, BIAS, REPETITION, COUNTED, TYPICAL, TOP_K, TOP_P, MIN_P, LOGPROBS = (1 << bit for bit in range(9))
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: steps of it visit all numbers, neighbours far apart


def mix(numbers: np.ndarray) -> np.ndarray:
    """Mix 64-bit numbers bijectively, with the finalizer of SplitMix64 (Steele et al. 2014).

    Takes and returns uint64 of any shape but ().
    """
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def uniforms(streams: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return a random number for each stream (its mixed seed) and step, both uint64 (B,): float64 (B,) in [0, 1)."""
    bits = mix(streams + (steps + np.uint64(1)) * GOLDEN)  # (B,) uint64
    return (bits >> np.uint64(11)) * 2.0**-53  # (B,): every multiple of 2^-53, equally often


def column(values: np.ndarray, like: Tensor) -> Tensor:
    """Copy numbers (R,) to the device and dtype of `like`, as (R, 1), without synchronizing."""
    return torch.from_numpy(values[:, None]).to(like.device, like.dtype, non_blocking=like.is_cuda)


def weights_of(scores: Tensor) -> Tensor:
    """Convert scores (R, V), -inf or finite, to integer weights (R, V), in units of 2^-40 of the likeliest token.

    Rounding makes tokens equal that differ by rounding errors only; tokens less than half a unit as likely as the
    likeliest are never sampled.
    """
    above = scores - scores.amax(-1, keepdim=True)  # (R, V) at most 0
    return above.exp_().mul_(UNIT).round_().to(torch.int64)  # (R, V)


def keep_typical(scores: Tensor, mass: np.ndarray) -> Tensor:
    """Select the tokens whose surprisal is nearest to the expected one, up to `mass` (R,): bool (R, V)."""
    weights = weights_of(scores)  # (R, V)
    probabilities = weights.to(scores.dtype) / weights.sum(-1, keepdim=True)  # (R, V)
    parts = (torch.special.entr(probabilities) * UNIT).to(torch.int64)  # (R, V)
    entropy = parts.sum(-1, keepdim=True).to(scores.dtype) / UNIT  # (R, 1) nats
    distance = (-probabilities.log() - entropy).abs().clamp_(max=64.0)  # (R, V) those without weight at the end
    nearest = (distance * UNIT).round_().to(torch.int64).sort(dim=-1, stable=True).indices  # (R, V) equals by id
    kept = _until(weights.gather(-1, nearest), mass, scores)  # (R, V) in that order
    return torch.empty_like(kept).scatter_(-1, nearest, kept)  # (R, V)


def keep_top_k(scores: Tensor, k: np.ndarray) -> Tensor:
    """Select exactly the k (R,) likeliest tokens, among equals those with smaller ids: bool (R, V). 1 <= k <= V."""
    k_th = scores.topk(int(k.max())).values.gather(-1, column(k, scores).long() - 1)  # (R, 1)
    above, equal = scores > k_th, scores == k_th  # (R, V)
    room = column(k, scores) - above.sum(-1, keepdim=True)  # (R, 1) for equals of the k-th
    return above | (equal & (equal.cumsum(-1) <= room))  # (R, V)


def keep_top_p(scores: Tensor, mass: np.ndarray) -> Tensor:
    """Select the fewest likeliest tokens with `mass` (R,), among equals those with smaller ids: bool (R, V)."""
    ordered, likeliest = scores.sort(dim=-1, descending=True, stable=True)  # (R, V)
    kept = _until(weights_of(ordered), mass, scores)  # (R, V) in that order
    return torch.empty_like(kept).scatter_(-1, likeliest, kept)  # (R, V)


def keep_min_p(scores: Tensor, share: np.ndarray) -> Tensor:
    """Select the tokens at least `share` (R,), above 0, times as likely as the likeliest: bool (R, V)."""
    return scores >= scores.amax(-1, keepdim=True) + column(np.log(share), scores)  # (R, V)


def _until(weights: Tensor, mass: np.ndarray, like: Tensor) -> Tensor:
    """Select the first tokens of each row (R, V) with `mass` (R,) of its weight, at least one: bool (R, V)."""
    reached = weights.cumsum(-1)  # (R, V)
    return reached - weights < column(mass, like) * reached[:, -1:]  # (R, V)


FILTERS = {TYPICAL: keep_typical, TOP_K: keep_top_k, TOP_P: keep_top_p, MIN_P: keep_min_p}  # in this order


@dataclass
class Sampled:
    """Sampled tokens, by row of the batch.

    Attributes:
        tokens: The sampled tokens.
        logprobs: Their log-probabilities by the model's raw logits, in nats: of all rows if one asked for them, or
            draws more continuations than it returns; else None.
        top: For each row the likeliest tokens it asked for with their log-probabilities, likeliest first, of equals
            smaller ids first; None where `logprobs` is.
    """

    tokens: list[int]
    logprobs: list[float] | None = None
    top: list[list[tuple[int, float]]] | None = None


class Sampler:
    """Samples the next tokens of a batch; holds the settings and token counts of the slots.

    Settings stay on the host and are copied to the device when needed, one number per row and without synchronizing.
    Only tables with a value for each token, biases and counts (n_slots, V), are on the device, from the first request
    that needs them.
    """

    def __init__(self, n_slots: int, vocab_size: int, device: torch.device):
        self.n_slots, self.vocab_size, self.device = n_slots, vocab_size, device
        self.real = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.features = np.zeros(n_slots, np.int64)
        self.streams = np.zeros(n_slots, np.uint64)
        self.steps = np.zeros(n_slots, np.uint64)
        self.top_logprobs = np.zeros(n_slots, np.int64)
        self.temperature = np.ones(n_slots)
        self.repetition, self.presence, self.frequency = np.ones(n_slots), np.zeros(n_slots), np.zeros(n_slots)
        self.limits = {feature: np.ones(n_slots) for feature in FILTERS}
        self.tables: dict[int, Tensor] = {}

    @torch.inference_mode()
    def add(
        self, slot: int, params: SamplingParams, prompt: Sequence[int], seed: int, output: Sequence[int] = ()
    ) -> None:
        """Assign a slot to a new or resumed request.

        Args:
            slot: The slot.
            params: Sampling params.
            prompt: Token ids of the prompt.
            seed: Random seed, 0 to 2^64 - 1.
            output: Tokens sampled before, in another slot; sampling continues after them.

        Raises:
            BDHError: `params` has a token id that the model does not have.
        """
        params.check_vocabulary(self.vocab_size)
        self.streams[slot : slot + 1] = mix(np.array([seed], np.uint64))
        self.steps[slot] = len(output)
        self.temperature[slot] = 1.0 if params.greedy else params.temperature
        self.repetition[slot] = params.repetition_penalty
        self.presence[slot], self.frequency[slot] = params.presence_penalty, params.frequency_penalty
        self.top_logprobs[slot] = min(params.logprobs or 0, self.vocab_size)
        self.limits[TYPICAL][slot], self.limits[TOP_K][slot] = params.typical_p, min(params.top_k, self.vocab_size)
        self.limits[TOP_P][slot], self.limits[MIN_P][slot] = params.top_p, params.min_p
        self.features[slot] = features = self._features(params)
        if features & BIAS:
            bias = self._table(BIAS, torch.float32)[slot].zero_()  # (V,)
            biases = params.logit_bias or {}
            bias[self._index(np.array(list(biases)))] = self._index(np.array(list(biases.values()), np.float32))
        if features & REPETITION:
            seen = self._table(REPETITION, torch.bool)[slot].zero_()  # (V,)
            seen[torch.tensor([*prompt, *output], dtype=torch.int64, device=self.device)] = True
        if features & COUNTED:
            counts = self._table(COUNTED, torch.int32)[slot].zero_()  # (V,)
            if output:
                counts += self._index(np.bincount(output, minlength=self.vocab_size).astype(np.int32))

    def remove(self, slot: int) -> None:
        """Reset the slot of a request that has ended."""
        self.features[slot] = 0

    @torch.inference_mode()
    def sample(
        self,
        logits: Tensor,
        slots: Sequence[int],
        allowed: Mapping[int, Tensor] | None = None,
        forbidden: Mapping[int, Sequence[int]] | None = None,
    ) -> Sampled:
        """Sample a token for each row, and advance its slot by a step.

        A token whose logit is -inf is never chosen while there is another; one that is no number counts as -inf.

        Args:
            logits: (B, V) floating-point, on the device; left as they are.
            slots: The slot of each row, all different; each with a request.
            allowed: By slot a mask of the tokens that may come, bool (V,), on the CPU; without one any may.
            forbidden: By slot tokens that may not come now; ignored where nothing else would be left.

        Raises:
            ValueError: A mask in `allowed` has no token.
        """
        here = np.asarray(slots, np.int64)  # (B,)
        used = int(np.bitwise_or.reduce(self.features[here]))
        if not (used & ~LOGPROBS or allowed or forbidden):
            tokens = logits.argmax(-1)  # (B,)
        else:
            scores = self._scores(logits, here, used, allowed or {}, forbidden or {})  # (B, V)
            tokens = self._draw(scores, here, used)  # (B,)
        self.steps[here] += np.uint64(1)
        if used & (REPETITION | COUNTED):
            self._count(tokens, here)
        return self._sampled(tokens, logits, here) if used & LOGPROBS else Sampled(tokens.tolist())

    @torch.inference_mode()
    def probabilities(
        self,
        logits: Tensor,
        slots: Sequence[int],
        allowed: Mapping[int, Tensor] | None = None,
        forbidden: Mapping[int, Sequence[int]] | None = None,
    ) -> Tensor:
        """The distributions that `sample` with the same arguments would draw from: (B, V) float64 (float32 on MPS)."""
        here = np.asarray(slots, np.int64)  # (B,)
        used = int(np.bitwise_or.reduce(self.features[here]))
        scores = self._scores(logits, here, used, allowed or {}, forbidden or {})  # (B, V)
        weights = weights_of(self._filter(scores, here, used))  # (B, V)
        drawn = weights.to(self.real) / weights.sum(-1, keepdim=True)  # (B, V)
        greedy = torch.zeros_like(drawn).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)  # (B, V)
        return torch.where(column(self.features[here] & SAMPLED, drawn) > 0, drawn, greedy)  # (B, V)

    def _features(self, params: SamplingParams) -> int:
        used = {
            BIAS: bool(params.logit_bias),
            REPETITION: params.repetition_penalty != 1,
            COUNTED: params.presence_penalty != 0 or params.frequency_penalty != 0,
            LOGPROBS: params.logprobs is not None or (params.best_of or params.n) > params.n,
        }
        if not params.greedy:
            used |= {SAMPLED: True, TYPICAL: params.typical_p < 1, TOP_K: 0 < params.top_k < self.vocab_size}
            used |= {TOP_P: params.top_p < 1, MIN_P: params.min_p > 0}
        return sum(feature for feature, is_used in used.items() if is_used)

    def _table(self, feature: int, dtype: torch.dtype) -> Tensor:
        if feature not in self.tables:
            self.tables[feature] = torch.zeros(self.n_slots, self.vocab_size, dtype=dtype, device=self.device)
        return self.tables[feature]

    def _index(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self.device, non_blocking=self.device.type == "cuda")

    def _rows(self, here: np.ndarray, feature: int) -> tuple[Tensor, np.ndarray]:
        """The rows that ask for a feature, and their slots: (R,) each."""
        rows = np.flatnonzero(self.features[here] & feature)
        return self._index(rows), here[rows]

    def _scores(
        self,
        logits: Tensor,
        here: np.ndarray,
        used: int,
        allowed: Mapping[int, Tensor],
        forbidden: Mapping[int, Sequence[int]],
    ) -> Tensor:
        """The logits after bias, penalties and temperature: (B, V); finite but for tokens that may not come, -inf."""
        scores = logits.to(self.real, copy=True)  # (B, V)
        if used & BIAS:
            rows, slots = self._rows(here, BIAS)
            scores[rows] += self.tables[BIAS][self._index(slots)]  # (R, V)
        if used & REPETITION:
            rows, slots = self._rows(here, REPETITION)
            plain, penalty = scores[rows], column(self.repetition[slots], scores)  # (R, V), (R, 1)
            penalized = torch.where(plain > 0, plain / penalty, plain * penalty)  # (R, V)
            scores[rows] = torch.where(self.tables[REPETITION][self._index(slots)], penalized, plain)  # (R, V)
        if used & COUNTED:
            rows, slots = self._rows(here, COUNTED)
            counts = self.tables[COUNTED][self._index(slots)]  # (R, V)
            presence, frequency = column(self.presence[slots], scores), column(self.frequency[slots], scores)  # (R, 1)
            scores[rows] -= presence * (counts > 0) + frequency * counts  # (R, V)
        if used & SAMPLED:
            scores /= column(self.temperature[here], scores)  # (B, V)
        scores.nan_to_num_(nan=torch.finfo(self.real).min)  # (B, V) so that -inf means only: may not come
        if allowed or forbidden:
            self._mask(scores, here, allowed, forbidden)
        return scores

    def _mask(
        self, scores: Tensor, here: np.ndarray, allowed: Mapping[int, Tensor], forbidden: Mapping[int, Sequence[int]]
    ) -> None:
        """Makes the scores (B, V) of tokens that may not come -inf, in place."""
        masked: dict[int, Tensor] = {}  # row: what may come, (V,) bool
        banned: list[tuple[int, int]] = []  # row and token
        for row, slot in enumerate(here.tolist()):
            ids = set(forbidden.get(slot, ()))
            if slot in allowed:
                rest = allowed[slot].clone()  # (V,)
                rest[list(ids)] = False
                masked[row] = rest if rest.any() else allowed[slot]
                if not masked[row].any():
                    raise ValueError(f"slot {slot} is allowed no token at all")
            elif len(ids) < self.vocab_size:
                banned += [(row, token) for token in ids]
        if masked:
            rows = self._index(np.array(list(masked)))
            mask = torch.stack(list(masked.values())).to(self.device, non_blocking=scores.is_cuda)  # (R, V)
            scores[rows] = scores[rows].masked_fill(~mask, float("-inf"))  # (R, V)
        if banned:
            rows, tokens = self._index(np.array(banned).T)
            scores[rows, tokens] = float("-inf")

    def _filter(self, scores: Tensor, here: np.ndarray, used: int) -> Tensor:
        """The scores (B, V), -inf for tokens that a row's settings leave out; each filter sees what the last left."""
        for feature, keep in FILTERS.items():
            if used & feature:
                rows, slots = self._rows(here, feature)
                left = scores if len(slots) == len(here) else scores[rows]  # (R, V)
                left = left.masked_fill(~keep(left, self.limits[feature][slots]), float("-inf"))  # (R, V)
                scores = left if len(slots) == len(here) else scores.index_copy(0, rows, left)  # (B, V)
        return scores

    def _draw(self, scores: Tensor, here: np.ndarray, used: int) -> Tensor:
        """Tokens (B,) drawn by scores (B, V): the first at which the probability so far exceeds a random number.

        Rows that do not draw take the likeliest.
        """
        if not used & SAMPLED:
            return scores.argmax(-1)  # (B,)
        reached = weights_of(self._filter(scores, here, used)).cumsum(-1)  # (B, V)
        whole = reached[:, -1:]  # (B, 1)
        random = column(uniforms(self.streams[here], self.steps[here]), scores)  # (B, 1)
        target = torch.minimum((random * whole).to(torch.int64), whole - 1)  # (B, 1) float32 may round up to it
        drawn = torch.searchsorted(reached, target, right=True).squeeze(-1)  # (B,)
        sampled = self.features[here] & SAMPLED
        if sampled.all():
            return drawn
        return torch.where(self._index(sampled) > 0, drawn, scores.argmax(-1))  # (B,)

    def _count(self, tokens: Tensor, here: np.ndarray) -> None:
        """Takes chosen tokens (B,) into the tables of the rows that are penalized for them."""
        rows, slots = self._rows(here, REPETITION)
        if len(slots):
            self.tables[REPETITION][self._index(slots), tokens[rows]] = True
        rows, slots = self._rows(here, COUNTED)
        if len(slots):
            self.tables[COUNTED][self._index(slots), tokens[rows]] += 1

    def _sampled(self, tokens: Tensor, logits: Tensor, here: np.ndarray) -> Sampled:
        """Tokens (B,) and log-probabilities, brought to the host in one copy."""
        logprobs = logits.log_softmax(-1, dtype=self.real)  # (B, V)
        parts = [tokens[:, None].to(self.real), logprobs.gather(-1, tokens[:, None])]  # (B, 1) each
        wanted = self.top_logprobs[here]  # (B,)
        most = int(wanted.max())
        if most:
            likeliest = keep_top_k(logprobs, wanted.clip(1).astype(np.float64))  # (B, V)
            values, ids = logprobs.masked_fill(~likeliest, float("-inf")).topk(most)  # (B, most)
            parts += [ids.to(self.real), values]
        table = torch.cat(parts, -1).tolist()  # (B, 2 + 2 * most)
        top = [
            _ranked(row[2 : 2 + k], row[2 + most : 2 + most + k]) for row, k in zip(table, wanted.tolist(), strict=True)
        ]
        return Sampled([int(row[0]) for row in table], [row[1] for row in table], top)


def _ranked(ids: list[float], logprobs: list[float]) -> list[tuple[int, float]]:
    """Tokens with their log-probabilities, likeliest first."""
    pairs = zip(map(int, ids), logprobs, strict=True)
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
