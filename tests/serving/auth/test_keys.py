"""API keys: who may come in, what is kept of a secret, and a file that changes under a running server."""

import hmac
import json
import logging
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from bdh.errors import BDHError
from bdh.serving.auth import api_keys as module
from bdh.serving.auth.api_keys import KeyRefused, KeyStore, hash_of, iso, read_keys
from bdh.serving.auth.key_file import add_key, revoke_key, write_keys
from tests.conftest import environment

SECRET = "a-secret-of-the-environment"
LEAVE_OUT = "leave out"


def refusal(store: KeyStore, presented: str | None) -> str:
    with pytest.raises(KeyRefused) as refused:
        store.check(presented)
    return refused.value.problem


def test_a_secret_is_known_by_its_hash_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key, secret = add_key(path, "web", requests_per_minute=5)
    other, second = add_key(path, "phone")
    store = KeyStore(path, None)
    assert store.required and store.check(secret) == key and store.check(second) == other
    assert key.name == "web" and key.requests_per_minute == 5 and key.state == "active"
    assert re.fullmatch(r"key_[0-9a-f]{8}", key.id) and re.fullmatch(r"bdh-[A-Za-z0-9_-]{43}", secret)
    assert key.hash == hash_of(secret) and secret not in path.read_text()
    assert refusal(store, None) == refusal(store, "") == "missing"
    for wrong in (secret[:-1], secret + "x", secret.upper(), key.hash, key.id, "é\udcff", "x" * 100_000):
        assert refusal(store, wrong) == "unknown"


def test_without_a_source_no_key_is_required() -> None:
    assert not KeyStore(None, None).required


def test_every_stored_key_is_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.json"
    made = [add_key(path, f"app{number}") for number in range(5)]
    store = KeyStore(path, f"own:{SECRET}")
    compared: list[str] = []
    real = hmac.compare_digest

    def compare(stored: str, presented: str) -> bool:
        compared.append(stored)
        return real(stored, presented)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    everything = [hash_of(SECRET), *(key.hash for key, _ in made)]
    for presented in (SECRET, made[0][1], made[2][1], made[4][1], "nobody's"):
        compared.clear()
        try:
            store.check(presented)
        except KeyRefused:
            assert presented == "nobody's"
        assert compared == everything


def test_a_revocation_reaches_a_running_store(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key, secret = add_key(path, "web")
    _, other = add_key(path, "phone")
    store = KeyStore(path, None)
    store.check(secret)
    assert revoke_key(path, key.id).revoked is not None
    assert refusal(store, secret) == "revoked"
    store.check(other)
    _, new = add_key(path, "web")  # the name is free again
    store.check(new)
    assert revoke_key(path, "web").id != key.id
    assert refusal(store, new) == "revoked"


def test_a_change_is_seen_that_leaves_size_and_time_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    _, secret = add_key(path, "web")
    before = path.stat()
    store = KeyStore(path, None)
    (only,) = read_keys(path)
    write_keys(path, [replace(only, hash=hash_of("another secret"))])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert refusal(store, secret) == "unknown"


def test_a_key_expires_while_the_server_runs(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    end = datetime.now(UTC) + timedelta(seconds=2)
    _, secret = add_key(path, "guest", expires=end)
    store = KeyStore(path, None)
    assert store.check(secret).expires == iso(end)
    time.sleep(max(0.0, (end - datetime.now(UTC)).total_seconds()))
    assert refusal(store, secret) == "expired"
    revoke_key(path, "guest")
    assert refusal(store, secret) == "revoked"


@pytest.mark.parametrize("harm", ["garbage", "half", "removed", "folder"])
def test_a_file_that_breaks_leaves_the_last_good_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.05)
    path = tmp_path / "keys.json"
    _, secret = add_key(path, "web")
    good = path.read_text()
    store = KeyStore(path, None)
    path.unlink()
    if harm == "folder":
        path.mkdir()
    elif harm != "removed":
        path.write_text("garbage" if harm == "garbage" else good[: len(good) // 2])
    for _ in range(5):
        assert store.check(secret).name == "web"
        assert refusal(store, "x") == "unknown"
        time.sleep(0.03)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and str(path) in record.getMessage() and "1 key" in record.getMessage()
    if path.is_dir():
        path.rmdir()
    path.write_text(good)
    revoke_key(path, "web")
    time.sleep(0.06)
    assert refusal(store, secret) == "revoked"
    assert "can be read again" in caplog.text


ENTRY = {
    "id": "key_00000000", "name": "web", "hash": "0" * 64, "created": "2026-01-01T00:00:00Z", "expires": None,
    "requests_per_minute": None, "tokens_per_minute": None, "revoked": None,
}  # fmt: skip


def file_of(*changes: dict[str, Any]) -> str:
    """A file's text with a key for each of the changes to ENTRY."""
    entries = [{name: value for name, value in {**ENTRY, **change}.items() if value != LEAVE_OUT} for change in changes]
    return json.dumps({"format": 1, "keys": entries})


GARBAGE = {
    "": "is not JSON",
    "\udcff\udcfe": "is not JSON",
    "[" * 100_000: "is not JSON",
    "[]": "is not a file of API keys",
    '{"format": 1}': "is not a file of API keys",
    '{"format": 2, "keys": []}': "has the format 2, and this bdh reads 1",
    '{"keys": []}': "has the format None",
    '{"format": 1, "keys": [3]}': "keys[0] is not an object",
    file_of({}, {"hash": LEAVE_OUT}): "keys[1] lacks hash",
    file_of({"secret": "x"}): "keys[0] has an unknown field secret",
    file_of({"id": "web"}): "keys[0]: id is not one",
    file_of({"name": "../\nweb"}): "keys[0]: name is not one",
    file_of({"hash": "0" * 63}): "keys[0]: hash is not one",
    file_of({"created": None}): "keys[0]: created is not a time",
    file_of({"expires": "2026-01-01T00:00:00"}): "keys[0]: expires is not a time with a zone",
    file_of({"revoked": True}): "keys[0]: revoked is not a time",
    file_of({"requests_per_minute": 0}): "keys[0]: requests_per_minute must be a whole number of at least 1",
    file_of({"tokens_per_minute": True}): "keys[0]: tokens_per_minute must be a whole number of at least 1",
    file_of({}, {"hash": "1" * 64}): "two keys have the same id",
    file_of({}, {"id": "key_00000001"}): "two keys have the same hash",
}


@pytest.mark.parametrize("number", range(len(GARBAGE)))
def test_a_file_that_is_something_else(tmp_path: Path, number: int) -> None:
    text, expected = list(GARBAGE.items())[number]
    path = tmp_path / "keys.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    for use in (lambda: KeyStore(path, None), lambda: add_key(path, "x"), lambda: revoke_key(path, "web")):
        with pytest.raises(BDHError, match=re.escape(expected)) as raised:
            use()
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert path.read_bytes() == text.encode("utf-8", "surrogateescape")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    for use in (lambda: KeyStore(path, None), lambda: revoke_key(path, "web")):
        with pytest.raises(BDHError, match=r"keys\.json does not exist; make it with: bdh keys add NAME --file"):
            use()
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------- the environment


def test_keys_of_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    _, secret = add_key(path, "web")
    store = KeyStore(path, f" web:{SECRET}, a-bare-secret-of-one, x:with:colons:inside:it ,")
    found = [store.check(word) for word in (SECRET, "a-bare-secret-of-one", "with:colons:inside:it", secret)]
    assert [key.name for key in found] == ["web", found[1].name, "x", "web"]
    assert found[1].name.startswith("environment-") and "secret" not in found[1].name
    assert len({key.id for key in found}) == 4
    assert KeyStore(None, f"web:{SECRET}").check(SECRET).id == found[0].id  # on every server
    assert SECRET not in repr(vars(store))


def test_a_secret_without_a_name_is_the_same_key_wherever_it_stands() -> None:
    first, second = (f"{letter}-{SECRET}" for letter in "ab")
    both, alone = KeyStore(None, f"{first},{second}"), KeyStore(None, second)
    before, after = both.check(second), alone.check(second)
    assert (before.id, before.name) == (after.id, after.name)
    assert both.check(first).id != before.id and both.check(first).name != before.name


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", "is set and empty"),
        (" , ,", "is set and empty"),
        ("web:too-short-secre", "the secret of key 1 in BDH_API_KEYS must have at least 16 characters"),
        ("web:", "the secret of key 1"),
        ("too-short-secre", "the secret of key 1"),
        (f"{SECRET},phone:with a blank in it", "the secret of key 2"),
        ("web:" + "ä" * 16, "ASCII"),
        (f"my web:{SECRET}", "the name of key 1"),
        (f"{SECRET}:web", "the secret of key 1"),  # the wrong way round
        (f"{SECRET}!:x", "the name of key 1"),
        (f"web:{SECRET},web:{SECRET}2", "have the same name"),
        (f"web:{SECRET},phone:{SECRET}", "have the same secret"),
    ],
)
def test_environments_that_are_refused(value: str, expected: str) -> None:
    with pytest.raises(BDHError, match=expected) as raised:
        KeyStore(None, value)
    assert SECRET not in str(raised.value) and "short-secre" not in str(raised.value)


# --------------------------------------------------------------------------------------------------------- the file


def test_processes_that_add_keys_at_once_lose_none(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from bdh.serving.auth.key_file import add_key\n"
        "for number in range(20): add_key(Path('keys.json'), f'{sys.argv[1]}{number}')"
    )
    work = [
        subprocess.Popen([sys.executable, "-c", code, name], cwd=tmp_path, env=environment())
        for name in ("a", "b", "c")
    ]
    assert [process.wait(60) for process in work] == [0, 0, 0]
    names = {key.name for key in read_keys(tmp_path / "keys.json")}
    assert names == {f"{letter}{number}" for letter in "abc" for number in range(20)}


def test_the_file_is_its_owners_and_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    link, target = tmp_path / "keys.json", tmp_path / "secrets" / "real.json"
    link.symlink_to(target)
    (tmp_path / "secrets" / ".real.json.tmp").write_text("of a command that was killed")
    before = os.umask(0)
    try:
        add_key(link, "web")
        add_key(link, "phone")
    finally:
        os.umask(before)
    assert link.is_symlink() and len(read_keys(target)) == 2
    for path in target.parent.iterdir():
        assert path.name in ("real.json", ".real.json.lock") and path.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_root_leaves_the_file_to_the_server_it_belongs_to(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add_key(path, "web")
    os.chown(path, 65534, 65534)
    revoke_key(path, "web")
    for made in tmp_path.iterdir():
        assert (made.stat().st_uid, made.stat().st_gid) == (65534, 65534), made


def changes(path: Path) -> list[Callable[[], object]]:
    return [lambda: add_key(path, "another"), lambda: revoke_key(path, "web")]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    _, secret = add_key(path, "web")
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        for change in changes(path):
            with pytest.raises(BDHError, match=r"keys\.json cannot be written: File too large"):
                change()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {"keys.json", ".keys.json.lock"}
    KeyStore(path, None).check(secret)


@pytest.mark.parametrize("with_lock", [True, False])
def test_a_folder_that_cannot_be_written(tmp_path: Path, with_lock: bool) -> None:
    path = tmp_path / "keys.json"
    add_key(path, "web")
    before = path.read_bytes()
    lock = tmp_path / ".keys.json.lock"
    path.chmod(0o644)
    if with_lock:
        lock.chmod(0o666)
    else:
        lock.unlink()
    opened = [folder for folder in tmp_path.parents if folder.stat().st_mode & 0o777 == 0o700]
    root = os.geteuid() == 0  # may write everywhere, so it is somebody else for a while
    for folder in opened if root else ():
        folder.chmod(0o711)
    tmp_path.chmod(0o555)
    if root:
        os.seteuid(65534)
    try:
        for change in changes(path) if with_lock else changes(path)[:1]:
            with pytest.raises(BDHError, match=r"keys\.json cannot be (written|changed).*: Permission denied"):
                change()
    finally:
        if root:
            os.seteuid(0)
        tmp_path.chmod(0o700)
        for folder in opened if root else ():
            folder.chmod(0o700)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("web", {}, "has a key named web already, key_"),
        ("", {}, "the name of the key is ''"),
        ("a/b", {}, "the name of the key is 'a/b'"),
        ("-x", {}, "the name of the key is '-x'"),
        ("x" * 65, {}, "64 of letters"),
        ("key_0123abcd", {}, "looks like the id of a key"),
        ("x", {"requests_per_minute": 0}, "requests_per_minute is 0; it must be at least 1"),
        ("x", {"tokens_per_minute": -1}, "tokens_per_minute is -1"),
        ("x", {"expires": datetime(2020, 1, 1, tzinfo=UTC)}, "expired already, 2020-01-01T00:00:00Z"),
    ],
)
def test_keys_that_cannot_be(tmp_path: Path, name: str, settings: dict[str, Any], expected: str) -> None:
    path = tmp_path / "keys.json"
    add_key(path, "web")
    before = path.read_bytes()
    with pytest.raises(BDHError, match=expected):
        add_key(path, name, **settings)
    assert path.read_bytes() == before
