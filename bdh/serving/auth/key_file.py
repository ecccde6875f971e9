"""Changes to a file of API keys: made whole or not at all, one at a time, for its owner's eyes only."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

from bdh.errors import BDHError
from bdh.serving.auth.api_keys import FORMAT, ID, Key, hash_of, iso, read_keys
from bdh.serving.config import checked_name


def add_key(
    path: Path,
    name: str,
    expires: datetime | None = None,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    concurrent_requests: int | None = None,
) -> tuple[Key, str]:
    """Puts a new key into a file, which is made if it is not there; returns it and its secret, which is not kept.

    Raises:
        BDHError: The name is none or is taken, a setting cannot be, or the file cannot be read or written.
    """
    if ID.fullmatch(checked_name(name, "the name of the key")):
        raise BDHError(f"the name {name} looks like the id of a key; choose another")
    limits = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrent_requests": concurrent_requests,
    }
    for what, limit in limits.items():
        if limit is not None and limit < 1:
            raise BDHError(f"{what} is {limit}; it must be at least 1")
    now = datetime.now(UTC)
    if expires is not None and expires <= now:
        raise BDHError(f"the key would have expired already, {iso(expires)}; choose a later time")
    _present(path)  # a file that is something else gets no lock beside it
    with locked(path):
        keys = _present(path)
        for key in keys:
            if key.name == name and key.revoked is None:
                raise BDHError(f"{path} has a key named {name} already, {key.id}; revoke it, or choose another name")
        secret = f"bdh-{secrets.token_urlsafe(32)}"
        taken = {key.id for key in keys}
        public = next(public for public in iter(lambda: f"key_{secrets.token_hex(4)}", "") if public not in taken)
        added = Key(
            id=public,
            name=name,
            hash=hash_of(secret),
            created=iso(now),
            expires=None if expires is None else iso(expires),
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            concurrent_requests=concurrent_requests,
        )
        write_keys(path, [*keys, added])
    return added, secret


def _present(path: Path) -> list[Key]:
    """As `read_keys`; a file that is not there has none."""
    try:
        path.stat()
    except FileNotFoundError:
        return []
    except OSError:
        pass  # reading says what is wrong
    return read_keys(path)


def revoke_key(path: Path, name_or_id: str) -> Key:
    """Revokes a key for good; it stays in the file, to be seen in the list. Returns it.

    Raises:
        BDHError: There is none with this name or id, it is revoked already, or the file cannot be read or written.
    """
    read_keys(path)  # a file that is not there, or something else, gets no lock beside it
    with locked(path):
        keys = read_keys(path)
        named = [key for key in keys if name_or_id in (key.id, key.name)]
        current = next((key for key in named if key.revoked is None), None)
        if current is None and named:
            raise BDHError(f"the key {name_or_id} in {path} was revoked already, {named[-1].revoked}")
        if current is None:
            raise BDHError(f"{path} has no key {name_or_id[:80]!r}; bdh keys list shows what it has")
        revoked = replace(current, revoked=iso(datetime.now(UTC)))
        write_keys(path, [revoked if key is current else key for key in keys])
    return revoked


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other processes that would change the file waiting; where there are no such locks, nobody waits."""
    target = path.resolve()
    lock = target.with_name(f".{target.name}.lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise BDHError(
            f"the file of API keys {path} cannot be changed: its lock {lock.name} beside it: {error.strerror}"
        ) from error
    try:
        with suppress(PermissionError):
            _keep_owner(target, descriptor)
        with suppress(ImportError):  # Windows has none
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_keys(path: Path, keys: list[Key]) -> None:
    """Replaces the file. Raises BDHError; then it is as it was."""
    target = path.resolve()  # what a link points to, not the link
    temporary = target.with_name(f".{target.name}.tmp")
    text = json.dumps({"format": FORMAT, "keys": [asdict(key) for key in keys]}, indent=2) + "\n"
    try:
        temporary.unlink(missing_ok=True)  # of a command that was killed
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            _keep_owner(target, descriptor)
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(target)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise BDHError(f"the file of API keys {path} cannot be written: {error.strerror}") from error


def _keep_owner(target: Path, descriptor: int) -> None:
    """Root may change the keys of a server that runs as somebody else, who must be able to read them still."""
    with suppress(FileNotFoundError):
        before, now = target.stat(), os.fstat(descriptor)
        if hasattr(os, "fchown") and (before.st_uid, before.st_gid) != (now.st_uid, now.st_gid):
            os.fchown(descriptor, before.st_uid, before.st_gid)
