"""`bdh keys`: make API keys for `bdh serve`, look at them, revoke them."""

import os
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from bdh.cli.parsing import Parser, run_subcommand
from bdh.errors import BDHError

USAGE = """usage: bdh keys COMMAND [options]

  add     make a key for `bdh serve`; its secret is shown once
  list    show the keys: names, limits, which still count; never secrets
  revoke  refuse a key from now on, also by servers that run

The file is --file, else BDH_SERVE__AUTH__KEYS_FILE of the environment, else keys.json in this folder.
bdh keys COMMAND --help tells a command's options."""

FILE_VARIABLE = "BDH_SERVE__AUTH__KEYS_FILE"
UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


def run(argv: list[str]) -> int:
    commands = {"add": add, "list": show, "revoke": revoke}
    return run_subcommand(argv, "bdh keys", USAGE, commands)


def keys_parser(command: str, description: str) -> Parser:
    parser = Parser(prog=f"bdh keys {command}", allow_abbrev=False, description=description)
    parser.add_argument(
        "--file",
        type=Path,
        default=Path(os.environ.get(FILE_VARIABLE) or "keys.json"),
        help=f"the file of keys; without it, {FILE_VARIABLE} of the environment, else keys.json",
    )
    return parser


def add(argv: list[str]) -> int:
    parser = keys_parser(
        "add",
        "Make an API key. Its secret is the only thing printed on stdout, and is nowhere else: keep it. Put the file "
        "where the server has it in --serve.auth.keys_file.",
    )
    parser.add_argument("name", metavar="NAME", type=str, help="what to call it, as the app or the person it is for")
    parser.add_argument(
        "--expires",
        type=str,
        default=None,
        help="after 12h, 30d or 8w, or at a date, 2027-01-31, or a time, 2027-01-31T18:00; UTC unless it says other",
    )
    parser.add_argument("--requests_per_minute", type=int, default=None, help="instead of the server's limit")
    parser.add_argument("--tokens_per_minute", type=int, default=None, help="instead of the server's limit")
    parser.add_argument("--concurrent_requests", type=int, default=None, help="instead of the server's limit")
    args = parser.parse_args(argv)
    expires = None if args.expires is None else expiry(args.expires, datetime.now(UTC))

    from bdh.serving.auth.key_file import add_key

    limits = args.requests_per_minute, args.tokens_per_minute, args.concurrent_requests
    key, secret = add_key(args.file, args.name, expires, *limits)
    until = "" if key.expires is None else f"; it expires {shown_time(key.expires)} UTC"
    print(f"{key.id}, {key.name}, is in {args.file}{until}. Its secret, shown this once:", file=sys.stderr, flush=True)
    print(secret, flush=True)
    return 0


def expiry(text: str, now: datetime) -> datetime:
    """The expiry of a key, from a duration or a date. Raises BDHError."""
    try:
        if match := re.fullmatch(r"(\d{1,9})([hdw])", text):
            return now + int(match[1]) * UNITS[match[2]]
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise BDHError(
            f"--expires is {text[:40]!r}; it must be a while, as 12h, 30d or 8w, or a date, as 2027-01-31"
        ) from error


def show(argv: list[str]) -> int:
    args = keys_parser("list", "Show the keys of a file; - means the server's own limit.").parse_args(argv)

    from bdh.serving.auth.api_keys import read_keys

    keys = read_keys(args.file)
    columns = {"REQUESTS/MIN": "requests_per_minute", "TOKENS/MIN": "tokens_per_minute"}
    if any(key.concurrent_requests is not None for key in keys):
        columns["CONCURRENT"] = "concurrent_requests"
    rows: list[tuple[str, ...]] = [("ID", "NAME", "CREATED (UTC)", "EXPIRES (UTC)", *columns, "STATE")]
    for key in keys:
        state = key.state if key.revoked is None else f"revoked {shown_time(key.revoked)}"
        limits = ("-" if n is None else f"{n:,}" for n in (getattr(key, name) for name in columns.values()))
        expires = "never" if key.expires is None else shown_time(key.expires)
        rows.append((key.id, key.name, shown_time(key.created), expires, *limits, state))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def shown_time(iso: str) -> str:
    return f"{datetime.fromisoformat(iso).astimezone(UTC):%Y-%m-%d %H:%M}"


def revoke(argv: list[str]) -> int:
    parser = keys_parser("revoke", "Refuse a key from now on. Servers that run see it within a second.")
    parser.add_argument("name", metavar="NAME_OR_ID", type=str, help="as bdh keys list shows it")
    args = parser.parse_args(argv)

    from bdh.serving.auth.key_file import revoke_key

    key = revoke_key(args.file, args.name)
    print(f"{key.id}, {key.name}, is revoked in {args.file}", file=sys.stderr)
    return 0
