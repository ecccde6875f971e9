"""Decoding with the state against recomputing the context, by context length: the cost of a token.

    python -m benchmarks.decode_speed [--contexts 64 512 2048] [--quadratic 64 512] [--device cpu]

The default 25.3 M model with random weights, one sequence, through `generate()` of transformers, the way `bdh generate`
decodes. "quadratic" is the published way: for every token, the whole context goes through the model again. Contexts
are taken in turn, several rounds in one process, and the median is reported, so that a machine that drifts treats all
alike.
Writes results/decode_speed_DEVICE.json and .png.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from bdh import BDHConfig, BDHForCausalLM
from benchmarks.record import RESULTS, save


@torch.inference_mode()
def seconds_per_token(model: BDHForCausalLM, context: int, tokens: int, use_state: bool) -> float:
    """Wall seconds of one new token after `context` others; the reading of the context is not counted with a state."""
    prompt = torch.randint(256, (1, context), device=model.device)
    settings = {"max_new_tokens": tokens, "do_sample": False}
    if use_state:
        state = model(prompt[:, :-1], logits_to_keep=1).past_key_values
        return timed(lambda: model.generate(prompt, past_key_values=state, **settings)) / tokens
    return timed(lambda: model.generate(prompt, use_cache=False, **settings)) / tokens


def timed(work: Callable[[], object]) -> float:
    """Wall seconds of some work, the GPU's included."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--quadratic", type=int, nargs="*", default=[64, 512])
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of one measurement")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = BDHForCausalLM(BDHConfig()).eval().to(args.device)
    seconds_per_token(model, args.contexts[0], 4, True)  # warm up
    with_state: dict[int, list[float]] = {context: [] for context in args.contexts}
    for _ in range(args.rounds):
        for context in args.contexts:
            with_state[context].append(seconds_per_token(model, context, args.tokens, True))
    recomputed = {context: seconds_per_token(model, context, 2, False) for context in args.quadratic}

    state = {context: 1 / statistics.median(times) for context, times in with_state.items()}
    quadratic = {context: 1 / seconds for context, seconds in recomputed.items()}
    ratio = state[max(state)] / state[min(state)]
    print("context   with the state   recomputing the context   (tokens/s)")
    for context in sorted({*state, *quadratic}):
        cells = [f"{row[context]:.2f}" if context in row else "-" for row in (state, quadratic)]
        print(f"{context:>7}   {cells[0]:>14}   {cells[1]:>23}")
    print(f"at {max(state)} it decodes at {ratio:.2f} of the speed at {min(state)}")
    name = f"decode_speed_{args.device}"
    figures = {
        "tokens_per_second": {"state": state, "quadratic": quadratic},
        "longest_over_shortest": ratio,
        "seconds_per_token_of_each_round": with_state,
    }
    print(save(name, figures))
    draw(name, state, quadratic)


def draw(name: str, state: dict[int, float], quadratic: dict[int, float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    axes.plot(list(state), list(state.values()), marker="o", color="#1d4ed8", label="with the state (recurrent)")
    axes.plot(list(quadratic), list(quadratic.values()), marker="o", color="#c2410c", label="recomputing the context")
    axes.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="tokens per second")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
