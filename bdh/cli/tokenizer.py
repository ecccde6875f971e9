"""`bdh tokenizer`: train a vocabulary, look at one, turn text into ids and back."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bdh.cli.parsing import Parser, run_subcommand
from bdh.cli.settings import notify
from bdh.errors import BDHError
from bdh.json_text import to_json

USAGE = """usage: bdh tokenizer COMMAND [options]

  train   learn a tokenizer from any text, and save it as a folder that AutoTokenizer opens
  info    show a tokenizer: its size, its special tokens, and how many bytes of a text a token stands for
  encode  text to token ids
  decode  token ids to text, as they come

bdh tokenizer COMMAND --help tells a command's options."""

KINDS = ["bpe", "wordpiece", "unigram", "bytes"]


def run(argv: list[str]) -> int:
    commands = {"train": train, "info": info, "encode": encode, "decode": decode}
    return run_subcommand(argv, "bdh tokenizer", USAGE, commands)


def train(argv: list[str]) -> int:
    from bdh.data.settings import DataConfig

    parser = Parser(
        prog="bdh tokenizer train",
        allow_abbrev=False,
        description="Learn a tokenizer from the training part of a text: --data.train_split of it, or, of a dataset "
        "with --data.validation_split, all of the training split.",
    )
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--kind", type=str, default="bpe", choices=KINDS, help="bpe is byte-level and exact; bytes needs no text"
    )
    parser.add_argument("--vocab_size", type=int, default=32768, help="tokens at most, special ones included")
    parser.add_argument("--min_frequency", type=int, default=2, help="how often what becomes a token must be seen")
    parser.add_argument("--max_bytes", type=float, default=None, help="read this much text at most; 1e9 is a gigabyte")
    parser.add_class_arguments(DataConfig, "data")
    args = parser.parse_args(argv)
    data = check(parser.instantiate(args).data)
    if args.max_bytes is not None and not args.max_bytes >= 1:
        raise BDHError(f"max_bytes is {args.max_bytes}; it must be at least 1")

    from bdh.data.tokenizer import check_tokenizer_target, save_tokenizer
    from bdh.data.vocabulary import train_tokenizer

    check_tokenizer_target(args.output)
    read = Progress()
    texts = () if args.kind == "bytes" else read.counted(data, args.max_bytes)
    tokenizer = train_tokenizer(args.kind, texts, args.vocab_size, args.min_frequency, sys.stderr.isatty())
    save_tokenizer(tokenizer, args.output)
    if args.kind != "bytes" and len(tokenizer) < args.vocab_size:
        print(f"notice: the text holds no more than {len(tokenizer):,} tokens of the {args.vocab_size:,} asked for")
    learned = f", learned from {read.documents:,} texts of {read.bytes / 1e6:,.1f} MB" if read.documents else ""
    print(f"{args.output} is a {args.kind} tokenizer of {len(tokenizer):,} tokens{learned}")
    return 0


def check(data: Any) -> Any:
    """The settings of a text, refused where a run would refuse them."""
    from bdh.training.config import TrainConfig, validate

    validate(TrainConfig(data=data))
    return data


class Progress:
    """Counts the texts on their way to the trainer.

    Attributes:
        documents: Texts read.
        bytes: Their UTF-8 bytes.
    """

    def __init__(self) -> None:
        self.documents = 0
        self.bytes = 0

    def counted(self, data: Any, limit: float | None) -> Iterator[str]:
        """The training texts, until the limit; says now and then how far it is."""
        from rich.console import Console

        from bdh.data.encoding import encode_utf8
        from bdh.data.loader import training_texts

        console = Console(stderr=True)
        with console.status("reading") as status:
            for text in training_texts(data, notify):
                self.documents += 1
                self.bytes += len(encode_utf8(text))
                yield text
                if self.documents % 1000 == 0:
                    status.update(f"reading: {self.documents:,} texts, {self.bytes / 1e6:,.0f} MB")
                if limit is not None and self.bytes >= limit:
                    break
            status.update(f"learning from {self.bytes / 1e6:,.0f} MB")


def info(argv: list[str]) -> int:
    from bdh.data.settings import DataConfig

    parser = Parser(
        prog="bdh tokenizer info",
        allow_abbrev=False,
        description="Show a tokenizer, and measure it on a text: --data.path as a whole, or the validation part of a "
        "corpus. More bytes per token make shorter sequences; compare models by bits per byte.",
    )
    parser.add_argument("tokenizer", metavar="DIR_OR_NAME", type=str, help="a tokenizer's folder, its name, or bytes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_class_arguments(DataConfig, "data")
    args = parser.parse_args(argv)
    data = check(parser.instantiate(args).data)

    from rich.console import Console

    from bdh.data.loader import read_text
    from bdh.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    console = Console(stderr=True)
    say = console.log if console.is_terminal else lambda line: None
    name, tokens, size = read_text(data, tokenizer, say, notify)
    if not len(tokens):
        raise BDHError(f"{name} has no tokens")
    special = {name: tokenizer.convert_tokens_to_ids(name) for name in tokenizer.all_special_tokens}
    facts = {
        "kind": type(tokenizer.backend_tokenizer.model).__name__,
        "tokens": len(tokenizer),
        "special_tokens": special,
        "end_of_text": tokenizer.eos_token,
        "chat_template": tokenizer.chat_template is not None,
        "text": name,
        "text_bytes": size,
        "text_tokens": len(tokens),
        "bytes_per_token": size / max(tokens.num_target_tokens(), 1),
    }
    if args.json:
        print(to_json(facts))
        return 0
    facts["special_tokens"] = ", ".join(f"{token} {i}" for token, i in special.items()) or "none"
    facts["end_of_text"] = facts["end_of_text"] or "none"
    facts["chat_template"] = "yes" if facts["chat_template"] else "no"
    facts["bytes_per_token"] = f"{size / len(tokens):.3f}"
    for key, value in facts.items():
        print(f"{key:<16}  {value:,}" if isinstance(value, int) else f"{key:<16}  {value}")
    return 0


def encode(argv: list[str]) -> int:
    parser = Parser(
        prog="bdh tokenizer encode",
        allow_abbrev=False,
        description="Print the ids of a text: the argument, or what comes on stdin, a line of ids for each line.",
    )
    parser.add_argument("tokenizer", metavar="DIR_OR_NAME", type=str, help="a tokenizer's folder, its name, or bytes")
    parser.add_argument("text", nargs="?", type=str, default=None, help="the text; without it, stdin is read")
    parser.add_argument("--tokens", action="store_true", help="print the tokens as they stand in the vocabulary")
    parser.add_argument("--special", action="store_true", help="take <|endoftext|> and the like for what they name")
    args = parser.parse_args(flags_first(argv, "--tokens", "--special"))

    from bdh.data.encoding import Encoder, clean
    from bdh.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    encoder = Encoder(tokenizer)
    lines = [args.text] if args.text is not None else (line.decode("utf-8", "replace") for line in sys.stdin.buffer)
    for line in lines:
        if args.special:
            ids = tokenizer.encode(clean(line), add_special_tokens=False)
        else:
            ids = encoder([line])[0].tolist()
        shown = [json.dumps(token, ensure_ascii=False) for token in tokenizer.convert_ids_to_tokens(ids)]
        print(*(shown if args.tokens else ids), flush=True)
    return 0


def decode(argv: list[str]) -> int:
    parser = Parser(
        prog="bdh tokenizer decode",
        allow_abbrev=False,
        description="Print the text of ids: the arguments, or what comes on stdin. A character is printed as soon as "
        "it is whole, never half of one.",
    )
    parser.add_argument("tokenizer", metavar="DIR_OR_NAME", type=str, help="a tokenizer's folder, its name, or bytes")
    parser.add_argument("ids", nargs="*", type=int, help="token ids; without them, stdin is read")
    parser.add_argument("--skip_special", action="store_true", help="leave special tokens out")
    args = parser.parse_args(flags_first(argv, "--skip_special"))

    from bdh.data.tokenizer import IncrementalDecoder, load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    decoder = IncrementalDecoder(tokenizer, skip_special_tokens=args.skip_special)
    for token in args.ids or ids_on_stdin():
        if not 0 <= token < len(tokenizer):
            raise BDHError(f"{token} is not an id of {args.tokenizer}, which has {len(tokenizer)} tokens")
        print(decoder.step(token), end="", flush=True)
    print(decoder.end())
    return 0


def flags_first(argv: list[str], *flags: str) -> list[str]:
    """The same command line with the flags in front: argparse would take an argument after them for one too many."""
    return sorted(argv, key=lambda word: word not in flags)


def ids_on_stdin() -> Iterator[int]:
    for line in sys.stdin:
        for word in line.split():
            try:
                yield int(word)
            except ValueError as error:
                raise BDHError(f"{word[:40]} on stdin is not a token id") from error
