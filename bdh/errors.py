"""Errors a user can cause and mend."""


class BDHError(Exception):
    """Something the user can put right. The message is one line: what is wrong, where, and what to do.

    Every command prints it to stderr without a traceback and exits with code 2.
    """
