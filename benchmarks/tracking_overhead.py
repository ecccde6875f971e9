"""What tracking costs: the time of a training step at default settings against one with all logging switched off.

    python -m benchmarks.tracking_overhead [--turns 120] [--section.field VALUE …]

One run, in turns of ten steps: logging off, the default settings, and all trackers besides (offline), over and over, so
that whatever else the machine does falls on all three alike. What is done at validations only, the look at the neurons,
is timed by itself and spread over `training.eval_interval` steps. Writes results/tracking_overhead.json. The bar: less
than 2 % of a step's time at default settings, by the upper bound of what was measured. More settings change the model,
which is the quickstart's at half its batch; the smaller a step, the more tracking weighs. Needs the four trackers'
packages: pip install 'bdh[tensorboard,wandb,trackio,mlflow]'.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from bdh.cli.run_config import build_config, train_parser
from bdh.training.config import TrainConfig
from bdh.training.loop import Trainer
from bdh.training.step_timer import StepClock
from bdh.training.trackers import Trackers, open_trackers
from benchmarks.record import save

TURN = 10
ARMS = ("off", "default", "all trackers")
NEVER = 10**9


class NoClock(StepClock):
    """A clock that does not run."""

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        yield


def settings(folder: str, turns: int, given: list[str]) -> TrainConfig:
    """The quickstart at half its batch, without validations, samples and checkpoints, and with default logging."""
    parser = train_parser("tracking_overhead", "")
    base = ["--config", "quickstart", "--training.batch_size", "4", "--training.max_steps", str(turns * TURN + 20)]
    config = build_config(parser, parser.parse_args([*base, *given]))
    logging = replace(TrainConfig().logging, sample_interval=0)
    training = replace(config.training, eval_interval=NEVER)
    checkpoint = replace(config.checkpoint, interval=NEVER)
    return replace(config, run_dir=f"{folder}/run", logging=logging, training=training, checkpoint=checkpoint)


def turn(run: Trainer, settings: TrainConfig, arm: str, trackers: Trackers) -> float:
    """Seconds of a step, over a turn."""
    off = replace(settings.logging, interval=NEVER, parameter_interval=0)
    run.config = replace(run.config, logging=off if arm == "off" else settings.logging)
    run.meter.clock = (NoClock if arm == "off" else StepClock)(run.device)
    run.timed_from = (run.state.step, run.state.seconds)
    run.tracker.others = trackers if arm == "all trackers" else None
    started = time.perf_counter()
    for _ in range(TURN):
        run.step()
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / TURN


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=120, help="a multiple of 30")
    options, given = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        config = settings(folder, options.turns, given)
        run = Trainer(config, None)
        every = replace(config.logging, tracking_mode="offline", trackers=["tensorboard", "wandb", "trackio", "mlflow"])
        trackers = open_trackers(replace(config, logging=every), Path(config.run_dir), 0, 0, print)
        run.model.train()
        for _ in range(2 * TURN):  # to be warm
            run.step()
        seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for number in range(options.turns):
            arm = ARMS[number % len(ARMS)]
            seconds[arm].append(turn(run, config, arm, trackers))
        looks = {}
        for arm, logging, others in (("default", config.logging, None), ("all trackers", every, trackers)):
            run.evaluator.config = replace(run.config, logging=logging)
            looks[arm] = look(run, others)
        trackers.close()
        run.data.close()
        run.folder.release()
    overhead = {arm: compare(seconds["off"], seconds[arm], looks[arm]) for arm in ARMS[1:]}
    tokens = f"{config.training.batch_size} x {config.data.block_size} tokens"
    figures = {
        "model": f"{run.model.num_parameters():,} parameters, {tokens} a step",
        "seconds_per_step": {arm: statistics.mean(times) for arm, times in seconds.items()},
        "turns_of_ten_steps": seconds,
        "look_at_neurons_seconds": looks,
        "overhead": overhead,
        "bar": {"default": 0.02, "kept": overhead["default"]["high"] < 0.02},
    }
    print(save("tracking_overhead", figures), overhead)


def look(run: Trainer, trackers: Trackers | None) -> float:
    """Seconds of the look at the neurons; the histograms that trackers get are part of it."""
    run.tracker.others = trackers
    times = []
    for _ in range(5):
        started = time.perf_counter()
        _, histograms = run.evaluator.activity()
        if histograms:
            run.tracker.histograms(run.state.step, histograms)
        times.append(time.perf_counter() - started)
    return statistics.mean(times)


def compare(off: list[float], on: list[float], look_seconds: float) -> dict[str, float]:
    """What a step takes longer, as a share of a step without logging, and between which bounds (95 %).

    By means: what is done at few steps only, a median would not see. By pairs of neighbouring turns, which the machine
    disturbs alike; a pair in which one turn, whichever, took more than twice its kind's median is left out: there the
    machine itself stood still.
    """
    at_validations = look_seconds / TrainConfig().training.eval_interval
    most = 2 * statistics.median(off), 2 * statistics.median(on)
    pairs = [(a, b) for a, b in zip(off, on, strict=True) if a <= most[0] and b <= most[1]]
    longer = [b - a for a, b in pairs]
    error = 1.96 * statistics.stdev(longer) / len(longer) ** 0.5
    middle, step = statistics.mean(longer) + at_validations, statistics.mean([a for a, _ in pairs])
    bounds = {"mean": middle / step, "low": (middle - error) / step, "high": (middle + error) / step}
    return {**bounds, "pairs": len(pairs), "pairs_left_out": len(off) - len(pairs)}


if __name__ == "__main__":
    main()
