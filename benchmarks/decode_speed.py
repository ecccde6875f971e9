"""Decoding and reading prompts with the engine against the published way, by context and by batch.

    python -m benchmarks.decode_speed [--device cpu|cuda] [--settings float32 int8 …] [--model DIR]
    python -m benchmarks.decode_speed --variants none gated-delta … [--device cpu|cuda] [--turns N] [--threads N]

Without --model: the default 25.3 M model with random weights, whose activity is denser than a trained one (50 % of the
neurons fire, not 35 %), so that a trained model is faster. "published" is its way: for every token the whole
context goes through the model again, in the model's own dtype, all pairs at once.

All figures are the engine's: requests in, greedy tokens out, one Python step a token. A context is a position, with the
synapses of a prompt of 512 tokens: nothing else of a past is ever read. Contexts are taken in turn, several rounds in
one process, so that a machine that drifts treats all alike; tokens/s are of the mean step, in which the synapses are
written now and then.
Writes results/decode_speed_DEVICE.json and .png.

With --variants: only the speed of decay and of the delta rule beside that of the published model, "none", for models of
the quickstart's and of the default size, one and 64 sequences at once. The variants take turns of 16 tokens, in which
each sequence's synapses are written once, and a second engine of "none" takes turns too: its speed beside the first is
the noise. Speeds are compared turn by turn, by wall time and by the processor time of the process, which does not count
the time that other work on the machine takes; and by the least processor time of a turn, the least disturbed.
Writes results/decode_speed_decay_DEVICE.json.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bdh import BDHConfig, BDHForCausalLM
from bdh.inference.engine import Engine
from bdh.inference.request import Request
from bdh.inference.runner import Runner, make_runner
from bdh.inference.sampling_params import SamplingParams
from bdh.model import BDHState, state_of
from benchmarks.record import RESULTS, save

CONTEXTS = (64, 512, 2048, 100_000)
FOR_EVER = 10**9
SETTINGS = {  # name: dtype and quantization
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "int8": ("auto", "int8"),
    "int4": ("auto", "int4"),
}

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "fixed": {"decay": "fixed"},
    "gated": {"decay": "gated"},
    "delta": {"write": "delta"},
    "fixed-delta": {"decay": "fixed", "write": "delta"},
    "gated-delta": {"decay": "gated", "write": "delta"},
}
CONTROL = "none (control)"
TURN = 16  # tokens
QUICKSTART = {"n_layer": 3, "mlp_internal_dim_multiplier": 16}
COMPARED: dict[str, tuple[dict[str, int], int]] = {  # name: sizes that are not the default, sequences at once
    "quickstart, batch 1": (QUICKSTART, 1),
    "quickstart, batch 64": (QUICKSTART, 64),
    "default, batch 1": ({}, 1),
    "default with 1 layer, batch 64": ({"n_layer": 1}, 64),  # of 6 layers, the state of a sequence takes 201 MB
    "default, batch 64": ({}, 64),
}
LEFT_OUT = {"cpu": "default, batch 64", "cuda": "default with 1 layer, batch 64"}  # unless asked for


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], object]) -> float:
    """Wall seconds of some work, the GPU's included."""
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def random_tokens(count: int, vocab_size: int) -> list[int]:
    return torch.randint(vocab_size, (count,)).tolist()


def after_prompt(runner: Runner) -> BDHState:
    """The state after a prompt of 512 tokens."""
    runner.clear(0)
    runner.prefill(0, random_tokens(512, runner.config.vocab_size))
    return runner.read_state(0)


def writing(runner: Runner, state: BDHState, context: int, batch: int) -> Engine:
    """An engine that writes `batch` texts on from a state, as if it had read `context` tokens, greedily."""
    engine = Engine(runner, prefix_cache_bytes=0)
    params = SamplingParams(temperature=0, max_new_tokens=FOR_EVER)
    there = BDHState(state.synapses, torch.full_like(state.position, context), context)
    for _ in range(batch):
        engine.add(Request([65], params, state=there))
    while len(engine.writing) < batch:
        engine.step()
    return engine


def decoding(runner: Runner, state: BDHState, context: int, batch: int, steps: int) -> list[float]:
    """Wall seconds of each of some steps after a context, when nothing else is to be done."""
    engine = writing(runner, state, context, batch)
    for _ in range(4):
        engine.step()
    return [seconds(engine.step) for _ in range(steps)]


@torch.inference_mode()
def recomputing(model: BDHForCausalLM, context: int, tokens: int) -> float:
    """Tokens a second of the published way of decoding."""
    ids = torch.randint(model.config.vocab_size, (1, context), device=model.device)
    took = []
    for _ in range(tokens + 1):
        took.append(seconds(lambda: model(ids, use_cache=False).logits[:, -1].argmax(-1)))  # (1, V)
    return 1 / statistics.median(took[1:])


def reading(runner: Runner, tokens: int, rounds: int) -> float:
    """Tokens a second of a prompt."""
    prompt = random_tokens(tokens, runner.config.vocab_size)
    took = []
    for _ in range(rounds + 1):
        engine = Engine(runner, prefix_cache_bytes=0, prefill_chunk=max(tokens, runner.prefill_chunk))
        engine.add(Request(prompt, SamplingParams(temperature=0, max_new_tokens=1)))
        took.append(seconds(engine.step))
    return tokens / statistics.median(took[1:])


@torch.inference_mode()
def overhead(rounds: int, batch: int = 8, tokens: int = 100) -> dict[str, float]:
    """A batch of small requests on the CPU: the engine's speed over the bare model's and the bare runner's."""
    ratios: dict[str, list[float]] = {"model": [], "runner": []}
    model = small_model()
    runner = make_runner(copy.deepcopy(model), batch)
    prompts = [random_tokens(16, 256) for _ in range(batch)]

    def engine_runs() -> None:
        engine = Engine(runner)
        for prompt in prompts:
            engine.add(Request(prompt, SamplingParams(temperature=0, max_new_tokens=tokens)))
        while engine.busy:
            engine.step()

    def model_runs() -> None:
        output = model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        for _ in range(tokens - 1):
            chosen = output.logits[:, -1].argmax(-1, keepdim=True)  # (B, 1)
            output = model(chosen, past_key_values=state_of(output), use_cache=True)

    def runner_runs() -> None:
        for slot, prompt in enumerate(prompts):
            runner.clear(slot)
            logits = runner.prefill(slot, prompt)
        chosen = [int(logits.argmax())] * batch
        for _ in range(tokens - 1):
            chosen = runner.decode(range(batch), chosen).argmax(-1).tolist()

    for _ in range(rounds + 1):
        took = seconds(engine_runs)
        ratios["model"].append(seconds(model_runs) / took)
        ratios["runner"].append(seconds(runner_runs) / took)
    return {name: statistics.median(values[1:]) for name, values in ratios.items()}


def small_model() -> BDHForCausalLM:
    """The size of the quickstart."""
    return BDHForCausalLM(BDHConfig(**QUICKSTART)).eval()


def measure(args: argparse.Namespace, model: BDHForCausalLM, name: str) -> dict[str, Any]:
    """All figures of one setting."""
    dtype, quantization = SETTINGS[name]
    runner = make_runner(copy.deepcopy(model), max(args.batches), dtype, quantization)
    state = after_prompt(runner)
    by_context: dict[int, list[float]] = {context: [] for context in args.contexts}
    for _ in range(args.rounds):
        for context in args.contexts:
            by_context[context] += decoding(runner, state, context, 1, args.steps)
    by_batch = {batch: decoding(runner, state, 512, batch, args.steps) for batch in args.batches}
    return {
        "tokens_per_second_by_context": {context: 1 / statistics.mean(took) for context, took in by_context.items()},
        "p99_step_ms_by_context": {context: 1e3 * percentile(took, 0.99) for context, took in by_context.items()},
        "tokens_per_second_by_batch": {batch: batch / statistics.mean(took) for batch, took in by_batch.items()},
        "median_step_ms_by_batch": {batch: 1e3 * statistics.median(took) for batch, took in by_batch.items()},
        "prompt_tokens_per_second": {count: reading(runner, count, args.rounds) for count in args.prompts},
    }


def compare(names: Sequence[str], sizes: dict[str, int], batch: int, device: str, turns: int) -> dict[str, Any]:
    """The speed of variants that take turns, for a model of these sizes: figures by variant."""
    engines = {}
    for name in [*names, CONTROL]:
        torch.manual_seed(0)
        config = BDHConfig(**sizes, **VARIANTS["none" if name == CONTROL else name])  # type: ignore[arg-type]
        runner = make_runner(BDHForCausalLM(config).eval().to(device), batch)
        engines[name] = writing(runner, after_prompt(runner), 512, batch)
    wall: dict[str, list[float]] = {name: [] for name in engines}
    processor: dict[str, list[float]] = {name: [] for name in engines}
    order = list(engines)
    for _ in range(turns + 1):
        for name in order:
            started = time.process_time()
            wall[name].append(seconds(lambda: [engines[name].step() for _ in range(TURN)]))  # noqa: B023
            processor[name].append(time.process_time() - started)
        order = [*order[1:], order[0]]
    return {
        name: {
            "tokens_per_second": batch * TURN / statistics.median(wall[name][1:]),
            "speed_over_none": speed_over(wall["none"][1:], wall[name][1:]),
            "speed_over_none_by_processor_time": speed_over(processor["none"][1:], processor[name][1:]),
            "speed_over_none_of_least_processor_times": min(processor["none"][1:]) / min(processor[name][1:]),
        }
        for name in engines
    }


def speed_over(base: Sequence[float], other: Sequence[float]) -> float:
    """The median over turns of the speed of one engine over another's."""
    return statistics.median(before / after for before, after in zip(base, other, strict=True))


def compare_variants(args: argparse.Namespace) -> None:
    figures: dict[str, Any] = {"turns": args.turns, "tokens_of_a_turn": TURN}
    for name in args.cases or [name for name in COMPARED if name != LEFT_OUT[args.device]]:
        sizes, batch = COMPARED[name]
        figures[name] = compare(args.variants, sizes, batch, args.device, args.turns)
        print(name, *(f"\n  {variant}: {rounded(values)}" for variant, values in figures[name].items()), flush=True)
        print(save(f"decode_speed_decay_{args.device}", figures))


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", type=Path, help="an export to measure instead of random weights")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS))
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--prompts", type=int, nargs="+")
    parser.add_argument("--published", type=int, nargs="*", help="contexts for the published way")
    parser.add_argument("--steps", type=int, help="tokens of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), help="compare these, and nothing else")
    parser.add_argument("--cases", nargs="+", choices=list(COMPARED), help="of --variants")
    parser.add_argument("--turns", type=int, default=24, help="of --variants")
    parser.add_argument("--threads", type=int, help="of the processor; default: torch's choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.variants:
        if "none" not in args.variants:
            parser.error("--variants must include none, which the others are compared with")
        compare_variants(args)
        return
    on_gpu = args.device == "cuda"
    args.settings = args.settings or (["bfloat16", "float32"] if on_gpu else list(SETTINGS))
    args.batches = args.batches or ([1, 8, 64] if on_gpu else [1, 2, 4, 8])
    args.prompts = args.prompts or ([512, 2048, 8192] if on_gpu else [512])
    args.steps = args.steps or (208 if on_gpu else 32)
    args.published = args.published if args.published is not None else ([512, 2048] if on_gpu else [64, 512])

    torch.manual_seed(0)
    if args.model:
        from bdh.model.export import load_model_only

        model = load_model_only(args.model).to(args.device)
    else:
        model = BDHForCausalLM(BDHConfig()).eval().to(args.device)
    figures: dict[str, Any] = {
        "published_tokens_per_second": {context: recomputing(model, context, 2) for context in args.published}
    }
    for name in args.settings:
        figures[name] = measure(args, model, name)
        print(name, *(f"\n  {what}: {rounded(values)}" for what, values in figures[name].items()), flush=True)
    print("published:", rounded(figures["published_tokens_per_second"]))
    if not on_gpu:
        figures["engine_over_bare"] = overhead(args.rounds)
        print("8 small requests, engine over bare:", rounded(figures["engine_over_bare"]))
    name = f"decode_speed_{args.device}"
    print(save(name, figures))
    draw(name, figures, args.settings)


def rounded(values: dict[Any, float]) -> dict[Any, float]:
    return {key: float(f"{value:.4g}") for key, value in values.items()}


def draw(name: str, figures: dict[str, Any], settings: Sequence[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), dpi=120)
    published = figures["published_tokens_per_second"]
    left.plot(list(published), list(published.values()), "o--", color="#57534e", label="published way, float32")
    for setting in settings:
        by_context, by_batch = (figures[setting][f"tokens_per_second_by_{what}"] for what in ("context", "batch"))
        left.plot(list(by_context), list(by_context.values()), "o-", label=setting)
        right.plot(list(by_batch), list(by_batch.values()), "o-", label=setting)
    left.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="tokens per second, one sequence")
    right.set(xscale="log", yscale="log", xlabel="sequences at once", ylabel="tokens per second together")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
