"""Statistics of BDH's neurons during training: the share that is active, neurons never active, and the size of
synapses.

A few fixed windows of the validation text are read once more, one at a time, and looked into by hooks on the layer's
matrices: what comes out of the encoders are X and Y before their relu, what goes into the decoder is Z.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdh.data.blocks import ValidationWindows, document_ids, inputs_and_targets
from bdh.model import BDHForCausalLM
from bdh.model.modeling_bdh import Gates, rotary_phases, rotate, unit_keys
from bdh.training.norms import Histogram, histogram

NEURONS = ("x", "y", "z")


@dataclass
class LayerActivity:
    """Sums over the tokens one layer has read.

    Attributes:
        active: How many neurons were active, over all tokens: by "x", "y", "z".
        fired: Which neurons ever were, (n,) bool.
        values: What those of the first window showed.
        state_norm: Euclidean norms of the synapses at the windows' ends, summed.
    """

    active: dict[str, Tensor] = field(default_factory=dict)
    fired: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Histogram] = field(default_factory=dict)
    state_norm: float = 0.0

    def add(self, kind: str, values: Tensor, keep_values: bool) -> None:
        """Takes in activity (T, n)."""
        on = values > 0  # (T, n)
        count, fired = on.sum(), on.any(0)  # (), (n,)
        self.active[kind] = self.active[kind] + count if kind in self.active else count
        self.fired[kind] = self.fired[kind] | fired if kind in self.fired else fired
        if keep_values and kind not in self.values and (found := histogram(values[on])):
            self.values[kind] = found


@torch.no_grad()
def observe_activity(
    model: BDHForCausalLM,
    windows: ValidationWindows,
    precision: Callable[[], AbstractContextManager[object]],
    end_of_text: int | None = None,
    with_values: bool = False,
) -> tuple[dict[str, float], dict[str, Histogram]]:
    """Reads the windows without dropout, each from its own beginning; the model's mode is put back afterwards.

    Args:
        model: On the device to use; not compiled.
        windows: A few.
        precision: Makes the context of a forward pass.
        end_of_text: As for `evaluate`; synapses are then those of the window's last document.
        with_values: Whether histograms of the activity are wanted too.

    Returns:
        Figures: `active_x/layer_0` … (share of active neurons, mean over tokens; also y and z), `never_fired_x/layer_0`
        … (share of neurons that were silent at every token), `never_fired` (share silent at every token in X of every
        layer), `state_norm/layer_0` … (norm of the synapses after a window, mean over windows). And, if wanted,
        histograms `activity_x/layer_0` … of the values of active neurons.
    """
    was_training = model.training
    model.eval()
    layers = [LayerActivity() for _ in range(model.config.n_layer)]
    tokens = 0
    try:
        for window in windows.batches(1):
            inputs, _ = inputs_and_targets(window.to(model.device))  # (1, T)
            documents = None if end_of_text is None else document_ids(inputs, end_of_text)  # (1, T)
            with ExitStack() as hooks, precision():
                Look(model, layers, hooks, documents, with_values)
                model(input_ids=inputs, use_cache=False, document_ids=documents)
            tokens += inputs.shape[1]
    finally:
        model.train(was_training)
    return figures(layers, tokens, len(windows), model.config.n_neurons), {
        f"activity_{kind}/layer_{i}": found for i, layer in enumerate(layers) for kind, found in layer.values.items()
    }


class Look:
    """Hooks on the one layer, for one forward pass over one window; `hooks` takes them away again."""

    def __init__(
        self,
        model: BDHForCausalLM,
        layers: list[LayerActivity],
        hooks: ExitStack,
        documents: Tensor | None,
        with_values: bool,
    ):
        self.config = model.config
        self.layers = iter(layers)
        self.documents = documents
        self.with_values = with_values
        self.Y: list[Tensor] = []
        layer = model.model.layer
        for handle in (
            layer.encoder.register_forward_hook(self.encoder),
            *(encoder.register_forward_hook(self.encoder_v) for encoder in layer.encoder_v),
            layer.decoder.register_forward_pre_hook(self.decoder),
        ):
            hooks.callback(handle.remove)
        self.gated = layer.gates is not None
        if layer.gates is not None:
            hooks.callback(layer.gates.register_forward_hook(self.gates).remove)

    def encoder(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """A layer begins: X, and with x the synapses that it will have written."""
        self.now = next(self.layers)
        X = F.relu(output[0])  # (T, n)
        self.now.add("x", X, self.with_values)
        if self.gated:
            self.X = X
        else:
            self.now.state_norm += self.synapse_norm(X, inputs[0][0])
        self.Y.clear()

    def gates(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Gates) -> None:
        """The gates of the heads, from the same x as X: what the synapses retain, and what is written into them."""
        self.now.state_norm += self.synapse_norm(self.X, inputs[0][0], output)

    def encoder_v(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """The Y of one head, (1, T, N)."""
        self.Y.append(F.relu(output[0]))  # (T, N)

    def decoder(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        """The layer ends: Y of all heads, and Z."""
        self.now.add("y", torch.cat(self.Y, -1), self.with_values)  # (T, n)
        self.now.add("z", inputs[0][0], self.with_values)  # (T, n)

    def synapse_norm(self, X: Tensor, x: Tensor, gates: Gates | None = None) -> float:
        """The norm of S = sum of R_s^T x_s over the last document, from X (T, n) and x (T, D), without making S.

        |S|^2 is the sum over all pairs of tokens of (R_s . R_t)(x_s . x_t): two products of (T, T) instead of a sum of
        n * D numbers, which for a large model is more than a training step leaves room for. With gates, keys k take the
        place of R, and that of x what has been written and is retained, which differs by head.
        """
        N, chunk = self.config.neurons_per_head, self.config.chunk_size
        positions = torch.arange(len(x), device=x.device)[None]  # (1, T)
        phases = rotary_phases(positions, N, self.config.rope_theta, torch.float32)  # 2 x (1, 1, T, N)
        if self.documents is not None:
            last = self.documents[0] == self.documents[0, -1]  # (T,)
            x = x * last[:, None]  # (T, D)
        x = x.float()
        total = torch.zeros((), device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            for head, X_k in enumerate(X.unflatten(-1, (-1, N)).unbind(1)):  # (T, N)
                R_k, values = rotate(X_k.float()[None, None], *phases)[0, 0], x  # (T, N), (T, D)
                if gates is not None:
                    R_k, values = self.retained(R_k, x, gates, head)  # (T, N), (T, D)
                for rows in torch.arange(len(x), device=x.device).split(chunk):
                    total += ((R_k[rows] @ R_k.mT) * (values[rows] @ values.mT)).sum()
        return total.clamp(min=0).sqrt().item()

    def retained(self, R: Tensor, x: Tensor, gates: Gates, head: int) -> tuple[Tensor, Tensor]:
        """The keys of a head, (T, N), and what the synapses retain of the vectors written for them, (T, D).

        Arguments are R (T, N) of the head, x (T, D), zero before the last document, and the gates of all heads.
        """
        T = len(x)
        u = x.new_zeros(T)  # (T)  cumulative log of the decay
        if gates.log_decay is not None:
            u = gates.log_decay[0, head].cumsum(0)  # (T)
        since = (u[-1] - u).exp()[:, None]  # (T, 1)
        if gates.write_strength is None:
            return R, since * x
        k, beta = unit_keys(R), gates.write_strength[0, head][:, None]  # (T, N), (T, 1)
        if self.documents is not None:
            k = k * (self.documents[0] == self.documents[0, -1])[:, None]  # (T, N)
        U = torch.empty_like(x)  # (T, D)
        for rows in torch.arange(T, device=x.device).split(self.config.chunk_size):
            start, end = int(rows[0]), int(rows[-1]) + 1
            later = (u[rows, None] - u[None, :end]).clamp(max=0).exp()  # (C, end)
            M = ((k[rows] @ k[:end].mT) * later).tril(start - 1)  # (C, end)
            U_c = beta[rows] * (x[rows] - M[:, :start] @ U[:start])  # (C, D)
            U[rows] = torch.linalg.solve_triangular(beta[rows] * M[:, start:], U_c, upper=False, unitriangular=True)
        return k, since * U


def figures(layers: list[LayerActivity], tokens: int, windows: int, neurons: int) -> dict[str, float]:
    """The figures of all layers; see `observe_activity`."""
    found: dict[str, float] = {}
    for kind in NEURONS:
        for i, layer in enumerate(layers):
            found[f"active_{kind}/layer_{i}"] = layer.active[kind].item() / (tokens * neurons)
    for kind in NEURONS:
        for i, layer in enumerate(layers):
            found[f"never_fired_{kind}/layer_{i}"] = 1 - layer.fired[kind].float().mean().item()
    ever = torch.stack([layer.fired["x"] for layer in layers]).any(0)  # (n,)
    found["never_fired"] = 1 - ever.float().mean().item()
    found |= {f"state_norm/layer_{i}": layer.state_norm / windows for i, layer in enumerate(layers)}
    return found
