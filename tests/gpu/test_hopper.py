"""On an H100 or H200: each Gluon kernel against the Triton one, which other tests compare with plain PyTorch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bdh.kernels.layer_operations import Dropout
from bdh.kernels.triton.operations import TritonOperations

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_HOPPER, reason="needs an H100 or H200")]

# G, C, N: those that fit the kernels, of one tile and of many, in odd numbers; and some that fit none
SIZES = [(1, 128, 128), (3, 128, 640), (5, 512, 384), (8, 512, 8192), (17, 256, 1024), (2, 96, 256), (1, 77, 130)]
SIZES += [(1, 77, 136), (3, 33, 72)]  # tokens and neurons of a tile's part
over_sizes = pytest.mark.parametrize("sizes", SIZES, ids=str)
over_dropout = pytest.mark.parametrize("p", [0.0, 0.1, 0.6])
D = 256


@pytest.fixture(scope="module")
def hopper() -> TritonOperations:
    from bdh.kernels.hopper.operations import HopperOperations, check_kernels

    for D in (256, 512, 96):
        check_kernels(torch.device("cuda"), D, 0.1)
    return HopperOperations()


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).bfloat16()


def same(actual: Tensor, expected: Tensor, tolerance: float = 1e-2) -> bool:
    """Return whether tensors are equal up to rounding; a few numbers may differ at a relu's threshold."""
    error = (actual.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-20)
    return actual.shape == expected.shape and actual.dtype == expected.dtype and error.item() < tolerance


def phases(C: int, N: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(C, device="cuda")[:, None] * 65536.0 ** (-torch.arange(0, N, 2, device="cuda") / N)  # (C, N/2)
    both = torch.stack((angle.cos(), angle.sin()), -1).bfloat16()  # (C, N/2, 2)
    return both[..., 0], both[..., 1]


@over_sizes
@pytest.mark.parametrize("width", [256, 512])
def test_excite(hopper: TritonOperations, sizes: tuple[int, int, int], width: int) -> None:
    torch.manual_seed(0)
    G, C, N = sizes
    x, E, (cos, sin) = draw(G, C, width), draw(N, width, scale=0.06), phases(C, N)
    for actual, expected in zip(hopper.excite(x, E, cos, sin), TritonOperations().excite(x, E, cos, sin), strict=True):
        assert same(actual, expected)


@over_sizes
@over_dropout
@pytest.mark.parametrize("width", [256, 512])
def test_gate_and_its_gradients(hopper: TritonOperations, sizes: tuple[int, int, int], p: float, width: int) -> None:
    torch.manual_seed(0)
    G, C, N = sizes
    dropout = Dropout(p, 1234567, 3)
    A, dy, X = draw(G, C, width), draw(G, C, width), draw(G, C, N).relu()
    Ev, Dec = draw(N, width, scale=0.06), draw(N, width, scale=0.06).mT
    results = []
    for op in (hopper, TritonOperations()):
        torch.manual_seed(1)
        y, dDec = torch.randn(G, C, width, device="cuda"), torch.empty(N, width, device="cuda").mT
        dEv = torch.empty(N, width, device="cuda")
        op.gate(A, Ev, X, dropout, Dec, y)
        dY, dX = op.gate_backward(dy, Dec, A, Ev, X, dropout, dDec, dEv)
        results.append((y, dDec, dEv, dY, dX))
    for actual, expected in zip(*results, strict=True):
        assert same(actual, expected)
    kept = [(dX != 0).float().mean().item() for *_, dX in results]
    assert abs(kept[0] - kept[1]) < 1e-3


@over_sizes
@over_dropout
def test_back_through_what_was_kept(hopper: TritonOperations, sizes: tuple[int, int, int], p: float) -> None:
    torch.manual_seed(0)
    G, C, N = sizes
    A, dy, X = draw(G, C, 512), draw(G, C, 512), draw(G, C, N).relu()
    Ev, Dec = draw(N, 512, scale=0.06), draw(N, 512, scale=0.06).mT
    Z = TritonOperations().gate_product(A, Ev, X, Dropout(p, 1234567, 3))  # (G, C, N)
    X[..., 0, :2], Z[..., 0, :2] = torch.tensor([1e-39, 2.0**-126]), 0.0  # of the first the reciprocal is infinite
    results = []
    for op in (hopper, TritonOperations()):
        dDec, dEv = torch.empty(N, 512, device="cuda").mT, torch.empty(N, 512, device="cuda")
        results.append((*op.gate_backward_saved(dy, Dec, A, X, Z, dDec, dEv), dDec, dEv))
    for actual, expected in zip(*results, strict=True):
        assert same(actual, expected)
    assert all(result.isfinite().all() for result in results[0])


@over_sizes
@pytest.mark.parametrize("carried", [False, True])
def test_gradient_of_excite(hopper: TritonOperations, sizes: tuple[int, int, int], carried: bool) -> None:
    torch.manual_seed(0)
    G, C, N = sizes
    dP, R, X, dX = draw(G, C, C, scale=0.1), draw(G, C, N), draw(G, C, N).relu(), draw(G, C, N)
    dP, (cos, sin) = dP + dP.mT, phases(C, N)
    past = (draw(G, C, D), draw(G, N, D, scale=0.1), draw(G, C, D), draw(G, N, D, scale=0.1)) if carried else None
    actual, expected = (op.excite_backward(dP, R, X, dX.clone(), cos, sin, past) for op in (hopper, TritonOperations()))
    assert same(actual, expected, 2e-2)
    assert not actual[X == 0].any()


def test_what_is_not_a_number_stays_so(hopper: TritonOperations) -> None:
    x, E, X, (cos, sin) = draw(1, 128, D), draw(256, D), draw(1, 128, 256).relu() + 1, phases(128, 256)
    x[0, 5, 7] = float("nan")
    assert all(result[0, 5].isnan().all() for result in hopper.excite(x, E, cos, sin))
    y = torch.zeros(1, 128, D, device="cuda")
    hopper.gate(x, E, X, Dropout(), draw(256, D).mT, y)
    assert y[0, 5].isnan().all() and not y[0, 6].isnan().any()


def test_sizes_of_the_default_model_and_twice_as_wide_take_these_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from bdh.kernels.hopper import device_functions
    from bdh.kernels.hopper.operations import HopperOperations, run_all

    launched: list[str] = []
    launch = device_functions.launch

    def record_launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launched.append(kernel.__name__)
        launch(kernel, *args, **kwargs)

    monkeypatch.setattr(device_functions, "launch", record_launch)
    run_all(HopperOperations(), 256, 0.1)
    assert launched == ["hopper_excite", "hopper_gate", "hopper_gate_backward", *["hopper_excite_backward"] * 2]
    launched.clear()
    run_all(HopperOperations(), 512, 0.1)
    gates = ["hopper_gate_product", "hopper_gate_product_backward", "hopper_gate_product_backward_saved"]
    assert launched == ["hopper_excite_512", *gates, *["hopper_excite_backward"] * 2]
