"""Errors a user can cause and mend."""

import difflib
from collections.abc import Iterable


def one_line(error: BaseException) -> str:
    """The message of an exception in one line of at most 200 characters; the name of its class if it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def error_text(error: BaseException) -> str:
    """The cause of an error in one line: the operating system's words if it has them, as for a full disk."""
    return getattr(error, "strerror", None) or one_line(error)


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of an error line about an unknown name: the closest known one, or the list of all."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"


class BDHError(Exception):
    """Something the user can put right. The message is one line: what is wrong, where, and what to do.

    Every command prints it to stderr without a traceback and exits with code 2.
    """


class ReportedByOtherRank(BDHError):  # noqa: N818
    """An error that another rank of the same run reports to the user."""


class QueueFull(BDHError):  # noqa: N818
    """As many requests wait for the engine as may."""


class PromptTooLong(BDHError):  # noqa: N818
    """A text has more tokens than may be read."""


class ModelClosed(BDHError):  # noqa: N818
    """The model was closed, and what it had in work with it."""
