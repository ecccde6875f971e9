"""What a token does in a layer, straight from the definitions: dense, in float64, one token after the other."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bdh.model import BDHConfig, BDHForCausalLM, BDHState


def small_model(seed: int, n_layer: int = 2, h: int = 2, width: int = 3, pairs: int = 4) -> BDHForCausalLM:
    """In float64, of D = h * width and N = width * 2 * pairs."""
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
    )
    return BDHForCausalLM(config).double().eval()


def random_state(model: BDHForCausalLM, position: int) -> BDHState:
    state = BDHState.zeros(model.config, 1, dtype=torch.float64)
    for S in state.synapses:
        S.normal_()
    state.position += position
    state.length = position
    return state


@dataclass
class Plain:
    """Of the last token: X (h, N); A before its layer norm (h, D); Y (h, N); what it wrote and read between any two
    neurons of a head, (h, N, N); its scores with the tokens before, (t)."""

    X: Tensor
    A: Tensor
    Y: Tensor
    written: Tensor
    read: Tensor
    scores: Tensor


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
        last, R = len(tokens) - 1, []
        for t in range(len(tokens)):
            angles = (start + t) * config.rope_theta ** (-2 * torch.arange(N // 2).double() / N)  # (N / 2)
            turn = torch.polar(torch.ones_like(angles), angles)  # (N / 2) complex
            pairs = torch.view_as_complex(X[t].reshape(h, N // 2, 2)) * turn  # (h, N / 2)
            R.append(torch.view_as_real(pairs).reshape(h, N))
            if t < last:
                S = S + R[t][:, :, None] * x[t]  # (h, N, D)
        seen = torch.view_as_complex(S.reshape(h, N // 2, 2, D).mT.contiguous()) * turn.conj()[:, None]  # (h, N/2, D)
        M = torch.view_as_real(seen).mT.reshape(h, N, D)
        A = torch.einsum("hn,hnd->hd", R[last], S)
        Y = F.relu(torch.einsum("hjd,hd->hj", Ev, F.layer_norm(A, (D,), eps=config.layer_norm_eps)))
        written = X[last][:, :, None] * (Ev @ x[last])[:, None]  # (h, N, N)
        read = X[last][:, :, None] * torch.einsum("hid,hjd->hij", M, Ev)  # (h, N, N)
        assert torch.allclose(read.sum(1), torch.einsum("hjd,hd->hj", Ev, A))  # all senders make up the attention
        scores = torch.stack([(R[last] * R[s]).sum() for s in range(last)]) if last else torch.zeros(0)
        return Plain(X[last], A, Y, written, read, scores)
