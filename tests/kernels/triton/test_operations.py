"""The Triton operations of training, in Triton's interpreter, against plain PyTorch, on odd sizes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bdh.kernels.layer_operations import Dropout
from bdh.kernels.torch.operations import TorchOperations
from bdh.kernels.triton import operations as triton_operations
from bdh.kernels.triton.operations import TILES, Tiles, TritonOperations, dropout_numbers

op = TritonOperations()
NOTHING_DROPPED = Dropout(0.0, 0, 0)
DROPPED = Dropout(0.3, 1 << 40, 2)
DTYPES = [torch.float32, torch.bfloat16]
SMALL = Tiles(16, 16, 16, 4, 2)  # so that small sizes take several

# G, C, D, N: one token; a tile's part; odd sizes of several tiles; multiples of all
SIZES = [(1, 1, 8, 6), (3, 7, 20, 34), (1, 37, 24, 70), (2, 16, 32, 64)]
over_sizes = pytest.mark.parametrize("sizes", SIZES, ids=str)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use(SMALL, monkeypatch)


def use(tiles: Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in TILES:
        monkeypatch.setitem(triton_operations.TILES, kernel, dict.fromkeys(DTYPES, tiles))


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def close(result: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a result, a sum of some ten terms of about 1, is as exact as its dtype allows."""
    error = (result.float() - expected.float()).abs().max().item()
    return error <= (1e-4 if dtype == torch.float32 else 2e-2) * max(1.0, expected.abs().max().item())


# ------------------------------------------------------------------------------------------------ plain forms


def phases(C: int, N: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (C, N/2) of angles far apart."""
    angle = torch.arange(C)[:, None] * 100.0 ** (-torch.arange(0, N, 2) / N)  # (C, N/2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rope(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs of the last dimension."""
    even, odd = values[..., 0::2], values[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


def plain_excite(x: Tensor, E: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    X = F.relu(x @ E.mT)  # (G, C, N)
    return X, rope(X, cos, sin)


def plain_scores(R: Tensor, documents: Tensor | None) -> Tensor:
    P = (R @ R.mT).tril(-1)  # (G, C, C)
    return P if documents is None else P * (documents[:, :, None] == documents[:, None, :])


def mix(h: Tensor) -> Tensor:
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return h ^ (h >> 16)


def dropout_mask(M: int, N: int, dropout: Dropout) -> Tensor:
    """Return the products that dropout keeps, (M, N) bool."""
    key, dropped = dropout_numbers(dropout)
    token, pair = torch.arange(M), torch.arange(N // 2)
    bits = mix(token ^ (key & 0xFFFFFFFF))[:, None] ^ mix((pair + 0x9E3779B9) & 0xFFFFFFFF)[None, :]  # (M, N/2)
    first = bits * 0x9E3779B1 & 0xFFFFFFFF  # (M, N/2)
    second = first * 0x10001 & 0xFFFFFFFF  # (M, N/2)
    return (torch.stack((first, second), -1).flatten(-2) >> 16) >= dropped


def plain_gate(A: Tensor, Ev: Tensor, X: Tensor, dropout: Dropout) -> Tensor:
    return X * F.relu(A @ Ev.mT) * dropout_mask(X.shape[0] * X.shape[1], X.shape[2], dropout).view_as(X)  # (G, C, N)


def plain_scan(U: Tensor, S: Tensor, cos: Tensor, sin: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    before = []
    for chunk in range(U.shape[1]):
        before.append(S)
        S = kept[:, chunk, None, None] * S + U[:, chunk]  # (B, N, D)
        S = rope(S.mT, cos, -sin).mT  # (B, N, D)
    return torch.stack(before, 1), S


# ------------------------------------------------------------------------------------------------ the operations


@over_sizes
@over_dtypes
def test_excite(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    G, C, D, N = sizes
    x, E, tables = draw(G, C, D, dtype=dtype), draw(N, D, dtype=dtype), phases(C, N, dtype)
    X, R = op.excite(x, E, *tables)
    expected = plain_excite(x.float(), E.float(), *(table.float() for table in tables))
    assert X.dtype == R.dtype == dtype
    assert close(X, expected[0], dtype)
    assert close(R, expected[1], dtype)


@over_sizes
@over_dtypes
@pytest.mark.parametrize("documents", [None, torch.int32, torch.int64], ids=str)
def test_scores(sizes: tuple[int, int, int, int], dtype: torch.dtype, documents: torch.dtype | None) -> None:
    G, C, _, N = sizes
    R = draw(G, C, N, dtype=dtype)
    ids = None if documents is None else torch.randint(3, (G, C), dtype=documents).sort(1).values
    P = op.scores(R, ids)
    assert P.dtype == dtype
    assert close(P, plain_scores(R.float(), ids), dtype)
    assert not P.triu().any()


@over_sizes
@over_dtypes
@pytest.mark.parametrize("documents", [None, torch.int64], ids=str)
def test_gradient_of_scores(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, documents: torch.dtype | None
) -> None:
    G, C, D, _ = sizes
    dA, x = draw(G, C, D, dtype=dtype), draw(G, C, D, dtype=dtype)
    ids = None if documents is None else torch.randint(3, (G, C), dtype=documents).sort(1).values
    dP = (dA.float() @ x.float().mT).tril(-1)  # (G, C, C)
    dP = dP if ids is None else dP * (ids[:, :, None] == ids[:, None, :])
    result = op.scores_backward(dA, x, ids)
    assert result.dtype == dtype
    assert close(result, dP + dP.mT, dtype)


@over_sizes
@over_dtypes
@pytest.mark.parametrize("dropout", [NOTHING_DROPPED, DROPPED], ids=["kept", "dropped"])
def test_gate_and_its_gradients(sizes: tuple[int, int, int, int], dtype: torch.dtype, dropout: Dropout) -> None:
    G, C, D, N = sizes
    A, Ev, X = draw(G, C, D, dtype=dtype), draw(N, D, dtype=dtype), F.relu(draw(G, C, N, dtype=dtype))
    dy, Dec = draw(G, C, D, dtype=dtype), draw(D, 3 * N, dtype=dtype)[:, N : 2 * N]  # of three heads
    Y = (A.float() @ Ev.float().mT).requires_grad_()  # (G, C, N), before relu
    activity = X.float().requires_grad_()
    expected = activity * F.relu(Y) * dropout_mask(G * C, N, dropout).view(G, C, N)  # (G, C, N)
    dY, dX = torch.autograd.grad(expected, (Y, activity), dy.float() @ Dec.float())
    assert close(op.gate_product(A, Ev, X, dropout), expected, dtype)
    Z, *gradients = op.gate_product_backward(dy, Dec, A, Ev, X, dropout)
    for result, wanted in zip((Z, *gradients), (expected, dY, dX), strict=True):
        assert result.dtype == dtype
        assert close(result, wanted, dtype)
    y, dDec, dEv = draw(G, C, D), draw(D, N), draw(N, D)
    began = y.clone()
    op.gate(A, Ev, X, dropout, Dec, y)
    assert close(y, began + Z.float() @ Dec.float().mT, dtype)
    repeated = op.gate_backward(dy, Dec, A, Ev, X, dropout, dDec, dEv)
    assert all(torch.equal(result, wanted) for result, wanted in zip(repeated, gradients, strict=True))
    assert close(dDec, dy.float().flatten(0, 1).mT @ Z.float().flatten(0, 1), dtype)
    assert close(dEv, repeated[0].float().flatten(0, 1).mT @ A.float().flatten(0, 1), dtype)
    for operations in (op, TorchOperations(torch.device("cpu"))):
        from_kept = operations.gate_backward_saved(dy, Dec, A, X.detach(), expected.detach().to(dtype), dDec, dEv)
        for result, wanted in zip(from_kept, (dY, torch.where(X > 0, dX, 0.0)), strict=True):
            assert result.dtype == dtype
            assert close(result, wanted, dtype)
        assert close(dDec, dy.float().flatten(0, 1).mT @ Z.float().flatten(0, 1), dtype)
        assert close(dEv, from_kept[0].float().flatten(0, 1).mT @ A.float().flatten(0, 1), dtype)


@over_sizes
@over_dtypes
@pytest.mark.parametrize("carried", [False, True], ids=["alone", "carried"])
def test_gradient_of_excite(sizes: tuple[int, int, int, int], dtype: torch.dtype, carried: bool) -> None:
    G, C, D, N = sizes
    cos, sin = phases(C, N, dtype)
    before = draw(G, C, N).requires_grad_()
    X = F.relu(before)  # (G, C, N)
    R = rope(X, cos.float(), sin.float())  # (G, C, N)
    dX, dP = draw(G, C, N, dtype=dtype), draw(G, C, C)
    dP = (dP + dP.mT).to(dtype)
    dA, S, values, dS = (draw(G, size, D, dtype=dtype) for size in (C, N, C, N))
    dR = dP.float() @ R.detach().to(dtype).float()  # (G, C, N)
    if carried:
        dR += dA.float() @ S.float().mT + values.float() @ dS.float().mT
    expected = torch.autograd.grad((X, R), before, (dX.float(), dR))[0]
    passed = X.detach().to(dtype)
    past = (dA, S, values, dS) if carried else None
    result = op.excite_backward(dP, R.detach().to(dtype), passed, dX, cos, sin, past)
    assert result.dtype == dtype
    assert close(result, expected, dtype)


@pytest.mark.parametrize("sizes", [(1, 1, 6, 8), (2, 4, 34, 20), (3, 3, 64, 16)], ids=str)
@over_dtypes
@pytest.mark.parametrize("carried", [False, True], ids=["alone", "carried"])
def test_scan_and_its_gradients(sizes: tuple[int, int, int, int], dtype: torch.dtype, carried: bool) -> None:
    B, c, N, D = sizes
    cos, sin = (table[5] for table in phases(6, N, torch.float32))  # (N/2)
    U, S = draw(B, c, N, D, dtype=dtype), draw(B, N, D)
    kept = torch.randint(2, (B, c)).float() if carried else None
    V, dS_end = draw(B, c, N, D, dtype=dtype), draw(B, N, D)
    written, first = U.float().requires_grad_(), (S if carried else torch.zeros_like(S)).requires_grad_()
    before, end = plain_scan(written, first, cos, sin, torch.ones(B, c) if kept is None else kept)
    dS_after = dS_end if carried else torch.zeros_like(dS_end)
    dU, dS = torch.autograd.grad((before, end), (written, first), (V.float(), dS_after))
    states, result = op.scan(U, S.detach() if carried else None, cos, sin, kept)
    assert (states.dtype, result.dtype) == (dtype, torch.float32)
    assert close(states, before, dtype)
    assert close(result, end, torch.float32)
    states, result = op.scan_backward(V, dS_end if carried else None, cos, sin, kept)
    assert (states.dtype, result.dtype) == (dtype, torch.float32)
    assert close(states, dU, dtype)
    assert close(result, dS, torch.float32)


@over_sizes
@over_dtypes
def test_norm_and_its_gradient(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    G, C, D, _ = sizes
    A, gradient = draw(G, C, D, dtype=dtype), draw(G, C, D, dtype=dtype)
    exact = A.float().requires_grad_()
    expected = F.layer_norm(exact, (D,), eps=1e-5)
    result, rstd = op.norm(A, 1e-5)
    assert (result.dtype, rstd.dtype, rstd.shape) == (dtype, torch.float32, (G, C, 1))
    assert close(result, expected, dtype)
    wanted = torch.autograd.grad(expected, exact, gradient.float())[0]
    assert close(op.norm_backward(gradient, result, rstd), wanted, dtype)


@pytest.mark.parametrize("sizes", [(1, 1, 6), (3, 7, 20), (1, 37, 24)], ids=str)
def test_join_and_its_gradients(sizes: tuple[int, int, int]) -> None:
    x, y, gradient = draw(*sizes).requires_grad_(), draw(*sizes).requires_grad_(), draw(*sizes)
    D = sizes[-1:]
    expected = F.layer_norm(x + F.layer_norm(y, D, eps=1e-5), D, eps=1e-5)
    result, kept = op.add_norm(x.detach(), y.detach(), 1e-5)
    assert close(result, expected, torch.float32)
    wanted = torch.autograd.grad(expected, (x, y), gradient)
    for actual, wanted_gradient in zip(op.add_norm_backward(gradient, kept, 1e-5), wanted, strict=True):
        assert close(actual, wanted_gradient, torch.float32)


def test_silent_tokens() -> None:
    G, C, D, N = 2, 9, 16, 40
    cos, sin = phases(C, N, torch.float32)
    X, R = op.excite(-draw(G, C, D).abs(), draw(N, D).abs(), cos, sin)
    assert not X.any()
    assert not R.any()
    assert not op.scores(R, None).any()
    for result in op.gate_product_backward(draw(G, C, D), draw(D, N), draw(G, C, D), draw(N, D), X, NOTHING_DROPPED)[
        :2
    ]:
        assert not result.any()
    assert not op.excite_backward(draw(G, C, C), R, X, draw(G, C, N), cos, sin, None).any()


# ------------------------------------------------------------------------------------------------ dropout


def kept_products(dropout: Dropout, G: int, C: int, N: int) -> Tensor:
    """Return which products of active neurons dropout keeps, (G, C, N)."""
    ones = torch.ones(G, C, N)
    return op.gate_product(ones[..., :8].contiguous(), torch.ones(N, 8), ones, dropout) > 0


@pytest.mark.parametrize("p", [0.1, 0.9])
def test_dropout_keeps_its_share_everywhere(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    use(Tiles(64, 256, 16, 4, 2), monkeypatch)
    M, N = 120, 500
    kept = kept_products(Dropout(p, 7, 0), 2, M // 2, N).view(M, N).float()
    assert abs(kept.mean() - (1 - p)) < 0.006  # 3 standard deviations of 60,000
    assert (kept.mean(0) - (1 - p)).abs().max() < 0.25  # by neuron
    assert (kept.mean(1) - (1 - p)).abs().max() < 0.12  # by token
    both = (kept[:, 0::2] * kept[:, 1::2]).mean()  # a pair's share its random bits
    assert abs(both - (1 - p) ** 2) < 0.012
    assert abs((kept[1:] * kept[:-1]).mean() - (1 - p) ** 2) < 0.008
    assert abs((kept[:, 1:] * kept[:, :-1]).mean() - (1 - p) ** 2) < 0.012


def test_dropout_is_a_function_of_seed_head_token_and_neuron() -> None:
    kept = kept_products(Dropout(0.5, 3, 1), 2, 20, 50)
    assert torch.equal(kept, kept_products(Dropout(0.5, 3, 1), 2, 20, 50))
    assert torch.equal(kept.view(40, 50), kept_products(Dropout(0.5, 3, 1), 5, 8, 50).view(40, 50))
    assert torch.equal(kept[0, :, :30], kept_products(Dropout(0.5, 3, 1), 1, 20, 30)[0])
    for other in (Dropout(0.5, 4, 1), Dropout(0.5, 3, 0), Dropout(0.5, 3 + (1 << 32), 1), Dropout(0.5, 2, 2)):
        alike = (kept == kept_products(other, 2, 20, 50)).float().mean()
        assert abs(alike - 0.5) < 0.04


# ------------------------------------------------------------------------------------------------ tiles


def all_results(G: int, C: int, D: int, N: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    cos, sin = phases(C, N, dtype)
    x, E, dP = draw(G, C, D, dtype=dtype), draw(N, D, dtype=dtype), draw(G, C, C, dtype=dtype)
    dA, S, values, dS = (draw(G, size, D, dtype=dtype) for size in (C, N, C, N))
    X, R = op.excite(x, E, cos, sin)
    Z, dY, dX = op.gate_product_backward(dA, E.mT, x, E, X, DROPPED)
    results = [
        X,
        R,
        op.scores(R, None),
        op.scores_backward(dA, values, None),
        op.gate_product(x, E, X, DROPPED),
        Z,
        dY,
        dX.clone(),
    ]
    return [*results, op.excite_backward(dP, R, X, dX, cos, sin, (dA, S, values, dS))]


@pytest.mark.parametrize(
    ("sizes", "dtype"), [((1, 130, 40, 270), torch.float32), ((2, 128, 64, 256), torch.bfloat16)], ids=str
)
def test_how_the_work_is_cut_up_does_not_matter(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the tiles of the table
    expected = all_results(*sizes, dtype)
    use(Tiles(64, 64, 64, 4, 2), monkeypatch)  # tokens are read once for two tiles
    for result, wanted in zip(all_results(*sizes, dtype), expected, strict=True):
        assert close(result, wanted, dtype)
