"""What a token does in a layer, straight from the definitions: dense, in float64, one token after the other."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bdh.model import BDHConfig, BDHForCausalLM, BDHState
from bdh.model.modeling_bdh import KEY_EPS

VARIANTS: list[tuple[Literal["none", "fixed", "gated"], Literal["add", "delta"]]] = [
    ("none", "add"),
    ("fixed", "add"),
    ("gated", "add"),
    ("none", "delta"),
    ("gated", "delta"),
]


def small_model(
    seed: int,
    n_layer: int = 2,
    h: int = 2,
    width: int = 3,
    pairs: int = 4,
    decay: Literal["none", "fixed", "gated"] = "none",
    write: Literal["add", "delta"] = "add",
) -> BDHForCausalLM:
    """In float64, of D = h * width and N = width * 2 * pairs; heads decay differently, and the last never."""
    torch.manual_seed(seed)
    config = BDHConfig(
        n_layer=n_layer,
        n_head=h,
        n_embd=h * width,
        mlp_internal_dim_multiplier=2 * pairs,
        vocab_size=20,
        initializer_range=0.5,
        rope_theta=64.0,
        chunk_size=8,
        decay=decay,
        decay_half_lives=None if decay == "none" else [*(4.0 * 2**k for k in range(h - 1)), None],
        write=write,
    )
    model = BDHForCausalLM(config).double().eval()
    if model.model.layer.gates is not None:
        for parameter in model.model.layer.gates.parameters():
            parameter.data.add_(torch.randn_like(parameter))
    return model


def random_state(model: BDHForCausalLM, position: int) -> BDHState:
    state = BDHState.zeros(model.config, 1, dtype=torch.float64)
    for S in state.synapses:
        S.normal_()
    state.position += position
    state.columns += position
    return state


@dataclass
class Plain:
    """Of the last token: X (h, N); A before its layer norm (h, D); Y (h, N); what it wrote and read between any two
    neurons of a head, (h, N, N); its scores with the tokens before, (t); its gates, (h) or None."""

    X: Tensor
    A: Tensor
    Y: Tensor
    written: Tensor
    read: Tensor
    scores: Tensor
    log_decay: Tensor | None
    write_strength: Tensor | None


def gates_of(model: BDHForCausalLM, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Logarithm of the retention, and write strength, (T, h) each, of tokens x (T, D)."""
    config, gates = model.config, model.model.layer.gates
    log_decay = beta = None
    if gates is None:
        return None, None
    lives = config.decay_half_lives or []
    if config.decay == "fixed":
        retention = [1.0 if life is None else 0.5 ** (1 / life) for life in lives]
        log_decay = torch.tensor(retention, dtype=torch.float64).log().expand(len(x), -1)  # (T, h)
    if config.decay == "gated":
        log_decay = -gates.decay_rate.exp() * torch.sigmoid(x @ gates.decay_weight.T + gates.decay_bias)  # (T, h)
        log_decay = log_decay * torch.tensor([float(life is not None) for life in lives]).double()  # (T, h)
    if config.write == "delta":
        beta = torch.sigmoid(x @ gates.write_weight.T + gates.write_bias)  # (T, h)
    return log_decay, beta


def plainly(model: BDHForCausalLM, tokens: list[int], state: BDHState | None, layer: int) -> Plain:
    config, module = model.config, model.model.layer
    h, N, D = config.n_head, config.neurons_per_head, config.n_embd
    start = 0 if state is None else int(state.position[0])
    with torch.no_grad():
        before = None if state is None else state.clone()
        out = model.model(torch.tensor([tokens]), past_key_values=before, use_cache=True, output_hidden_states=True)
        x = out.hidden_states[layer][0]  # (T, D)
        X = F.relu(x @ module.encoder.weight.T).view(-1, h, N)  # (T, h, N)
        Ev = torch.stack([one.get_parameter("weight") for one in module.encoder_v])  # (h, N, D)
        S = torch.zeros(h, N, D, dtype=torch.float64) if state is None else state.synapses[layer][0]
        last, keys, U = len(tokens) - 1, [], x[:, None].expand(-1, h, -1).clone()  # U (T, h, D)
        log_decay, beta = gates_of(model, x)  # (T, h)
        for t in range(len(tokens)):
            angles = (start + t) * config.rope_theta ** (-2 * torch.arange(N // 2).double() / N)  # (N / 2)
            turn = torch.polar(torch.ones_like(angles), angles)  # (N / 2) complex
            pairs = torch.view_as_complex(X[t].reshape(h, N // 2, 2)) * turn  # (h, N / 2)
            k = torch.view_as_real(pairs).reshape(h, N)
            if beta is not None:
                k = k / (k.norm(dim=-1, keepdim=True) + KEY_EPS)  # (h, N)
            keys.append(k)
            if log_decay is not None:
                S = log_decay[t].exp()[:, None, None] * S  # (h, N, D)
            A = torch.einsum("hn,hnd->hd", k, S)
            if beta is not None:
                U[t] = beta[t][:, None] * (x[t] - A)  # (h, D)
            if t < last:
                S = S + k[:, :, None] * U[t][:, None]  # (h, N, D)
        seen = torch.view_as_complex(S.reshape(h, N // 2, 2, D).mT.contiguous()) * turn.conj()[:, None]  # (h, N/2, D)
        M = torch.view_as_real(seen).mT.reshape(h, N, D)
        Y = F.relu(torch.einsum("hjd,hd->hj", Ev, F.layer_norm(A, (D,), eps=config.layer_norm_eps)))
        sent = X[last]  # (h, N)
        if beta is not None:
            sent = sent / (sent.norm(dim=-1, keepdim=True) + KEY_EPS)  # (h, N)
        written = sent[:, :, None] * torch.einsum("hjd,hd->hj", Ev, U[last])[:, None]  # (h, N, N)
        read = sent[:, :, None] * torch.einsum("hid,hjd->hij", M, Ev)  # (h, N, N)
        assert torch.allclose(read.sum(1), torch.einsum("hjd,hd->hj", Ev, A))  # all senders make up the attention
        scores = torch.zeros(last, dtype=torch.float64)
        for s in range(last):
            weight = (keys[last] * keys[s]).sum(-1)  # (h)
            if log_decay is not None:
                weight = weight * log_decay[s + 1 : last + 1].sum(0).exp()  # (h)
            if beta is not None:
                weight = weight * U[s].norm(dim=-1) / D**0.5  # (h)
            scores[s] = weight.sum()
        mine = (None if gate is None else gate[last] for gate in (log_decay, beta))
        return Plain(X[last], A, Y, written, read, scores, *mine)
