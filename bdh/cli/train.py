"""`bdh train`: all settings by flag, YAML and environment; `--resume` takes a run up again."""

import json
from pathlib import Path
from typing import Any

from bdh.cli.parsing import Parser, build_config, train_parser

DESCRIPTION = (
    "Train a model. A setting is taken from its flag, else from the last --config file that has it, else from its "
    "environment variable BDH_SECTION__FIELD, else it is the default. --resume continues the run in run_dir; "
    "--resume PATH continues that run or checkpoint, with the settings it was saved with unless others are given."
)


def run(argv: list[str]) -> int:
    parser = train_parser("bdh train", DESCRIPTION)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        default=None,
        type=str,
        metavar="PATH",
        help="go on from the latest checkpoint of run_dir, or from PATH: a run or one of its checkpoints",
    )
    parsed = parser.parse_args(argv)
    if parsed.resume is None:
        return finish(build_config(parser, parsed), None)
    return resume(parser, parsed, argv)


def resume(parser: Parser, parsed: Any, argv: list[str]) -> int:
    """Parses once more with the saved configuration underneath what the command line says."""
    from bdh.training.checkpoint import find_checkpoint, read_state

    where = find_checkpoint(Path(parsed.resume or parsed.run_dir), report=lambda line: print(f"notice: {line}"))
    saved = where.parent.parent / "config.yaml"
    settings = str(saved) if saved.is_file() else json.dumps(read_state(where)["config"])
    given = ["--config", settings, *argv]
    if parsed.resume and not any(arg.split("=")[0] == "--run_dir" for arg in argv):
        given = [*given, "--run_dir", str(where.parent.parent)]
    return finish(build_config(parser, parser.parse_args(given)), where)


def finish(config: Any, checkpoint: Path | None) -> int:
    from bdh.training.loop import train

    outcome = train(config, checkpoint)
    return 0 if outcome.signal is None else 128 + outcome.signal
