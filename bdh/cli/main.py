"""`bdh`: finds the command and runs it. Loads nothing heavy, so that `bdh --help` answers at once."""

import importlib
import io
import os
import sys
from contextlib import suppress
from errno import EBADF

from bdh import __version__
from bdh.errors import BDHError, ReportedByOtherRank, suggestion
from bdh.library_logging import quiet_libraries

COMMANDS = {
    "quickstart": "train a small model on text that is already here, and let it write (about 2 minutes)",
    "train": "train a model, from the beginning or from a checkpoint",
    "export": "turn a run or a checkpoint into a model folder that from_pretrained() reads",
    "generate": "let a model write on from a prompt, or from many",
    "chat": "talk with a model",
    "eval": "score a model on a text: loss, perplexity, bits per byte, accuracy",
    "calibrate": "find the decay that lets a model read beyond the block it was trained on",
    "convert": "turn a published checkpoint into an export, or back",
    "average": "average the weights of several checkpoints into an export",
    "tokenizer": "learn a vocabulary from text, look at one, encode and decode",
    "serve": "serve models: the OpenAI API, sessions, and a page to talk to them and watch them think",
    "keys": "make, list and revoke the API keys of a server",
    "report": "compare runs on one HTML page: curves, settings, samples, neurons",
    "info": "show a model's sizes: parameters, memory, state",
}

USAGE = "usage: bdh COMMAND [options]"


def overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {line}" for name, line in COMMANDS.items()]
    return "\n".join(
        [
            f"bdh {__version__}: Dragon Hatchling language models",
            "",
            USAGE,
            "",
            *lines,
            "",
            "bdh COMMAND --help tells a command's options. To begin: bdh quickstart",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0 done, 2 an error the user can mend, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"bdh {__version__}")
        return 0
    name = argv[0]
    quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character still shows the rest
    try:
        if name not in COMMANDS:
            raise BDHError(f"{name} is not a command; {suggestion(name, COMMANDS)}")
        return importlib.import_module(f"bdh.cli.{name}").run(argv[1:])
    except ReportedByOtherRank:
        return 2
    except BDHError as error:
        prog = f"bdh {name}" if name in COMMANDS else "bdh"
        rank = os.environ.get("RANK", "0")  # of several processes of a run
        which = "" if rank == "0" else f"process {rank}: "
        print(f"{prog}: error: {which}{' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # of several processes, all of which are interrupted
            print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `bdh ... | head` does
        return 141
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        place = "the output cannot be written: " if error.errno == EBADF and not place else place
        print(f"bdh {name}: error: {place}{error.strerror or error}", file=sys.stderr)
        return 2


def open_closed_streams() -> None:
    """Opens standard streams that the caller has closed, as `>&-` does: or files opened later would get their numbers.

    stdin is then empty, what goes to stderr is discarded, and writing to stdout is an error as it was before.
    """
    for number, name, flags in ((0, "stdin", os.O_RDONLY), (1, "stdout", os.O_RDONLY), (2, "stderr", os.O_WRONLY)):
        if getattr(sys, name) is not None:
            continue
        with suppress(OSError):
            os.fstat(number)  # open, but of no use to Python
            continue
        opened = os.open(os.devnull, flags)  # the lowest number that is free, which is this one
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)
        mode = "r" if name == "stdin" else "w"
        setattr(sys, name, open(number, mode, encoding="utf-8", errors="replace", closefd=False))  # noqa: SIM115


def entry() -> None:
    """The console command: `main`, and its output written out before the process ends."""
    open_closed_streams()
    code: int | str | None = 0
    try:
        try:
            code = main()
        except SystemExit as done:  # as --help ends
            code = done.code
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain once more
        if isinstance(error, BrokenPipeError):
            code = 141
        elif not code:  # an error of the command has its line already
            print(f"bdh: error: the output cannot be written: {error.strerror}", file=sys.stderr)
            code = 2
    sys.exit(code)
