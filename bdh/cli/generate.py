"""`bdh generate`: a model writes on from a prompt, or from each prompt of a file."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdh.cli.generate_distributed import first_speaks, open_shared, together
from bdh.cli.parsing import Parser
from bdh.cli.prompts import SEED_STRIDE, answer_prompts
from bdh.cli.settings import add_model, add_settings, given_settings
from bdh.cli.terminal import show
from bdh.errors import BDHError

if TYPE_CHECKING:
    from bdh.distributed.processes import Processes
    from bdh.inference.llm import LLM, TokenLogprob
    from bdh.inference.sampling_params import SamplingParams

PROMPTS_HELP = (
    'answer a file of prompts: .txt, one a line; or .jsonl, objects with "prompt" or "messages" and settings of their '
    "own, if you like. A line of JSON comes out for each, in order; it has an error in "
    f"it where there is no answer. With --seed S, prompt i (from 0) has the seed S + {SEED_STRIDE} i"
)
OUTPUT_HELP = (
    "where the lines for --prompts go, instead of stdout: a .jsonl file. What it has is kept, so the same command goes "
    "on where it was interrupted"
)


def run(argv: list[str]) -> int:
    with first_speaks():
        args = asked_for(argv)
        given = given_settings(args)
        check(args, given)
    with together(args) as processes:
        code = answer_prompts(args, given, processes) if args.prompts is not None else answer(args, given, processes)
        if code == 0:
            processes.gather(None)  # nobody ends before the first one has shown everything
    return code


def asked_for(argv: list[str]) -> Any:
    """The parsed command line. Raises BDHError."""
    parser = Parser(
        prog="bdh generate",
        allow_abbrev=False,
        description="Continue a prompt, or each prompt of a file. A token costs the same, however long the text has "
        "become. Several processes share the heads of a model: torchrun --nproc-per-node=N -m bdh generate …",
    )
    add_model(parser)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", metavar="TEXT", type=str, help="what to go on from; - reads stdin")
    asked.add_argument("--prompts", metavar="FILE", type=Path, help=PROMPTS_HELP)
    parser.add_argument("--output", metavar="FILE", type=Path, help=OUTPUT_HELP)
    parser.add_argument("--stream", action="store_true", help="show each character as soon as it is known")
    parser.add_argument(
        "--batch_size", metavar="N", type=int, help="texts in work at once; without it, what the device is good for"
    )
    add_settings(parser)
    return parser.parse_args(argv)


def check(args: Any, given: Mapping[str, Any]) -> None:
    """Raises BDHError for flags that do not go together, and for settings that are wrong whatever the model."""
    from bdh.inference.sampling_params import SamplingParams

    if args.batch_size is not None and args.batch_size < 1:
        raise BDHError(f"batch_size is {args.batch_size}; it must be at least 1")
    if args.prompts is not None:
        if args.stream:
            raise BDHError("--stream is for one --prompt; the lines for --prompts come as they are ready anyway")
        return
    if args.output is not None:
        raise BDHError("--output is for --prompts; the text for one --prompt goes to stdout")
    params = SamplingParams(**given)
    if args.stream and params.n > 1:
        raise BDHError(f"n is {params.n}; --stream shows one text, leave one of them out")


def answer(args: Any, given: Mapping[str, Any], processes: "Processes") -> int:
    """Continues one prompt; returns the command's exit code. Raises BDHError."""
    from bdh.inference.sampling_params import SamplingParams

    llm = open_shared(args, processes)
    prompt = processes.on_main(read_stdin) if args.prompt == "-" else args.prompt
    (stream if args.stream else write)(llm, prompt, SamplingParams(**given))
    return 0


def write(llm: "LLM", prompt: str, params: "SamplingParams") -> None:
    """Shows what was written once it is whole, each of several texts under a line of its own."""
    choices = llm.generate(prompt, params)[0].choices
    for number, choice in enumerate(choices, 1):
        heading = f"---------- {number} of {len(choices)}\n" if len(choices) > 1 else ""
        show(f"{heading}{prompt}{choice.text}\n", sys.stdout)
        show("".join(table(llm, choice.logprobs or ())), sys.stdout)


def stream(llm: "LLM", prompt: str, params: "SamplingParams") -> None:
    """Shows what is written as it comes."""
    notices: list[str] = []
    tell, llm.notify = llm.notify, notices.append  # after the text, not in the middle of it
    deltas = llm.stream(prompt, params)
    logprobs: list[TokenLogprob] = []
    show(prompt, sys.stdout)
    for delta in deltas:
        show(delta.text, sys.stdout)
        logprobs += delta.logprobs or ()
    show("\n" + "".join(table(llm, logprobs)), sys.stdout)
    for line in notices:
        tell(line)


def table(llm: "LLM", logprobs: "Sequence[TokenLogprob]") -> Iterator[str]:
    """A line a token: its log-probability, the token as it stands in the vocabulary, the likeliest with theirs."""

    def name(token: int) -> str:
        return json.dumps(llm.tokenizer.convert_ids_to_tokens(token), ensure_ascii=False)

    for entry in logprobs:
        likeliest = "".join(f"   {name(token)} {logprob:.4f}" for token, logprob in entry.top)
        yield f"{entry.logprob:10.4f}  {name(entry.token):<12}{likeliest}".rstrip() + "\n"


def read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise BDHError(f"the prompt on stdin is not UTF-8 text: byte {error.start}") from error
