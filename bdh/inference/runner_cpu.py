"""The runner for CPUs: one token a sequence by `bdh.kernels.decode`, prompts through the model's own forward."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bdh.errors import BDHError
from bdh.inference.runner import PREFILL_ALIGNMENT, pieces
from bdh.kernels.decode.cpu_step import (
    Decays,
    DecayStep,
    SlotPhases,
    SlotRun,
    TokenGates,
    flush,
    flush_gated,
    lazy_zeros,
    read_gated_pending,
    read_pending,
    rotate_pairs,
    split_runs,
    sum_rows,
)
from bdh.kernels.decode.cpu_weights import INT4_GROUP, make_matrices
from bdh.model import BDHConfig, BDHForCausalLM, BDHState
from bdh.model.modeling_bdh import KEY_EPS

MAX_PENDING = 16  # a slot's synapses are written at every position divisible by this
SHORT = 4  # tokens of a prompt that are sooner decoded one by one than sent through the model
LARGE = 1 << 21  # numbers in the decoder from which up to `FEW_ROWS` sequences sum the rows they need of it
FEW_ROWS = 4  # at the activity of a trained model; from about 8 all of the decoder is sooner read


@dataclass(frozen=True)
class DecodeStep:
    """Values of a decoding step that all layers share.

    Attributes:
        phases: Rotary phases of the rows' positions, (B, 1, N/2) complex64.
        runs: The rows by their slots.
        starts: The first row of each sequence's synapses in the table (slots * n, D) of a layer; B numbers.
        pending_rows: Rows of the pending R and x in a layer's tables (slots * h * W, N) and (slots * W, D); (B * h) and
            (B), int64. U, of a model with gates, has the same rows as R.
        decays: How the synapses and the pending tokens decay; None if they do not.
    """

    phases: Tensor
    runs: list[SlotRun]
    starts: list[int]
    pending_rows: tuple[Tensor, Tensor]
    decays: DecayStep | None


class CPURunner:
    """Runner for CPUs, see `bdh.inference.runner.Runner`. The rest of a batch changes logits by rounding at most.

    Args:
        model: Model on the CPU, converted to `dtype` and evaluation mode. Its weights are copied for the kernels.
        n_slots: Number of slots; each takes `state_nbytes` once used, and 16 / `n_embd` more for pending tokens.
        dtype: float32 or bfloat16, of weights and activity. Synapses and values read from them are always float32.
        quantization: None, "int8" or "int4" weights of `encoder` and `encoder_v` for decoding; longer prompts are read
            with the original weights.

    Raises:
        BDHError: The model's sizes do not allow this quantization.
    """

    def __init__(
        self,
        model: BDHForCausalLM,
        n_slots: int,
        dtype: torch.dtype = torch.float32,
        quantization: str | None = None,
    ):
        check_sizes(model.config, quantization)
        self.config = config = model.config
        self.device = torch.device("cpu")
        self.n_slots = n_slots
        self.prefill_alignment = self.prefill_chunk = PREFILL_ALIGNMENT
        self.state_nbytes = 4 * config.n_layer * config.n_neurons * config.n_embd
        # These are read at every layer of every token, and a config answers slowly.
        self.h, self.N, self.D = h, N, D = config.n_head, config.neurons_per_head, config.n_embd
        self.eps = config.layer_norm_eps
        layer = model.model.layer
        self.encoder = make_matrices([layer.encoder.weight], dtype, quantization, relu=True)
        self.encoder_v = make_matrices(list(layer.encoder_v.parameters()), dtype, quantization, relu=True)
        self.decoder = make_matrices([layer.decoder.weight], dtype)
        self.lm_head = make_matrices([model.lm_head.weight], dtype)
        gates, layer.gates = layer.gates, None
        self.model = model.to(dtype).eval()  # after the matrices, which are quantised from the weights as they came
        layer.gates = None if gates is None else gates.float()  # at any dtype: bfloat16 would round the half-lives
        self.gates = None if gates is None else TokenGates(gates)
        self.embed = model.model.embed_tokens.weight.detach()  # (V, D)
        self.decoder_rows = layer.decoder.weight.detach().T.contiguous()  # (n, D)
        self.allocate()
        self.decays = None if config.decay == "none" else Decays(config.n_layer, n_slots, h, MAX_PENDING)
        self.phases = SlotPhases(n_slots, N, config.rope_theta, MAX_PENDING)
        self.few_rows = FEW_ROWS if h * N * D >= LARGE else 0
        self.position = [0] * n_slots  # tokens read
        self.flushed = [0] * n_slots  # how many of these are in the synapses; the others are pending

    # -------------------------------------------------------------------------------------------- memory of the slots

    def allocate(self) -> None:
        """Allocate the tables of all slots; their memory is committed when first written."""
        n_slots, h, N, D = self.n_slots, self.h, self.N, self.D
        layers = range(self.config.n_layer)
        with torch.inference_mode():  # only so does the model write them in place
            self.synapses = [lazy_zeros(n_slots, h, N, D) for _ in layers]
        self.pending_R = [lazy_zeros(n_slots, h, MAX_PENDING, N) for _ in layers]
        if self.gates is None:
            self.pending_x = pending = [lazy_zeros(n_slots, MAX_PENDING, D) for _ in layers]
        else:
            self.pending_U = pending = [lazy_zeros(n_slots, h, MAX_PENDING, D) for _ in layers]
        self.slot_nbytes = sum(table.nbytes for table in (*self.synapses, *self.pending_R, *pending)) // n_slots
        self.clean = [True] * n_slots  # whether a slot's synapses are zero
        self.used = [False] * n_slots  # whether a slot has taken memory

    @property
    def slots_nbytes(self) -> int:
        return sum(self.used) * self.slot_nbytes

    def release(self) -> None:
        if any(self.used):
            self.allocate()

    # -------------------------------------------------------------------------------------------- reading tokens

    @torch.inference_mode()
    def prefill(self, slot: int, tokens: Sequence[int]) -> Tensor:
        for piece in pieces(tokens, self.position[slot]):
            logits = self.read_short(slot, piece) if len(piece) <= SHORT else self.read_long(slot, piece, 1)  # (T, V)
        return logits[-1]

    @torch.inference_mode()
    def prefill_logits(self, slot: int, tokens: Sequence[int]) -> Iterator[Tensor]:
        for piece in pieces(tokens, self.position[slot]):
            yield self.read_short(slot, piece) if len(piece) <= SHORT else self.read_long(slot, piece, len(piece))

    def read_short(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """Read tokens one by one; return the logits (T, V) after each."""
        return torch.cat([self.decode([slot], [token]) for token in tokens])

    def read_long(self, slot: int, tokens: Sequence[int], count: int) -> Tensor:
        """Read tokens with the model's forward pass; return the logits (count, V) after the last ones."""
        self.flush(slot)
        self.clean[slot] = False  # also if this fails halfway
        synapses = [S[slot : slot + 1] for S in self.synapses]  # L x (1, h, N, D), which the model writes in place
        state = BDHState(synapses, torch.tensor([self.position[slot]]), self.position[slot])
        ids = torch.tensor([tokens])  # (1, T)
        logits = self.model(ids, past_key_values=state, use_cache=True, logits_to_keep=count).logits  # (1, count, V)
        self.position[slot] = self.flushed[slot] = state.length
        return logits[0].float()  # (count, V)

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        step = self.begin(slots)
        x = self.norm(self.embed[torch.tensor(tokens)].float())  # (B, D)
        for i in range(len(self.synapses)):
            x = self.layer(x, i, step)  # (B, D)
        if self.decays is not None and step.decays is not None:
            self.decays.end(step.decays)
        for slot in slots:
            self.position[slot] += 1
            if self.position[slot] % MAX_PENDING == 0:
                self.flush(slot)
        return self.lm_head(x[:, None]).float()  # (B, V)

    def begin(self, slots: Sequence[int]) -> DecodeStep:
        """Prepare a step of one token in each of these slots."""
        counts = [self.position[slot] - self.flushed[slot] for slot in slots]
        first = [slot * MAX_PENDING + count for slot, count in zip(slots, counts, strict=True)]
        heads = [
            (slot * self.h + k) * MAX_PENDING + count
            for slot, count in zip(slots, counts, strict=True)
            for k in range(self.h)
        ]
        return DecodeStep(
            phases=self.phases.at(slots, [self.position[slot] for slot in slots]),
            runs=split_runs(slots, counts),
            starts=[slot * self.h * self.N for slot in slots],
            pending_rows=(torch.tensor(heads), torch.tensor(first)),
            decays=None if self.decays is None else self.decays.begin(slots, counts),
        )

    def layer(self, x: Tensor, i: int, step: DecodeStep) -> Tensor:
        """Compute layer i: x (B, D) float32 -> the next x. The tokens become pending."""
        B, h, N, D = x.shape[0], self.h, self.N, self.D
        X = self.encoder(x[:, None])  # (B, n)
        R = rotate_pairs(X.float().view(B, h, N), step.phases)  # (B, h, N) float32
        A = sum_rows(R, self.synapses[i].view(-1, D), step.starts)  # (B, h, D) float32
        if self.gates is None:
            read_pending(R, A, self.pending_R[i], self.pending_x[i], step.runs)
            self.pending_x[i].view(-1, D).index_copy_(0, step.pending_rows[1], x)
        else:
            self.attend_gated(R, x, A, i, step)
        self.pending_R[i].view(-1, N).index_copy_(0, step.pending_rows[0], R.view(-1, N))
        Z = self.encoder_v(self.norm(A)).mul_(X)  # (B, n)
        if B <= self.few_rows:
            out = sum_rows(Z.view(B, h, N), self.decoder_rows, [0] * B).sum(1)  # (B, D)
        else:
            out = self.decoder(Z[:, None])  # (B, D)
        return self.norm(x + self.norm(out.float()))  # (B, D)

    def attend_gated(self, R: Tensor, x: Tensor, A: Tensor, i: int, step: DecodeStep) -> None:
        """Turn A = R S, (B, h, D), into attention with decay and the delta rule, in place; U becomes pending."""
        assert self.gates is not None
        log_decay, beta = self.gates(x)  # (B, h)
        since = None
        if step.decays is not None and log_decay is not None:
            since = step.decays.since(i, log_decay)  # (B, h, 1 + longest)
        read_gated_pending(R, A, since, self.pending_R[i], self.pending_U[i], step.runs)
        if beta is None:
            U = x[:, None].expand_as(A).reshape(-1, self.D)  # (B * h, D)
        else:
            scale = 1 / (torch.linalg.vector_norm(R, dim=-1).numpy() + np.float32(KEY_EPS))  # (B, h)
            A.mul_(torch.from_numpy(scale)[..., None])  # (B, h, D)
            U = (x[:, None] - A).mul_(torch.from_numpy(scale * beta)[..., None]).view(-1, self.D)  # (B * h, D)
        self.pending_U[i].view(-1, self.D).index_copy_(0, step.pending_rows[0], U)

    def norm(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, (self.D,), eps=self.eps)

    # -------------------------------------------------------------------------------------------- states

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        if not self.clean[slot]:
            for S in self.synapses:
                S[slot].zero_()
        self.clean[slot] = self.used[slot] = True
        self.position[slot] = self.flushed[slot] = 0

    def flush(self, slot: int) -> None:
        """Write the pending tokens of a slot into its synapses."""
        self.clean[slot] = self.clean[slot] and self.position[slot] == self.flushed[slot]
        self.flush_into([S[slot] for S in self.synapses], slot)
        self.flushed[slot] = self.position[slot]

    def flush_into(self, synapses: Sequence[Tensor], slot: int) -> None:
        """Write the pending tokens of a slot into synapses, L x (h, N, D): its own or a copy."""
        count = self.position[slot] - self.flushed[slot]
        if count and self.gates is not None:
            since = None if self.decays is None else self.decays.since(slot, count)  # (L, h, 1 + count)
            for i, S in enumerate(synapses):
                R, U = self.pending_R[i][slot, :, :count], self.pending_U[i][slot, :, :count]  # (h, count, N or D)
                flush_gated(S, R, U, None if since is None else since[i])
        elif count:
            for S, R, x in zip(synapses, self.pending_R, self.pending_x, strict=True):
                flush(S, R[slot, :, :count], x[slot, :count])

    @torch.inference_mode()
    def read_state(self, slot: int) -> BDHState:
        synapses = [S[slot].clone() for S in self.synapses]  # L x (h, N, D)
        self.flush_into(synapses, slot)
        return BDHState([S[None] for S in synapses], torch.tensor([self.position[slot]]), self.position[slot])

    @torch.inference_mode()
    def write_state(self, slot: int, state: BDHState) -> None:
        self.clean[slot], self.used[slot] = False, True
        for mine, S in zip(self.synapses, state.synapses, strict=True):
            mine[slot].copy_(S[0])
        self.position[slot] = self.flushed[slot] = int(state.position[0])


def check_sizes(config: BDHConfig, quantization: str | None) -> None:
    """Raise BDHError if the kernels of a quantization do not support the model's sizes."""
    D, N = config.n_embd, config.neurons_per_head
    if quantization == "int8" and D % 16:
        raise BDHError(f"int8 needs an n_embd divisible by 16, and this model's is {D}; leave quantization out")
    if quantization == "int4" and (D % INT4_GROUP or N % 16):
        raise BDHError(
            f"int4 needs an n_embd divisible by {INT4_GROUP} and neurons a head divisible by 16, and this model has "
            f"{D} and {N}; take int8 or leave quantization out"
        )
