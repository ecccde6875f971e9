"""The operations of `bdh.kernels.gated_operations` on a GPU: launches the kernels of `gated_kernels`."""

import torch
import triton
from torch import Tensor

from bdh.kernels.torch.gated_operations import chunk_order, start_scan
from bdh.kernels.triton import gated_kernels
from bdh.kernels.triton.launch import cdiv, launch
from bdh.kernels.triton.operations import TILES, pairs

SIDE = 64  # rows of a block of the inverse


class TritonGatedOperations:
    """See `GatedOperations`."""

    all_heads_per_call = True

    def add_scores(self, R: Tensor, u: Tensor, documents: Tensor | None) -> Tensor:
        return pairs("scores", R, R, documents, u=u)[0]

    def delta_scores(
        self, R: Tensor, u: Tensor, beta: Tensor, documents: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        squares = torch.empty_like(u)  # (G, C)
        M, _ = pairs("scores", R, R, documents, squares_out=squares)  # (G, C, C)  scaled below
        inverse = torch.empty_like(M)  # (G, C, C)
        G, C, _ = M.shape
        blocks = cdiv(C, SIDE)
        launch(
            gated_kernels.scale_and_invert_diagonal, (blocks, G), (M, squares, u, beta, inverse, C),
            {"SIDE": SIDE, "BASE": SIDE // 4}, num_warps=4,
        )  # fmt: skip
        if blocks > 1:
            launch(gated_kernels.invert_columns, (blocks - 1, G), (M, beta, inverse, C), {"SIDE": SIDE}, num_warps=4)
        return M, inverse, squares

    def gated_scores_backward(
        self,
        E: Tensor,
        U: Tensor,
        u: Tensor,
        squares: Tensor | None,
        documents: Tensor | None,
        diagonal: Tensor | None,
        M: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        return pairs("scores_backward", E, U, documents, u=u, squares=squares, diagonal=diagonal, M=M)

    def scaled_matrix(self, X: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        out = torch.empty_like(X)  # (G, C, C)
        over_chunks(gated_kernels.scaled_matrix, out, X, rows, columns, out)
        return out

    def scaled_difference(self, w: Tensor, x: Tensor, r: Tensor | None = None, Q: Tensor | None = None) -> Tensor:
        out = torch.empty(len(w), *x.shape[1:], dtype=x.dtype, device=x.device)  # (G, C, D)
        strides = [0 if each is None else each.stride(0) for each in (w, x, r, Q, out)]
        over_chunks(gated_kernels.scaled_difference, out, w, x, r, Q, out, *strides, len(x))
        return out

    def add_scaled_(self, A: Tensor, Q: Tensor, r: Tensor) -> None:
        over_chunks(gated_kernels.add_scaled, A, A, Q, r, A.stride(0), Q.stride(0), r.stride(0))

    def scan_delta(
        self,
        R: Tensor,
        W: Tensor,
        Y: Tensor,
        retention: Tensor,
        state: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        back: bool,
    ) -> tuple[Tensor, Tensor]:
        states, Q = start_scan(R, Y, state, back)  # (B, c, N, D), (B, c, C, D)
        order = chunk_order(R, back)
        R_of, W_of, Y_of, Q_of, S_of, retention_of = (each.unbind(1) for each in (R, W, Y, Q, states, retention))
        # In bfloat16 the state is a sum of two tensors, for more precision: see the kernel.
        rest = None if Y.dtype == torch.float32 else torch.empty_like(S_of[0])  # (B, N, D)
        end = None if state is None else torch.empty_like(S_of[0])  # (B, N, D)
        before = None if state is None else S_of[order[0]]  # (B, N, D)
        if rest is not None and state is not None:
            torch.sub(state, S_of[order[0]], out=rest)
        for i, after in zip(order, [*(S_of[following] for following in order[1:]), end], strict=True):
            if before is None:
                Q_of[i].zero_()
            else:
                torch.bmm(R_of[i], before, out=Q_of[i])  # (B, C, D)
                Y_of[i].baddbmm_(W_of[i], Q_of[i], alpha=-1)  # (B, C, D)
            if after is not None:
                written = torch.bmm(R_of[i].mT, Y_of[i])  # (B, N, D)
                advance(before, rest, written, retention_of[i], cos, sin, after)
            before = after
        if state is not None and end is not None:
            state.copy_(end if rest is None else torch.add(end, rest.to(state.dtype)))
        return states, Q

    def delta_rows_backward(
        self, dA: Tensor, V: Tensor, A: Tensor, U: Tensor, x: Tensor, beta: Tensor, squares: Tensor, dx: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        G = len(x)
        E = torch.empty_like(dA)  # (k * G, C, D)
        sums = beta.new_empty(2, *beta.shape)  # (2, k * G, C)
        over_rows(gated_kernels.delta_rows_backward, x, dA, V, A, U, x, beta, squares, dx, E, *sums, HEADS=len(dA) // G)
        return E, sums[0], sums[1]

    def difference_of_dots(self, r: Tensor, E: Tensor, Q: Tensor, w: Tensor, U: Tensor, P: Tensor) -> Tensor:
        difference = torch.empty_like(r)  # (G, C)
        over_rows(gated_kernels.difference_of_dots, E, r, E, Q, w, U, P, difference)
        return difference


def advance(
    before: Tensor | None,
    rest: Tensor | None,
    written: Tensor,
    retention: Tensor,
    cos: Tensor,
    sin: Tensor,
    after: Tensor,
) -> None:
    """Compute after = rope_(-C)(retention before + written), (B, N, D) dt; `rest` is the rounding error, in and out."""
    B, N, D = written.shape
    tiles = TILES["advance"][after.dtype]
    columns = min(tiles.columns, triton.next_power_of_2(D))
    strides = (0 if before is None else before.stride(0), retention.stride(0), after.stride(0))
    launch(
        gated_kernels.advance, (cdiv(N // 2, tiles.rows), cdiv(D, columns), B),
        (before, rest, written, retention, cos, sin, after, *strides, N // 2),
        {"D": D, "PAIRS": tiles.rows, "BLOCK_D": columns}, num_warps=tiles.warps,
    )  # fmt: skip


def over_chunks(kernel: object, like: Tensor, *arguments: object) -> None:
    """Launch a kernel over rows of the chunks of (G, C, D)."""
    G, C, D = like.shape
    rows = min(TILES["norm"][like.dtype].rows, triton.next_power_of_2(C))
    constants = {"ROWS": rows, "WIDTH": triton.next_power_of_2(D)}
    launch(kernel, (cdiv(C, rows), G), (*arguments, C, D), constants, num_warps=4)


def over_rows(kernel: object, like: Tensor, *arguments: object, **constants: object) -> None:
    """Launch a kernel over rows of (G, C, D)."""
    G, C, D = like.shape
    rows = TILES["norm"][like.dtype].rows
    constants |= {"ROWS": rows, "WIDTH": triton.next_power_of_2(D)}
    launch(kernel, (cdiv(G * C, rows),), (*arguments, G * C, D), constants, num_warps=4)
