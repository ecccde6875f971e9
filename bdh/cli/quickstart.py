"""`bdh quickstart`: a model trained and talking in about two minutes, on text every Python carries."""

import shlex
import shutil
import sys
import time
from pathlib import Path

from bdh.cli.parsing import without_print_config
from bdh.cli.run_config import build_config, train_parser

DEFAULT_RUN = Path("runs") / "quickstart"
PROMPTS = ("The ", "If the ", "A function ")


def run(argv: list[str]) -> int:
    parser = train_parser("bdh quickstart", "Train the quickstart configuration, export it, and let it write.")
    given = ["--config", "quickstart", *argv]
    if parser.parse_args(without_print_config(given)).run_dir == str(DEFAULT_RUN):
        given += ["--run_dir", str(free_run_dir())]
    config = build_config(parser, parser.parse_args(given))

    from bdh.inference.llm import LLM
    from bdh.inference.sampling_params import SamplingParams
    from bdh.training.loop import train
    from bdh.training.run_log import beyond_block_words, read_metrics

    started = time.monotonic()
    outcome = train(config)
    if outcome.signal is not None:
        return 128 + outcome.signal
    print(f"\ntrained for {time.monotonic() - started:.0f} s, validation included. The curve's end:")
    records = [r for r in read_metrics(outcome.run_dir / "metrics.jsonl") if "validation_loss" in r]
    for record in records[-3:]:
        figures = f"validation {record['bits_per_byte']:.3f} bits per byte{beyond_block_words(record)}"
        print(f"  step {record['step']:>5}   {figures}")
    print(f"  drawn in {outcome.run_dir / 'loss.png'}\n\nThree samples:")
    params = [SamplingParams(max_new_tokens=240, temperature=0.6, seed=seed) for seed in range(len(PROMPTS))]
    llm = LLM(outcome.run_dir / "model")
    llm.notify = lambda line: None  # the figures above say it
    for prompt, completion in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        text = prompt + completion.text
        print("\n".join(f"  | {line}" for line in text.splitlines()) + "\n")
    bdh, folder = shlex.quote(command_name()), shlex.quote(str(outcome.run_dir / "model"))
    print(
        "Try next:\n"
        f'  {bdh} generate --model {folder} --prompt "Python is" --stream\n'
        f"  {bdh} chat --model {folder}\n"
        f"  {bdh} eval --model {folder} --data.corpus pydoc\n"
        f"  {bdh} train --config quickstart --data.path YOUR_TEXT.txt --run_dir runs/mine"
    )
    return 0


def command_name() -> str:
    """The command that calls `bdh` in this shell: its name if it is on the path, else its path."""
    if shutil.which("bdh"):
        return "bdh"
    beside_python = Path(sys.executable).parent / "bdh"
    return str(beside_python.relative_to(Path.cwd()) if beside_python.is_relative_to(Path.cwd()) else beside_python)


def free_run_dir() -> Path:
    """runs/quickstart, or the first of runs/quickstart-2, -3 … that is free."""
    number = 1
    while (path := DEFAULT_RUN if number == 1 else DEFAULT_RUN.with_name(f"quickstart-{number}")).exists():
        number += 1
    return path
