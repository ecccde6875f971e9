"""The Triton operations of decay and the delta rule, in Triton's interpreter, against those in PyTorch."""

import pytest
import torch
from torch import Tensor

from bdh.kernels.torch.gated_operations import TorchGatedOperations
from bdh.kernels.torch.workspace import Workspace
from bdh.kernels.triton import operations as triton_operations
from bdh.kernels.triton.gated_operations import TritonGatedOperations
from bdh.kernels.triton.operations import Tiles

torch_op, triton_op = TorchGatedOperations(Workspace(torch.device("cpu"))), TritonGatedOperations()
DTYPES = [torch.float32, torch.bfloat16]
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# G, C, D, N: one token; part of a tile; several tiles; several blocks of the inverse
over_sizes = pytest.mark.parametrize(
    "sizes", [(1, 1, 8, 6), (2, 13, 20, 34), (2, 32, 16, 64), (1, 150, 16, 20)], ids=str
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in triton_operations.TILES:
        tiles = dict.fromkeys(DTYPES, Tiles(16, 16, 16, 4, 2))
        monkeypatch.setitem(triton_operations.TILES, kernel, tiles)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def gates_of(G: int, C: int) -> tuple[Tensor, Tensor, Tensor]:
    """u, beta and |R|^2, (G, C)."""
    return -torch.rand(G, C).cumsum(-1), torch.rand(G, C), torch.rand(G, C) * 30


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Compare with the tolerance of the inputs' dtype, by default that of the results."""
    tolerance = 1e-5 if (dtype or actual.dtype) == torch.float32 else 3e-2
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual.float() - expected.float()).norm() <= tolerance * (1 + expected.float().norm())


@over_sizes
@over_dtypes
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_scores_and_their_gradient(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, unit: bool, documents: bool
) -> None:
    G, C, D, N = sizes
    torch.manual_seed(0)
    R, E, U = draw(G, C, N, dtype=dtype).relu(), draw(G, C, D, dtype=dtype), draw(G, C, D, dtype=dtype)
    u, _, squares = gates_of(G, C)
    ids = (torch.arange(C).expand(G, C) // 5).contiguous() if documents else None
    if not unit:
        assert_close(triton_op.add_scores(R, u, ids), torch_op.add_scores(R, u, ids))
    arguments = (E, U, u, squares if unit else None, ids, draw(G, C) if unit else None)
    M = torch_op.add_scores(R, u, ids)  # (G, C, C)
    actual, of_u = triton_op.gated_scores_backward(*arguments, M)
    expected, expected_of_u = torch_op.gated_scores_backward(*arguments, M)
    assert_close(actual, expected)
    assert of_u is not None and expected_of_u is not None
    assert_close(of_u, expected_of_u, dtype)
    without, nothing = triton_op.gated_scores_backward(*arguments, None)
    assert nothing is None and without.equal(actual)


def test_rounding_cancels_in_the_gradient_of_decay() -> None:
    """A product that is rounded is of a row and of a column: the sum over a chunk is 0 in bfloat16 too."""
    torch.manual_seed(0)
    R, E, U = (draw(2, 60, 16, dtype=torch.bfloat16) for _ in range(3))
    u, _, _ = gates_of(2, 60)
    for op in (triton_op, torch_op):
        _, of_u = op.gated_scores_backward(E, U, u, None, None, None, op.add_scores(R, u, None))
        assert of_u is not None
        assert (of_u.sum(-1).abs() < 1e-5 * of_u.abs().sum(-1)).all()


@over_sizes
@over_dtypes
@pytest.mark.parametrize("documents", [False, True])
def test_scores_of_the_delta_rule_and_their_inverse(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, documents: bool
) -> None:
    G, C, _, N = sizes
    torch.manual_seed(0)
    R = torch.rand(G, C, N).to(dtype)  # alike, as positive neurons are
    R[:, 0] = 0  # a silent token
    u, beta, _ = gates_of(G, C)
    ids = (torch.arange(C).expand(G, C) // 70).contiguous() if documents else None
    actual, expected = (op.delta_scores(R, u / 50, beta, ids) for op in (triton_op, torch_op))
    for result, wanted in zip(actual, expected, strict=True):
        assert_close(result, wanted, dtype)
    M, inverse, _ = (each.float() for each in actual)
    product = (torch.eye(C) + beta[..., None] * M) @ inverse  # (G, C, C)
    assert (product - torch.eye(C)).abs().max() < (1e-4 if dtype == torch.float32 else 5e-2)
    rows, columns = torch.rand(G, C), torch.rand(G, C)
    assert_close(
        triton_op.scaled_matrix(actual[1], rows, columns), torch_op.scaled_matrix(actual[1], rows, columns), dtype
    )


@over_sizes
@over_dtypes
def test_rows_of_tokens(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    G, C, D, _ = sizes
    torch.manual_seed(0)
    x, Q = draw(G, 3, C, D, dtype=dtype)[:, 1], draw(G, C, D, dtype=dtype)  # the first strided, as one chunk of several
    w, r = draw(G, 2, C)[:, 1], draw(G, 2, C)[:, 0]
    assert_close(triton_op.scaled_difference(w, x), torch_op.scaled_difference(w, x))
    assert_close(triton_op.scaled_difference(w, x, r, Q), torch_op.scaled_difference(w, x, r, Q))
    actual, expected = Q.clone(), Q.clone()
    triton_op.add_scaled_(actual, x.contiguous(), r)
    torch_op.add_scaled_(expected, x.contiguous(), r)
    assert_close(actual, expected)


@over_sizes
@over_dtypes
@pytest.mark.parametrize("heads", [1, 3])
def test_rows_backward(sizes: tuple[int, int, int, int], dtype: torch.dtype, heads: int) -> None:
    G, C, D, _ = sizes
    torch.manual_seed(0)
    dA, V, A = (draw(heads * G, C, D, dtype=dtype) for _ in range(3))
    x, dx = draw(G, C, D, dtype=dtype), draw(G, C, D)
    _, beta, squares = gates_of(heads * G, C)
    beta += 0.1
    U = (beta[..., None] * (x.repeat(heads, 1, 1) - A)).to(dtype)
    squares[:, 0] = 0  # a silent token
    results = []
    for op in (triton_op, torch_op):
        total = dx.clone()
        results.append(
            [
                *op.delta_rows_backward(dA, V, A, U, x, beta, squares, total), total,
                op.difference_of_dots(beta, dA, V, squares, A, U),
            ]
        )  # fmt: skip
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, dtype)


@over_dtypes
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("carried", [False, True])
def test_a_state_is_scanned(dtype: torch.dtype, back: bool, carried: bool) -> None:
    torch.manual_seed(0)
    B, c, C, N, D = 2, 3, 18, 34, 20
    R, Y = draw(B, c, C, N, dtype=dtype).relu() / 4, draw(B, c, C, D, dtype=dtype)
    W, remains = draw(B, c, C, C, dtype=dtype) / 20, torch.rand(B, c)
    angle, state = torch.rand(N // 2), draw(B, N, D)
    results = []
    for op in (triton_op, torch_op):
        values, mine = Y.clone(), state.clone() if carried else None
        scanned = op.scan_delta(R, W.mT if back else W, values, remains, mine, angle.cos(), angle.sin(), back)
        results.append([*scanned, values, *([] if mine is None else [mine])])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, dtype)
