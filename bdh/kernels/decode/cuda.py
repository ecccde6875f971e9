"""Triton kernels that decode one token of each sequence on a GPU: two for each layer, and one that flushes.

Shapes: B sequences in slots of a pool, D `n_embd`, h heads, N neurons of a head, n = h * N, V `vocab_size`.

Layout: weights and the synapses of a slot are tables (n, D) with a row for each neuron. Rows of inactive neurons are
not loaded. Within a head the even neurons precede the odd ones (`halved`), so that a rotary pair is rows i and i + N/2.

Synapses are written in blocks. The pair (R, x) of a token becomes pending, up to W pairs in each slot; attention reads
S and the pending pairs,

    A = R S + sum over pending s of (R . R_s) x_s,

and after W tokens `flush_pending` adds the pairs to S. So S, the largest tensor by far, is read for each token but
written for every W-th only. The sums are the same, in another order.

With decay and the delta rule (`bdh.model.modeling_bdh`), c_s is the sum of a head's log-decay from the last flush up to
and including token s, c the newest c_s (0 if none is pending), a = 1 / (|R| + eps) for "delta" and 1 for "add". Then

    A_t = exp(log_decay_t) a_t [exp(c) R_t S + sum over pending s of exp(c - c_s) (R_t . R_s) a_s U_s],

where U = x for "add" and beta (x - A) for "delta". The pending tokens have c_s beside R_s, and a_s U_s in place of x_s,
for "delta" one for each head. The last program of a head computes the gates and stores both.

A step is `embed_tokens`, then `excite_and_attend` and `gate_and_decode` for each layer, then `project_logits`. Where
programs share a sum over neurons, the last one adds their partial sums, in a fixed order. For larger batches products
with the weights are matrix products: `excite_and_attend` is given X, and `gate` and `add_norm` replace
`gate_and_decode`.
"""

import triton
import triton.language as tl
from torch import Tensor

from bdh.model.modeling_bdh import KEY_EPS

LENGTH_EPS = tl.constexpr(KEY_EPS)


def halved(rows: Tensor, n_head: int) -> Tensor:
    """Rows of neurons (..., n, D) with each head's even neurons first, then its odd ones."""
    return rows.unflatten(-2, (n_head, -1, 2)).transpose(-2, -3).flatten(-4, -2)


def interleaved(rows: Tensor, n_head: int) -> Tensor:
    """Undoes `halved`."""
    return rows.unflatten(-2, (n_head, 2, -1)).transpose(-2, -3).flatten(-4, -2)


@triton.jit
def layer_norm(v, inside, D, eps):
    """Layer norm without scale or shift of the D numbers `inside` a row of BLOCK_D."""
    mean = tl.sum(v, 0) / D
    centred = tl.where(inside, v - mean, 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)


@triton.jit
def sum_of_parts(parts, d, D, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the sum of P rows of D numbers, in a fixed order. (P, D) -> (BLOCK_D)."""
    p = tl.arange(0, BLOCK_P)
    sums = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in tl.static_range(0, P, BLOCK_P):
        inside = (start + p < P)[:, None] & (d < D)[None, :]
        sums += tl.load(parts + (start + p)[:, None] * D + d[None, :], mask=inside, other=0.0)
    return tl.sum(sums, 0)


@triton.jit
def is_last_program(ticket, programs: tl.constexpr):
    """Return whether this program is the last of several to arrive; it then sees what the others stored before."""
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(ticket, 0)  # for the next launch
    return last


@triton.jit
def gate_value(token, weights, bias):
    """sigmoid(w . x + b), with a token's vector x and the weights w, both (BLOCK_D), and the bias b."""
    return 1.0 / (1.0 + tl.exp(-(tl.sum(token * weights, 0) + bias)))


@triton.jit
def embed_tokens(
    inputs,  # (4, B) int64: token, slot (-1: an empty row), position, pending tokens of each row
    embed,  # (V, D)
    turns_per_token,  # (N/2) float64
    x,  # (B, D) float32, out
    v,  # (B, D), out: the same in the weights' dtype
    cos,  # (B, N/2) float32, out
    sin,  # (B, N/2) float32, out
    B,
    D,
    HALF,
    eps,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x = LN(embed[token]), and the rotary phases of each row's position, worked out in float64 turns modulo 1."""
    b, j = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    if j == 0:
        token = tl.load(inputs + b)
        e = layer_norm(tl.load(embed + token * D + d, mask=d < D, other=0.0).to(tl.float32), d < D, D, eps)  # (D)
        tl.store(x + b * D + d, e, mask=d < D)
        tl.store(v + b * D + d, e, mask=d < D)
    i = j * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(inputs + 2 * B + b).to(tl.float64)
    turns = position * tl.load(turns_per_token + i, mask=i < HALF, other=0.0)  # (BLOCK) float64
    angle = ((turns - tl.floor(turns)) * 6.283185307179586).to(tl.float32)  # (BLOCK)
    tl.store(cos + b * HALF + i, tl.cos(angle), mask=i < HALF)
    tl.store(sin + b * HALF + i, tl.sin(angle), mask=i < HALF)


@triton.jit
def excite_and_attend(
    inputs,  # (4, B) int64, as in `begin`
    v,  # (B, D)
    cos,  # (B, N/2) float32
    sin,  # (B, N/2) float32
    encoder,  # (n, D)
    S,  # (slots, n, D) float32: this layer's synapses
    pending_R,  # (slots, W, n)
    pending_x,  # (slots, W, D); (slots, h, W, D) with DELTA: a_s U_s
    pending_c,  # (slots, h, W) float32: cumulative log-decay; None if the synapses do not decay
    x,  # (B, D) float32; None without gates, as are the next three
    gate_weights,  # (2, h, D) float32: w of the decay, v of the write strength
    gate_constants,  # (3, h) float32: the rate of the decay, and the biases of the decay and of the write strength
    squares,  # (B, h, SPLIT) float32: parts of |R|^2
    X,  # (B, n): out with FIRE, else in, before relu
    parts,  # (B, h, SPLIT, D) float32: to be summed
    tickets,  # (B, h + 1) int32, all 0
    A,  # (h, B, D), out: normalised
    B,
    n,
    D,
    HALF,
    eps,
    FIRE: tl.constexpr,
    DECAY: tl.constexpr,  # "none", "fixed" or "gated"
    DELTA: tl.constexpr,
    SPLIT: tl.constexpr,
    TILES: tl.constexpr,
    PAIRS: tl.constexpr,
    W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """X = relu(E x), R = rope(X), A = LN(R S + sum over pending s of (R . R_s) x_s); (R, x) becomes pending.

    With decay or DELTA see the docstring of this module. A program takes 1/SPLIT
    of one head's pairs for one sequence, PAIRS at a time.
    """
    program, b = tl.program_id(0), tl.program_id(1)
    slot = tl.load(inputs + B + b)
    if slot >= 0:
        k, part, heads = program // SPLIT, program % SPLIT, tl.num_programs(0) // SPLIT
        count = tl.load(inputs + 3 * B + b)
        d = tl.arange(0, BLOCK_D)
        w = tl.arange(0, W)
        in_row = d[None, :] < D
        value = tl.load(v + b * D + d, mask=d < D, other=0.0)  # (D)
        value32 = value.to(tl.float32)
        sums = tl.zeros((PAIRS, BLOCK_D), tl.float32)  # of S's rows; added up at the end, once
        scores = tl.zeros((W, PAIRS), tl.float32)  # of R . R_s, likewise
        if DECAY != "none":
            list_c = pending_c + (slot * heads + k) * W
            c_s = tl.load(list_c + w, mask=w < count, other=0.0)  # (W)
            c_newest = tl.load(list_c + count - 1, mask=count > 0, other=0.0)
        if DELTA:
            square = tl.zeros((PAIRS,), tl.float32)  # of |R|^2, likewise
        for tile in range(TILES):
            i = (part * TILES + tile) * PAIRS + tl.arange(0, PAIRS)  # pairs of the head
            exists = i < HALF
            even = (k * 2 * HALF + i).to(tl.int64)  # rows
            odd = even + HALF
            if FIRE:
                E_even = tl.load(encoder + even[:, None] * D + d[None, :], mask=exists[:, None] & in_row, other=0.0)
                E_odd = tl.load(encoder + odd[:, None] * D + d[None, :], mask=exists[:, None] & in_row, other=0.0)
                X_even = tl.sum(E_even.to(tl.float32) * value32[None, :], 1)  # (PAIRS)
                X_odd = tl.sum(E_odd.to(tl.float32) * value32[None, :], 1)  # (PAIRS)
                tl.store(X + b * n + even, X_even, mask=exists)
                tl.store(X + b * n + odd, X_odd, mask=exists)
            else:
                X_even = tl.load(X + b * n + even, mask=exists, other=0.0).to(tl.float32)  # (PAIRS)
                X_odd = tl.load(X + b * n + odd, mask=exists, other=0.0).to(tl.float32)  # (PAIRS)
            X_even = tl.maximum(X_even, 0.0)
            X_odd = tl.maximum(X_odd, 0.0)
            c = tl.load(cos + b * HALF + i, mask=exists, other=0.0)  # (PAIRS)
            s = tl.load(sin + b * HALF + i, mask=exists, other=0.0)  # (PAIRS)
            R_even = (X_even * c - X_odd * s).to(pending_R.dtype.element_ty)  # (PAIRS)
            R_odd = (X_odd * c + X_even * s).to(pending_R.dtype.element_ty)  # (PAIRS)
            tl.store(pending_R + (slot * W + count) * n + even, R_even, mask=exists)
            tl.store(pending_R + (slot * W + count) * n + odd, R_odd, mask=exists)
            R_even = R_even.to(tl.float32)
            R_odd = R_odd.to(tl.float32)
            row = S + slot * n * D + d[None, :]
            S_even = tl.load(row + even[:, None] * D, mask=(R_even != 0)[:, None] & in_row, other=0.0)  # (PAIRS, D)
            S_odd = tl.load(row + odd[:, None] * D, mask=(R_odd != 0)[:, None] & in_row, other=0.0)  # (PAIRS, D)
            is_pending = (w < count)[:, None] & exists[None, :]
            list_R = pending_R + (slot * W + w)[:, None] * n
            W_even = tl.load(list_R + even[None, :], mask=is_pending, other=0.0).to(tl.float32)  # (W, PAIRS)
            W_odd = tl.load(list_R + odd[None, :], mask=is_pending, other=0.0).to(tl.float32)  # (W, PAIRS)
            scores += W_even * R_even[None, :] + W_odd * R_odd[None, :]  # (W, PAIRS)
            sums += R_even[:, None] * S_even + R_odd[:, None] * S_odd  # (PAIRS, D)
            if DELTA:
                square += R_even * R_even + R_odd * R_odd  # (PAIRS)
        if DELTA:
            first_pending = (slot * heads + k) * W  # of the list
        else:
            first_pending = slot * W
        list_x = pending_x + (first_pending + w)[:, None] * D + d[None, :]
        values = tl.load(list_x, mask=(w < count)[:, None] & in_row, other=0.0).to(tl.float32)  # (W, D)
        past = tl.sum(sums, 0)  # (D)
        weights = tl.sum(scores, 1)  # (W)
        if DECAY != "none":
            past *= tl.exp(c_newest)
            weights *= tl.exp(c_newest - c_s)
        total = past + tl.sum(weights[:, None] * values, 0)  # (D)
        parts += (b * heads + k) * SPLIT * D
        tl.store(parts + part * D + d, total, mask=d < D)
        if DELTA:
            list_squares = squares + (b * heads + k) * SPLIT
            tl.store(list_squares + part, tl.sum(square, 0))
        elif program == 0:
            tl.store(pending_x + (first_pending + count) * D + d, value, mask=d < D)
        if is_last_program(tickets + b * (heads + 1) + k, SPLIT):
            # All loads are issued before the first sum.
            if DECAY != "none":
                rate = tl.load(gate_constants + k)
            if DECAY == "gated":
                decay_bias = tl.load(gate_constants + heads + k)
                decay_weight = tl.load(gate_weights + k * D + d, mask=d < D, other=0.0)  # (D)
            if DELTA:
                write_bias = tl.load(gate_constants + 2 * heads + k)
                write_weight = tl.load(gate_weights + (heads + k) * D + d, mask=d < D, other=0.0)  # (D)
                all_squares = tl.load(list_squares + tl.arange(0, SPLIT))  # (SPLIT)
            if DELTA or DECAY == "gated":
                token = tl.load(x + b * D + d, mask=d < D, other=0.0)  # (D)
            whole = sum_of_parts(parts, d, D, SPLIT, BLOCK_P, BLOCK_D)  # (D)
            if DECAY != "none":
                log_decay = -rate
                if DECAY == "gated":
                    log_decay *= gate_value(token, decay_weight, decay_bias)
                tl.store(list_c + count, c_newest + log_decay)
                whole *= tl.exp(log_decay)
            if DELTA:
                beta = gate_value(token, write_weight, write_bias)
                a = 1.0 / (tl.sqrt(tl.sum(all_squares, 0)) + LENGTH_EPS)
                whole *= a
                tl.store(pending_x + (first_pending + count) * D + d, beta * a * (token - whole), mask=d < D)
            tl.store(A + (k * B + b) * D + d, layer_norm(whole, d < D, D, eps), mask=d < D)


@triton.jit
def add_norm_row(x, v, total, d, D, eps):
    """x = LN(x + LN(total)): the end of a layer, for one sequence; v is x in the weights' dtype."""
    old = tl.load(x + d, mask=d < D, other=0.0)  # (D)
    new = layer_norm(old + layer_norm(total, d < D, D, eps), d < D, D, eps)  # (D)
    tl.store(x + d, new, mask=d < D)
    tl.store(v + d, new, mask=d < D)


@triton.jit
def gate_and_decode(
    inputs,  # (4, B) int64, as in `begin`
    X,  # (B, n), before relu
    A,  # (h, B, D)
    encoder_v,  # (n, D)
    decoder,  # (n, D)
    x,  # (B, D) float32, in and out
    v,  # (B, D), out
    parts,  # (B, h, PARTS, D) float32: to be summed
    head_sums,  # (B, h, D) float32: likewise
    tickets,  # (B, h + 1) int32, all 0
    B,
    n,
    D,
    N,
    eps,
    h: tl.constexpr,
    PARTS: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Y = relu(A Ev) where X is active, Z = X o Y, x = LN(x + LN(Z Dec)).

    A program takes 1/PARTS of one head's neurons for one sequence, ROWS at a time.
    """
    program, b = tl.program_id(0), tl.program_id(1)
    if tl.load(inputs + B + b) >= 0:
        k, part = program // PARTS, program % PARTS
        d = tl.arange(0, BLOCK_D)
        in_row = d[None, :] < D
        a = tl.load(A + (k * B + b) * D + d, mask=d < D, other=0.0).to(tl.float32)  # (D)
        sums = tl.zeros((ROWS, BLOCK_D), tl.float32)  # of the decoder's rows; added up at the end, once
        for tile in range(TILES):
            j = (part * TILES + tile) * ROWS + tl.arange(0, ROWS)  # neurons of the head
            rows = (k * N + j).to(tl.int64)
            activity = tl.load(X + b * n + rows, mask=j < N, other=0.0).to(tl.float32)  # (ROWS)
            V = tl.load(encoder_v + rows[:, None] * D + d[None, :], mask=(activity > 0)[:, None] & in_row, other=0.0)
            Y = tl.maximum(tl.sum(V.to(tl.float32) * a[None, :], 1), 0.0)  # (ROWS)
            Z = (tl.maximum(activity, 0.0) * Y).to(decoder.dtype.element_ty).to(tl.float32)  # (ROWS)
            G = tl.load(decoder + rows[:, None] * D + d[None, :], mask=(Z > 0)[:, None] & in_row, other=0.0)
            sums += Z[:, None] * G.to(tl.float32)  # (ROWS, D)
        parts += (b * h + k) * PARTS * D
        tl.store(parts + part * D + d, tl.sum(sums, 0), mask=d < D)
        if is_last_program(tickets + b * (h + 1) + k, PARTS):  # of the head
            head_sums += b * h * D
            tl.store(head_sums + k * D + d, sum_of_parts(parts, d, D, PARTS, BLOCK_P, BLOCK_D), mask=d < D)
            if is_last_program(tickets + b * (h + 1) + h, h):  # of all
                add_norm_row(x + b * D, v + b * D, sum_of_parts(head_sums, d, D, h, 4, BLOCK_D), d, D, eps)


@triton.jit
def gate(X, Y, Z, B, n, N, BLOCK: tl.constexpr):
    """Z = relu(X) o relu(Y): X and Z are (B, n), Y is (h, B, N)."""
    b = tl.program_id(1)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    activity = tl.maximum(tl.load(X + b * n + j, mask=j < n, other=0.0).to(tl.float32), 0.0)
    gate_values = tl.load(Y + ((j // N) * B + b) * N + j % N, mask=j < n, other=0.0).to(tl.float32)
    tl.store(Z + b * n + j, (activity * tl.maximum(gate_values, 0.0)).to(Z.dtype.element_ty), mask=j < n)


@triton.jit
def add_norm(out, x, v, D, eps, BLOCK_D: tl.constexpr):
    """x = LN(x + LN(out)) for every sequence: out (B, D), x (B, D) float32 in and out, v (B, D) out."""
    b = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    total = tl.load(out + b * D + d, mask=d < D, other=0.0).to(tl.float32)  # (D)
    add_norm_row(x + b * D, v + b * D, total, d, D, eps)


@triton.jit
def project_logits(
    v,  # (B, D)
    lm_head,  # (V, D)
    logits,  # (B, V) float32, out
    V,
    D,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """logits = x lm_head^T, ROWS tokens of the vocabulary a program."""
    b = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    value = tl.load(v + b * D + d, mask=d < D, other=0.0).to(tl.float32)  # (D)
    inside = (rows < V)[:, None] & (d[None, :] < D)
    weights = tl.load(lm_head + rows.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.0)  # (ROWS, D)
    tl.store(logits + b * V + rows, tl.sum(weights.to(tl.float32) * value[None, :], 1), mask=rows < V)


@triton.jit
def flush_pending(
    flushed_slots,  # (2, F) int64: slots, and the number of pending tokens in each
    S,  # (L, slots, n, D) float32, in and out
    pending_R,  # (L, slots, W, n)
    pending_x,  # (L, slots, W, D); (L, slots, h, W, D) with DELTA
    pending_c,  # (L, slots, h, W) float32; None if the synapses do not decay
    F,
    slots,
    n,
    D,
    N,
    BY_HEAD: tl.constexpr,  # whether a program's rows are of one head, as decay and DELTA need
    DELTA: tl.constexpr,
    ROWS: tl.constexpr,
    W: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """S += sum over pending s of R_s^T x_s, for some slots and all layers.

    With decay S = exp(c) S + sum of exp(c - c_s) R_s^T x_s, where c is the newest c_s.
    """
    f = tl.program_id(1)
    slot = tl.load(flushed_slots + f)
    count = tl.load(flushed_slots + F + f)
    slot_row = tl.program_id(2) * slots + slot  # of this layer's slot
    if BY_HEAD:
        blocks = tl.cdiv(N, ROWS)
        k = tl.program_id(0) // blocks
        j = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)  # neurons of the head
        rows = (k * N + j).to(tl.int64)
        exists = j < N
    else:
        rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        exists = rows < n
    d = tl.arange(0, BLOCK_D)
    w = tl.arange(0, W)
    inside = exists[:, None] & (d[None, :] < D)
    R = tl.load(
        pending_R + (slot_row * W + w)[None, :] * n + rows[:, None],
        mask=(w < count)[None, :] & exists[:, None],
        other=0.0,
    )  # (ROWS, W)
    if DELTA:
        list_x = pending_x + ((slot_row * (n // N) + k) * W + w)[:, None] * D + d[None, :]
    else:
        list_x = pending_x + (slot_row * W + w)[:, None] * D + d[None, :]
    x = tl.load(list_x, mask=(w < count)[:, None] & (d[None, :] < D), other=0.0)  # (W, D)
    tile = S + slot_row * n * D + rows[:, None] * D + d[None, :]
    before = tl.load(tile, mask=inside, other=0.0)  # (ROWS, D)
    if pending_c is not None:
        list_c = pending_c + (slot_row * (n // N) + k) * W
        c_newest = tl.load(list_c + count - 1)
        retention = tl.exp(c_newest - tl.load(list_c + w, mask=w < count, other=0.0))  # (W)
        x = (x.to(tl.float32) * retention[:, None]).to(pending_x.dtype.element_ty)  # (W, D)
        before *= tl.exp(c_newest)
    tl.store(tile, before + tl.dot(R, x, input_precision="ieee"), mask=inside)
