"""How active neurons are, and the norm of what they remember, against the definitions."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bdh.data.blocks import ValidationWindows, document_ids
from bdh.data.tokens import Tokens
from bdh.model import BDHConfig, BDHForCausalLM
from bdh.training.neuron_statistics import observe_activity
from tests.insight.plain import small_model

END = 7


@pytest.mark.parametrize("length", [6, 20])  # the model's chunks are of 8 tokens
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("synapses", [{}, {"decay": "fixed"}, {"decay": "gated", "write": "delta"}])
def test_figures_are_what_the_definitions_say(length: int, apart: bool, synapses: dict[str, Any]) -> None:
    model = small_model(3).float()
    if synapses:
        config = BDHConfig.from_dict(model.config.to_dict() | synapses)
        gated = BDHForCausalLM(config)
        for name, parameter in gated.named_parameters():
            if ".gates." in name:
                torch.nn.init.normal_(parameter)
        gated.load_state_dict(model.state_dict(), strict=False)
        model = gated
    model.train()
    text = np.random.default_rng(1).integers(0, 20, 3 * length + 1)
    windows = ValidationWindows(Tokens([text]), length)
    with torch.no_grad():
        model.model.layer.encoder.weight[5].zero_()  # a neuron that never fires
    figures, histograms = observe_activity(model, windows, nullcontext, END if apart else None, with_values=True)
    assert model.training and not model.model.layer.encoder._forward_hooks

    model.eval()
    n = model.config.n_neurons
    ever = torch.zeros(n, dtype=torch.bool)
    for i in range(model.config.n_layer):
        active = {"x": 0.0, "z": 0.0}
        fired = {kind: torch.zeros(n, dtype=torch.int64) for kind in active}
        norms = []
        for window in windows.batches(1):
            inputs = window[:, :-1]
            documents = document_ids(inputs, END) if apart else None
            with torch.no_grad():
                out = model.model(inputs, use_cache=True, output_hidden_states=True, document_ids=documents)
                x = out.hidden_states[i][0]  # (T, D)
                X = F.relu(model.model.layer.encoder(x))  # (T, n)
                Z: list[torch.Tensor] = []
                hook = model.model.layer.decoder.register_forward_pre_hook(lambda m, given, Z=Z: Z.append(given[0][0]))
                model.model(inputs, document_ids=documents)
                hook.remove()
            norms.append(out.past_key_values.synapses[i].norm().item())
            for kind, values in (("x", X), ("z", Z[i])):
                active[kind] += (values > 0).float().mean().item() / len(windows)
                fired[kind] += (values > 0).sum(0)
        for kind in ("x", "z"):
            assert figures[f"active_{kind}/layer_{i}"] == pytest.approx(active[kind], rel=1e-5)
            assert figures[f"never_fired_{kind}/layer_{i}"] == pytest.approx((fired[kind] == 0).float().mean().item())
        ever |= fired["x"] > 0
        assert figures[f"active_z/layer_{i}"] < figures[f"active_y/layer_{i}"] < 1
        assert figures[f"state_norm/layer_{i}"] == pytest.approx(np.mean(norms), rel=1e-4)
        assert histograms[f"activity_x/layer_{i}"].edges[0] > 0
    assert figures["never_fired"] == pytest.approx((~ever).float().mean().item(), abs=1e-6) and not ever[5]
