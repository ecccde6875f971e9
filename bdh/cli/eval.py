"""`bdh eval`: how well a model predicts a text."""

import json

from bdh.cli.parsing import Parser
from bdh.errors import BDHError


def run(argv: list[str]) -> int:
    from bdh.data.settings import DataConfig
    from bdh.training.config import TrainConfig, validate

    parser = Parser(
        prog="bdh eval",
        allow_abbrev=False,
        description="Score a model on a text: --data.path as a whole, or the validation part of a corpus. Windows of "
        "data.block_size tokens, each predicted from its own beginning.",
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
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    args = parser.parse_args(argv)
    data: DataConfig = parser.instantiate(args).data
    validate(TrainConfig(data=data))
    if args.batch_size < 1:
        raise BDHError(f"batch_size is {args.batch_size}; it must be at least 1")

    from dataclasses import asdict

    from rich.console import Console
    from rich.progress import Progress

    from bdh.data.blocks import ValidationWindows
    from bdh.data.loader import read_text
    from bdh.data.tokenizer import load_tokenizer, same_tokenizer
    from bdh.model.device import choose_device
    from bdh.model.export import load_export
    from bdh.training.device import autocast
    from bdh.training.evaluation import evaluate

    model, tokenizer = load_export(args.model)
    if data.tokenizer is not None and not same_tokenizer(tokenizer, load_tokenizer(data.tokenizer)):
        raise BDHError(f"data.tokenizer {data.tokenizer} is not the tokenizer of {args.model}; leave it out")
    apart = not data.cross_documents or args.carry_state
    if apart and tokenizer.eos_token_id is None:
        raise BDHError(f"{args.model} has a tokenizer without an end-of-text token: documents cannot be kept apart")
    device = choose_device(args.device)
    model.to(device)
    console = Console(stderr=True)
    name, tokens, size = read_text(data, tokenizer, console.log if console.is_terminal else lambda line: None)
    if len(tokens) < 2:
        raise BDHError(f"{name} has {len(tokens)} tokens; at least 2 are needed to score one")
    windows = ValidationWindows(tokens, min(data.block_size, len(tokens) - 1))
    settings = TrainConfig().training
    settings.precision = args.precision
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("scoring", total=len(windows))
        result = evaluate(
            model,
            windows,
            size / max(tokens.predicted(), 1),
            args.batch_size,
            lambda: autocast(settings, device),
            lambda done: progress.update(task, completed=done),
            end_of_text=tokenizer.eos_token_id if apart else None,
            carry_state=args.carry_state,
        )
    if args.json:
        print(json.dumps(asdict(result)))
    else:
        print(
            f"{name}: loss {result.loss:.4f} nats a token, perplexity {result.perplexity:.3f}, "
            f"{result.bits_per_byte:.4f} bits per byte, perplexity per byte {result.perplexity_per_byte:.4f}, "
            f"accuracy {result.accuracy:.2%} "
            f"({result.tokens:,} {'tokens of answers' if data.has_chats() else 'tokens'} in windows of "
            f"{windows.block_size})"
        )
    return 0
