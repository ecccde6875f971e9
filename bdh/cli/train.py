"""`bdh train`: all settings by flag, YAML and environment; `--resume` takes a run up again."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bdh.cli.parsing import Parser, without_print_config
from bdh.cli.run_config import build_config, train_parser
from bdh.errors import BDHError
from bdh.training.config import TrainConfig, with_earlier_defaults

DESCRIPTION = (
    "Train a model. A setting is taken from its flag, else from the last --config file that has it, else from its "
    "environment variable BDH_SECTION__FIELD, else it is the default. --resume continues the run in run_dir; "
    "--resume PATH continues that run or checkpoint, with the settings it was saved with instead of the defaults; "
    "--resume auto continues the run in run_dir if there is one, and begins it else, for whoever starts the same line "
    "again. Several processes: torchrun --nproc-per-node=N -m bdh train …; those that torchrun starts again go on from "
    "the last checkpoint. --init_from DIR fine-tunes an export: its sizes and its tokenizer come with it."
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
        help="go on from the latest checkpoint of run_dir, or from PATH: a run or one of its checkpoints; auto: if any",
    )
    parsed = parser.parse_args(without_print_config(argv))
    elsewhere = bool(parsed.resume) and parsed.resume != "auto" and parsed.run_dir != TrainConfig().run_dir
    newest = None
    if parsed.resume == "auto" or (started_again() and (parsed.resume is None or elsewhere)):
        # A run that has gone on from elsewhere may have come further by now.
        newest = find("newest", lambda: newest_in(Path(parsed.run_dir)))
    if newest is not None:
        return resume(parser, argv, newest, stays=True)
    if parsed.resume is not None and parsed.resume != "auto":
        asked = Path(parsed.resume or parsed.run_dir)
        where = find("asked", lambda: checkpoint_of(asked, stays=not elsewhere))
        assert where is not None
        return resume(parser, argv, where, stays=not elsewhere)
    if parsed.init_from:
        argv = begin_after(parser, parsed, argv)
    return finish(build_config(parser, parser.parse_args(argv)), None)


def begin_after(parser: Parser, parsed: Any, argv: list[str]) -> list[str]:
    """The command line of a run that begins with a model, from which the defaults of the parser are then taken."""
    from bdh.training.init_from import starting_settings

    settings = starting_settings(parsed.init_from, parsed.data.tokenizer)
    use_defaults(parser, settings, parsed.init_from)
    return [*argv, "--init_from", settings["init_from"]]


def use_defaults(parser: Parser, settings: dict[str, Any], origin: str) -> None:
    """Makes settings the defaults of the parser, which flags, files and environment variables override.

    Args:
        parser: Parser of the command line.
        settings: Sections with their fields, as in a YAML file.
        origin: The checkpoint or export that recorded the settings, for error messages.

    Raises:
        BDHError: A setting is unknown, or its value has the wrong type.
    """
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat.update(
            {f"{name}.{key}": entry for key, entry in value.items()} if isinstance(value, dict) else {name: value}
        )
    known = {action.dest for action in parser._actions}
    if unknown := sorted(flat.keys() - known):
        raise BDHError(f"{origin} has the setting {unknown[0]}, which this version of bdh does not have")
    try:
        parser.parse_object(settings, env=False)  # defaults are not validated by the parser
    except BDHError as error:
        raise BDHError(f"{origin} has settings that cannot be used: {error}") from error
    parser.set_defaults(flat)


def started_again() -> bool:
    """Whether torchrun has started this process in the place of one that ended."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def find(what: str, search: Callable[[], Path | None]) -> Path | None:
    """Runs a search for a checkpoint, which reads all of its files; of several processes only one runs it, where
    possible."""
    from bdh.distributed.processes import broadcast_from_main

    return broadcast_from_main(what, search)


def newest_in(run: Path) -> Path | None:
    """The newest checkpoint of a run that is whole; None if there is none. Raises BDHError if the run is in use."""
    from bdh.training.checkpoint import CheckpointStore
    from bdh.training.run_folder import refuse_if_in_use

    store = CheckpointStore(run / "checkpoints", keep=1)
    if store.paths() and is_main():
        refuse_if_in_use(run)
    newest, complaints = store.latest()
    for line in complaints if newest else ():
        notice(line)
    return newest


def checkpoint_of(asked: Path, stays: bool) -> Path:
    """The checkpoint that a path means. Raises BDHError, also if the run is in use in which the new one would be."""
    from bdh.training.checkpoint import find_checkpoint
    from bdh.training.run_folder import refuse_if_in_use

    if stays and is_main():
        refuse_if_in_use(asked)
    return find_checkpoint(asked, report=notice)


def is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def notice(line: str) -> None:
    if is_main():
        print(f"notice: {line}")


def resume(parser: Parser, argv: list[str], where: Path, stays: bool) -> int:
    """Parses once more with a checkpoint's configuration as the defaults.

    Args:
        parser: Of the command line.
        argv: That line.
        where: The checkpoint.
        stays: Whether the run goes on in its own folder.
    """
    from bdh.training.checkpoint import naming_damage, read_state

    with naming_damage(where):
        use_defaults(parser, with_earlier_defaults(read_state(where)["config"]), str(where))
    given = ["--run_dir", str(run_of(where))] if stays else []
    return finish(build_config(parser, parser.parse_args([*argv, *given])), where)


def run_of(checkpoint: Path) -> Path:
    """The run a checkpoint lies in, relative to here if it is below."""
    folder = checkpoint.absolute().parent
    if folder.name != "checkpoints":
        raise BDHError(f"{checkpoint} lies in no run; name a folder for the one to begin with it: --run_dir DIR")
    run = folder.parent
    return run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run


def finish(config: Any, checkpoint: Path | None) -> int:
    from bdh.training.loop import train

    outcome = train(config, checkpoint)
    return 0 if outcome.signal is None else 128 + outcome.signal
