"""Names that come from outside and end in paths, headers or logs."""

import re

from bdh.errors import BDHError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def checked_name(name: str, what: str) -> str:
    """The name, if it can be nothing but one. Raises BDHError."""
    if not NAME.fullmatch(name):
        raise BDHError(
            f"{what} is {name[:80]!r}; it must begin with a letter or digit and have 64 of letters, digits, "
            "dots, dashes and underscores at most"
        )
    return name
