"""`bdh export`: a run or a checkpoint becomes a model folder."""

from pathlib import Path

from bdh.cli.parsing import Parser


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="bdh export",
        allow_abbrev=False,
        description="Write a folder that from_pretrained() reads: weights, code, tokenizer and model card. Of a run, "
        "the best checkpoint by validation loss is taken.",
    )
    parser.add_argument("source", metavar="RUN_OR_CKPT", type=Path, help="a run's folder, or one of its checkpoints")
    parser.add_argument("directory", metavar="DIR", type=Path, help="the folder to write")
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="of a run with LoRA, write the adapters alone, for peft to load on the model they belong to; otherwise "
        "they are merged into it",
    )
    parser.add_argument(
        "--init_from", metavar="DIR", type=Path, help="where the model is now that the adapters of the run belong to"
    )
    args = parser.parse_args(argv)

    from bdh.model.export import check_target
    from bdh.training.checkpoint import find_checkpoint
    from bdh.training.export import export_adapter, export_checkpoint
    from bdh.training.lora import check_adapter_target

    (check_adapter_target if args.adapter else check_target)(args.directory)
    checkpoint = find_checkpoint(args.source, prefer="best", report=lambda line: print(f"notice: {line}"))
    (export_adapter if args.adapter else export_checkpoint)(checkpoint, args.directory, args.init_from)
    what = "holds the adapters" if args.adapter else "is the export"
    print(f"{args.directory} {what} of {checkpoint}")
    return 0
