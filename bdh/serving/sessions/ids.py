"""Ids of what a server keeps in its memory. Where several servers answer as one, an id says which of them has it."""

import hashlib
import re
import uuid

from bdh.serving.api.errors import ApiError

DIGITS = 8  # of a place in an id; the other 24 are what nobody guesses
ID = re.compile(rf"(?:ses|trc)_([0-9a-f]{{{DIGITS}}})[0-9a-f]{{{32 - DIGITS}}}")


def place_of_replica(name: str) -> str:
    """The digits that stand for a replica."""
    return hashlib.blake2b(name.encode(), digest_size=DIGITS // 2).hexdigest()


def new_id(kind: str, place: str) -> str:
    """A new id, "ses_" or "trc_" and 32 hexadecimal digits, which begin with the place if there is one."""
    return f"{kind}_{place}{uuid.uuid4().hex[len(place) :]}"


def place_in(text: str) -> str | None:
    """The place in an id, if it is one."""
    found = ID.fullmatch(text)
    return None if found is None else found[1]


def check_place(id: str, place: str, remedy: str) -> None:
    """Raises ApiError 410 for what was kept elsewhere. It comes here only if that place is no more."""
    if place and place_in(id) not in (None, place):
        kind = "session" if id.startswith("ses_") else "trace"
        raise ApiError(410, f"the {kind} {id} was on a replica that is gone; {remedy}", code=f"{kind}_gone")
