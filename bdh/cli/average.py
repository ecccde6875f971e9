"""`bdh average`: the mean of several checkpoints' weights, as an export."""

from pathlib import Path

from bdh.cli.parsing import Parser
from bdh.errors import BDHError


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="bdh average",
        allow_abbrev=False,
        description="Average the weights of checkpoints (or exports) of one architecture and write an export.",
    )
    parser.add_argument("sources", metavar="CKPT", nargs="+", type=Path, help="checkpoints, runs or exports")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="the folder to write")
    args = parser.parse_args(argv)
    if len(args.sources) < 2:
        raise BDHError(f"only {args.sources[0]} is given; averaging takes two checkpoints or more")

    from bdh.training.weight_averaging import average

    average(args.sources, args.output)
    print(f"{args.output} is the average of {len(args.sources)} models")
    return 0
