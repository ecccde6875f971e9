"""`bdh report`: one HTML page that compares runs."""

import datetime
from pathlib import Path

from bdh.cli.parsing import Parser
from bdh.errors import BDHError


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="bdh report",
        allow_abbrev=False,
        description="Write one HTML page that compares runs: curves to zoom into, differences of their settings, what "
        "they wrote, their best figures, and how active their neurons are. It needs no network, and runs may be going "
        "on.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--output", metavar="FILE", type=Path, default=Path("report.html"), help="the page to write")
    args = parser.parse_args(argv)

    from bdh.report.page import render
    from bdh.report.runs import read_runs
    from bdh.training.run_log import write_atomically

    if args.output.is_dir():
        raise BDHError(f"--output {args.output} is a folder; name a file, as report.html")
    runs = read_runs(args.runs)
    try:
        write_atomically(args.output, render(runs, datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")))
    except OSError as error:
        raise BDHError(f"--output {args.output} cannot be written: {error.strerror}") from error
    print(f"{args.output} compares {len(runs)} runs" if len(runs) > 1 else f"{args.output} shows {runs[0].name}")
    return 0
