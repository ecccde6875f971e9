"""Command lines and YAML to settings, and mistakes in them to one line."""

import difflib
import itertools
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from bdh.errors import BDHError, error_text, suggestion
from bdh.kernels import KERNEL_ALIASES


def ready_configs() -> dict[str, str]:
    """The configurations that come with the package: name to path."""
    folder = files("bdh") / "configs"
    return {entry.name.removesuffix(".yaml"): str(entry) for entry in folder.iterdir() if entry.name.endswith(".yaml")}


_FUNCTION = r"<function\s+\S+\s+at\s+0x[0-9a-f]+>"  # as which jsonargparse shows the type of an option with choices
OTHER_VARIABLES = {"BDH_SHAKESPEARE_URL", "BDH_API_KEYS"}  # of this program, but no settings


class ReadyConfigFile(ActionConfigFile):
    """`--config`: a YAML file, or the name of a ready configuration."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        try:
            check_sections(parser, ready_configs().get(values, values))
            super().__call__(parser, cfg, ready_configs().get(values, values), option_string)
        except UnicodeDecodeError as error:
            raise BDHError(f"--config {values} is not a text file") from error


def check_sections(parser: Any, file: str) -> None:
    """Raises BDHError where a file has a single value for a whole section, which would go unnoticed."""
    try:
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # what is wrong with it is told by who reads it next
        return
    for name, value in settings.items() if isinstance(settings, dict) else ():
        if name in parser.groups and not isinstance(value, dict):
            raise BDHError(f"{name} in {file} is {value}; it must be a section with settings below it")


class Parser(ArgumentParser):
    """A parser whose errors are one line, with the nearest spelling where there is one; flags win over files."""

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:  # type: ignore[override]
        try:
            return super().parse_args(None if args is None else files_first(args), *more, **options)
        except OverflowError as error:  # of an integer beyond the range of floats
            raise BDHError(f"a setting cannot be read as a number: {error}") from error

    def instantiate(self, *args: Any, **options: Any) -> Any:
        """The settings as dataclasses; jsonargparse lets null pass for every type. Raises BDHError."""
        settings = super().instantiate(*args, **options)
        for name, value in vars(settings).items():
            refuse_nulls(value, f"{name}.")
        return settings

    def print_help(self, file: Any = None) -> None:
        """Writes the help text; argparse would pass over a full disk. Raises BDHError."""
        stream = sys.stdout if file is None else file
        try:
            stream.write(self.format_help())
            stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise BDHError(f"the output cannot be written: {error_text(error)}") from error

    def format_help(self, *args: Any, **options: Any) -> str:
        """The help text; types are in words, and are left out beside choices. Aliases of values are left out."""
        text = re.sub(rf"\(type:\s+{_FUNCTION},\s+", "(", super().format_help(*args, **options))
        text = re.sub(rf"(,\s+type:\s+{_FUNCTION})|(\s+\(type:\s+{_FUNCTION}\))", "", text)
        text = re.sub(rf",\s*'?({'|'.join(KERNEL_ALIASES)})'?(?=[,}}\]])", "", text)
        return re.sub(r"<class\s+'(?:\w+\.)*(\w+)'>", r"\1", text)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise BDHError(self.explain(message)) from ex

    def explain(self, message: str) -> str:
        """jsonargparse's message in the words of someone who has to mend it."""
        message = " ".join(message.split())
        known = [action.dest for action in self._actions]
        options = [option.lstrip("-") for action in self._actions for option in action.option_strings]
        if match := re.match(r"unrecognized arguments: (\S+)", message):
            return f"{match[1]} is not an option{_nearest(match[1].lstrip('-').split('=')[0], options, '--')}"
        if match := re.match(r"Group '([^']+)' does not accept option '([^']+)'", message):
            return f"{match[1]}.{match[2]} is not a setting{_nearest(f'{match[1]}.{match[2]}', known)}"
        if message == "the following arguments are required: path":
            return "a path is missing in the settings; each entry of a list of models or texts must have one"
        if match := re.match(r"Option '([^']+)' is not accepted", message):
            return f"{match[1]} is not a setting{_nearest(match[1], known)}"
        if match := re.match(r'Parser key "config": File does not exist: \'?([^\']+)', message):
            ready, given = ready_configs(), match[1].removeprefix(f"{Path.cwd()}/")
            near = _nearest(Path(given).name, list(ready))
            return f"--config {given} does not exist{near or '; ready ones are ' + ', '.join(sorted(ready))}"
        if match := re.match(
            r'Parser key "([^"]+)"(?: element (\d+))?: Expected an? (.+?)\. Got value: ?(.*)', message
        ):
            name = match[1] if match[2] is None else f"element {match[2]} of {match[1]}"
            near = _nearest(match[4], _choices(match[3]))
            return f"{name} is {match[4] or 'empty'}; it must be {_kind(match[3])}{near}"
        if match := re.match(
            r'Parser key "([^"]+)": Does not validate .*? Subtypes: \[(.+?), .{0,8}NoneType.{0,2}\] Errors: '
            r".* Given value: (.*)",
            message,
        ):
            return f"{match[1]} is {match[3]}; it must be {_kind(match[2])}, or null"
        return re.sub(r"<class '(\w+)'>", r"\1", message)


def files_first(argv: Sequence[str]) -> list[str]:
    """A command line whose --config files come before everything else, so that no flag is undone by one after it."""
    files: list[str] = []
    others: list[str] = []
    left = iter(argv)
    for argument in left:
        if argument == "--config":
            files += [argument, *itertools.islice(left, 1)]
        else:
            (files if argument.startswith("--config=") else others).append(argument)
    return files + others


def refuse_nulls(settings: Any, prefix: str = "") -> None:
    """Raises BDHError for a field of a dataclass, or of one below it, that is None and whose type does not allow it."""
    if isinstance(settings, list):
        for entry in settings:
            refuse_nulls(entry, prefix)
    if not is_dataclass(settings):
        return
    for name, kind in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if value is None and type(None) not in get_args(kind):
            raise BDHError(f"{prefix}{name} is null; it must be {_kind(str(kind))}")
        refuse_nulls(value, f"{prefix}{name}.")


def _nearest(word: str, known: list[str], prefix: str = "") -> str:
    last_parts = {name.rpartition(".")[2]: name for name in reversed(known)}
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    near = near or [last_parts[part] for part in difflib.get_close_matches(word, last_parts, n=1, cutoff=0.7)]
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _choices(kind: str) -> list[str]:
    found = re.findall(r"'([^']+)'", kind) if kind.startswith("typing.Literal") else []
    return [choice for choice in found if choice not in KERNEL_ALIASES]


def _kind(kind: str) -> str:
    if choices := _choices(kind):
        return f"one of {', '.join(choices)}"
    names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list"}
    names["list[float | None]"] = "a list of numbers or nulls"
    words = re.sub(r"<class '(\w+)'>", r"\1", kind)
    return names.get(words, words)


def without_print_config(argv: list[str]) -> list[str]:
    """A command line for a first look at the settings, which must not print them yet."""
    return [arg for arg in argv if not arg.startswith("--print_config")]


def check_environment(parser: Parser) -> None:
    """Raises BDHError for a variable that looks like a setting of what the parser is for, and is none."""
    own = {f"BDH_{action.dest.upper().replace('.', '__')}" for action in parser._actions}
    known = own | OTHER_VARIABLES
    serving = any(name.startswith("BDH_SERVE__") for name in own)
    for name in sorted(os.environ):
        if name.startswith("BDH_") and name.startswith("BDH_SERVE__") == serving and name not in known:
            raise BDHError(f"the environment variable {name} is not a setting{_nearest(name, sorted(known))}")


def run_subcommand(argv: list[str], prog: str, usage: str, commands: Mapping[str, Callable[[list[str]], int]]) -> int:
    """Runs the subcommand that the first argument names, or prints the usage; returns the exit code.

    Raises:
        BDHError: There is no such subcommand.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage)
        return 0
    if argv[0] not in commands:
        raise BDHError(f"{argv[0]} is not a command of {prog}; {suggestion(argv[0], commands)}")
    return commands[argv[0]](argv[1:])
