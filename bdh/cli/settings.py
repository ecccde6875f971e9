"""Sampling settings as users give them: flags, /set in a chat, or a line of a file of prompts."""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdh.cli.parsing import Parser
from bdh.cli.terminal import show
from bdh.errors import BDHError

if TYPE_CHECKING:
    from bdh.inference.llm import LLM

WHOLE = {"type": int, "metavar": "N"}
NUMBER = {"type": float, "metavar": "X"}
TEXT = {"type": str, "metavar": "TEXT"}

# Fields of SamplingParams, which checks them: how each is declared as a flag, and what it does.
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "max_new_tokens": (WHOLE, "tokens to write at most (default 256)"),
    "min_new_tokens": (WHOLE, "tokens to write before the text may end (default 0)"),
    "temperature": (NUMBER, "how freely tokens are chosen; 0 always takes the likeliest (default 0.8)"),
    "top_k": (WHOLE, "choose among this many likeliest tokens; 0 among all (default 0)"),
    "top_p": (NUMBER, "choose among the likeliest tokens that hold this probability (default 1.0)"),
    "min_p": (NUMBER, "choose among tokens at least this many times as likely as the likeliest (default 0.0)"),
    "typical_p": (NUMBER, "choose among the most typical tokens that hold this probability (default 1.0)"),
    "repetition_penalty": (NUMBER, "above 1: makes tokens of the prompt and the text less likely (default 1.0)"),
    "presence_penalty": (NUMBER, "taken off the logits of tokens that the text has (default 0.0)"),
    "frequency_penalty": (NUMBER, "taken off a token's logit as often as the text has it (default 0.0)"),
    "logit_bias": (
        {"type": str, "metavar": "JSON"},
        'added to the logits of tokens: a JSON object of their ids, as {"101": -5}',
    ),
    "stop": ({**TEXT, "action": "append"}, "the text ends before this; may be given several times"),
    "stop_token_ids": ({"type": int, "metavar": "ID", "nargs": "+"}, "the text ends at these tokens"),
    "ignore_eos": ({"action": "store_true"}, "write on where the model would end the text"),
    "logprobs": (WHOLE, "tell each token's log-probability, and those of this many likeliest"),
    "n": (WHOLE, "texts to write for each prompt (default 1)"),
    "best_of": (WHOLE, "write this many and show the n likeliest"),
    "seed": (WHOLE, "makes the choices repeatable"),
    "num_beams": (WHOLE, "more than 1: look for the likeliest text by a search of this width (default 1)"),
    "regex": (TEXT, "a regular expression that the whole text will match"),
    "json_schema": ({"type": str, "metavar": "JSON"}, "a JSON schema that the text will satisfy; @FILE reads it"),
}


def add_settings(parser: Parser, names: Iterable[str] = SETTINGS) -> None:
    """A flag for each setting; one that is not given leaves no trace, so that SamplingParams' defaults hold."""
    group = parser.add_argument_group("how the text is written")
    for name in names:
        declared, words = SETTINGS[name]
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=words, **declared)


def given_settings(args: Any) -> dict[str, Any]:
    """The settings on a command line, for SamplingParams. Raises BDHError if one is no text, or no file."""
    given = {name: args[name] for name in SETTINGS if name in args}
    for name in ("stop", "regex"):
        check_text(name, "".join(given.get(name, "")))
    if "json_schema" in given:
        given["json_schema"] = schema_text(given["json_schema"])
    if "logit_bias" in given:
        given["logit_bias"] = from_text("logit_bias", given["logit_bias"])
    return given


def from_text(name: str, text: str) -> Any:
    """The value of a setting from what was typed, for SamplingParams. Raises BDHError if it is no text, or no file."""
    check_text(name, text)
    if name == "json_schema":
        return schema_text(text)
    if name == "regex":
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if name == "logit_bias":
        return with_token_ids(value)
    return text if name == "stop" and not isinstance(value, str | list) else value


def with_token_ids(bias: Any) -> Any:
    """A logit_bias from JSON, where all keys are text, with token ids for keys; what is none is left to be refused."""
    if not isinstance(bias, dict):
        return bias
    return {int(key) if key.isascii() and key.isdigit() and len(key) < 20 else key: bias[key] for key in bias}


def check_text(name: str, text: str) -> None:
    """Raises BDHError where text has bytes that were no characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BDHError(f"{name} is not valid text: character {error.start} is half of one") from error


def schema_text(given: str) -> str:
    """A JSON schema, or the one in the file after an @. Raises BDHError."""
    check_text("json_schema", given)
    return read_text(Path(given[1:])) if given.startswith("@") else given


def read_text(path: Path) -> str:
    """A file of UTF-8 text, whole. Raises BDHError."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BDHError(f"{path} is not UTF-8 text: byte {error.start}") from error
    except OSError as error:
        raise BDHError(f"{path} cannot be read: {error.strerror}") from error


def add_model(parser: Parser) -> None:
    """Flags of which model is to run, where, and in which numbers."""
    parser.add_argument("--model", metavar="DIR", type=str, required=True, help="folder of an export")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where it runs")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of weights and activity"
    )
    parser.add_argument("--quantization", choices=["int8", "int4"], help="of the weights, on the CPU")


def open_model(args: Any, batch_size: int | None) -> "LLM":
    """The model that `add_model`'s flags name. Raises BDHError."""
    from bdh.inference.llm import LLM

    llm = LLM(
        args.model, device=args.device, dtype=args.dtype, quantization=args.quantization, max_batch_size=batch_size
    )
    llm.notify = notify
    return llm


def notify(line: str) -> None:
    """Shows a line about the model, that is no error and no part of its text, on stderr."""
    show(f"notice: {line}\n", sys.stderr)
