"""Speed of the Triton operations of training on a GPU, relative to plain PyTorch compiled by torch.compile.

    python -m benchmarks.kernel_speed [--tokens 16384] [--chunk 512] [--width 256] [--neurons 8192] [--tune]

Prints, by operation, milliseconds of both, their ratio, TFLOP/s of the necessary products, GB/s of the necessary reads
and writes, and the largest difference from the plain form, relative to the largest number. `excite_backward` overwrites
an argument, so its time includes a clone. With --tune it measures other tiles for each kernel instead and prints the
fastest, in the form of `TILES`; tiles that do not compile, or exceed registers or shared memory, are reported.
Needs torch and Triton only.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.testing import do_bench

from bdh.kernels.layer_operations import Dropout
from bdh.kernels.triton import operations as triton_operations
from bdh.kernels.triton.operations import Tiles, TritonOperations

Results = tuple[Tensor, ...]
op = TritonOperations()


@dataclass(frozen=True)
class Case:
    """An operation on given tensors.

    Attributes:
        kernel: Name in `TILES`.
        ours: The operation in Triton, with a dropout.
        plain: The same in PyTorch, with a dropout probability.
        flops: Of the necessary products.
        nbytes: Of the necessary reads and writes.
    """

    kernel: str
    ours: Callable[[Dropout], Results]
    plain: Callable[[float], Results]
    flops: float
    nbytes: float


# ------------------------------------------------------------------------------------------------ plain forms


def rope(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = values[..., 0::2], values[..., 1::2]  # (…, N/2)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)  # (…, N)


def plain_excite(x: Tensor, E: Tensor, cos: Tensor, sin: Tensor) -> Results:
    X = F.relu(x @ E.mT)  # (G, C, N)
    return X, rope(X, cos, sin)


def plain_scores(R: Tensor) -> Results:
    return ((R @ R.mT).tril(-1),)  # (G, C, C)


def plain_scores_backward(dA: Tensor, x: Tensor) -> Results:
    dP = (dA @ x.mT).tril(-1)  # (G, C, C)
    return (dP + dP.mT,)


def plain_gate(A: Tensor, Ev: Tensor, X: Tensor, p: float) -> Results:
    return (F.dropout(X * F.relu(A @ Ev.mT), p),)  # (G, C, N)


def plain_gate_backward(dy: Tensor, Dec: Tensor, A: Tensor, Ev: Tensor, X: Tensor, p: float) -> Results:
    Y = F.relu(A @ Ev.mT)  # (G, C, N)
    kept = F.dropout(torch.ones_like(X), p)  # (G, C, N)
    dZ = (dy @ Dec) * kept  # (G, C, N)
    return X * Y * kept, (dZ * X).where(Y > 0, 0), dZ * Y


def plain_excite_backward(
    dP: Tensor, R: Tensor, X: Tensor, dX: Tensor, cos: Tensor, sin: Tensor, terms: Sequence[Tensor] | None
) -> Results:
    dR = dP @ R  # (G, C, N)
    if terms is not None:
        dA, S, values, dS = terms
        dR = dR + dA @ S.mT + values @ dS.mT  # (G, C, N)
    return ((dX + rope(dR, cos, -sin)).where(X > 0, 0),)  # (G, C, N)


def plain_scan(U: Tensor, cos: Tensor, sin: Tensor) -> Results:
    S = torch.zeros_like(U[:, 0], dtype=torch.float32)  # (B, N, D)
    states = []
    for written in U.unbind(1):
        states.append(S.to(U.dtype))
        S = rope((S + written).mT, cos, -sin).mT  # (B, N, D)
    return torch.stack(states, 1), S  # (B, c, N, D)


def plain_scan_backward(V: Tensor, cos: Tensor, sin: Tensor) -> Results:
    g = torch.zeros_like(V[:, 0], dtype=torch.float32)  # (B, N, D)
    written = []
    for read in reversed(V.unbind(1)):
        g = rope(g.mT, cos, sin).mT  # (B, N, D)
        written.append(g.to(V.dtype))
        g = g + read  # (B, N, D)
    return torch.stack(written[::-1], 1), g  # (B, c, N, D)


# ------------------------------------------------------------------------------------------------ cases


def make_cases(args: argparse.Namespace) -> dict[str, Case]:
    """Return the operations by name, on random tensors with the scale of a layer's."""
    dtype, C, D, N = getattr(torch, args.dtype), args.chunk, args.width, args.neurons
    G = args.tokens // C
    M, side = G * C, triton.cdiv(C, 128)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device="cuda") * scale).to(dtype)

    turns_per_token = 65536.0 ** (-torch.arange(0, N, 2, device="cuda") / N)  # (N/2)
    angle = torch.arange(C, device="cuda")[:, None] * turns_per_token  # (C, N/2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)  # (C, N/2)
    ends = (C * turns_per_token).cos(), (C * turns_per_token).sin()  # (N/2) float32
    x, A, dy, E, Ev, Dec = (draw(*shape) for shape in ((G, C, D),) * 3 + ((N, D),) * 3)
    E, Ev, Dec = E * 0.1, Ev * 0.1, (Dec * 0.1).mT  # (N, D), (N, D), (D, N)
    X, R = op.excite(x, E, cos, sin)  # (G, C, N)
    dX, dP = draw(G, C, N), draw(G, C, C, scale=0.1)
    dP = dP + dP.mT  # (G, C, C)
    terms = draw(G, C, D), draw(G, N, D, scale=0.1), draw(G, C, D), draw(G, N, D, scale=0.1)
    tensor, products, chunks = M * N * dtype.itemsize, 2.0 * M * N, G * N * D * dtype.itemsize
    c = max(d for d in range(1, 5) if G % d == 0)  # chunks of a sequence
    U = draw(G // c, c, N, D)
    scan_bytes = 2 * chunks + 4 * G // c * N * D
    return {
        "excite": Case(
            "excite",
            lambda _: op.excite(x, E, cos, sin),
            lambda _: plain_excite(x, E, cos, sin),
            products * D,
            2 * tensor,
        ),
        "scores": Case(
            "scores",
            lambda _: (op.scores(R, None),),
            lambda _: plain_scores(R),
            products * C * (side + 1) / (2 * side),  # tiles of 128 on and below the diagonal
            tensor,
        ),
        "gate": Case(
            "gate",
            lambda dropout: (op.gate_product(A, Ev, X, dropout),),
            lambda p: plain_gate(A, Ev, X, p),
            products * D,
            2 * tensor,
        ),
        "gate_backward": Case(
            "gate_backward",
            lambda dropout: op.gate_product_backward(dy, Dec, A, Ev, X, dropout),
            lambda p: plain_gate_backward(dy, Dec, A, Ev, X, p),
            2 * products * D,
            4 * tensor,
        ),
        "scores_backward": Case(
            "scores_backward",
            lambda _: (op.scores_backward(A, x, None),),
            lambda _: plain_scores_backward(A, x),
            2.0 * M * C * D,
            (2 * M * D + M * C) * dtype.itemsize,
        ),
        "norm": Case(
            "norm",
            lambda _: op.norm(A, 1e-5)[:1],
            lambda _: (F.layer_norm(A, (D,)),),
            0,
            2 * M * D * dtype.itemsize,
        ),
        "excite_backward": Case(
            "excite_backward",
            lambda _: (op.excite_backward(dP, R, X, dX.clone(), cos, sin, None),),
            lambda _: plain_excite_backward(dP, R, X, dX, cos, sin, None),
            products * C,
            4 * tensor,
        ),
        "excite_backward_carried": Case(
            "excite_backward",
            lambda _: (op.excite_backward(dP, R, X, dX.clone(), cos, sin, terms),),
            lambda _: plain_excite_backward(dP, R, X, dX, cos, sin, terms),
            products * (C + 2 * D),
            4 * tensor + 2 * chunks,
        ),
        "scan": Case(
            "scan",
            lambda _: op.scan(U, None, *ends, None),
            lambda _: plain_scan(U, *ends),
            0,
            scan_bytes,
        ),
        "scan_backward": Case(
            "scan",
            lambda _: op.scan_backward(U, None, *ends, None),
            lambda _: plain_scan_backward(U, *ends),
            0,
            scan_bytes,
        ),
    }


# ------------------------------------------------------------------------------------------------ measuring


def milliseconds(work: Callable[[], object]) -> float:
    return float(do_bench(work, warmup=30, rep=150, return_mode="median"))


def difference(results: Results, expected: Results) -> float:
    """Return the largest difference, relative to the largest number of a result."""
    return max(
        ((result.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1e-20)).item()
        for result, wanted in zip(results, expected, strict=True)
    )


def compare(name: str, case: Case, p: float) -> None:
    """Measure an operation and print its row."""
    expected = case.plain(0.0)
    off = difference(case.ours(Dropout()), expected)
    del expected
    plain_form = torch.compile(case.plain)
    ours, plain = milliseconds(lambda: case.ours(Dropout(p, 1, 0))), milliseconds(lambda: plain_form(p))
    print(
        f"{name:26}{ours:9.3f}{plain:10.3f}{plain / ours:8.2f}x{case.flops / ours / 1e9:9.0f}"
        f"{case.nbytes / ours / 1e6:9.0f}{off:12.1e}",
        flush=True,
    )


# ------------------------------------------------------------------------------------------------ tuning


def candidates(kernel: str) -> Iterator[Tiles]:
    """Yield tiles to measure, for bfloat16, that may fit into registers and shared memory."""
    if kernel == "scan":
        for rows, columns, warps in itertools.product((1, 2, 4, 8), (128, 256), (2, 4, 8)):
            yield Tiles(rows, columns, 0, warps, 2)
        return
    if kernel == "norm":
        for rows, warps in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8)):
            yield Tiles(rows, 0, 0, warps, 1)
        return
    if kernel == "excite_backward":
        for rows, columns, warps in itertools.product((4, 8, 16, 32), (128, 256, 512), (4, 8)):
            yield Tiles(rows, columns, 0, warps, 1)
        return
    loops = ((32, 4), (64, 2), (64, 3), (64, 4), (128, 2), (128, 3))  # depth and stages
    if kernel in ("scores", "scores_backward"):
        for side, warps, (depth, stages) in itertools.product((64, 128), (4, 8), loops):
            yield Tiles(side, side, depth, warps, stages)
        return
    shapes = ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8))
    for (rows, columns, warps), (depth, stages), group in itertools.product(shapes, loops, (1, 8, 128)):
        if (rows + columns) * depth * stages * 2 <= 200_000:
            yield Tiles(rows, columns, depth, warps, stages, group)


def tune(name: str, case: Case, args: argparse.Namespace) -> None:
    """Measure a kernel with other tiles, and print the fastest."""
    table = triton_operations.TILES[case.kernel]
    dtype, dropout = getattr(torch, args.dtype), Dropout(args.p, 1, 0)
    default, took = table[dtype], {}
    for tiles in (default, *candidates(case.kernel)):
        table[dtype] = tiles
        try:
            case.ours(dropout)
            torch.cuda.synchronize()
            took[tiles] = milliseconds(lambda: case.ours(dropout))
        except Exception as error:  # of many kinds, from the compiler's passes to the driver
            print(f"  {name}: {tiles} left out: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
    table[dtype] = default
    print(f"{name}: {took.get(default, float('nan')):.3f} ms as it is; best:")
    for tiles, ms in sorted(took.items(), key=lambda pair: pair[1])[:6]:
        numbers = f"{tiles.rows}, {tiles.columns}, {tiles.depth}, {tiles.warps}, {tiles.stages}, {tiles.group}"
        print(f"  {ms:8.3f} ms  Tiles({numbers})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the Triton operations of training.")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of a step (M); a multiple of --chunk")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a chunk (C)")
    parser.add_argument("--width", type=int, default=256, help="n_embd (D)")
    parser.add_argument("--neurons", type=int, default=8192, help="of one head (N)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--p", type=float, default=0.1, help="of dropout")
    parser.add_argument("--operations", nargs="+", help="only these; else all")
    parser.add_argument("--tune", action="store_true", help="measure other tiles")
    args = parser.parse_args()
    cases = make_cases(args)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {vars(args)}")
    if not args.tune:
        print(f"{'':26}{'ours ms':>9}{'plain ms':>10}{'':>9}{'TFLOP/s':>9}{'GB/s':>9}{'difference':>12}")
    for name, case in cases.items():
        if args.operations and name not in args.operations:
            continue
        if args.tune:
            tune(name, case, args)
        else:
            compare(name, case, args.p)


if __name__ == "__main__":
    main()
