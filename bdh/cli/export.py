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
    args = parser.parse_args(argv)

    from bdh.model.export import check_target
    from bdh.training.checkpoint import find_checkpoint
    from bdh.training.export import export_checkpoint

    check_target(args.directory)
    checkpoint = find_checkpoint(args.source, prefer="best", report=lambda line: print(f"notice: {line}"))
    export_checkpoint(checkpoint, args.directory)
    print(f"{args.directory} is the export of {checkpoint}")
    return 0
