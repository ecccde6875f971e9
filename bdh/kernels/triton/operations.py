"""The operations of `bdh.kernels.layer_operations` on an NVIDIA GPU: launches the Triton kernels of `neuron_kernels`
and `bdh.kernels.triton.token_kernels`.

Shapes: G chunks of C tokens, D `n_embd`, N neurons of the head, M = G * C. Tensors are contiguous and of one dtype,
bfloat16 or float32; sums are in float32.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from bdh.kernels.gated_operations import GatedOperations
from bdh.kernels.layer_operations import Dropout, SynapseTerms
from bdh.kernels.products import add_product_, product_into
from bdh.kernels.triton import neuron_kernels, token_kernels
from bdh.kernels.triton.launch import cdiv, launch


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts up its work.

    Attributes:
        rows: Tokens of a tile.
        columns: Of a tile: neurons; tokens in `scores`; values (D) in "scan" and "advance", whose rows are pairs of
            neurons.
        depth: Terms of the sums taken at a time.
        warps: Of a program.
        stages: Steps of a loop that are loaded ahead.
        group: Rows of tiles that are done before the next, to share the cache.
        registers: That a thread may have at most; None leaves it to the compiler.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8
    registers: int | None = None


# By kernel, for bfloat16 and for float32; `benchmarks/kernel_speed.py --tune` measures others.
TILES: dict[str, dict[torch.dtype, Tiles]] = {
    "excite": {torch.bfloat16: Tiles(128, 128, 64, 8, 3, 128), torch.float32: Tiles(64, 64, 32, 4, 2)},
    "scores": {torch.bfloat16: Tiles(128, 128, 128, 8, 3), torch.float32: Tiles(64, 64, 32, 4, 2)},
    "gate": {torch.bfloat16: Tiles(128, 128, 64, 8, 3, 1), torch.float32: Tiles(64, 64, 32, 4, 2)},
    "gate_backward": {torch.bfloat16: Tiles(64, 64, 64, 4, 3, 1), torch.float32: Tiles(64, 64, 32, 4, 2)},
    "scores_backward": {torch.bfloat16: Tiles(64, 64, 64, 4, 3), torch.float32: Tiles(64, 64, 32, 4, 2)},
    "excite_backward": {torch.bfloat16: Tiles(4, 256, 0, 8, 1), torch.float32: Tiles(16, 256, 0, 4, 1)},
    "gate_backward_saved": {torch.bfloat16: Tiles(4, 256, 0, 8, 1), torch.float32: Tiles(16, 256, 0, 4, 1)},
    "norm": {torch.bfloat16: Tiles(8, 0, 0, 4, 1), torch.float32: Tiles(4, 0, 0, 4, 1)},
    "advance": {torch.bfloat16: Tiles(8, 128, 0, 1, 1), torch.float32: Tiles(8, 128, 0, 1, 1)},
    "scan": {torch.bfloat16: Tiles(2, 256, 0, 1, 2), torch.float32: Tiles(2, 256, 0, 1, 2)},
}
SMALLEST = 16  # side of a tile that the matrix units take


def dropout_numbers(dropout: Dropout) -> tuple[int, int]:
    """What kernels need: a key of 32 bits (signed), and how many of 2^16 random numbers drop."""
    key = scramble(scramble(dropout.seed) + dropout.head) >> 32
    return key - (1 << 31), min(round(dropout.p * (1 << 16)), (1 << 16) - 1)


def scramble(number: int) -> int:
    """An integer to 64 bits that all depend on all of its own (the mixing of splitmix64)."""
    z = (number + 1) * 0x9E3779B97F4A7C15 % (1 << 64)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % (1 << 64)
    return z ^ (z >> 31)


class TritonOperations:
    """See `Operations`. Fastest where cos and sin of tokens are views of one tensor (C, N/2, 2)."""

    def __init__(self) -> None:
        from bdh.kernels.triton.gated_operations import TritonGatedOperations

        self.gated_attention: GatedOperations = TritonGatedOperations()
        self.turning: tuple[Tensor, ...] = ()  # cos and sin, and what `phases` has made of them

    def phases(self, cos: Tensor, sin: Tensor) -> Tensor:
        """cos and sin of each pair next to each other, (C, N/2, 2): the same for all heads and layers."""
        if not self.turning or self.turning[0] is not cos or self.turning[1] is not sin:
            self.turning = cos, sin, side_by_side(cos, sin)
        return self.turning[2]

    def supports(self, dtype: torch.dtype) -> bool:
        return dtype in TILES["excite"]

    def excite(
        self, x: Tensor, E: Tensor, cos: Tensor, sin: Tensor, keep: bool = False, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        G, C, D = x.shape
        N = E.shape[0]
        X = x.new_empty(G, C, N)  # (G, C, N)
        R = torch.empty_like(X) if out is None else out  # (G, C, N)
        tiles = fitted("excite", x, G * C, N, D)
        run(
            neuron_kernels.excite, (cdiv(G * C, tiles.rows) * cdiv(N, tiles.columns),), tiles,
            x, E, self.phases(cos, sin), X, R, G * C, C, N,
            D=D, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=tiles.depth, GROUP=tiles.group,
            EVEN=divide((G * C, tiles.rows), (N, tiles.columns), (D, tiles.depth)),
        )  # fmt: skip
        return X, R

    def scores(self, R: Tensor, documents: Tensor | None) -> Tensor:
        return pairs("scores", R, R, documents)[0]

    def scores_backward(self, dA: Tensor, x: Tensor, documents: Tensor | None) -> Tensor:
        return pairs("scores_backward", dA, x, documents)[0]

    def gate(
        self, A: Tensor, Ev: Tensor, X: Tensor, dropout: Dropout, Dec: Tensor, y: Tensor, keep: bool = False
    ) -> Tensor | None:
        Z = self.gate_product(A, Ev, X, dropout)  # (G, C, N)
        add_product_(y, Z, Dec.mT)  # (G, C, D)
        return Z if keep else None

    def gate_product(self, A: Tensor, Ev: Tensor, X: Tensor, dropout: Dropout) -> Tensor:
        """Z, (G, C, N)."""
        G, C, N = X.shape
        D = A.shape[2]
        Z = torch.empty_like(X)  # (G, C, N)
        tiles = fitted("gate", A, G * C, N, D)
        run(
            neuron_kernels.gate, (cdiv(G * C, tiles.rows) * cdiv(N, tiles.columns),), tiles,
            A, Ev, X, Z, *dropout_numbers(dropout), G * C, N,
            D=D, DROPOUT=dropout.p > 0,
            BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=tiles.depth, GROUP=tiles.group,
            EVEN=divide((G * C, tiles.rows), (N, tiles.columns), (D, tiles.depth)),
        )  # fmt: skip
        return Z

    def gate_backward(
        self,
        dy: Tensor,
        Dec: Tensor,
        A: Tensor,
        Ev: Tensor,
        X: Tensor,
        dropout: Dropout,
        dDec: Tensor,
        dEv: Tensor,
    ) -> tuple[Tensor, Tensor]:
        Z, dY, dX = self.gate_product_backward(dy, Dec, A, Ev, X, dropout)  # (G, C, N)
        fill_weight_gradients(dy, Z, dY, A, dDec, dEv)
        return dY, dX

    def gate_product_backward(
        self, dy: Tensor, Dec: Tensor, A: Tensor, Ev: Tensor, X: Tensor, dropout: Dropout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Z, dY, dX, (G, C, N)."""
        G, C, N = X.shape
        D = A.shape[2]
        dX = dy @ Dec  # (G, C, N)  dZ, for the time being
        Z, dY = torch.empty_like(X), torch.empty_like(X)  # (G, C, N)
        tiles = fitted("gate_backward", A, G * C, N, D)
        run(
            neuron_kernels.gate_backward, (cdiv(G * C, tiles.rows) * cdiv(N, tiles.columns),), tiles,
            A, Ev, X, dX, Z, dY, *dropout_numbers(dropout), G * C, N,
            D=D, DROPOUT=dropout.p > 0,
            BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=tiles.depth, GROUP=tiles.group,
            EVEN=divide((G * C, tiles.rows), (N, tiles.columns), (D, tiles.depth)),
        )  # fmt: skip
        return Z, dY, dX

    def should_save_activations(self, C: int, N: int, D: int, dtype: torch.dtype) -> bool:
        return False

    def gate_backward_saved(
        self, dy: Tensor, Dec: Tensor, A: Tensor, X: Tensor, Z: Tensor, dDec: Tensor, dEv: Tensor
    ) -> tuple[Tensor, Tensor]:
        dY, dX = self.gate_product_backward_saved(dy, Dec, X, Z)  # (G, C, N)
        fill_weight_gradients(dy, Z, dY, A, dDec, dEv)
        return dY, dX

    def gate_product_backward_saved(self, dy: Tensor, Dec: Tensor, X: Tensor, Z: Tensor) -> tuple[Tensor, Tensor]:
        """dY, dX, (G, C, N)."""
        G, C, N = X.shape
        dX = dy @ Dec  # (G, C, N)  dZ, for the time being
        dY = torch.empty_like(X)  # (G, C, N)
        tiles = fitted("gate_backward_saved", X, G * C, N, 1)
        run(
            neuron_kernels.gate_backward_saved, (cdiv(N, tiles.columns), cdiv(G * C, tiles.rows)), tiles,
            X, Z, dX, dY, G * C, N, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns,
            EVEN=divide((G * C, tiles.rows), (N, tiles.columns)),
        )  # fmt: skip
        return dY, dX

    def excite_backward(
        self, dP: Tensor, R: Tensor, X: Tensor, dX: Tensor, cos: Tensor, sin: Tensor, past: SynapseTerms | None
    ) -> Tensor:
        dR = torch.bmm(dP, R)  # (G, C, N)
        if past is not None:
            dA, S, values, dS = past
            dR.baddbmm_(dA, S.mT).baddbmm_(values, dS.mT)  # (G, C, N)
        G, C, N = X.shape
        tiles = fitted("excite_backward", X, C, N, 1)
        run(
            neuron_kernels.excite_backward, (cdiv(N, tiles.columns), cdiv(C, tiles.rows), G), tiles,
            dR, X, dX, self.phases(cos, sin), C, N, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns,
            EVEN=divide((C, tiles.rows), (N, tiles.columns)),
        )  # fmt: skip
        return dX

    def scan(self, U: Tensor, S: Tensor | None, cos: Tensor, sin: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        return scan(U, S, cos, -sin, kept, back=False)

    def scan_backward(
        self, V: Tensor, dS: Tensor | None, cos: Tensor, sin: Tensor, kept: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return scan(V, dS, cos, sin, kept, back=True)

    def norm(self, A: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        result = torch.empty_like(A)  # (G, C, D)
        rstd = A.new_empty(*A.shape[:-1], 1, dtype=torch.float32)  # (G, C, 1)
        over_rows(token_kernels.norm, A.dtype, A.shape, A, result, rstd, eps)
        return result, rstd

    def norm_backward(self, gradient: Tensor, A: Tensor, rstd: Tensor) -> Tensor:
        result = torch.empty_like(gradient)  # (G, C, D)
        over_rows(token_kernels.norm_backward, A.dtype, A.shape, gradient, A, rstd, result)
        return result

    def add_norm(self, x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, tuple[Tensor, ...]]:
        result = torch.empty_like(x)  # (B, T, D)
        over_rows(token_kernels.add_norm, x.dtype, x.shape, x, y, result, eps)
        return result, (x, y)

    def add_norm_backward(self, gradient: Tensor, kept: tuple[Tensor, ...], eps: float) -> tuple[Tensor, Tensor]:
        x, y = kept
        dx, dy = torch.empty_like(x), torch.empty_like(y)  # (B, T, D)
        over_rows(token_kernels.add_norm_backward, x.dtype, x.shape, gradient, x, y, dx, dy, eps)
        return dx, dy


def fill_weight_gradients(dy: Tensor, Z: Tensor, dY: Tensor, A: Tensor, dDec: Tensor, dEv: Tensor) -> None:
    """Fills dDec (D, N) with dy^T Z and dEv (N, D) with dY^T A."""
    product_into(dDec.mT, Z.flatten(0, 1).mT, dy.flatten(0, 1))  # (N, D)
    product_into(dEv, dY.flatten(0, 1).mT, A.flatten(0, 1))  # (N, D)


def pairs(
    kernel: str,
    a: Tensor,
    b: Tensor,
    documents: Tensor | None,
    *,
    u: Tensor | None = None,
    squares: Tensor | None = None,
    diagonal: Tensor | None = None,
    M: Tensor | None = None,
    squares_out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """tril(a b^T, -1), 0 where documents differ; of "scores_backward" plus its transpose. (G, C, K) -> (G, C, C).

    The others as for the kernel, `bdh.kernels.triton.token_kernels.pairs`: M (G, C, C), the rest (G, C) float32.

    Returns:
        The scores (G, C, C), and with M the sums over rows minus those over columns of a b^T * M, (G, C) float32.
    """
    G, C, K = a.shape
    P = a.new_empty(G, C, C)  # (G, C, C)
    tiles = fitted(kernel, a, C, C, K)
    side = cdiv(C, tiles.rows)
    differences = None if M is None else torch.empty(G, side, C, device=a.device)  # (G, side, C) float32
    run(
        token_kernels.pairs, (side * (side + 1) // 2, G), tiles,
        a, b, documents, u, squares, diagonal, M, P, differences, squares_out, C, K,
        SAME=a is b, BOTH_WAYS=kernel == "scores_backward",
        BLOCK=tiles.rows, BLOCK_K=tiles.depth, EVEN=divide((C, tiles.rows), (K, tiles.depth)),
    )  # fmt: skip
    return P, None if differences is None else differences.sum(1)


def scan(
    new: Tensor, begin: Tensor | None, cos: Tensor, sin: Tensor, kept: Tensor | None, back: bool
) -> tuple[Tensor, Tensor]:
    """What was there when each chunk's came in, (B, c, N, D), and what is there at the end, (B, N, D) float32."""
    B, c, N, D = new.shape
    there, end = torch.empty_like(new), torch.empty(B, N, D, device=new.device)  # (B, c, N, D), (B, N, D)
    tiles = TILES["scan"][new.dtype]
    columns = min(tiles.columns, triton.next_power_of_2(D))
    run(
        token_kernels.scan, (cdiv(N // 2, tiles.rows), cdiv(D, columns), B), tiles,
        new, begin, cos, sin, kept, there, end, c, N // 2,
        D=D, BACK=back, PAIRS=tiles.rows, BLOCK_D=columns,
    )  # fmt: skip
    return there, end


def over_rows(kernel: Any, dtype: torch.dtype, shape: torch.Size, *arguments: object) -> None:
    """A kernel that takes whole rows of some (…, D) numbers."""
    M, D = shape[:-1].numel(), shape[-1]
    tiles = TILES["norm"][dtype]
    run(
        kernel, (cdiv(M, tiles.rows),), tiles, *arguments, M, D,
        ROWS=tiles.rows, WIDTH=triton.next_power_of_2(D),
    )  # fmt: skip


def side_by_side(cos: Tensor, sin: Tensor) -> Tensor:
    """cos and sin of each pair next to each other, (C, N/2, 2); not copied if they lie so."""
    C, pairs = cos.shape
    if cos.stride() == sin.stride() == (2 * pairs, 2) and sin.data_ptr() == cos.data_ptr() + cos.itemsize:
        return cos.as_strided((C, pairs, 2), (2 * pairs, 2, 1))  # (C, N/2, 2)
    return torch.stack((cos, sin), -1)  # (C, N/2, 2)


def fitted(kernel: str, like: Tensor, rows: int, columns: int, depth: int) -> Tiles:
    """A kernel's tiles, no larger than what there is to do, and what they need no more than shared memory holds."""
    return fit(TILES[kernel][like.dtype], rows, columns, depth, shared_memory(like.device) // like.itemsize)


@lru_cache
def fit(tiles: Tiles, rows: int, columns: int, depth: int, room: int) -> Tiles:
    side, across, deep = (max(SMALLEST, triton.next_power_of_2(size)) for size in (rows, columns, depth))
    tiles = replace(tiles, rows=min(tiles.rows, side), columns=min(tiles.columns, across), depth=min(tiles.depth, deep))
    while (tiles.rows + tiles.columns) * tiles.depth * tiles.stages > room and tiles.stages > 1:
        tiles = replace(tiles, stages=tiles.stages - 1)
    while (tiles.rows + tiles.columns) * tiles.depth * tiles.stages > room:
        tiles = replace(tiles, depth=tiles.depth // 2)
    return tiles


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program can have of it."""
    if device.type != "cuda":  # Triton's interpreter
        return 1 << 30
    found = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return int(found["max_shared_mem"])


def divide(*sizes: tuple[int, int]) -> bool:
    """Whether each of some sizes is a multiple of its block."""
    return all(size % block == 0 for size, block in sizes)


def run(kernel: Any, grid: tuple[int, ...], tiles: Tiles, *arguments: object, **constants: object) -> None:
    assert all(argument.is_contiguous() for argument in arguments if isinstance(argument, Tensor))
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    if tiles.registers is not None:
        options["maxnreg"] = tiles.registers
    launch(kernel, grid, arguments, constants, **options)
