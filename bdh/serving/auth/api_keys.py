"""API keys: what a file of them holds, and whether a key that is presented may come in.

A secret has 256 random bits, so that nobody can try them all, and a fast hash of it gives nothing away: SHA-256, where
a password would need a slow one. The secret itself is in no file; it is shown once, when the key is made.
"""

import hashlib
import hmac
import json
import logging
import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from bdh.errors import BDHError
from bdh.serving.config import NAME

FORMAT = 1  # of the file
SHORTEST_SECRET = 16  # characters, of a secret in the environment
RETRY_SECONDS = 0.5  # between two tries to read a file that cannot be read
ID = re.compile(r"key_[0-9a-f]{8}")
_HASH = re.compile(r"[0-9a-f]{64}")
_SECRET = re.compile(r"[!-~]+")  # what an HTTP header carries unchanged

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Key:
    """An API key as the server knows it: all but its secret.

    Attributes:
        id: "key_" and 8 hexadecimal digits; for logs, and to share counts between servers.
        name: What people call it.
        hash: SHA-256 of the secret, hexadecimal.
        created: ISO time in UTC; of a key from the environment, when it was read.
        expires: ISO time in UTC from which on it is refused; None: never.
        requests_per_minute: Its own limit; None takes the server's.
        tokens_per_minute: Its own limit; None takes the server's.
        concurrent_requests: Its own limit; None takes the server's.
        revoked: ISO time in UTC when it was revoked; None: it was not.
    """

    id: str
    name: str
    hash: str
    created: str
    expires: str | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    revoked: str | None = None
    concurrent_requests: int | None = None  # files of earlier versions have none

    @property
    def state(self) -> Literal["active", "revoked", "expired"]:
        if self.revoked is not None:
            return "revoked"
        if self.expires is not None and datetime.now(UTC) >= datetime.fromisoformat(self.expires):
            return "expired"
        return "active"


class KeyRefused(Exception):  # noqa: N818
    """A key is not accepted.

    Attributes:
        problem: No key was presented, there is none like it, or it was revoked or has expired.
    """

    def __init__(self, problem: Literal["missing", "unknown", "revoked", "expired"]):
        super().__init__(f"API key {problem}")
        self.problem = problem


def hash_of(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def short_hash(word: str) -> str:
    return hashlib.sha256(word.encode()).hexdigest()[:8]


def iso(moment: datetime) -> str:
    """A moment as the file has it: UTC, to the second."""
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


# -------------------------------------------------------------------------------------------------------- the file


def parse_keys(text: bytes | str, path: Path) -> list[Key]:
    """The keys of a file's text. Raises BDHError, which names the file and the place in it."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BDHError(f"{path} is not a file of API keys: it is not JSON; make one with: bdh keys add NAME") from error
    if not isinstance(content, dict) or not isinstance(content.get("keys"), list):
        raise BDHError(f"{path} is not a file of API keys; make one with: bdh keys add NAME")
    if content.get("format") != FORMAT:
        raise BDHError(f"{path} has the format {content.get('format')!r}, and this bdh reads {FORMAT}; update bdh")
    keys = [_parse_key(entry, f"{path}: keys[{number}]") for number, entry in enumerate(content["keys"])]
    for what in ("id", "hash"):
        _refuse_twins((getattr(key, what) for key in keys), f"{path}: two keys have the same {what}; remove one")
    return keys


def _parse_key(entry: Any, place: str) -> Key:
    if not isinstance(entry, dict):
        raise BDHError(f"{place} is not an object")
    names = {field.name for field in fields(Key)}
    entry = {"concurrent_requests": None, **entry}
    if entry.keys() != names:
        missing, strange = sorted(names - entry.keys()), sorted(entry.keys() - names)
        raise BDHError(f"{place} {'lacks ' + missing[0] if missing else 'has an unknown field ' + strange[0][:40]}")
    for name, pattern in (("id", ID), ("name", NAME), ("hash", _HASH)):
        if not isinstance(entry[name], str) or not pattern.fullmatch(entry[name]):
            raise BDHError(f"{place}: {name} is not one")
    for name in ("created", "expires", "revoked"):
        if not (_is_moment(entry[name]) or (entry[name] is None and name != "created")):
            raise BDHError(f"{place}: {name} is not a time with a zone, as 2027-01-31T00:00:00Z")
    for name in ("requests_per_minute", "tokens_per_minute", "concurrent_requests"):
        if entry[name] is not None and (type(entry[name]) is not int or entry[name] < 1):
            raise BDHError(f"{place}: {name} must be a whole number of at least 1, or null")
    return Key(**entry)


def _is_moment(value: Any) -> bool:
    with suppress(ValueError):
        return isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None
    return False


def _refuse_twins(values: Iterable[str], message: str) -> None:
    values = list(values)
    if len(set(values)) != len(values):
        raise BDHError(message)


# -------------------------------------------------------------------------------------------------- the environment


def environment_keys_of(value: str) -> list[Key]:
    """The keys in `BDH_API_KEYS`: "name:secret,name2:secret2"; a secret alone is named by its hash.

    Raises:
        BDHError: One is too short, or is not one. Says which, and never what.
    """
    keys = []
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if not parts:  # more likely a variable that came out empty than a server meant to be open
        raise BDHError("BDH_API_KEYS is set and empty; unset it to need no keys, or set it to NAME:SECRET")
    for number, part in enumerate(parts, start=1):
        before, colon, after = part.partition(":")
        name, secret = (before.strip(), after.strip()) if colon else (f"environment-{short_hash(hash_of(part))}", part)
        if not NAME.fullmatch(name):
            raise BDHError(
                f"the name of key {number} in BDH_API_KEYS must begin with a letter or digit and have 64 of letters, "
                "digits, dots, dashes and underscores at most"
            )
        if not _SECRET.fullmatch(secret) or len(secret) < SHORTEST_SECRET:
            raise BDHError(
                f"the secret of key {number} in BDH_API_KEYS must have at least {SHORTEST_SECRET} characters, ASCII "
                "without spaces; make one with: openssl rand -base64 32"
            )
        public = short_hash(f"environment:{name}")  # the same on every server, and wherever in the variable
        keys.append(Key(f"key_{public}", name, hash_of(secret), iso(datetime.now(UTC))))
    _refuse_twins((key.name for key in keys), "two keys in BDH_API_KEYS have the same name; rename one")
    _refuse_twins((key.hash for key in keys), "two keys in BDH_API_KEYS have the same secret; change one")
    return keys


# --------------------------------------------------------------------------------------------------------- the store


class KeyStore:
    """The accepted API keys: those of a file, of the environment, or both.

    The file is looked at with every check and read again when it has changed, so a key that is revoked is refused from
    then on. While it cannot be read, the keys last read go on to count, and the log has a warning.

    Args:
        path: Written by `bdh keys`.
        environment_keys: The value of `BDH_API_KEYS`; only hashes of it are kept.

    Raises:
        BDHError: The file is missing or broken, or the variable is wrong.
    """

    def __init__(self, path: Path | None, environment_keys: str | None):
        self.path = path
        self.required = path is not None or environment_keys is not None
        self._of_environment = [] if environment_keys is None else environment_keys_of(environment_keys)
        self._of_file: list[Key] = []
        self._seen: tuple[int, ...] | None = None  # what the file was when it was read
        self._failure: str | None = None
        self._retry_at = 0.0
        if path is not None:
            self._read(path)

    def check(self, presented: str | None) -> Key:
        """The key with this secret. Takes as long whichever it is. Raises KeyRefused."""
        if self.path is not None:
            self._refresh(self.path)
        if not presented:
            raise KeyRefused("missing")
        digest = hash_of(presented)
        found: Key | None = None
        for key in (*self._of_environment, *self._of_file):
            if hmac.compare_digest(key.hash, digest):
                found = key
        if found is None:
            raise KeyRefused("unknown")
        state = found.state
        if state != "active":
            raise KeyRefused(state)
        return found

    def _refresh(self, path: Path) -> None:
        """Reads the file if it is not what was read, at most once in a while if that fails."""
        try:
            if self._seen is not None and signature(path.stat()) == self._seen:
                return
        except OSError:
            pass  # reading says what is wrong
        if time.monotonic() < self._retry_at:
            return
        try:
            self._read(path)
        except BDHError as error:
            self._seen = None
            self._retry_at = time.monotonic() + RETRY_SECONDS
            if str(error) != self._failure:
                self._failure = str(error)
                logger.warning("%s; the %d keys read before go on to count", error, len(self._of_file))
            return
        if self._failure is not None:
            logger.warning("%s can be read again", path)
        logger.info("%s has changed: it holds %d API keys", path, len(self._of_file))
        self._failure = None
        self._retry_at = 0.0

    def _read(self, path: Path) -> None:
        self._of_file, self._seen = read_with_signature(path)


def signature(status: os.stat_result) -> tuple[int, ...]:
    """A value that changes when a file or its permissions change, which decide whether it can be read."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_keys(path: Path) -> list[Key]:
    """The keys of a file. Raises BDHError if it is missing, cannot be read, or is something else."""
    return read_with_signature(path)[0]


def read_with_signature(path: Path) -> tuple[list[Key], tuple[int, ...]]:
    """As `read_keys`; also the signature of just what was read, whatever the path means by then."""
    try:
        with path.open("rb") as file:
            return parse_keys(file.read(), path), signature(os.fstat(file.fileno()))
    except FileNotFoundError as error:
        make = f"bdh keys add NAME --file {path}"
        raise BDHError(f"the file of API keys {path} does not exist; make it with: {make}") from error
    except OSError as error:
        raise BDHError(f"the file of API keys {path} cannot be read: {error.strerror}") from error
