"""The operations of `bdh.kernels.operations` on an NVIDIA GPU: what launches the Triton kernels of `bdh.kernels.train`.

Shapes: G chunks of C tokens, D `n_embd`, N neurons of the head, M = G * C. Tensors are contiguous and of one dtype,
bfloat16 or float32; sums are in float32.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from bdh.kernels import train
from bdh.kernels.operations import Dropout, Past


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts up its work.

    Attributes:
        rows: Tokens of a tile.
        columns: Of a tile: neurons; tokens in `scores`; values (D) in the scans, whose rows are pairs of neurons.
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
    "excite_backward": {torch.bfloat16: Tiles(128, 128, 64, 8, 4, 4), torch.float32: Tiles(64, 64, 32, 4, 2)},
    "scan": {torch.bfloat16: Tiles(4, 256, 0, 4, 2), torch.float32: Tiles(4, 256, 0, 4, 2)},
}
SMALLEST = 16  # side of a tile that the matrix units take


def dropout_numbers(dropout: Dropout) -> tuple[int, int, float]:
    """What kernels need: a key of 32 bits (signed), which of 2^16 random numbers drop, and what others multiply by."""
    key = scramble(scramble(dropout.seed) + dropout.head) >> 32
    return key - (1 << 31), round(dropout.p * (1 << 16)), 1 / (1 - dropout.p)


def scramble(number: int) -> int:
    """An integer to 64 bits that all depend on all of its own (the mixing of splitmix64)."""
    z = (number + 1) * 0x9E3779B97F4A7C15 % (1 << 64)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % (1 << 64)
    return z ^ (z >> 31)


class TritonOperations:
    """One head's operations; what each is, its shapes and its dtypes are in each method's words."""

    def excite(self, x: Tensor, E: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """X = relu(x E^T) and R = rope(X).

        Args:
            x: (G, C, D).
            E: (N, D).
            cos: (C, N/2), of the phases of a chunk's tokens; `sin` likewise. Fastest where both are views of one tensor
                (C, N/2, 2).

        Returns:
            X and R, (G, C, N).
        """
        G, C, D = x.shape
        N = E.shape[0]
        X, R = x.new_empty(G, C, N), x.new_empty(G, C, N)  # (G, C, N)
        tiles = fitted("excite", x.dtype, G * C, N, D)
        launch(
            train.excite, (triton.cdiv(G * C, tiles.rows) * triton.cdiv(N, tiles.columns),), tiles,
            x, E, side_by_side(cos, sin), X, R, G * C, C, N, D,
            BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=tiles.depth, GROUP=tiles.group,
            EVEN=divide((G * C, tiles.rows), (N, tiles.columns), (D, tiles.depth)),
        )  # fmt: skip
        return X, R

    def scores(self, R: Tensor, documents: Tensor | None) -> Tensor:
        """P = tril(R R^T, -1), 0 where documents differ.

        Args:
            R: (G, C, N).
            documents: (G, C), integers; None: all tokens are of one.

        Returns:
            (G, C, C).
        """
        G, C, N = R.shape
        P = R.new_empty(G, C, C)  # (G, C, C)
        tiles = fitted("scores", R.dtype, C, C, N)
        side = triton.cdiv(C, tiles.rows)
        launch(
            train.scores, (side * (side + 1) // 2, G), tiles, R, documents, P, C, N,
            BLOCK=tiles.rows, BLOCK_K=tiles.depth, EVEN=divide((C, tiles.rows), (N, tiles.depth)),
        )  # fmt: skip
        return P

    def gate(self, A: Tensor, Ev: Tensor, X: Tensor, dropout: Dropout) -> Tensor:
        """Z = dropout(X o relu(A Ev^T)).

        Args:
            A: Normalised, (G, C, D).
            Ev: (N, D).
            X: (G, C, N).
            dropout: What is dropped.

        Returns:
            (G, C, N).
        """
        G, C, N = X.shape
        D = A.shape[2]
        Z = torch.empty_like(X)  # (G, C, N)
        tiles = fitted("gate", A.dtype, G * C, N, D)
        launch(
            train.gate, (triton.cdiv(G * C, tiles.rows) * triton.cdiv(N, tiles.columns),), tiles,
            A, Ev, X, Z, *dropout_numbers(dropout), G * C, N, D, DROPOUT=dropout.p > 0,
            BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=tiles.depth, GROUP=tiles.group,
            EVEN=divide((G * C, tiles.rows), (N, tiles.columns), (D, tiles.depth)),
        )  # fmt: skip
        return Z

    def gate_backward(
        self, dy: Tensor, Dec: Tensor, A: Tensor, Ev: Tensor, X: Tensor, dropout: Dropout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Z again, the gradient before relu(A Ev^T), and the gradient of X, from that of Z Dec^T.

        Args:
            dy: (G, C, D).
            Dec: (D, N); fastest where its transpose is contiguous, else it is copied so.
            A: Normalised, (G, C, D).
            Ev: (N, D).
            X: (G, C, N).
            dropout: As for `gate`.

        Returns:
            Z, dY, dX, (G, C, N).
        """
        G, C, N = X.shape
        D = A.shape[2]
        Z, dY, dX = torch.empty_like(X), torch.empty_like(X), torch.empty_like(X)  # (G, C, N)
        tiles = fitted("gate_backward", A.dtype, G * C, N, D)
        launch(
            train.gate_backward, (triton.cdiv(G * C, tiles.rows) * triton.cdiv(N, tiles.columns),), tiles,
            dy, Dec.mT.contiguous(), A, Ev, X, Z, dY, dX, *dropout_numbers(dropout),
            G * C, N, D, DROPOUT=dropout.p > 0,
            BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=tiles.depth, GROUP=tiles.group,
            EVEN=divide((G * C, tiles.rows), (N, tiles.columns), (D, tiles.depth)),
        )  # fmt: skip
        return Z, dY, dX

    def excite_backward(
        self, dP: Tensor, R: Tensor, X: Tensor, dX: Tensor, cos: Tensor, sin: Tensor, past: Past | None
    ) -> Tensor:
        """The gradient before relu(x E^T): (dX + rope^-1(dR)) where X > 0, dR = dP R, and with a past
        + dA S^T + values dS^T.

        Args:
            dP: (G, C, C), symmetric: the gradient of the scores and its transpose.
            R: (G, C, N).
            X: (G, C, N).
            dX: (G, C, N); overwritten with the result.
            cos: (C, N/2); `sin` likewise.
            past: dA (G, C, D), S (G, N, D), values (G, C, D) and dS (G, N, D), or None where nothing is carried.

        Returns:
            (G, C, N): `dX`.
        """
        G, C, N = X.shape
        dA, S, values, dS = past or (None, None, None, None)
        D = 0 if dA is None else dA.shape[2]
        tiles = fitted("excite_backward", X.dtype, C, N, max(C, D))
        launch(
            train.excite_backward, (triton.cdiv(C, tiles.rows) * triton.cdiv(N, tiles.columns), G), tiles,
            dP, R, X, dX, side_by_side(cos, sin), dA, S, values, dS, C, N, D,
            BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=tiles.depth, GROUP=tiles.group,
            EVEN=divide((C, tiles.rows), (N, tiles.columns), (C, tiles.depth), (D, tiles.depth)),
        )  # fmt: skip
        return dX

    def scan(self, U: Tensor, S: Tensor | None, cos: Tensor, sin: Tensor, kept: Tensor | None) -> Tensor:
        """The synapses from chunk to chunk: S^{c+1} = rope_{-C}(kept_c S^c + U_c).

        Args:
            U: (B, c, N, D), what each chunk writes; overwritten with the synapses before it.
            S: Before the first chunk, (B, N, D) float32, or None: zeros.
            cos: (N/2) float32, of the phases of C tokens; `sin` likewise.
            kept: (B, c) float32, how much of what was there stays after each chunk, or None: all.

        Returns:
            After the last chunk, (B, N, D) float32.
        """
        return self.scan_with(train.scan, U, S, cos, sin, kept)

    def scan_backward(self, V: Tensor, dS_end: Tensor | None, cos: Tensor, sin: Tensor, kept: Tensor | None) -> Tensor:
        """The gradients of `scan`, from the last chunk to the first: G_c = rope_{+C}(g^{c+1}), g^c = kept_c G_c + V_c.

        Args:
            V: (B, c, N, D), the gradient of the synapses before each chunk by what read them there; overwritten with
                that of what the chunk writes, G_c.
            dS_end: Of the synapses after the last chunk, (B, N, D) float32, or None: zeros.
            cos, sin, kept: As for `scan`.

        Returns:
            The gradient of the synapses before the first chunk, (B, N, D) float32.
        """
        return self.scan_with(train.scan_backward, V, dS_end, cos, sin, kept)

    def scan_with(
        self, kernel: Any, chunks: Tensor, begin: Tensor | None, cos: Tensor, sin: Tensor, kept: Tensor | None
    ) -> Tensor:
        B, c, N, D = chunks.shape
        end = torch.empty(B, N, D, device=chunks.device)  # (B, N, D) float32
        tiles = TILES["scan"][chunks.dtype]
        columns = min(tiles.columns, triton.next_power_of_2(D))
        launch(
            kernel, (triton.cdiv(N // 2, tiles.rows), triton.cdiv(D, columns), B), tiles,
            chunks, begin, cos, sin, kept, end, c, N // 2, D, PAIRS=tiles.rows, BLOCK_D=columns,
        )  # fmt: skip
        return end


def side_by_side(cos: Tensor, sin: Tensor) -> Tensor:
    """cos and sin of each pair next to each other, (C, N/2, 2); not copied if they lie so."""
    C, pairs = cos.shape
    if cos.stride() == sin.stride() == (2 * pairs, 2) and sin.data_ptr() == cos.data_ptr() + cos.itemsize:
        return cos.as_strided((C, pairs, 2), (2 * pairs, 2, 1))  # (C, N/2, 2)
    return torch.stack((cos, sin), -1)  # (C, N/2, 2)


def fitted(kernel: str, dtype: torch.dtype, rows: int, columns: int, depth: int) -> Tiles:
    """A kernel's tiles, no larger than what there is to do."""
    tiles = TILES[kernel][dtype]
    side, across, deep = (max(SMALLEST, triton.next_power_of_2(size)) for size in (rows, columns, depth))
    return replace(tiles, rows=min(tiles.rows, side), columns=min(tiles.columns, across), depth=min(tiles.depth, deep))


def divide(*sizes: tuple[int, int]) -> bool:
    """Whether each of some sizes is a multiple of its block."""
    return all(size % block == 0 for size, block in sizes)


def launch(kernel: Any, grid: tuple[int, ...], tiles: Tiles, *arguments: object, **constants: object) -> None:
    assert all(argument.is_contiguous() for argument in arguments if isinstance(argument, Tensor))
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    if tiles.registers is not None:
        options["maxnreg"] = tiles.registers
    kernel[grid](*arguments, **constants, **options)
