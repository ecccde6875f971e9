"""Speed of the parts of a decoding step on a CPU, each in several implementations, for `bdh.kernels.decode`.

    python -m benchmarks.decode_cpu_parts [--rows 1 8] [--rounds 25]

One layer of the default 25.3 M model. Before each measurement 64 MB are read, as the synapses of the other layers would
be, so that nothing is found in a cache. Activity is random at the density of a trained model: 33 % of the neurons fire
(X), of which 30 % come through the gate (Z = 10 %). Forms are taken in turn, several rounds, and medians are reported.
Writes results/decode_cpu_parts.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bdh import BDHConfig
from bdh.kernels.decode.cpu_step import (
    flush,
    lazy_zeros,
    read_pending,
    rotate_pairs,
    split_runs,
    sum_rows,
)
from bdh.kernels.decode.cpu_weights import (
    Int4Matrices,
    Int8Matrices,
    Int8WeightMatrices,
    PackedMatrices,
)
from benchmarks.record import save

CONFIG = BDHConfig()
H, N, D = CONFIG.n_head, CONFIG.neurons_per_head, CONFIG.n_embd
Forms = dict[str, Callable[[], object]]


def matrices(rows: int) -> Forms:
    """x through the encoder, (32768, 256)."""
    weight, x = torch.randn(H * N, D) * 0.02, torch.randn(rows, 1, D)
    turned, short, short_x = weight.T.contiguous(), weight.bfloat16(), x[:, 0].bfloat16()
    packed = {
        "float32, oneDNN's layout": PackedMatrices([weight], torch.float32, True),
        "bfloat16, oneDNN's layout": PackedMatrices([weight], torch.bfloat16, True),
        "int8, oneDNN, rows in int8": Int8Matrices([weight], torch.bfloat16, True),
        "int8, _weight_int8pack_mm": Int8WeightMatrices([weight], torch.bfloat16, True),
        "int4, _weight_int4pack_mm_for_cpu": Int4Matrices([weight], torch.bfloat16, True),
    }
    return {
        "float32, F.linear": lambda: F.linear(x[:, 0], weight),
        "float32, x @ transposed": lambda: x[:, 0] @ turned,
        "bfloat16, F.linear": lambda: F.linear(short_x, short),
        **{name: partial(form, x) for name, form in packed.items()},
    }


def activity(rows: int, density: float) -> Tensor:
    """(rows, h, N), that share of it above zero."""
    return torch.randn(rows, H, N).abs() * (torch.rand(rows, H, N) < density)


def reading(rows: int) -> Forms:
    """A = R S; R turned by rotary phases, so that a pair is silent only if both its neurons are."""
    S = lazy_zeros(rows, H, N, D).normal_()
    R = rotate_pairs(activity(rows, 0.33), torch.polar(torch.ones(rows, 1, N // 2), torch.rand(rows, 1, N // 2)))
    starts = [row * H * N for row in range(rows)]
    short = S.bfloat16()
    return {
        "all rows, bmm": lambda: torch.bmm(R.flatten(0, 1)[:, None], S.flatten(0, 1)),
        "active rows, embedding_bag": lambda: sum_rows(R, S.view(-1, D), starts),
        "active rows of a bfloat16 copy": lambda: sum_rows(R.bfloat16(), short.view(-1, D), starts),
    }


def writing(rows: int) -> Forms:
    """S + R^T x: now, or a list of tokens at once; and the cost of reading the list while it is pending. By slot."""
    S = lazy_zeros(1, H, N, D)
    R, x = lazy_zeros(1, H, 32, N).copy_(activity(32, 0.55).transpose(0, 1)), torch.randn(1, 32, D)
    A, table = torch.zeros(1, H, D), S.view(-1, D)
    forms: Forms = {"one token, addr_": lambda: table.addr_(R[0, :, 0].flatten(), x[0, 0])}
    for W in (8, 16, 32):
        forms[f"{W} tokens, baddbmm_ (each {W} tokens)"] = partial(flush, S[0], R[0, :, :W], x[0, :W])
        forms[f"{W // 2} pending tokens read"] = partial(read_pending, R[:, :, 0], A, R, x, split_runs([0], [W // 2]))
    return forms


def decoding(rows: int) -> Forms:
    """Z through the decoder, (256, 32768)."""
    Z, weight = activity(rows, 0.1), torch.randn(D, H * N) * 0.02
    forms: Forms = {}
    for dtype in (torch.float32, torch.bfloat16):
        name, z, table = str(dtype)[6:], Z.to(dtype), weight.to(dtype).T.contiguous()
        forms[f"{name}, all, oneDNN's layout"] = partial(PackedMatrices([weight], dtype), z.flatten(1)[:, None])
        forms[f"{name}, active rows"] = partial(sum_rows, z, table, [0] * rows)
    return forms


@torch.inference_mode()
def milliseconds(forms: Forms, rounds: int) -> dict[str, float]:
    """Median wall time of each form, caches cold."""
    elsewhere = torch.ones(16_000_000)
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, work in forms.items():
            elsewhere.sum()
            started = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - started)
    return {name: round(1000 * statistics.median(taken), 3) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="sequences of the batch")
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    torch.manual_seed(0)
    parts = {"encoder": matrices, "reading synapses": reading, "writing synapses": writing, "decoder": decoding}
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for part, forms in parts.items():
        for rows in [1] if part == "writing synapses" else args.rows:
            with torch.inference_mode():
                made = forms(rows)
            taken = figures.setdefault(part, {})[f"{rows} rows"] = milliseconds(made, args.rounds)
            print(f"{part}, {rows} rows (ms)")
            for name, value in taken.items():
                print(f"  {name:<40} {value:8.3f}")
    print(save("decode_cpu_parts", {"milliseconds": figures}))


if __name__ == "__main__":
    main()
