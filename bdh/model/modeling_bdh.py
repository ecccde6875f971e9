"""The Dragon Hatchling language model (BDH; Kosowski et al., arXiv 2509.26507), in one file.

What is notable about it, for a reader who knows transformers:

* A token excites *neurons*: X = relu(x E). They are many (32768 at the defaults), positive, and a minority is active.
* Attention is linear and has no softmax. Query and key are one vector R, the neurons' activity turned by rotary
  phases; the value is the token's own vector x, the same for all heads. A token sees only tokens before it.
* So the past enters through a sum, S = sum of R_s^T x_s: *the synapses*, of a size that never grows. `BDHState` is
  that sum and each sequence's position; it stands where other models have a cache of keys and values.
* The published synapses never forget. `config.decay` lets each head's decay, by a fixed half-life or by a gate of the
  token; with `config.write` "delta" a token writes only what the synapses do not already return for its key.
* All layers share one set of weights: `BDHModel` holds one `BDHLayer` and applies it L times.
* There are no biases but those of the gates, and layer norms have no parameters.

Shapes in comments: B sequences, T tokens, D `n_embd`, h `n_head`, N neurons of one head, n = h * N neurons,
L `n_layer`, V `vocab_size`.

This file is copied into every export (`trust_remote_code=True` loads it), so it needs torch and transformers only.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_bdh import BDHConfig

AUTO_MAP = {"AutoModel": "modeling_bdh.BDHModel", "AutoModelForCausalLM": "modeling_bdh.BDHForCausalLM"}

# What the library calls the state in a model's output, and `generate()` in `forward`: "cache" from its 5.24 on.
STATE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"

# ------------------------------------------------------------------------------------------------ the state


@dataclass(eq=False)
class BDHState:
    """The synapses of a batch of sequences, and how far each has been read.

    `forward` consumes a state and leaves it advanced by the tokens it read; `clone()` first to keep the old one. With
    gradients enabled, and in compiled and exported code, the tensors are replaced, not overwritten, so that gradients
    flow through a carried state.

    A state is a pytree of the three fields below, in this order, so `torch.export` and `torch.onnx.export` take it and
    return it.

    Attributes:
        synapses: One tensor (B, h, N, D) a layer, S in the equations; float32 unless moved.
        position: Real tokens read so far, by sequence, padding not counted: (B,) int64.
        columns: Columns read so far, padding counted: () int64 on the CPU. The constructor takes an int too.
    """

    synapses: list[Tensor]
    position: Tensor
    columns: Tensor

    def __init__(self, synapses: Sequence[Tensor], position: Tensor, columns: Tensor | int):
        self.synapses = list(synapses)
        self.position = position
        # A tensor, as compiled and exported code would take a number for a constant.
        self.columns = torch.tensor(columns, device="cpu") if isinstance(columns, int) else columns

    @classmethod
    def zeros(
        cls,
        config: BDHConfig,
        batch_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "BDHState":
        """The state before the first token: no synapses, position 0."""
        shape = (batch_size, config.n_head, config.neurons_per_head, config.n_embd)
        return cls(
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)],
            torch.zeros(batch_size, dtype=torch.int64, device=device),
            0,
        )

    @property
    def batch_size(self) -> int:
        return self.position.shape[0]

    @property
    def length(self) -> int:
        """`columns` as a number: what `generate()` takes for the length of the past."""
        return int(self.columns)

    @property
    def nbytes(self) -> int:
        """Bytes the synapses take; constant however long the sequences grow."""
        return sum(S.numel() * S.element_size() for S in self.synapses)

    def clone(self) -> "BDHState":
        """A copy that shares nothing with this one."""
        return BDHState([S.clone() for S in self.synapses], self.position.clone(), self.columns)

    def detach(self) -> "BDHState":
        """The same numbers, cut off from the graph that made them (truncated back-propagation); memory is shared."""
        return BDHState([S.detach() for S in self.synapses], self.position, self.columns)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "BDHState":
        """The state on another device, the synapses in another dtype; positions stay integers."""
        return BDHState(
            [S.to(device=device, dtype=dtype) for S in self.synapses], self.position.to(device=device), self.columns
        )

    def forget(self, rows: Tensor) -> "BDHState":
        """The state with the sequences marked in `rows`, (B,) bool, back at the beginning; the others as they are."""
        kept = ~rows.to(self.position.device)  # (B,)
        return BDHState([S * kept[:, None, None, None] for S in self.synapses], self.position * kept, self.columns)

    def select(self, indices: Tensor) -> "BDHState":
        """A new state of the sequences `indices` (int64, any order, repeats allowed)."""
        return BDHState([S[indices] for S in self.synapses], self.position[indices], self.columns)

    # The rest is what `generate()` and its users ask of a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rearranges the sequences in place, as beam search does after each step."""
        chosen = self.select(beam_idx.to(self.position.device))
        self.synapses, self.position = chosen.synapses, chosen.position

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences `indices`, in place."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence, in place: for several continuations of one prompt."""
        self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("synapses cannot go back by tokens; clone() the state before tokens that may not count")

    def activate_past_recording(self) -> None:
        self.crop(0)

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_linear(self) -> list[bool]:
        """By layer, whether it is a cache that does not know its length: none, so what was read is not read again."""
        return [False] * len(self.synapses)


torch.export.register_dataclass(BDHState, serialized_type_name=f"{BDHState.__module__}.{BDHState.__qualname__}")
torch.serialization.add_safe_globals([BDHState])  # saved programs hold their example inputs


# ------------------------------------------------------------------------------------------------ rotary phases


def rotary_phases(positions: Tensor, n: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and signed sin of the phases t * theta^(-2i/N) of each neuron pair (2i, 2i+1), laid out for `rotate`.

    The phase is worked out in float64 and in turns, modulo 1, so that it keeps its digits at any position (float32
    phases are off by more than a degree beyond some 10^5 tokens); only cos and sin are rounded to `dtype`.

    Args:
        positions: Token positions, (B or 1, T) int64.
        n: Neurons of one head (N, even).
        theta: Base of the phases.
        dtype: Of the result.

    Returns:
        Two tensors (B or 1, 1, T, N) of `dtype`: (cos, cos) and (-sin, sin) for each pair.
    """
    where = "cpu" if positions.device.type == "mps" else positions.device  # Apple's GPUs have no float64
    if torch.compiler.is_exporting():  # as constants, because ONNX rounds the numbers of a formula to float32
        per_token = [theta ** (-i / n) / (2 * math.pi) for i in range(0, n, 2)]
        turns_per_token = torch.tensor(per_token, dtype=torch.float64, device=where)  # (N/2)
    else:
        pair = torch.arange(0, n, 2, dtype=torch.float64, device=where)  # (N/2)
        turns_per_token = theta ** (-pair / n) / (2 * math.pi)  # (N/2)
    turns = positions.to(where, torch.float64)[:, None, :, None] * turns_per_token  # (B|1, 1, T, N/2)
    angle = (turns - turns.floor()) * (2 * math.pi)  # (B|1, 1, T, N/2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)  # (B|1, 1, T, N/2)
    cos, sin = torch.stack((cos, cos), dim=-1).flatten(-2), torch.stack((-sin, sin), dim=-1).flatten(-2)
    return cos.to(positions.device), sin.to(positions.device)  # (B|1, 1, T, N)


def rotate(X: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each neighbouring pair of the last dimension by its phase. (B, h, T, N) -> (B, h, T, N)."""
    partner = X.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # (B, h, T, N)  2i and 2i+1 swapped
    return torch.addcmul(X * cos, partner, sin)  # (B, h, T, N)


# ------------------------------------------------- attention: three forms of A_t = sum over s<t of (R_t . R_s) x_s


def synapse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of synapses for activity of `dtype`: float32 at least, as they are a sum over the whole past."""
    return torch.promote_types(dtype, torch.float32)


def read_synapses(R: Tensor, S: Tensor) -> Tensor:
    """Reads the synapses for each token: R S. (B, h, T, N), (B, h, N, D) -> (B, h, T, D) in R's dtype."""
    if R.shape[2] == 1:  # one token: cheaper to widen R than to narrow S
        return (R.to(S.dtype) @ S).to(R.dtype)  # (B, h, 1, D)
    return R @ S.to(R.dtype)  # (B, h, T, D)


def may_overwrite(S: Tensor) -> bool:
    """Whether synapses can be updated in place: no gradient is recorded, and torch allows it for this tensor.

    Compiled and exported code does not, as it is traced once for tensors of any origin.
    """
    if torch.compiler.is_compiling():
        return False
    return not torch.is_grad_enabled() and S.is_inference() == torch.is_inference_mode_enabled()


def write_synapses(R: Tensor, x: Tensor, S: Tensor, documents: Tensor | None = None) -> Tensor:
    """The synapses after these tokens: S + R^T x, in place when no gradient is recorded.

    Args:
        R: Rotated activity, (B, h, T, N).
        x: Values, (B, T, D).
        S: Synapses before, (B, h, N, D).
        documents: As for `attention_quadratic`; only the last token's document stays in the synapses.
    """
    if documents is not None:
        last = documents[:, -1:]  # (B, 1)
        x = x * (documents == last)[:, :, None]  # (B, T, D)
        S = S * (last == 0)[:, :, None, None]  # (B, h, N, D)
    Rt, values = R.mT, x[:, None]  # (B, h, N, T), (B, 1, T, D)
    if R.shape[2] == 1:  # one token: an outer product in the synapses' own precision
        Rt, values = Rt.to(S.dtype), values.to(S.dtype)
        return S.addcmul_(Rt, values) if may_overwrite(S) else S + Rt * values  # (B, h, N, D)
    written = Rt @ values  # (B, h, N, D)
    return S.add_(written) if may_overwrite(S) else S + written  # (B, h, N, D)


def attention_quadratic(R: Tensor, x: Tensor, S: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
    """All pairs of tokens at once: A = tril(R R^T, -1) x, and R S for the past. Cost T * n a token.

    Args:
        R: Rotated activity, (B, h, T, N).
        x: Values, (B, T, D); zero where a token is padding.
        S: Synapses of the tokens before, (B, h, N, D), or None at the start.
        documents: Which document each token is of, (B, T) int64, never falling; a token sees its own document only,
            and document 0 is the one the synapses are of. None: all tokens and the synapses are of one.

    Returns:
        A, (B, h, T, D).
    """
    scores = (R @ R.mT).tril(-1)  # (B, h, T, T)
    if documents is not None:
        other = documents[:, :, None] != documents[:, None, :]  # (B, T, T)
        scores = scores.masked_fill(other[:, None], 0)  # (B, h, T, T)
    A = scores @ x[:, None]  # (B, h, T, D)
    if S is None:
        return A
    past = read_synapses(R, S)  # (B, h, T, D)
    return A + (past if documents is None else past * (documents == 0)[:, None, :, None])


def attention_chunked(
    R: Tensor, x: Tensor, S: Tensor, chunk_size: int, documents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quadratic within chunks, synapses between them. Cost chunk_size * n + 2 * n * D a token, whatever T.

    Arguments as for `attention_quadratic`; returns A (B, h, T, D) and the synapses after the last token.
    """
    pieces = []
    for start in range(0, R.shape[2], chunk_size):
        chunk = slice(start, start + chunk_size)
        R_c, x_c, d_c = R[:, :, chunk], x[:, chunk], documents_since(documents, chunk)  # (B, h, C, N), (B, C, D)
        pieces.append(attention_quadratic(R_c, x_c, S, d_c))  # (B, h, C, D)
        S = write_synapses(R_c, x_c, S, d_c)
    return torch.cat(pieces, dim=2), S


def attention_recurrent(R: Tensor, x: Tensor, S: Tensor, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Token by token: A_t = R_t S_t, then S_(t+1) = S_t + R_t^T x_t. Cost 2 * n * D a token.

    Arguments as for `attention_quadratic`; returns A (B, h, T, D) and the synapses after the last token.
    """
    steps = []
    for t in range(R.shape[2]):
        now = slice(t, t + 1)
        R_t, x_t, d_t = R[:, :, now], x[:, now], documents_since(documents, now)  # (B, h, 1, N), (B, 1, D), (B, 1)
        if d_t is not None:  # a new document begins without synapses
            S = S * (d_t == 0)[:, :, None, None]  # (B, h, N, D)
        steps.append(read_synapses(R_t, S))  # (B, h, 1, D)
        S = write_synapses(R_t, x_t, S)
    return torch.cat(steps, dim=2), S


def documents_since(documents: Tensor | None, chunk: slice) -> Tensor | None:
    """The document numbers of a chunk, (B, C), 0 for the document before it, which the synapses are then of."""
    if documents is None or chunk.start == 0:
        return None if documents is None else documents[:, chunk]
    return documents[:, chunk] - documents[:, chunk.start - 1 : chunk.start]


def attend(
    R: Tensor, x: Tensor, S: Tensor | None, chunk_size: int, documents: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Chooses the form by the length and by whether synapses come in. Returns A and the new synapses, if any."""
    T = R.shape[2]
    if S is not None and T == 1:
        return attention_recurrent(R, x, S, documents)
    if T <= chunk_size:
        A = attention_quadratic(R, x, S, documents)
        return A, None if S is None else write_synapses(R, x, S, documents)
    if S is None:
        B, h, _, N = R.shape
        S = R.new_zeros(B, h, N, x.shape[-1], dtype=synapse_dtype(R.dtype))  # (B, h, N, D)
        return attention_chunked(R, x, S, chunk_size, documents)[0], None
    return attention_chunked(R, x, S, chunk_size, documents)


# ------------------------------------------------------------- attention with decay, and with the delta rule
#
# With retention g_t = exp(log_decay_t) and write strength beta_t of a head, and keys k (R for "add", R / |R| for
# "delta"), where S_(t-1) holds the tokens before t:
#
#     A_t = k_t (g_t S_(t-1))
#     add:    S_t = g_t S_(t-1) + k_t^T x_t
#     delta:  S_t = g_t S_(t-1) + k_t^T beta_t (x_t - A_t)      (DeltaNet, arXiv 2406.06484; gated, arXiv 2412.06464)
#
# The vector that is written is called U: x for "add", beta (x - A) for "delta".


class Gates(NamedTuple):
    """Retention and write strength of each head at each token, float32 at least.

    Attributes:
        log_decay: Logarithm of the retention, at most 0: (B, h, T); None if the synapses do not decay.
        write_strength: beta, between 0 and 1: (B, h, T); None for "add".
    """

    log_decay: Tensor | None
    write_strength: Tensor | None

    def at(self, tokens: slice) -> "Gates":
        """The gates of some of the tokens."""
        return Gates(*(None if gate is None else gate[:, :, tokens] for gate in self))


KEY_EPS = 1e-6  # added to the length of a key before the division by it


def unit_keys(R: Tensor) -> Tensor:
    """R / (|R| + eps), the keys of the delta rule; zero where R is. (..., N) -> (..., N)."""
    length = torch.linalg.vector_norm(R, dim=-1, keepdim=True, dtype=synapse_dtype(R.dtype))  # (..., 1)
    return (R / (length + KEY_EPS)).to(R.dtype)  # (..., N)


def solve_unit_lower(L: Tensor, B: Tensor, longest: int | None = None) -> Tensor:
    """(I + L)^-1 B for strictly lower triangular L: (..., T, T), (..., T, D) -> (..., T, D).

    ONNX and other targets of exported programs have no triangular solver. In exports I + L is inverted block by block:
    the inverse of [[P, 0], [Q, R]] is [[P^-1, 0], [-R^-1 Q P^-1, R^-1]], for blocks of 1, 2, 4, ... rows.

    Args:
        L: Strictly lower triangular.
        B: The right-hand sides.
        longest: The largest T, for exports in which T is not fixed; None where it is.
    """
    if not torch.compiler.is_exporting():
        return torch.linalg.solve_triangular(L, B, upper=False, unitriangular=True)
    T = L.shape[-1]
    size = T if isinstance(T, int) or longest is None else longest
    row = torch.arange(T, device=L.device)  # (T)
    inverse = torch.eye(T, dtype=L.dtype, device=L.device)  # (T, T)
    for level in range((size - 1).bit_length()):
        block = row // 2**level  # (T)
        pairs = (block[:, None] == block + 1) & (block % 2 == 0)  # (T, T)  below P and left of R
        inverse = inverse - inverse @ (L * pairs) @ inverse  # (..., T, T)
    return inverse @ B


def gated_attention_quadratic(
    k: Tensor, x: Tensor, S: Tensor | None, gates: Gates, documents: Tensor | None = None, longest: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """All pairs of tokens at once.

    With u the cumulative sum of log_decay, M_ts = (k_t . k_s) exp(u_t - u_s) for s < t and P_t = exp(u_t) k_t S:
    A = P + M U, where U = x for "add", and (I + diag(beta) M) U = beta (x - P) for "delta".

    Args:
        k: Keys, (B, h, T, N).
        x: Values, (B, T, D); zero where a token is padding.
        S: Synapses of the tokens before, (B, h, N, D), or None at the start.
        gates: Of these tokens; padding neither decays nor writes.
        documents: As for `attention_quadratic`.
        longest: The largest T, for exports in which T is not fixed.

    Returns:
        A, (B, h, T, D), and the synapses after the last token, None if none came in.
    """
    wide = synapse_dtype(k.dtype)
    B, h, T, _ = k.shape
    seen = torch.ones(T, T, dtype=torch.bool, device=k.device).tril(-1)  # (T, T)
    if documents is not None:
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])  # (B, 1, T, T)
    M = (k @ k.mT).to(wide)  # (B, h, T, T)
    u = k.new_zeros(B, h, T, dtype=wide)  # (B, h, T)
    if gates.log_decay is not None:
        u = gates.log_decay.to(wide).cumsum(-1)  # (B, h, T)
        M = M * (u[..., :, None] - u[..., None, :]).masked_fill(~seen, -math.inf).exp()  # (B, h, T, T)
    M = M.masked_fill(~seen, 0)  # (B, h, T, T)
    values = x[:, None].to(wide)  # (B, 1, T, D)
    P: Tensor | None = None
    if S is not None:
        P = read_synapses(k, S).to(wide) * u.exp()[..., None]  # (B, h, T, D)
        if documents is not None:
            P = P * (documents == 0)[:, None, :, None]  # (B, h, T, D)
    U = values.expand(-1, h, -1, -1)  # (B, h, T, D)
    if gates.write_strength is not None:
        beta = gates.write_strength.to(wide)[..., None]  # (B, h, T, 1)
        U = beta * (values if P is None else values - P)  # (B, h, T, D)
        U = solve_unit_lower(beta * M, U, longest)  # (B, h, T, D)
    A = M @ U  # (B, h, T, D)
    if S is None or P is None:
        return A.to(k.dtype), None
    A = A + P  # (B, h, T, D)
    remains, since = u[..., -1:].exp(), (u[..., -1:] - u).exp()  # (B, h, 1), (B, h, T)
    if documents is not None:
        last = documents[:, None, -1:]  # (B, 1, 1)
        remains, since = remains * (last == 0), since * (documents[:, None] == last)  # (B, h, 1), (B, h, T)
    written = (k.mT @ (since[..., None] * U).to(k.dtype)).to(S.dtype)  # (B, h, N, D)
    remains = remains[..., None].to(S.dtype)  # (B, h, 1, 1)
    S = S.mul_(remains).add_(written) if may_overwrite(S) else S * remains + written  # (B, h, N, D)
    return A.to(k.dtype), S


def gated_attention_chunked(
    k: Tensor, x: Tensor, S: Tensor, gates: Gates, chunk_size: int, documents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quadratic within chunks, synapses between them; arguments and results as for `gated_attention_quadratic`."""
    results = []
    for start in range(0, k.shape[2], chunk_size):
        chunk = slice(start, start + chunk_size)
        A_c, S_c = gated_attention_quadratic(
            k[:, :, chunk], x[:, chunk], S, gates.at(chunk), documents_since(documents, chunk)
        )  # (B, h, C, D), (B, h, N, D)
        assert S_c is not None
        results.append(A_c)
        S = S_c
    return torch.cat(results, dim=2), S


def gated_attention_recurrent(
    k: Tensor, x: Tensor, S: Tensor, gates: Gates, documents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token, as the equations above; arguments and results as for `gated_attention_quadratic`."""
    steps = []
    for t in range(k.shape[2]):
        now = slice(t, t + 1)
        k_t, x_t, d_t = k[:, :, now], x[:, now], documents_since(documents, now)  # (B, h, 1, N), (B, 1, D), (B, 1)
        if d_t is not None:  # a new document begins without synapses
            S = S * (d_t == 0)[:, :, None, None]  # (B, h, N, D)
        if gates.log_decay is not None:
            g = gates.log_decay[:, :, t, None, None].exp().to(S.dtype)  # (B, h, 1, 1)
            S = S.mul_(g) if may_overwrite(S) else S * g  # (B, h, N, D)
        A_t = k_t.to(S.dtype) @ S  # (B, h, 1, D)
        U = x_t[:, None].to(S.dtype)  # (B, 1, 1, D)
        if gates.write_strength is not None:
            U = gates.write_strength[:, :, t, None, None].to(S.dtype) * (U - A_t)  # (B, h, 1, D)
        k_column = k_t.mT.to(S.dtype)  # (B, h, N, 1)
        S = S.addcmul_(k_column, U) if may_overwrite(S) else S + k_column * U  # (B, h, N, D)
        steps.append(A_t.to(k.dtype))
    return torch.cat(steps, dim=2), S


def gated_attend(
    R: Tensor, x: Tensor, S: Tensor | None, gates: Gates, chunk_size: int, documents: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`attend` with decay or the delta rule: from R (B, h, T, N); returns A and the new synapses, if any."""
    k = R if gates.write_strength is None else unit_keys(R)  # (B, h, T, N)
    T = k.shape[2]
    if S is not None and T == 1:
        return gated_attention_recurrent(k, x, S, gates, documents)
    if T <= chunk_size:
        return gated_attention_quadratic(k, x, S, gates, documents, chunk_size)
    if S is None:
        B, h, _, N = k.shape
        S = k.new_zeros(B, h, N, x.shape[-1], dtype=synapse_dtype(k.dtype))  # (B, h, N, D)
        return gated_attention_chunked(k, x, S, gates, chunk_size, documents)[0], None
    return gated_attention_chunked(k, x, S, gates, chunk_size, documents)


def per_head(values: list[float], like: Tensor) -> Tensor:
    """Numbers as a tensor (h), made on the device of `like`: a copy from the host would wait for the device."""
    return torch.stack([like.new_full((), value) for value in values])  # (h)


class BDHGates(nn.Module):
    """Computes the retention and the write strength of each head from a token's vector; all layers share it.

    fixed:  log g_h = -ln 2 / half-life of h
    gated:  log g_h = -exp(a_h) sigmoid(w_h . x + b_h), which starts at the half-lives of the configuration
    delta:  beta_h = sigmoid(v_h . x + c_h)

    Parameters: `decay_rate` a (h), `decay_weight` w (h, D) and `decay_bias` b (h) if the decay is gated; `write_weight`
    v (h, D) and `write_bias` c (h) for the delta rule; float32 at least, whatever the dtype of the model. A head whose
    half-life is None never decays.
    """

    def __init__(self, config: BDHConfig):
        super().__init__()
        self.config = config
        self.attention = nn.Identity()  # A (B, h, T, D) passes through it, before its layer norm: a place for hooks
        h, D = config.n_head, config.n_embd
        dtype = synapse_dtype(torch.get_default_dtype())  # bfloat16 would round half-lives by some percent
        if config.decay == "gated":
            self.decay_rate = nn.Parameter(torch.empty(h, dtype=dtype))
            self.decay_weight = nn.Parameter(torch.empty(h, D, dtype=dtype))
            self.decay_bias = nn.Parameter(torch.empty(h, dtype=dtype))
        if config.write == "delta":
            self.write_weight = nn.Parameter(torch.empty(h, D, dtype=dtype))
            self.write_bias = nn.Parameter(torch.empty(h, dtype=dtype))

    def reset_parameters(self) -> None:
        """Initial values: the configured half-lives, whatever the token, and a write strength of one half."""
        for name, parameter in self.named_parameters():
            if name == "decay_rate":  # sigmoid(0) is one half
                rates = [0.0 if rate is None else math.log(2 * rate) for rate in self.rates()]
                init.copy_(parameter, torch.tensor(rates, dtype=parameter.dtype))
            else:
                init.zeros_(parameter)

    @property
    def depends_on_tokens(self) -> bool:
        """Whether the gates differ from token to token."""
        return self.config.decay == "gated" or self.config.write == "delta"

    def rates(self) -> list[float | None]:
        """ln 2 / half-life of each head; None for one that never decays."""
        return [None if life is None else math.log(2) / life for life in self.config.decay_half_lives or []]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Gates:
        """The gates of tokens x (B, T, D); `mask` (B, T, 1) is 0 at padding, which neither decays nor writes."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(synapse_dtype(x.dtype))  # (B, T, D)
            names = ["decay"] * (self.config.decay == "gated") + ["write"] * (self.config.write == "delta")
            shares = dict(zip(names, self.shares(x, names), strict=True))  # (B, T, h) each
            gates = [self.log_decay(x, shares.get("decay")), shares.get("write")]  # (B, T, h)
            if mask is not None:
                gates = [None if gate is None else gate * mask for gate in gates]
            return Gates(*(None if gate is None else gate.transpose(1, 2) for gate in gates))  # (B, h, T)

    def shares(self, x: Tensor, names: list[str]) -> Sequence[Tensor]:
        """sigmoid(w x + b) of the gates of these names, in one product: (B, T, D) -> (B, T, h) each."""
        if not names:
            return []
        weight = torch.cat([self.local(f"{name}_weight", x) for name in names])  # (gates * h, D)
        bias = torch.cat([self.local(f"{name}_bias", x) for name in names])  # (gates * h)
        return torch.sigmoid(F.linear(x, weight, bias)).chunk(len(names), -1)

    def log_decay(self, x: Tensor, share: Tensor | None) -> Tensor | None:
        """The logarithm of the retention, (B, T, h), at most 0; None if the synapses do not decay.

        Args:
            x: (B, T, D).
            share: sigmoid(w x + b), (B, T, h), of a gated decay.
        """
        rates = self.rates()
        if self.config.decay == "fixed":
            rate = per_head([rate or 0.0 for rate in rates], x)  # (h)
            return -rate.expand(*x.shape[:2], -1)  # (B, T, h)
        if share is None:
            return None
        result = -self.local("decay_rate", x).exp() * share  # (B, T, h)
        if None in rates:
            result = result * per_head([float(rate is not None) for rate in rates], x)  # (B, T, h)
        return result

    def local(self, name: str, x: Tensor) -> Tensor:
        """A parameter in x's dtype; where heads are on several devices, the rows of the heads here."""
        parameter = self.get_parameter(name)
        to_local = getattr(parameter, "to_local", None)
        return (parameter if to_local is None else to_local()).to(x.dtype)


# ------------------------------------------------------------------------------------------------- the model


class LayerKernels(Protocol):
    """Interface of a faster implementation of `BDHLayer` for training."""

    def begin(
        self, layer: "BDHLayer", embeds: Tensor, mask: Tensor | None, state: BDHState | None, documents: Tensor | None
    ) -> Any:
        """Prepare a forward pass of the model over embeds (B, T, D), with a mask (B, T) and documents (B, T) if any.

        Returns a context for all layers, or None if the layer's own code is to compute this pass.
        """

    def neurons(self, layer: "BDHLayer", context: Any, x: Tensor, S: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Compute what `BDHLayer.neurons` computes, from x (B, T, D) and S (B, h, N, D) or None."""

    def add_norm(self, context: Any, x: Tensor, y: Tensor) -> Tensor:
        """Compute what `BDHLayer.add_norm` computes."""


class BDHLayer(GradientCheckpointingLayer):
    """The one layer of a BDH model, applied L times."""

    def __init__(self, config: BDHConfig):
        super().__init__()
        D, h, N = config.n_embd, config.n_head, config.neurons_per_head
        self.config = config
        self.encoder = nn.Linear(D, h * N, bias=False)
        # A head decodes its own attention, so encoder_v is h matrices; separate modules keep each a plain nn.Linear.
        self.encoder_v = nn.ModuleList(nn.Linear(D, N, bias=False) for _ in range(h))  # h x (D -> N)
        self.decoder = nn.Linear(h * N, D, bias=False)
        self.gates = BDHGates(config) if config.has_gates else None
        # Tensor parallelism over heads replaces these two by collectives; between them, heads are independent.
        self.copy_to_tensor_parallel: nn.Module = nn.Identity()
        self.reduce_from_tensor_parallel: nn.Module = nn.Identity()
        self.kernels: LayerKernels | None = None  # for training; not saved with the model

    def forward(
        self,
        x: Tensor,
        phases: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        S: Tensor | None,
        documents: Tensor | None = None,
        context: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One layer: x (B, T, D), synapses S (B, h, N, D) or None -> the next x, the synapses after these tokens.

        `mask` (B, T, 1) is 0 at padding, whose values are then neither seen nor written; `documents` (B, T) separates
        documents. With a `context` of `kernels`, these compute the layer, and the arguments in between are not used.
        """
        heads_x = self.copy_to_tensor_parallel(x)  # (B, T, D)
        if context is not None and self.kernels is not None:
            y, S = self.kernels.neurons(self, context, heads_x, S)  # (B, T, D), (B, h, N, D)
            return self.kernels.add_norm(context, x, self.reduce_from_tensor_parallel(y)), S  # (B, T, D)
        assert phases is not None
        y, S = self.neurons(heads_x, phases, mask, S, documents)  # (B, T, D), (B, h, N, D)
        return self.add_norm(x, self.reduce_from_tensor_parallel(y)), S  # (B, T, D)

    def add_norm(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output, from its input and the sum over heads: (B, T, D) twice -> (B, T, D)."""
        return self.norm(x + self.norm(y))  # (B, T, D)

    def neurons(
        self,
        x: Tensor,
        phases: tuple[Tensor, Tensor],
        mask: Tensor | None,
        S: Tensor | None,
        documents: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The decoder output of the neurons for x (B, T, D), and the synapses after; arguments as for `forward`."""
        h = self.config.n_head
        X = F.relu(self.encoder(x)).unflatten(-1, (h, -1))  # (B, T, h, N)  who fires
        R = rotate(X.transpose(1, 2), *phases)  # (B, h, T, N)  query and key
        values = (x if mask is None else x * mask).to(R.dtype)  # (B, T, D)
        if self.gates is None:
            A, S = attend(R, values, S, self.config.chunk_size, documents)  # (B, h, T, D)
        else:
            A, S = gated_attend(R, values, S, self.gates(x, mask), self.config.chunk_size, documents)  # (B, h, T, D)
            A = self.gates.attention(A)  # (B, h, T, D)
        A = self.norm(A)  # (B, h, T, D)
        Z = torch.cat(  # (B, T, n)  X o Y, head by head
            [
                X_k * F.relu(encoder_k(A_k))  # (B, T, N)
                for X_k, A_k, encoder_k in zip(X.unbind(2), A.unbind(1), self.encoder_v, strict=True)
            ],
            dim=-1,
        )
        Z = F.dropout(Z, self.config.dropout, self.training)  # (B, T, n)
        return self.decoder(Z), S  # (B, T, D), (B, h, N, D)

    def norm(self, x: Tensor) -> Tensor:
        """Layer norm over D, without scale or shift."""
        return F.layer_norm(x, x.shape[-1:], eps=self.config.layer_norm_eps)


class BDHPreTrainedModel(PreTrainedModel):
    """Initial weights (every one from N(0, initializer_range^2)), loading and saving, by the library's machinery."""

    config_class = BDHConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BDHLayer"]
    _is_stateful = True  # `generate()` then refuses assisted decoding, which takes back tokens

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in the library; where the code is saved too, the configuration names the class of every auto class."""
        if self._auto_class is not None:
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **AUTO_MAP}
        super().save_pretrained(save_directory, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, BDHGates):
            module.reset_parameters()
        else:
            super()._init_weights(module)


# What the library, its trainer or its users may say to any model, and means nothing other than what BDH does.
HARMLESS: dict[str, tuple[object, ...]] = {
    "output_attentions": (False,),
    "output_router_logits": (False,),
    "is_causal": (True,),
}
# The library's keywords for packed sequences, which say the same as `document_ids`.
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def refuse_unused(kwargs: dict[str, Any], config: BDHConfig) -> None:
    """Raises TypeError for arguments that would change nothing, although their caller expects something of them."""
    unused = [
        name
        for name, value in kwargs.items()
        if value is not None and not any(value is harmless for harmless in HARMLESS.get(name, ()))
    ]
    if kwargs.get("output_attentions") or config.output_attentions:
        raise TypeError(
            "output_attentions is true, but BDH has no attention weights to return; hidden_states hold what each "
            "layer makes"
        )
    if packed := [name for name in unused if name in PACKED]:
        raise TypeError(f"BDH does not take {', '.join(packed)}; give document_ids, (B, T), to keep documents apart")
    if unused:
        raise TypeError(f"BDH does not take {', '.join(unused)}")


def given_state(past_key_values: BDHState | None, cache: BDHState | None) -> BDHState | None:
    """The state to go on from, under either name. Raises ValueError for both, TypeError for something else."""
    if past_key_values is not None and cache is not None:
        raise ValueError("give either past_key_values or cache, which are two names for one thing")
    state = past_key_values if cache is None else cache
    if state is not None and not isinstance(state, BDHState):
        raise TypeError(
            f"the cache is a {type(state).__name__}; BDH goes on from a BDHState, because it has no keys and values to "
            "cache, and none that could be put before them (prefix tuning)"
        )
    return state


def padding_mask(attention_mask: Tensor, B: int, T: int) -> Tensor:
    """1 for tokens and 0 for padding, (B, T) int64, from (B, T) or (B, past + T). Raises ValueError."""
    if attention_mask.dim() != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] < T:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; it must say of each token whether it is one or "
            f"padding, ({B}, {T}) or ({B}, past + {T}), as BDH reads from left to right whatever a mask says"
        )
    return attention_mask[:, -T:].to(torch.int64)  # (B, T)


def checked_positions(position_ids: Tensor, B: int, T: int) -> Tensor:
    """The positions (B|1, T) of T tokens. Raises ValueError unless they are that."""
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, B) or position_ids.shape[1] != T:
        raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}; it must be ({B}, {T}) or (1, {T})")
    return position_ids


def documents_of(position_ids: Tensor) -> Tensor:
    """Numbers of the documents, from 0, that positions count through: (B|1, T) -> (B|1, T)."""
    begins = position_ids[:, 1:] != position_ids[:, :-1] + 1  # (B|1, T - 1)
    return F.pad(begins.cumsum(1), (1, 0))  # (B|1, T)


def next_position(position: Tensor, T: int, mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
    """The position (B,) after T tokens: one further than the last token that is not padding."""
    if position_ids is None:
        return position + (T if mask is None else mask.sum(1))  # (B,)
    if mask is None:
        return (position_ids[:, -1] + 1).expand_as(position)  # (B,)
    after = torch.where(mask.bool(), position_ids + 1, 0).amax(1)  # (B,)
    return torch.where(mask.any(1), after, position)  # (B,)


def selected(trace: list[Tensor], wanted: bool | int | list[int]) -> tuple[Tensor | None, ...] | None:
    """Hidden states as `output_hidden_states` asks for them: all, none, or those of some numbers, None for others."""
    if isinstance(wanted, bool):
        return tuple(trace) if wanted else None
    numbers = {i % len(trace) for i in ([wanted] if isinstance(wanted, int) else wanted)}
    return tuple(x if i in numbers else None for i, x in enumerate(trace))


class BDHModel(BDHPreTrainedModel):
    """BDH without its head: tokens in, vectors of width D out."""

    def __init__(self, config: BDHConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layer = BDHLayer(config)
        if self.layer.gates is not None and self.layer.gates.depends_on_tokens:  # it has parameters
            self._keep_in_fp32_modules_strict = {"gates"}  # loading in another dtype does not change them
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: BDHState | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        document_ids: Tensor | None = None,
        cache: BDHState | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Reads T tokens, from the beginning or from where `past_key_values` stopped.

        Args:
            input_ids: Tokens, (B, T) int64; or give `inputs_embeds` (B, T, D).
            attention_mask: 1 for tokens and 0 for padding, (B, T) or (B, past + T), of which the last T count. Padding
                writes nothing into the state and takes no position; it may stand left or right.
            past_key_values: State to go on from; left advanced by these tokens.
            use_cache: Whether to return the state (made if none came in). Default: no while training, else
                `config.use_cache`.
            output_hidden_states: Whether to return x before the first layer and after each; or the numbers of those to
                return, the others being None. Default: `config.output_hidden_states`.
            document_ids: Which document each token is of, (B, T) int64, never falling along a row. A token sees only
                its own document; document 0 goes on from the state, and the state left is that of the last document.
            cache: Another name for `past_key_values`.
            position_ids: In `kwargs`. Positions of the tokens, (B, T) or (1, T) int64, instead of those that follow
                from the state and the mask. Where they do not go up by one, another document begins, as in the
                library, unless there is a state, a mask, or `document_ids`.
            return_dict: In `kwargs`. False for a tuple. Default: `config.return_dict`.

        Raises:
            ValueError: Arguments contradict each other, or have shapes of something else.
            TypeError: An argument is unknown, or asks for what the model does not have.
        """
        position_ids = kwargs.pop("position_ids", None)
        refuse_unused(kwargs, self.config)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, D)
        B, T, _ = embeds.shape
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        state = given_state(past_key_values, cache)
        mask = None if attention_mask is None else padding_mask(attention_mask, B, T)  # (B, T)
        if position_ids is not None:
            position_ids = checked_positions(position_ids, B, T)  # (B|1, T)
            if state is None and mask is None and document_ids is None:
                document_ids = documents_of(position_ids).expand(B, -1)  # (B, T)
        if state is None and use_cache:
            state = BDHState.zeros(self.config, B, embeds.device, synapse_dtype(embeds.dtype))
        if state is not None and state.batch_size != B:
            raise ValueError(f"the state holds {state.batch_size} sequences, the input {B}")

        kernels = self.layer.kernels if position_ids is None else None
        context = None if kernels is None else kernels.begin(self.layer, embeds, mask, state, document_ids)
        phases = self.phases(T, mask, state, embeds, position_ids) if context is None else None  # 2 x (B|1, 1, T, N)
        x = self.layer.norm(embeds)  # (B, T, D)
        values_mask = None if mask is None else mask.to(x.dtype)[:, :, None]  # (B, T, 1)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        trace = [x]
        for i in range(self.config.n_layer):
            S = None if state is None else state.synapses[i]  # (B, h, N, D)
            x, S = self.layer(x, phases, values_mask, S, document_ids, context)  # (B, T, D)
            if state is not None:
                state.synapses[i] = S
            trace.append(x)
        if state is not None:
            state.position = next_position(state.position, T, mask, position_ids)  # (B,)
            state.columns = state.columns + T  # ()
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=selected(trace, output_hidden_states),
            **{STATE: state if use_cache else None},
        )

    def phases(
        self, T: int, mask: Tensor | None, state: BDHState | None, embeds: Tensor, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rotary phases of the next T tokens, at `position_ids` (B|1, T) if given; padding takes no position."""
        if position_ids is not None:
            positions = position_ids  # (B|1, T)
        elif mask is None:
            positions = torch.arange(T, device=embeds.device)[None]  # (1, T)
        else:
            positions = (mask.cumsum(1) - 1).clamp(min=0)  # (B, T), padding before the first token counts as 0
        if state is not None and position_ids is None:
            positions = positions + state.position[:, None]  # (B, T)
        dtype = embeds.dtype
        if torch.is_autocast_enabled(embeds.device.type):
            dtype = torch.get_autocast_dtype(embeds.device.type)
        return rotary_phases(positions, self.config.neurons_per_head, self.config.rope_theta, dtype)


LOSS_KWARGS = ("num_items_in_batch", "shift_labels", "ignore_index")


class BDHForCausalLM(BDHPreTrainedModel, GenerationMixin):
    """BDH with its language-model head: logits, loss, and `generate()`."""

    def __init__(self, config: BDHConfig):
        super().__init__(config)
        config.check_embeddings()  # once more: the configuration may have been changed since it was made
        self.model = BDHModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: BDHState | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        logits_to_keep: int | Tensor = 0,
        document_ids: Tensor | None = None,
        cache: BDHState | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), or of the last `logits_to_keep` tokens, and the mean cross-entropy in nats if labels come.

        Args:
            labels: Tokens (B, T); the library's convention, so they are shifted here: position t is scored against
                label t + 1, and -100 is not scored. Labels already shifted go in as `shift_labels`, with or without
                `labels`; `num_items_in_batch` divides the sum instead of the number of labels scored.
            The others as for `BDHModel.forward`.
        """
        loss_kwargs = {name: kwargs.pop(name) for name in LOSS_KWARGS if name in kwargs}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            document_ids=document_ids,
            cache=cache,
            return_dict=True,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])  # (B, T, V)
        loss = None
        if labels is not None or loss_kwargs.get("shift_labels") is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{STATE: state_of(outputs)}
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes its own BDHState; there are no keys and values to keep

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: str,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """As in the library; for a prompt read in pieces (`prefill_chunk_size`), the state is there beforehand."""
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        if generation_config.prefill_chunk_size is None:
            return
        if model_kwargs.get("inputs_embeds") is not None:  # which the library hands over whole with each piece
            raise ValueError("prefill_chunk_size is for a prompt of tokens; give input_ids without inputs_embeds")
        if generation_config.use_cache is not False and model_kwargs.get(STATE) is None:
            rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            model_kwargs[STATE] = BDHState.zeros(self.config, rows, self.device, synapse_dtype(self.dtype))

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses the library's continuous batching, which pages keys and values."""
        raise NotImplementedError(
            "continuous batching (generate_batch, cache_implementation='paged') pages keys and values, which BDH does "
            "not have; use generate(), or bdh.LLM and bdh serve, which batch continuously"
        )


def state_of(outputs: BaseModelOutputWithPast | CausalLMOutputWithPast) -> BDHState | None:
    """The state that a `forward` has left, whatever the library calls it."""
    return getattr(outputs, STATE)


__all__ = ["BDHConfig", "BDHForCausalLM", "BDHModel", "BDHPreTrainedModel", "BDHState"]
