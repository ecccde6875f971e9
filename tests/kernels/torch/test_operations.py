"""The PyTorch operations of training: dropout, and when a CPU saves activations."""

import pytest
import torch

from bdh.kernels.layer_operations import Dropout
from bdh.kernels.torch.operations import TorchOperations, dropout_mask

CPU = torch.device("cpu")


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.99])
def test_dropout_drops_its_share_of_everything(p: float) -> None:
    """By neuron, by token, by neighbours and between heads, as chance would have it."""
    size, tokens, N = (8, 64, 512), 512, 512
    kept = [dropout_mask(torch.empty(size), Dropout(p, 12345, head)).view(tokens, N) != 0 for head in range(2)]
    sure = 5 * (p * (1 - p)) ** 0.5  # five standard deviations of one draw
    for dropped in (~kept[0], ~kept[1]):
        assert abs(dropped.double().mean() - p) < sure / (tokens * N) ** 0.5
        assert (dropped.double().mean(0) - p).abs().max() < sure / tokens**0.5
        assert (dropped.double().mean(1) - p).abs().max() < sure / N**0.5
        for shifts in ((0, 1), (1, 0), (1, 1), (64, 0), (7, 8)):
            both = (dropped & dropped.roll(shifts, (0, 1))).double().mean()
            assert abs(both - p * p) < 5 * p / (tokens * N) ** 0.5
    assert abs((~kept[0] & ~kept[1]).double().mean() - p * p) < 5 * p / (tokens * N) ** 0.5


def test_a_cpu_keeps_neurons_unless_its_products_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    op = TorchOperations(CPU)
    for fast in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda fast=fast: fast)
        assert op.should_save_activations(16, 16, 8, torch.float32) and not op.should_save_activations(
            16, 16, 8, torch.float16
        )
        assert op.should_save_activations(16, 16, 8, torch.bfloat16) != fast
    assert not TorchOperations(torch.device("cuda")).should_save_activations(16, 16, 8, torch.float32)
