"""`bdh generate`: a model writes on from a prompt."""

import sys

from bdh.cli.parsing import Parser
from bdh.errors import BDHError


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="bdh generate",
        allow_abbrev=False,
        description="Continue a prompt. Each token costs the same, however long the text has become.",
    )
    parser.add_argument("--model", metavar="DIR", type=str, required=True, help="folder of an export")
    parser.add_argument("--prompt", metavar="TEXT", type=str, required=True, help="what to go on from; - reads stdin")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="tokens to write at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    parser.add_argument("--top_k", type=int, default=0, help="choose among this many likeliest tokens; 0 among all")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="choose among the likeliest that hold this probability"
    )
    parser.add_argument("--seed", type=int, default=None, help="makes the choices repeatable")
    parser.add_argument("--stream", action="store_true", help="show each character as soon as it is known")
    parser.add_argument("--device", type=str, default="auto", choices=["auto", "cpu", "cuda", "mps"])
    args = parser.parse_args(argv)

    from bdh.inference.generation import SamplingSettings, generate_text
    from bdh.model.export import load_export
    from bdh.training.device import choose_device

    settings = SamplingSettings(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    model, tokenizer = load_export(args.model)
    model.to(choose_device(args.device))
    prompt = read_stdin() if args.prompt == "-" else args.prompt

    def write(text: str) -> None:
        print(text, end="", flush=True)

    if args.stream:
        write(prompt)
        generate_text(model, tokenizer, prompt, settings, write)
        print()
    else:
        print(prompt + generate_text(model, tokenizer, prompt, settings))
    return 0


def read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise BDHError(f"the prompt on stdin is not UTF-8 text: byte {error.start}") from error
