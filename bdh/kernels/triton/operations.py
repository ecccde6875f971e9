"""`bdh.kernels.layer_operations` on an NVIDIA GPU, with the kernels of `neuron_kernels` and `token_kernels`.

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
    """Tile sizes of a kernel.

    Attributes:
        rows: Tokens of a tile.
        columns: Neurons of a tile; tokens in "scores"; values (D) in "scan" and "advance", whose rows are pairs of
            neurons.
        depth: Terms of a sum that are loaded at a time.
        warps: Warps of a program.
        stages: Software pipelining stages.
        group: Rows of tiles that share the cache.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8


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
MIN_TILE = 16  # smallest side of a tile for the tensor cores


def dropout_numbers(dropout: Dropout) -> tuple[int, int]:
    """Return the kernels' arguments: a signed 32-bit key, and the number of 2^16 random values that are dropped."""
    key = splitmix64(splitmix64(dropout.seed) + dropout.head) >> 32
    return key - (1 << 31), min(round(dropout.p * (1 << 16)), (1 << 16) - 1)


def splitmix64(number: int) -> int:
    """Hash an integer to 64 bits."""
    z = (number + 1) * 0x9E3779B97F4A7C15 % (1 << 64)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % (1 << 64)
    return z ^ (z >> 31)


class TritonOperations:
    """See `Operations`. Fastest where cos and sin of tokens are views of one tensor (C, N/2, 2)."""

    def __init__(self) -> None:
        from bdh.kernels.triton.gated_operations import TritonGatedOperations

        self.gated_attention: GatedOperations = TritonGatedOperations()
        self.rope_cache: tuple[Tensor, ...] = ()  # cos, sin, and the result of `phases`

    def phases(self, cos: Tensor, sin: Tensor) -> Tensor:
        """Interleave cos and sin, (C, N/2, 2); cached for all heads and layers."""
        if not self.rope_cache or self.rope_cache[0] is not cos or self.rope_cache[1] is not sin:
            self.rope_cache = cos, sin, interleave(cos, sin)
        return self.rope_cache[2]

    def supports(self, dtype: torch.dtype) -> bool:
        return dtype in TILES["excite"]

    def excite(
        self, x: Tensor, E: Tensor, cos: Tensor, sin: Tensor, save: bool = False, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        (G, C, _), N = x.shape, len(E)
        X = x.new_empty(G, C, N)  # (G, C, N)
        R = torch.empty_like(X) if out is None else out  # (G, C, N)
        run_product("excite", neuron_kernels.excite, x, E, (self.phases(cos, sin), X, R, G * C, C, N))
        return X, R

    def scores(self, R: Tensor, documents: Tensor | None) -> Tensor:
        return pairs("scores", R, R, documents)[0]

    def scores_backward(self, dA: Tensor, x: Tensor, documents: Tensor | None) -> Tensor:
        return pairs("scores_backward", dA, x, documents)[0]

    def gate(
        self, A: Tensor, Ev: Tensor, X: Tensor, dropout: Dropout, Dec: Tensor, y: Tensor, save: bool = False
    ) -> Tensor | None:
        Z = self.gate_product(A, Ev, X, dropout)  # (G, C, N)
        add_product_(y, Z, Dec.mT)  # (G, C, D)
        return Z if save else None

    def gate_product(self, A: Tensor, Ev: Tensor, X: Tensor, dropout: Dropout) -> Tensor:
        """Return Z, (G, C, N)."""
        G, C, N = X.shape
        Z = torch.empty_like(X)  # (G, C, N)
        arguments = (X, Z, *dropout_numbers(dropout), G * C, N)
        run_product("gate", neuron_kernels.gate, A, Ev, arguments, DROPOUT=dropout.p > 0)
        return Z

    def gate_backward(
        self, dy: Tensor, Dec: Tensor, A: Tensor, Ev: Tensor, X: Tensor, dropout: Dropout, dDec: Tensor, dEv: Tensor
    ) -> tuple[Tensor, Tensor]:
        Z, dY, dX = self.gate_product_backward(dy, Dec, A, Ev, X, dropout)  # (G, C, N)
        fill_weight_gradients(dy, Z, dY, A, dDec, dEv)
        return dY, dX

    def gate_product_backward(
        self, dy: Tensor, Dec: Tensor, A: Tensor, Ev: Tensor, X: Tensor, dropout: Dropout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return Z, dY, dX, (G, C, N)."""
        G, C, N = X.shape
        dX = dy @ Dec  # (G, C, N)  dZ, overwritten
        Z, dY = torch.empty_like(X), torch.empty_like(X)  # (G, C, N)
        arguments = (X, dX, Z, dY, *dropout_numbers(dropout), G * C, N)
        run_product("gate_backward", neuron_kernels.gate_backward, A, Ev, arguments, DROPOUT=dropout.p > 0)
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
        """Return dY, dX, (G, C, N), from the saved X and Z."""
        G, C, N = X.shape
        dX = dy @ Dec  # (G, C, N)  dZ, overwritten
        dY = torch.empty_like(X)  # (G, C, N)
        tiles = tiles_for("gate_backward_saved", X, G * C, N, 1)
        run(
            neuron_kernels.gate_backward_saved, (cdiv(N, tiles.columns), cdiv(G * C, tiles.rows)), tiles,
            X, Z, dX, dY, G * C, N, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns,
            EVEN=all_divisible((G * C, tiles.rows), (N, tiles.columns)),
        )  # fmt: skip
        return dY, dX

    def excite_backward(
        self, dP: Tensor, R: Tensor, X: Tensor, dX: Tensor, cos: Tensor, sin: Tensor, terms: SynapseTerms | None
    ) -> Tensor:
        dR = torch.bmm(dP, R)  # (G, C, N)
        if terms is not None:
            dA, S, values, dS = terms
            dR.baddbmm_(dA, S.mT).baddbmm_(values, dS.mT)  # (G, C, N)
        G, C, N = X.shape
        tiles = tiles_for("excite_backward", X, C, N, 1)
        run(
            neuron_kernels.excite_backward, (cdiv(N, tiles.columns), cdiv(C, tiles.rows), G), tiles,
            dR, X, dX, self.phases(cos, sin), C, N, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns,
            EVEN=all_divisible((C, tiles.rows), (N, tiles.columns)),
        )  # fmt: skip
        return dX

    def scan(
        self, U: Tensor, S: Tensor | None, cos: Tensor, sin: Tensor, retention: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return scan(U, S, cos, -sin, retention, back=False)

    def scan_backward(
        self, V: Tensor, dS: Tensor | None, cos: Tensor, sin: Tensor, retention: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return scan(V, dS, cos, sin, retention, back=True)

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

    def add_norm_backward(self, gradient: Tensor, saved: tuple[Tensor, ...], eps: float) -> tuple[Tensor, Tensor]:
        x, y = saved
        dx, dy = torch.empty_like(x), torch.empty_like(y)  # (B, T, D)
        over_rows(token_kernels.add_norm_backward, x.dtype, x.shape, gradient, x, y, dx, dy, eps)
        return dx, dy


def fill_weight_gradients(dy: Tensor, Z: Tensor, dY: Tensor, A: Tensor, dDec: Tensor, dEv: Tensor) -> None:
    """Fill dDec (D, N) with dy^T Z and dEv (N, D) with dY^T A."""
    product_into(dDec.mT, Z.flatten(0, 1).mT, dy.flatten(0, 1))  # (N, D)
    product_into(dEv, dY.flatten(0, 1).mT, A.flatten(0, 1))  # (N, D)


def run_product(
    name: str, kernel: Any, a: Tensor, b: Tensor, arguments: tuple[object, ...], **constants: object
) -> None:
    """Launch a kernel over tiles of a b^T: a (G, C, D), b (N, D), its other arguments, and its constants after D."""
    M, (N, D) = a.shape[:-1].numel(), b.shape
    tiles = tiles_for(name, a, M, N, D)
    run(
        kernel, (cdiv(M, tiles.rows) * cdiv(N, tiles.columns),), tiles, a, b, *arguments, D=D, **constants,
        BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=tiles.depth, GROUP=tiles.group,
        EVEN=all_divisible((M, tiles.rows), (N, tiles.columns), (D, tiles.depth)),
    )  # fmt: skip


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
    """Compute tril(a b^T, -1), 0 where documents differ; "scores_backward" adds its transpose: (G, C, K) -> (G, C, C).

    Other arguments as for the kernel, `token_kernels.pairs`: M (G, C, C), the others (G, C) float32.

    Returns:
        The scores (G, C, C), and with M the row sums minus the column sums of a b^T * M, (G, C) float32.
    """
    G, C, K = a.shape
    P = a.new_empty(G, C, C)  # (G, C, C)
    tiles = tiles_for(kernel, a, C, C, K)
    side = cdiv(C, tiles.rows)
    differences = None if M is None else torch.empty(G, side, C, device=a.device)  # (G, side, C) float32
    run(
        token_kernels.pairs, (side * (side + 1) // 2, G), tiles,
        a, b, documents, u, squares, diagonal, M, P, differences, squares_out, C, K,
        SAME=a is b, BOTH_WAYS=kernel == "scores_backward",
        BLOCK=tiles.rows, BLOCK_K=tiles.depth, EVEN=all_divisible((C, tiles.rows), (K, tiles.depth)),
    )  # fmt: skip
    return P, None if differences is None else differences.sum(1)


def scan(
    updates: Tensor, initial: Tensor | None, cos: Tensor, sin: Tensor, retention: Tensor | None, back: bool
) -> tuple[Tensor, Tensor]:
    """Return the state when each chunk is added, (B, c, N, D), and the state at the end, (B, N, D) float32."""
    B, c, N, D = updates.shape
    states, end = torch.empty_like(updates), torch.empty(B, N, D, device=updates.device)  # (B, c, N, D), (B, N, D)
    tiles = TILES["scan"][updates.dtype]
    columns = min(tiles.columns, triton.next_power_of_2(D))
    run(
        token_kernels.scan, (cdiv(N // 2, tiles.rows), cdiv(D, columns), B), tiles,
        updates, initial, cos, sin, retention, states, end, c, N // 2,
        D=D, BACK=back, PAIRS=tiles.rows, BLOCK_D=columns,
    )  # fmt: skip
    return states, end


def over_rows(kernel: Any, dtype: torch.dtype, shape: torch.Size, *arguments: object) -> None:
    """Launch a kernel over rows of a tensor (…, D)."""
    M, D = shape[:-1].numel(), shape[-1]
    tiles = TILES["norm"][dtype]
    run(
        kernel, (cdiv(M, tiles.rows),), tiles, *arguments, M, D,
        ROWS=tiles.rows, WIDTH=triton.next_power_of_2(D),
    )  # fmt: skip


def interleave(cos: Tensor, sin: Tensor) -> Tensor:
    """Interleave cos and sin, (C, N/2, 2); without a copy if they are views of such a tensor."""
    C, pairs = cos.shape
    if cos.stride() == sin.stride() == (2 * pairs, 2) and sin.data_ptr() == cos.data_ptr() + cos.itemsize:
        return cos.as_strided((C, pairs, 2), (2 * pairs, 2, 1))  # (C, N/2, 2)
    return torch.stack((cos, sin), -1)  # (C, N/2, 2)


def tiles_for(kernel: str, like: Tensor, rows: int, columns: int, depth: int) -> Tiles:
    """Return a kernel's tiles, limited to the size of the tensors and of shared memory."""
    return limit_tiles(TILES[kernel][like.dtype], rows, columns, depth, shared_memory(like.device) // like.itemsize)


@lru_cache
def limit_tiles(tiles: Tiles, rows: int, columns: int, depth: int, max_elements: int) -> Tiles:
    side, across, deep = (max(MIN_TILE, triton.next_power_of_2(size)) for size in (rows, columns, depth))
    tiles = replace(tiles, rows=min(tiles.rows, side), columns=min(tiles.columns, across), depth=min(tiles.depth, deep))
    while (tiles.rows + tiles.columns) * tiles.depth * tiles.stages > max_elements and tiles.stages > 1:
        tiles = replace(tiles, stages=tiles.stages - 1)
    while (tiles.rows + tiles.columns) * tiles.depth * tiles.stages > max_elements:
        tiles = replace(tiles, depth=tiles.depth // 2)
    return tiles


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory for a program."""
    if device.type != "cuda":  # Triton's interpreter
        return 1 << 30
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return int(properties["max_shared_mem"])


def all_divisible(*sizes: tuple[int, int]) -> bool:
    """Return whether each size is a multiple of its block."""
    return all(size % block == 0 for size, block in sizes)


def run(kernel: Any, grid: tuple[int, ...], tiles: Tiles, *arguments: object, **constants: object) -> None:
    assert all(argument.is_contiguous() for argument in arguments if isinstance(argument, Tensor))
    launch(kernel, grid, arguments, constants, num_warps=tiles.warps, num_stages=tiles.stages)
