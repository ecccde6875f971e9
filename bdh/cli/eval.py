"""`bdh eval`: how well a model predicts a text."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdh.cli.parsing import Parser
from bdh.cli.settings import notify
from bdh.errors import BDHError
from bdh.json_text import to_json

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from bdh.data.tokens import Tokens
    from bdh.model import BDHForCausalLM
    from bdh.training.config import TrainingConfig

LONG_BLOCKS = 16  # training blocks of a window of --by_position, unless its length is given


def run(argv: list[str]) -> int:
    from bdh.data.settings import DataConfig
    from bdh.training.config import TrainConfig, validate

    parser = Parser(
        prog="bdh eval",
        allow_abbrev=False,
        description="Score a model on a text: --data.path as a whole, or the validation part of a corpus. Windows of "
        "data.block_size tokens, the last one shorter, each predicted from its own beginning. --by_position reads "
        "longer windows, with the state carried, and reports the loss by position.",
    )
    parser.add_argument("--model", metavar="DIR", type=str, required=True, help="folder of an export")
    parser.add_class_arguments(DataConfig, "data")
    parser.add_argument("--batch_size", type=int, default=8, help="windows of one forward pass")
    parser.add_argument("--device", type=str, default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--precision", type=str, default="float32", choices=["auto", "float32", "bfloat16"])
    parser.add_argument(
        "--carry_state",
        action="store_true",
        help="read each window with the synapses of the one before it, until its document ends",
    )
    parser.add_argument(
        "--by_position",
        metavar="LENGTH",
        nargs="?",
        const=0,
        type=int,
        help="report the loss by position in windows of LENGTH tokens, in bins that double; without LENGTH, 16 times "
        "the block the model was trained on, or as many as the text has",
    )
    parser.add_argument("--windows", type=int, default=8, help="windows of --by_position, spread evenly over the text")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="draw the loss by position into this PNG file")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    args = parser.parse_args(argv)
    data: DataConfig = parser.instantiate(args).data
    validate(TrainConfig(data=data))
    if args.batch_size < 1:
        raise BDHError(f"batch_size is {args.batch_size}; it must be at least 1")
    check_by_position(args)

    from dataclasses import asdict

    from rich.console import Console
    from rich.progress import Progress

    from bdh.data.blocks import ValidationWindows
    from bdh.data.loader import read_text
    from bdh.data.tokenizer import is_tokenizer
    from bdh.model.device import choose_device
    from bdh.model.export import load_export
    from bdh.training.device_setup import autocast
    from bdh.training.validation import evaluate

    model, tokenizer = load_export(args.model)
    if data.tokenizer is not None and not is_tokenizer(tokenizer, data.tokenizer):
        raise BDHError(f"data.tokenizer {data.tokenizer} is not the tokenizer of {args.model}; leave it out")
    apart = not data.cross_documents or args.carry_state
    if apart and tokenizer.eos_token_id is None:
        raise BDHError(f"{args.model} has a tokenizer without an end-of-text token: documents cannot be kept apart")
    device = choose_device(args.device)
    model.to(device)
    console = Console(stderr=True)
    say = console.log if console.is_terminal else lambda line: None
    name, tokens, size = read_text(data, tokenizer, say, notify)
    if len(tokens) < 2:
        raise BDHError(f"{name} has {len(tokens)} tokens; at least 2 are needed to score one")
    settings = TrainConfig().training
    settings.precision = args.precision
    bytes_per_token = size / max(tokens.num_target_tokens(), 1)
    if args.by_position is not None:
        end_of_text = tokenizer.eos_token_id if apart else None
        return by_position(args, model, name, tokens, bytes_per_token, end_of_text, settings, console)
    windows = ValidationWindows(tokens, min(data.block_size, len(tokens) - 1), whole=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("scoring", total=len(windows))
        result = evaluate(
            model,
            windows,
            bytes_per_token,
            args.batch_size,
            lambda: autocast(settings, device),
            lambda done: progress.update(task, completed=done),
            end_of_text=tokenizer.eos_token_id if apart else None,
            carry_state=args.carry_state,
        )
    if args.json:
        print(to_json(asdict(result)))
    else:
        print(
            f"{name}: loss {result.loss:.4f} nats a token, perplexity {result.perplexity:.3f}, "
            f"{result.bits_per_byte:.4f} bits per byte, perplexity per byte {result.perplexity_per_byte:.4f}, "
            f"accuracy {result.accuracy:.2%} "
            f"({result.tokens:,} {'tokens of answers' if data.has_chats() else 'tokens'} in windows of "
            f"{windows.block_size})"
        )
    return 0


def check_by_position(args: Any) -> None:
    """Refuses flags that do not go with --by_position, or without it. Raises BDHError."""
    if args.windows < 1:
        raise BDHError(f"windows is {args.windows}; it must be at least 1")
    if args.by_position is None:
        if args.picture is not None:
            raise BDHError("--picture is for --by_position; leave it out, or add --by_position")
        return
    if args.by_position != 0 and args.by_position < 2:
        raise BDHError(f"by_position is {args.by_position}; it must be at least 2 tokens")
    if args.carry_state:
        raise BDHError("--by_position carries the state within each window; leave --carry_state out")
    if args.picture is not None and args.picture.is_dir():
        raise BDHError(f"--picture {args.picture} is a folder; name a file, as by_position.png")


def by_position(
    args: Any,
    model: "BDHForCausalLM",
    name: str,
    tokens: "Tokens",
    bytes_per_token: float,
    end_of_text: int | None,
    settings: "TrainingConfig",
    console: "Console",
) -> int:
    """Scores long windows by position, and shows the result. Raises BDHError."""
    from dataclasses import asdict

    from rich.progress import Progress

    from bdh.data.blocks import ValidationWindows
    from bdh.evaluation.by_position import score_by_position, table
    from bdh.evaluation.loss_plot import draw_by_position
    from bdh.training.device_setup import autocast

    block_size = model.config.training_block_size
    length = args.by_position or min(LONG_BLOCKS * (block_size or args.data.block_size), len(tokens) - 1)
    if length > len(tokens) - 1:
        raise BDHError(
            f"by_position is {length}, but {name} has {len(tokens):,} tokens; use a length of at most "
            f"{len(tokens) - 1}, or a longer text"
        )
    windows = ValidationWindows(tokens, length, args.windows, whole=args.windows * length >= len(tokens) - 1)
    device: torch.device = next(model.parameters()).device
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("scoring", total=len(windows) * length)
        bins = score_by_position(
            model,
            windows,
            bytes_per_token,
            args.batch_size,
            precision=lambda: autocast(settings, device),
            end_of_text=end_of_text,
            progress=lambda done: progress.update(task, completed=done),
        )
    if args.json:
        sizes = {"text": name, "length": length, "windows": len(windows), "training_block_size": block_size}
        print(to_json({**sizes, "bins": [asdict(entry) for entry in bins]}))
    else:
        print(f"{name}: {len(windows)} windows of {length:,} tokens")
        print("\n".join(table(bins, block_size)))
    if args.picture is not None:
        draw_by_position({Path(args.model).name or args.model: bins}, block_size, args.picture)
    return 0
