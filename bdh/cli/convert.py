"""`bdh convert`: between the published checkpoint layout and exports."""

from pathlib import Path

from bdh.cli.parsing import Parser


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="bdh convert",
        allow_abbrev=False,
        description="Turn a checkpoint in the published layout (.safetensors, or .pt holding a state dict) into an "
        "export, or with --to-published an export into such a checkpoint. The round trip is exact.",
    )
    parser.add_argument(
        "source", metavar="SRC", type=Path, help="a published checkpoint; an export with --to-published"
    )
    parser.add_argument("target", metavar="DST", type=Path, help="a new export folder; a file with --to-published")
    parser.add_argument(
        "--to-published", dest="to_published", action="store_true", help="from an export to a checkpoint"
    )
    parser.add_argument("--n_layer", type=int, default=None, help="layers, where the file does not say (default 6)")
    parser.add_argument("--dropout", type=float, default=None, help="dropout for further training (default 0.1)")
    parser.add_argument("--tokenizer", choices=["bytes", "none"], default="bytes", help="what to put beside the model")
    args = parser.parse_args(argv)

    from bdh.data.tokenizer import byte_tokenizer
    from bdh.model import published

    if args.to_published:
        published.save_published(args.source, args.target)
        print(f"{args.target} is {args.source} in the published layout")
        return 0
    given = {name: getattr(args, name) for name in ("n_layer", "dropout") if getattr(args, name) is not None}
    tokenizer = byte_tokenizer(end_of_text=False) if args.tokenizer == "bytes" else None  # as they were trained
    notes = published.convert(args.source, args.target, given, tokenizer)
    for note in notes:
        print(f"notice: {note}")
    print(f"{args.target} is the export of {args.source}")
    return 0
