"""`bdh eval`: how well a model predicts a text."""

import json

from bdh.cli.parsing import Parser
from bdh.errors import BDHError


def run(argv: list[str]) -> int:
    from bdh.training.config import LIMITS, DataConfig, TrainConfig, check_limit

    parser = Parser(
        prog="bdh eval",
        allow_abbrev=False,
        description="Score a model on a text: --data.path FILE as a whole, or the validation part of a corpus. Windows "
        "of data.block_size tokens, each predicted from its own beginning.",
    )
    parser.add_argument("--model", metavar="DIR", type=str, required=True, help="folder of an export")
    parser.add_class_arguments(DataConfig, "data")
    parser.add_argument("--batch_size", type=int, default=8, help="windows of one forward pass")
    parser.add_argument("--device", type=str, default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--precision", type=str, default="float32", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    args = parser.parse_args(argv)
    data = DataConfig(**vars(args.data))
    for name in ("data.block_size", "data.train_split"):
        check_limit(name, getattr(data, name.removeprefix("data.")), LIMITS[name])
    if args.batch_size < 1:
        raise BDHError(f"batch_size is {args.batch_size}; it must be at least 1")

    from dataclasses import asdict

    from rich.console import Console
    from rich.progress import Progress

    from bdh.data.blocks import ValidationWindows, tokenize
    from bdh.data.corpora import load_corpus
    from bdh.model.export import load_export
    from bdh.training.device import autocast, choose_device
    from bdh.training.evaluation import evaluate

    model, tokenizer = load_export(args.model)
    device = choose_device(args.device)
    model.to(device)
    corpus = load_corpus(data.corpus, data.path, data.cache_dir)
    text = corpus.text if data.path else corpus.text[int(len(corpus.text) * data.train_split) :]
    tokens = tokenize(text, tokenizer)
    if len(tokens) < 2:
        raise BDHError(f"{corpus.name} has {len(tokens)} tokens; at least 2 are needed to score one")
    windows = ValidationWindows(tokens, min(data.block_size, len(tokens) - 1))
    settings = TrainConfig().training
    settings.precision = args.precision
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("scoring", total=len(windows))
        result = evaluate(
            model,
            windows,
            len(text.encode("utf-8")) / len(tokens),
            args.batch_size,
            lambda: autocast(settings, device),
            lambda done: progress.update(task, completed=done),
        )
    if args.json:
        print(json.dumps(asdict(result)))
    else:
        print(
            f"{corpus.name}: loss {result.loss:.4f} nats a token, perplexity {result.perplexity:.3f}, "
            f"{result.bits_per_byte:.4f} bits per byte, accuracy {result.accuracy:.2%} "
            f"({result.tokens:,} tokens in windows of {windows.block_size})"
        )
    return 0
