"""The runner for NVIDIA GPUs: Triton kernels, and a CUDA graph of the whole step for each size of batch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from bdh.kernels.decode.cuda import (
    add_norm,
    embed_tokens,
    excite_and_attend,
    flush_pending,
    gate,
    gate_and_decode,
    halved,
    interleaved,
    project_logits,
)
from bdh.kernels.decode.prefill import attend_chunks, attend_delta, gate_tokens, rotate_tokens, scan_synapses
from bdh.model import BDHForCausalLM, BDHState
from bdh.model.modeling_bdh import BDHGates

MAX_PENDING = 16  # pending tokens of a slot before they are flushed; the smallest tile of the tensor cores
CHUNK = 256  # tokens of a prompt between two synapses
LONGEST = 8192  # tokens of a prompt read at once; more would only take more memory
MATRIX_BATCH = 8  # rows from which on products with the weights are matrix products
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # sizes for which a graph is recorded


@dataclass(frozen=True)
class DecodeTiles:
    """Tile sizes of the kernels of a decoding step.

    Attributes:
        split: Programs that share a head of a sequence in `excite_and_attend`: enough to keep the GPU busy, few enough
            that their sums are added quickly.
        parts: Programs that share a head in `gate_and_decode`.
        pairs: Rotary pairs that `excite_and_attend` takes at a time.
        rows: Neurons that `gate_and_decode` takes at a time.
        read_warps: Warps of `excite_and_attend`.
        answer_warps: Warps of `gate_and_decode`.
    """

    split: int
    parts: int
    pairs: int
    rows: int
    read_warps: int
    answer_warps: int = 2

    def fitted(self, N: int) -> "DecodeTiles":
        """Limit the tiles to heads of N neurons."""
        pairs, rows = min(self.pairs, block(N // 2)), min(self.rows, block(N))
        split = min(self.split, triton.next_power_of_2(triton.cdiv(N // 2, pairs)))
        parts = min(self.parts, triton.next_power_of_2(triton.cdiv(N, rows)))
        return replace(self, split=split, parts=parts, pairs=pairs, rows=rows)


# What measured best on an H200 for one sequence and for 64: with many, small programs of one warp hide more latency.
FEW = DecodeTiles(split=128, parts=128, pairs=16, rows=32, read_warps=2)
MANY = DecodeTiles(split=32, parts=128, pairs=8, rows=32, read_warps=1)


@dataclass
class DecodeBuffers:
    """Buffers of a decoding step of B rows, and its CUDA graph."""

    staged: Tensor  # (4, B) int64, on the host
    inputs: Tensor  # (4, B) int64
    x: Tensor  # (B, D) float32
    v: Tensor  # (B, D)
    phases: Tensor  # (2, B, N/2) float32
    X: Tensor  # (B, n)
    A: Tensor  # (h, B, D)
    parts: Tensor  # (B, h * max(SPLIT, PARTS), D) float32
    squares: Tensor  # (B, h, SPLIT) float32
    head_sums: Tensor  # (B, h, D) float32
    tickets: Tensor  # (B, h + 1) int32
    logits: Tensor  # (B, V) float32
    graph: torch.cuda.CUDAGraph | None = None
    copied: torch.cuda.Event | None = None  # after the inputs have left the host


class CUDARunner:
    """Runner for NVIDIA GPUs, see `bdh.inference.runner.Runner`.

    Weights and activity have the model's dtype; synapses and sums are float32.

    Args:
        model: Model on the GPU, in the dtype to run in. Its weights are copied into the layout of the kernels.
        n_slots: Number of slots; each takes `state_nbytes`, and 3 % more for pending tokens.
    """

    def __init__(self, model: BDHForCausalLM, n_slots: int):
        config, layer = model.config, model.model.layer
        self.config = config
        self.device = model.device
        self.dtype = model.dtype
        self.n_slots = n_slots
        self.N, self.n, self.D = config.neurons_per_head, config.n_neurons, config.n_embd
        h = config.n_head
        encoder_v = [part.get_parameter("weight").detach() for part in layer.encoder_v]  # h x (N, D)
        self.embed = model.model.embed_tokens.weight.detach()  # (V, D)
        self.lm_head = model.lm_head.weight.detach()  # (V, D)
        self.encoder = halved(layer.encoder.weight.detach(), h).contiguous()  # (n, D)
        self.encoder_v = halved(torch.cat(encoder_v), h).contiguous()  # (n, D)
        self.decoder = halved(layer.decoder.weight.detach().mT, h).contiguous()  # (n, D)
        pair = torch.arange(0, self.N, 2, dtype=torch.float64, device=self.device)  # (N/2)
        self.turns_per_token = config.rope_theta ** (-pair / self.N) / (2 * math.pi)  # (N/2)
        self.gates = layer.gates
        self.decays, self.delta = config.decay != "none", config.write == "delta"
        self.gate_weights: Tensor | None = None  # (2, h, D) float32
        self.gate_constants: Tensor | None = None  # (3, h) float32
        if self.gates is not None:
            self.gate_weights, self.gate_constants = gate_constants(self.gates, self.device)

        shape = (config.n_layer, n_slots)
        self.S = torch.empty(*shape, self.n, self.D, device=self.device)  # (L, slots, n, D) float32
        self.pending_R = torch.empty(*shape, MAX_PENDING, self.n, device=self.device, dtype=self.dtype)
        values = (h, MAX_PENDING, self.D) if self.delta else (MAX_PENDING, self.D)
        self.pending_x = torch.empty(*shape, *values, device=self.device, dtype=self.dtype)
        self.pending_c = torch.empty(*shape, h, MAX_PENDING, device=self.device) if self.decays else None  # float32
        tables = (self.S, self.pending_R, self.pending_x, self.pending_c)
        self.all_slots_nbytes = sum(table.nbytes for table in tables if table is not None)
        self.state_nbytes = self.S.nbytes // n_slots
        self.prefill_alignment, self.prefill_chunk = CHUNK, 4096
        self.position = [0] * n_slots
        self.n_pending = [0] * n_slots
        self.steps: dict[int, DecodeBuffers] = {}
        self.few, self.many = FEW.fitted(self.N), MANY.fitted(self.N)

    # ------------------------------------------------------------------------------------------------- the slots

    @property
    def slots_nbytes(self) -> int:
        return self.all_slots_nbytes

    def release(self) -> None:
        """Does nothing: the recorded graphs know where the slots are."""

    def clear(self, slot: int) -> None:
        self.S[:, slot] = 0
        self.position[slot] = self.n_pending[slot] = 0

    @torch.inference_mode()
    def read_state(self, slot: int) -> BDHState:
        self.flush([slot])
        h = self.config.n_head
        synapses = [interleaved(S[slot], h).reshape(1, h, self.N, self.D).clone() for S in self.S]  # (1, h, N, D)
        position = torch.tensor([self.position[slot]], device=self.device)
        return BDHState(synapses, position, self.position[slot])

    @torch.inference_mode()
    def write_state(self, slot: int, state: BDHState) -> None:
        for S, given in zip(self.S, state.synapses, strict=True):
            S[slot] = halved(given.to(self.device).reshape(self.n, self.D), self.config.n_head)
        self.position[slot] = int(state.position)
        self.n_pending[slot] = 0

    def flush(self, slots: Sequence[int]) -> None:
        """Write the pending tokens of these slots into their synapses."""
        slots = [slot for slot in slots if self.n_pending[slot]]
        if not slots:
            return
        pending = torch.tensor([slots, [self.n_pending[slot] for slot in slots]], device=self.device)  # (2, F)
        rows, by_head = 32, self.gates is not None
        blocks = self.config.n_head * triton.cdiv(self.N, rows) if by_head else triton.cdiv(self.n, rows)
        flush_pending[(blocks, len(slots), self.config.n_layer)](
            pending, self.S, self.pending_R, self.pending_x, self.pending_c, len(slots), self.n_slots, self.n, self.D,
            self.N, BY_HEAD=by_head, DELTA=self.delta, ROWS=rows, W=MAX_PENDING, BLOCK_D=block(self.D), num_warps=8,
        )  # fmt: skip
        for slot in slots:
            self.n_pending[slot] = 0

    # ------------------------------------------------------------------------------------------------- one token

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        full = [slot for slot in slots if self.n_pending[slot] == MAX_PENDING]
        if full:
            self.flush(full)
        rows = len(slots)
        B = next((size for size in BATCHES if size >= rows), triton.cdiv(rows, BATCHES[-1]) * BATCHES[-1])
        step = self.steps.get(B) or self.record(B)
        if step.copied is not None:
            step.copied.synchronize()  # the copy before may still wait behind a long prompt
        staged = step.staged.numpy()  # (4, B)
        staged[0, :rows], staged[1, :rows] = tokens, slots
        staged[1, rows:] = -1
        staged[2, :rows], staged[3, :rows] = [self.position[s] for s in slots], [self.n_pending[s] for s in slots]
        step.inputs.copy_(step.staged, non_blocking=True)
        if step.graph is None or step.copied is None:
            self.launch(step)
        else:
            step.copied.record()
            step.graph.replay()
        for slot in slots:
            self.position[slot] += 1
            self.n_pending[slot] += 1
        return step.logits[:rows].clone()  # (rows, V); the next step overwrites its own

    @torch.inference_mode()
    def record(self, B: int) -> DecodeBuffers:
        """Buffers for B rows, and on a GPU the graph of their step. What runs while recording touches no slot."""
        h, tiles, on_gpu = self.config.n_head, self.tiles(B), self.device.type == "cuda"

        def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, device=self.device, dtype=dtype)

        step = DecodeBuffers(
            staged=torch.zeros(4, B, dtype=torch.int64, pin_memory=on_gpu),
            inputs=numbers(4, B, dtype=torch.int64),
            x=numbers(B, self.D),
            v=numbers(B, self.D, dtype=self.dtype),
            phases=numbers(2, B, self.N // 2),
            X=numbers(B, self.n, dtype=self.dtype),
            A=numbers(h, B, self.D, dtype=self.dtype),
            parts=numbers(B, h * max(tiles.split, tiles.parts), self.D),
            squares=numbers(B, h, tiles.split),
            head_sums=numbers(B, h, self.D),
            tickets=numbers(B, h + 1, dtype=torch.int32),
            logits=numbers(B, self.config.vocab_size),
        )
        step.inputs[1] = -1
        if on_gpu:
            self.launch(step)  # compiles the kernels
            torch.cuda.synchronize()
            step.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(step.graph, capture_error_mode="thread_local"):  # other threads may use the GPU
                self.launch(step)
            step.copied = torch.cuda.Event()
        self.steps[B] = step
        return step

    def tiles(self, B: int) -> DecodeTiles:
        return self.few if B < MATRIX_BATCH else self.many

    def launch(self, step: DecodeBuffers) -> None:
        """All kernels of a step."""
        config, B = self.config, step.inputs.shape[1]
        tiles = self.tiles(B)
        D, half, eps, wide = self.D, self.N // 2, config.layer_norm_eps, block(self.D)
        cos, sin = step.phases
        fused, gated = B < MATRIX_BATCH, self.gates is not None
        embed_tokens[(B, triton.cdiv(half, 256))](
            step.inputs, self.embed, self.turns_per_token, step.x, step.v, cos, sin, B, D, half, eps,
            BLOCK_D=wide, BLOCK=256,
        )  # fmt: skip
        for i in range(config.n_layer):
            if not fused:
                torch.mm(step.v, self.encoder.T, out=step.X)
            excite_and_attend[(config.n_head * tiles.split, B)](
                step.inputs, step.v, cos, sin, self.encoder, self.S[i], self.pending_R[i], self.pending_x[i],
                None if self.pending_c is None else self.pending_c[i], step.x if gated else None,
                self.gate_weights, self.gate_constants, step.squares if self.delta else None,
                step.X, step.parts, step.tickets, step.A, B, self.n, D, half, eps, FIRE=fused, DECAY=config.decay,
                DELTA=self.delta, SPLIT=tiles.split, TILES=triton.cdiv(half, tiles.split * tiles.pairs),
                PAIRS=tiles.pairs, W=MAX_PENDING, BLOCK_P=8, BLOCK_D=wide, num_warps=tiles.read_warps,
            )  # fmt: skip
            (self.answer_rows if fused else self.answer_batch)(step)
        project_logits[(triton.cdiv(config.vocab_size, 32), B)](
            step.v, self.lm_head, step.logits, config.vocab_size, D, ROWS=32, BLOCK_D=wide
        )

    def answer_rows(self, step: DecodeBuffers) -> None:
        """Compute the second half of a layer for few sequences, without loading rows of silent neurons."""
        B, h = step.inputs.shape[1], self.config.n_head
        tiles = self.tiles(B)
        gate_and_decode[(h * tiles.parts, B)](
            step.inputs, step.X, step.A, self.encoder_v, self.decoder, step.x, step.v, step.parts, step.head_sums,
            step.tickets, B, self.n, self.D, self.N, self.config.layer_norm_eps, h=h, PARTS=tiles.parts,
            TILES=triton.cdiv(self.N, tiles.parts * tiles.rows), ROWS=tiles.rows,
            BLOCK_P=8, BLOCK_D=block(self.D), num_warps=tiles.answer_warps,
        )  # fmt: skip

    def answer_batch(self, step: DecodeBuffers) -> None:
        """Compute the second half of a layer for many sequences, among which few neurons are silent."""
        B = step.inputs.shape[1]
        Y = torch.bmm(step.A, self.encoder_v.view(self.config.n_head, self.N, self.D).mT)  # (h, B, N)
        Z = torch.empty_like(step.X)  # (B, n)
        gate[(triton.cdiv(self.n, 1024), B)](step.X, Y, Z, B, self.n, self.N, BLOCK=1024)
        out = Z @ self.decoder  # (B, D)
        add_norm[(B,)](out, step.x, step.v, self.D, self.config.layer_norm_eps, BLOCK_D=block(self.D))

    # ----------------------------------------------------------------------------------------------- many tokens

    @torch.inference_mode()
    def prefill(self, slot: int, tokens: Sequence[int]) -> Tensor:
        if len(tokens) == 1:
            return self.decode([slot], tokens)[0]
        for v in self.read_parts(slot, tokens):  # (T, D)
            last = v[-1]  # (D)
        return (last @ self.lm_head.T).float()  # (V,)

    @torch.inference_mode()
    def prefill_logits(self, slot: int, tokens: Sequence[int]) -> Iterator[Tensor]:
        if len(tokens) == 1:
            yield self.decode([slot], tokens)
            return
        for v in self.read_parts(slot, tokens):  # (T, D)
            for rows in v.split(CHUNK):
                yield (rows @ self.lm_head.T).float()  # (rows, V): of all tokens at once they could take gigabytes

    def read_parts(self, slot: int, tokens: Sequence[int]) -> Iterator[Tensor]:
        """Read tokens into a slot; yield x after the last layer, (T, D), in parts."""
        self.flush([slot])
        for start in range(0, len(tokens), LONGEST):
            part = tokens[start : start + LONGEST]
            v = self.read(slot, torch.from_numpy(np.array(part, dtype=np.int64)).to(self.device))  # (T, D)
            self.position[slot] += len(part)
            yield v

    def read(self, slot: int, tokens: Tensor) -> Tensor:
        """Read tokens (T,) into a slot without pending tokens; return x after the last layer, (T, D)."""
        config, D, T = self.config, self.D, len(tokens)
        h, half, eps = config.n_head, self.N // 2, config.layer_norm_eps
        inputs = torch.zeros(4, T, dtype=torch.int64, device=self.device)
        inputs[0] = tokens
        inputs[2] = torch.arange(self.position[slot], self.position[slot] + T, device=self.device)
        x = torch.empty(T, D, device=self.device)
        cos, sin = torch.empty(2, T, half, device=self.device)
        C = min(CHUNK, max(16, block(T)))
        chunks = triton.cdiv(T, C)
        step, stages = (min(block(D), 256), 4) if self.dtype == torch.bfloat16 else (min(block(D), 64), 2)
        width = triton.cdiv(D, step) * step
        padded = chunks * C
        X, Z = (torch.empty(T, self.n, device=self.device, dtype=self.dtype) for _ in range(2))
        R = torch.empty(h, padded, self.N, device=self.device, dtype=self.dtype)
        v = torch.empty(padded, D, device=self.device, dtype=self.dtype)
        R[:, T:], v[T:] = 0, 0
        before = None if self.delta else torch.empty(h, chunks, self.N, D, device=self.device, dtype=self.dtype)
        embed_tokens[(T, triton.cdiv(half, 256))](
            inputs, self.embed, self.turns_per_token, x, v, cos, sin, T, D, half, eps, BLOCK_D=block(D), BLOCK=256
        )
        for i in range(config.n_layer):
            torch.mm(v[:T], self.encoder.T, out=X)
            rotate_tokens[(T, triton.cdiv(half, 1024))](
                X, cos, sin, R, self.n, half, padded, h, PAIRS=min(1024, block(half))
            )
            u, beta = self.gates_of_chunks(x, chunks, C)  # (h, chunks, C) float32
            if before is None:
                assert beta is not None
                token_vectors = F.pad(x, (0, 0, 0, padded - T))  # (padded, D)
                A = attend_delta(R, token_vectors, self.S[i, slot].view(h, self.N, D), u, beta)  # (h, padded, D)
            else:
                values, remains = v, None
                if u is not None:
                    remains = u[..., -1].exp()  # (h, chunks)
                    values = ((u[..., -1:] - u).exp().view(h, padded, 1) * v).to(self.dtype)  # (h, padded, D)
                scan_synapses[(h * triton.cdiv(self.N, 128), triton.cdiv(D, 256))](
                    R, values, remains, self.S[i, slot], before, padded, self.N, D, C,
                    ROWS=128, COLUMNS=min(256, block(D)), TOKENS=min(64, C), num_warps=8, num_stages=stages,
                )  # fmt: skip
                A = attend_chunks(R, v, before, u)  # (h, padded, D)
            A = F.layer_norm(A[:, :T], (D,), eps=eps).to(self.dtype)  # (h, T, D)
            gate_tokens[(triton.cdiv(T, 128), h * triton.cdiv(self.N, 64 * 16))](
                A, self.encoder_v, X, Z, T, self.n, D, self.N,
                TOKENS=128, ROWS=64, TILES=16, WIDTH=width, BLOCK_D=step, STAGES=stages - 1, num_warps=8,
            )  # fmt: skip
            out = (Z @ self.decoder).float()  # (T, D)
            x = F.layer_norm(x + F.layer_norm(out, (D,), eps=eps), (D,), eps=eps)
            v[:T] = x
        return v[:T]

    def gates_of_chunks(self, x: Tensor, chunks: int, C: int) -> tuple[Tensor | None, Tensor | None]:
        """Compute the gates of tokens x (T, D), padded to whole chunks with tokens that neither decay nor write.

        Returns:
            The cumulative log-decay since the beginning of each chunk and the write strength, both (h, chunks, C)
            float32; None where the model has none.
        """
        if self.gates is None:
            return None, None
        log_decay, beta = (
            None if gate is None else F.pad(gate[0], (0, chunks * C - len(x))).unflatten(1, (chunks, C))
            for gate in self.gates(x[None])
        )  # (h, chunks, C)
        return None if log_decay is None else log_decay.cumsum(-1), beta  # (h, chunks, C)


def gate_constants(gates: BDHGates, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the parameters of the gates for `excite_and_attend`, 0 where the model has none.

    Returns:
        The weights of the decay and of the write strength, (2, h, D), and the rate of the decay and the two biases,
        (3, h), all float32. With a gated decay the rate is that of a token whose gate is 1.
    """
    h, D = gates.config.n_head, gates.config.n_embd
    parameters = {name: parameter.detach().float() for name, parameter in gates.named_parameters()}
    rates = torch.tensor([rate or 0.0 for rate in gates.rates()] or [0.0] * h, device=device)  # (h)
    if "decay_rate" in parameters:
        rates = parameters["decay_rate"].exp() * (rates > 0)  # (h)
    weights = [parameters.get(name, rates.new_zeros(h, D)) for name in ("decay_weight", "write_weight")]  # 2 x (h, D)
    biases = [parameters.get(name, rates.new_zeros(h)) for name in ("decay_bias", "write_bias")]  # 2 x (h)
    return torch.stack(weights), torch.stack([rates, *biases])


def block(size: int) -> int:
    """Return the smallest power of two that is at least `size` and 16, for the block of a kernel."""
    return max(16, triton.next_power_of_2(size))
