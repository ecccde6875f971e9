"""`bdh generate --prompts`: a file of prompts, answered in order, and taken up again where it was left.

The line of an answer begins with all that decides it, its *head*: number, prompt, settings, model. So a line that is
there can be held to what would be written now byte by byte, and so can the beginning of one that a crash tore.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from bdh.cli.generate_distributed import fingerprint, open_shared
from bdh.cli.settings import SETTINGS, read_text, with_token_ids
from bdh.cli.terminal import show
from bdh.errors import BDHError, suggestion
from bdh.json_text import to_json

if TYPE_CHECKING:
    from bdh.distributed.processes import Processes
    from bdh.inference.llm import LLM
    from bdh.inference.outputs import Completion, TextRequest
    from bdh.inference.sampling_params import SamplingParams

SEED_STRIDE = 1 << 16  # prompt i has the seed S + i · this: its n continuations, S, S + 1 …, are not those of the next
CHOICES, ERROR = '"choices": ', '"error": '  # what follows the head


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file.

    Attributes:
        line: Where it stands, from 1.
        text: What to go on from: a text, or the messages of a conversation.
        params: How.
    """

    line: int
    text: str | list[dict[str, str]]
    params: "SamplingParams"


def answer_prompts(args: Any, given: Mapping[str, Any], processes: "Processes") -> int:
    """The command, with its parsed flags and the settings among them; returns its exit code. Raises BDHError.

    All processes that share the model call it; the first one reads and writes files.
    """
    from bdh.inference.sampling_params import SamplingParams

    path: Path | None = args.output
    if path is not None and (path.suffix != ".jsonl" or (path.exists() and not path.is_file())):
        raise BDHError(f"--output {path} must be a file that ends in .jsonl")
    SamplingParams(seed=given.get("seed"))  # before others are made of it
    prompts = processes.on_main(lambda: read_prompts(args.prompts, given))
    llm = open_shared(args, processes)
    requests = [as_request(llm, prompt, args.prompts) for prompt in prompts]
    runs_as = {"dtype": args.dtype, "quantization": args.quantization}
    runs_as = {name: value for name, value in runs_as.items() if value not in (None, "auto")}
    model = {"model": fingerprint(llm, args, processes)[:16], **runs_as}
    heads = [head_of(number, prompt, model) for number, prompt in enumerate(prompts)]
    if path is None:
        bar_fits = processes.is_main and not sys.stdout.isatty()
        failed = write_answers(llm, requests, heads, 0, lambda line: show(line, sys.stdout), bar_fits)
        tell_failed(failed, len(heads))
        return 0
    try:
        with ExitStack() as files:
            return add_answers(llm, requests, heads, path, processes, files)
    except OSError as error:
        raise BDHError(f"--output {path} cannot be written: {error.strerror}") from error


def add_answers(
    llm: "LLM",
    requests: "Sequence[TextRequest]",
    heads: Sequence[str],
    path: Path,
    processes: "Processes",
    files: ExitStack,
) -> int:
    """Writes those answers that a file has not; returns the command's exit code. Raises BDHError.

    The file stays open, and others out of it, as long as `files`; it is in the first process only.
    """
    file: BinaryIO | None = None

    def begin() -> tuple[int, int]:
        nonlocal file
        file = files.enter_context(path.open("a+b"))
        lock(file, path)
        return count_answers(file, path, heads)

    done, failed = processes.on_main(begin)
    if 0 < done < len(heads):
        print(f"notice: {path} has {done} of {len(heads)} answers; going on from there")

    def write(line: str) -> None:
        nonlocal done
        if file is not None:
            file.write(line.encode())
            file.flush()
        done += 1

    try:
        failed += write_answers(llm, requests, heads, done, write, processes.is_main)
    except KeyboardInterrupt:
        words = f"{path} has {done} of {len(heads)} answers; the same command goes on from there"
        if processes.is_main:
            print(f"interrupted: {words}", file=sys.stderr)
        return 130
    tell_failed(failed, len(heads))
    print(f"{path} has the answers to all {len(heads)} prompts")
    return 0


def tell_failed(failed: int, total: int) -> None:
    """Raises BDHError if there are prompts without an answer."""
    if failed:
        raise BDHError(
            f"{failed} of {total} prompts could not be answered; the lines of these have an error that says why"
        )


# ------------------------------------------------------------------------------------------------------------ prompts


def read_prompts(path: Path, given: Mapping[str, Any]) -> list[Prompt]:
    """The prompts of a file: a line each of a .txt, an object each of a .jsonl; empty lines are left out.

    Args:
        path: The file.
        given: Settings of all of them; an object's own win.

    Raises:
        BDHError: The file cannot be read, or a line is wrong.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise BDHError(f"--prompts {path} must end in .txt (a prompt a line) or .jsonl (an object a line)")
    prompts: list[Prompt] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                record = {"prompt": line.removesuffix("\r")} if path.suffix == ".txt" else read_object(line)
                text, params = understand(record, given, len(prompts))
            except BDHError as error:
                raise BDHError(f"{path} line {number}: {error}") from error
            prompts.append(Prompt(number, text, params))
    if not prompts:
        raise BDHError(f"--prompts {path} holds no prompts")
    return prompts


def read_object(line: str) -> dict[str, Any]:
    """A line of a .jsonl: a prompt or messages, and settings. Raises BDHError."""
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a character
        raise BDHError("there is half of a character in it") from error
    except (ValueError, RecursionError) as error:
        raise BDHError(f"it is not JSON: {error}") from error
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise BDHError('it must be a JSON object with either "prompt" or "messages"')
    for name in record:
        if name not in ("prompt", "messages", *SETTINGS):
            raise BDHError(f"{name} is not a setting; {suggestion(name, SETTINGS)}")
    return record


def understand(record: dict[str, Any], given: Mapping[str, Any], index: int) -> tuple[Any, "SamplingParams"]:
    """Parses a line of the file of prompts into a prompt and its settings. Raises BDHError."""
    from bdh.data.chat_format import check_messages
    from bdh.inference.sampling_params import SamplingParams

    own = {name: value for name, value in record.items() if name in SETTINGS and value is not None}
    if "logit_bias" in own:
        own["logit_bias"] = with_token_ids(own["logit_bias"])
    if "seed" in given:
        own = {"seed": (given["seed"] + index * SEED_STRIDE) % 2**63, **own}
    text = record.get("prompt", record.get("messages"))
    if not isinstance(text, str if "prompt" in record else list):
        raise BDHError("the prompt must be text" if "prompt" in record else "messages must be a list")
    if isinstance(text, list):
        check_messages(text)
    return text, SamplingParams(**{**given, **own})


def as_request(llm: "LLM", prompt: Prompt, path: Path) -> "TextRequest":
    """A prompt for the engine. Raises BDHError if it will not take it."""
    try:
        if isinstance(prompt.text, str):
            request = llm.text_request(prompt.text, prompt.params)
        else:
            request = llm.chat_request(prompt.text, prompt.params)
        llm.check(request)
    except BDHError as error:
        raise BDHError(f"{path} line {prompt.line}: {error}") from error
    return request


# ------------------------------------------------------------------------------------------------------------ answers


def write_answers(
    llm: "LLM",
    requests: "Sequence[TextRequest]",
    heads: Sequence[str],
    done: int,
    write: Callable[[str], None],
    bar_fits: bool,
) -> int:
    """Writes the lines of those not yet done, in order, each as soon as those before it are there.

    Returns:
        How many of them have an error.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    disabled = not (console.is_terminal and bar_fits)
    ready: dict[int, str] = {}
    next_one = done
    failed = 0
    with Progress(*columns, console=console, transient=True, disable=disabled, redirect_stdout=False) as bar:
        task = bar.add_task("", total=len(heads), completed=done)
        for number, completion in llm.run(requests[done:]):
            ready[done + number] = line_of(heads[done + number], completion)
            failed += completion.error is not None
            while (line := ready.pop(next_one, None)) is not None:
                write(line)
                next_one += 1
            bar.update(task, completed=next_one + len(ready))
    return failed


def head_of(index: int, prompt: Prompt, model: Mapping[str, Any]) -> str:
    """The first fields of a prompt's output line; settings with the usual values are omitted."""
    from bdh.inference.sampling_params import SamplingParams

    usual = asdict(SamplingParams())
    settings = {name: value for name, value in asdict(prompt.params).items() if value != usual[name]}
    kind = "prompt" if isinstance(prompt.text, str) else "messages"
    head = to_json({"index": index, kind: prompt.text, "settings": settings, **model}, ensure_ascii=False)
    return head[:-1] + ", "


def line_of(head: str, completion: "Completion") -> str:
    """The line of a prompt: its answer, or why there is none."""
    if completion.error is not None:
        return f"{head}{ERROR}{json.dumps(completion.error, ensure_ascii=False)}}}\n"
    told = []
    for choice in completion.choices:
        entry: dict[str, Any] = {"text": choice.text, "finish_reason": choice.finish_reason, "tokens": choice.tokens}
        if choice.logprobs is not None:
            entry["logprobs"] = [
                {"token": at.token, "logprob": round(at.logprob, 4), "top": [(k, round(v, 4)) for k, v in at.top]}
                for at in choice.logprobs
            ]
        told.append(entry)
    return f"{head}{CHOICES}{to_json(told, ensure_ascii=False)}}}\n"


def count_answers(file: BinaryIO, path: Path, heads: Sequence[str]) -> tuple[int, int]:
    """Counts the outputs in a file, errors included, and the errors; truncates a line that a crash left incomplete.

    Raises:
        BDHError: It holds something else, or answers to other prompts or with other settings.
    """
    file.seek(0)
    done = whole = failed = 0
    for line in file:
        head = heads[done] if done < len(heads) else ""
        kinds = tuple(f"{head}{kind}".encode() for kind in (CHOICES, ERROR) if head)
        begins = line.startswith(kinds)
        if begins and line.endswith(b"}\n"):
            done, whole, failed = done + 1, whole + len(line), failed + line.startswith(kinds[1])
        elif line.endswith(b"\n") or not (begins or any(kind.startswith(line) for kind in kinds)):
            raise BDHError(f"--output {path} line {done + 1} {difference(line, head)}; name another file, or remove it")
    file.truncate(whole)
    return done, failed


def difference(line: bytes, head: str) -> str:
    """Describes the fault of an output line with an unexpected beginning; without an expected one, of any line."""
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.keys().isdisjoint(("choices", "error")):
        return "is not an answer of bdh generate"
    if not head:
        return "is one more than there are prompts"
    expected = json.loads(f"{head}{CHOICES}0}}")
    names = (name for name in {**found, **expected} if found.get(name) != expected.get(name))
    name = next((name for name in names if name not in ("choices", "error")), "form")
    return f"has other {name}: {json.dumps(found.get(name), ensure_ascii=False)[:100]}"


def lock(file: BinaryIO, path: Path) -> None:
    """Keeps other processes that would write answers out of a file, until it is closed. Raises BDHError."""
    try:
        import fcntl
    except ImportError:  # Windows has none
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BDHError(f"--output {path} is being written by another process; wait for it") from error
