"""On an NVIDIA GPU: the Triton operations of decay and the delta rule against those of PyTorch in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bdh.kernels.torch.gated_operations import TorchGatedOperations
from bdh.kernels.torch.workspace import Workspace
from bdh.kernels.triton.gated_operations import TritonGatedOperations

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CUDA = torch.device("cuda")
EXACT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SIZES = [(3, 32, 64, 128), (2, 77, 48, 200), (2, 512, 256, 4096), (1, 1100, 256, 1024)]  # G, C, D, N
Operation = Callable[[TritonGatedOperations | TorchGatedOperations, list[Tensor]], tuple[Tensor, ...]]


def assert_exact(operation: Operation, dtype: torch.dtype, tensors: list[Tensor], gates: list[Tensor]) -> None:
    """Compares results of tensors in a dtype, and gates in float32, with those of the same numbers in float64."""
    tensors = [each.to(dtype) for each in tensors]
    actual = operation(TritonGatedOperations(), [*tensors, *gates])
    plain = TorchGatedOperations(Workspace(CUDA))
    expected = operation(plain, [each.double() for each in (*tensors, *gates)])
    for result, wanted in zip(actual, expected, strict=True):
        assert (result.double() - wanted).norm() < EXACT[dtype] * wanted.norm()


def gates_of(G: int, C: int) -> tuple[Tensor, Tensor]:
    """Cumulative log-decay and write strength, (G, C)."""
    return -torch.rand(G, C, device=CUDA).mul(0.1).cumsum(-1), torch.rand(G, C, device=CUDA)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_scores_and_the_inverse_of_the_delta_rule(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    G, C, _, N = sizes
    torch.manual_seed(0)
    R = torch.randn(G, C, N, device=CUDA).relu()  # (G, C, N)
    assert_exact(
        lambda op, tensors: op.delta_scores(tensors[0], tensors[1], tensors[2], None), dtype, [R], [*gates_of(G, C)]
    )
    assert_exact(lambda op, tensors: (op.add_scores(tensors[0], tensors[1], None),), dtype, [R], [gates_of(G, C)[0]])


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients_of_scores_and_of_decay(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    G, C, D, N = sizes
    torch.manual_seed(0)
    R = torch.randn(G, C, N, device=CUDA).relu()  # (G, C, N)
    E, U = torch.randn(2, G, C, D, device=CUDA)  # (G, C, D)
    u, beta = gates_of(G, C)
    M, _, squares = TorchGatedOperations(Workspace(CUDA)).delta_scores(R, u, beta, None)  # (G, C, C)

    def backward(op: TritonGatedOperations | TorchGatedOperations, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        E, U, M, u, squares, diagonal = tensors
        dP, of_u = op.gated_scores_backward(E, U, u, squares, None, diagonal, M)  # (G, C, C), (G, C)
        assert of_u is not None
        return dP, of_u, op.difference_of_dots(u, E, U, squares, U, E)

    diagonal = torch.randn(G, C, device=CUDA)  # (G, C)
    assert_exact(backward, dtype, [E, U, M], [u, squares, diagonal])
