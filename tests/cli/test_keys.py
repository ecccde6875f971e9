"""`bdh keys`: the secret once, on stdout alone; a list without secrets; mistakes in one line."""

import json
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bdh.cli.keys import expiry
from bdh.cli.main import main
from bdh.errors import BDHError
from bdh.serving.auth.api_keys import Key, KeyRefused, KeyStore, hash_of, iso, read_keys
from bdh.serving.auth.key_file import write_keys
from tests.conftest import environment

SECRET = re.compile(r"bdh-[A-Za-z0-9_-]{43}\n")

Said = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BDH_SERVE__AUTH__KEYS_FILE", raising=False)


def test_add_list_revoke(capsys: Said) -> None:
    assert main(["keys", "add", "web"]) == 0
    said = capsys.readouterr()
    assert SECRET.fullmatch(said.out) and said.out.strip() not in said.err
    (web,) = read_keys(Path("keys.json"))
    assert f"{web.id}, web, is in keys.json." in said.err
    store = KeyStore(Path("keys.json"), None)
    assert store.check(said.out.strip()) == web

    limits = ["--requests_per_minute", "60", "--tokens_per_minute", "100000", "--concurrent_requests", "4"]
    assert main(["keys", "add", *limits, "phone", "--expires", "2099-01-31"]) == 0
    assert "it expires 2099-01-31 00:00 UTC" in capsys.readouterr().err
    phone = read_keys(Path("keys.json"))[1]
    assert (phone.expires, phone.requests_per_minute, phone.tokens_per_minute) == ("2099-01-31T00:00:00Z", 60, 100_000)
    assert phone.concurrent_requests == 4 and main(["keys", "list"]) == 0
    head, web_row, phone_row = capsys.readouterr().out.splitlines()
    assert (
        "CONCURRENT" in head and web_row.split()[-2:] == ["-", "active"] and phone_row.split()[-2:] == ["4", "active"]
    )

    for word in ("web", phone.id):
        assert main(["keys", "revoke", word]) == 0
        again = capsys.readouterr()
        assert again.out == "" and "is revoked in keys.json" in again.err
    with pytest.raises(KeyRefused, match="revoked"):
        store.check(said.out.strip())


def test_the_list_tells_what_counts_and_no_secrets(capsys: Said) -> None:
    days = {"old": -30, "week": 7}
    now = datetime.now(UTC)
    keys = [
        Key(f"key_0000000{n}", name, hash_of(name), iso(now), expires=iso(now + timedelta(days=each)))
        for n, (name, each) in enumerate(days.items())
    ]
    keys.append(Key("key_00000002", "gone", hash_of("gone"), iso(now), None, 1_500, 2, iso(now)))
    write_keys(Path("keys.json"), keys)
    assert main(["keys", "list"]) == 0
    said = capsys.readouterr().out
    head, *rows = [re.split(r"\s{2,}", line) for line in said.splitlines()]
    assert head == ["ID", "NAME", "CREATED (UTC)", "EXPIRES (UTC)", "REQUESTS/MIN", "TOKENS/MIN", "STATE"]
    today = f"{now:%Y-%m-%d %H:%M}"
    assert rows[0] == ["key_00000000", "old", today, f"{now - timedelta(days=30):%Y-%m-%d %H:%M}", "-", "-", "expired"]
    assert rows[1][1] == "week" and rows[1][-1] == "active"
    assert rows[2] == ["key_00000002", "gone", today, "never", "1,500", "2", f"revoked {today}"]
    assert not any(key.hash[:12] in said for key in keys)


def test_which_file(monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    monkeypatch.setenv("BDH_SERVE__AUTH__KEYS_FILE", "theirs.json")
    assert main(["keys", "add", "web"]) == 0
    assert main(["keys", "add", "web", "--file", "mine.json"]) == 0
    assert sorted(path.name for path in Path().glob("*.json")) == ["mine.json", "theirs.json"]
    capsys.readouterr()
    assert main(["keys", "list"]) == 0
    assert read_keys(Path("theirs.json"))[0].id in capsys.readouterr().out


def test_when_a_key_expires() -> None:
    now = datetime(2026, 3, 1, 12, tzinfo=UTC)
    moments = {
        "12h": "2026-03-02T00:00:00Z",
        "30d": "2026-03-31T12:00:00Z",
        "2w": "2026-03-15T12:00:00Z",
        "2027-01-31": "2027-01-31T00:00:00Z",
        "2027-01-31T18:30": "2027-01-31T18:30:00Z",
        "2027-01-31T18:30:00+02:00": "2027-01-31T16:30:00Z",
    }
    assert {text: iso(expiry(text, now)) for text in moments} == moments
    for text in ("", "30", "30y", "d", "-3d", "999999999w", "2027-02-30", "soon", "9999-12-31T23:59:59-02:00"):
        with pytest.raises(BDHError, match="--expires is"):
            expiry(text, now)


MISTAKES = {
    "revok web": "revok is not a command of bdh keys; did you mean revoke?",
    "xyzzy": "xyzzy is not a command of bdh keys; there are add, list, revoke",
    "add": "name",
    "add web": "keys.json has a key named web already, key_",
    "add a/b": "the name of the key is 'a/b'",
    "add x --expires never": "--expires is 'never'; it must be a while",
    "add x --expires 2020-01-01": "would have expired already",
    "add x --requests_per_minute 0": "requests_per_minute is 0; it must be at least 1",
    "add x --tokens_per_minute many": "tokens_per_minute is many; it must be a whole number",
    "add x --tokens 5": "--tokens is not an option",
    "add x --file no/keys.json": "no/keys.json cannot be changed",
    "add x --file garbage.json": "garbage.json is not a file of API keys",
    "list --file none.json": "none.json does not exist; make it with: bdh keys add NAME --file none.json",
    "list --file .": "cannot be read: Is a directory",
    "list --file garbage.json": "garbage.json is not a file of API keys",
    "revoke nobody": "keys.json has no key 'nobody'; bdh keys list shows what it has",
    "revoke gone": "the key gone in keys.json was revoked already, 20",
    "revoke web --file none.json": "none.json does not exist",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_are_one_line(line: str, capsys: Said) -> None:
    for words in ("add web", "add gone", "revoke gone"):
        assert main(["keys", *words.split()]) == 0
    Path("garbage.json").write_text("garbage")
    before = {path: path.read_bytes() for path in Path().rglob("*")}
    capsys.readouterr()
    assert main(["keys", *line.split()]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("bdh keys: error: ") and said.err.count("\n") == 1
    assert MISTAKES[line] in said.err
    assert {path: path.read_bytes() for path in Path().rglob("*")} == before


def test_a_command_loads_no_torch_and_prints_nothing_but_the_secret(tmp_path: Path) -> None:
    code = (
        "import sys; from bdh.cli.main import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'transformers', 'limits', 'fastapi'} & sys.modules.keys(); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "keys", "add", "web", "--expires", "30d"],
        cwd=tmp_path, env=environment(BDH_SERVE__AUTH__KEYS_FILE="served.json"), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert SECRET.fullmatch(done.stdout)
    kept = json.loads((tmp_path / "served.json").read_text())
    assert [key["name"] for key in kept["keys"]] == ["web"]
    assert (tmp_path / "served.json").stat().st_mode & 0o777 == 0o600
