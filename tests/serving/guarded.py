"""A server that asks for keys, has small limits, and may be called by one page."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from bdh.serving.auth.api_keys import iso, read_keys
from bdh.serving.auth.key_file import add_key, write_keys
from tests.conftest import run_bdh
from tests.serving.running import Running, running

SECONDS = 2.0  # for a client to send a request, or to take an answer
LARGEST = 1 << 20  # bytes of a body
OF_ENVIRONMENT = "a-secret-of-the-environment"
PAGE = "https://app.example"


@dataclass(frozen=True)
class Guarded:
    """A server that asks for keys.

    Attributes:
        running: It.
        keys: Secrets by the names of their keys.
        file: Where they are.
        folder: Where its sessions are.
    """

    running: Running
    keys: dict[str, str]
    file: Path
    folder: Path

    @property
    def url(self) -> str:
        return self.running.url

    def headers(self, name: str = "web") -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[name]}"}

    def head(self, path: str = "/v1/tokenize", *more: str, method: str = "POST") -> bytes:
        """The beginning of a request with a key, without its last empty line."""
        lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {self.keys['web']}"]
        return "".join(f"{line}\r\n" for line in [*lines, "Content-Type: application/json", *more]).encode()

    def memory(self, name: str) -> int:
        """Bytes of memory that its process has, "VmRSS", or has had at most, "VmHWM"."""
        lines = Path(f"/proc/{self.running.process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10


@contextmanager
def guarded_server(export: Path, folder: Path) -> Iterator[Guarded]:
    """Such a server, with an export as the model tiny."""
    file = folder / "keys.json"
    made = run_bdh("keys", "add", "web", "--file", file, cwd=folder)
    keys = {"web": made.stdout.strip(), "environment": OF_ENVIRONMENT}
    for name in ("other", "doomed"):
        keys[name] = add_key(file, name)[1]
    keys["old"] = add_key(file, "old")[1]
    past = iso(datetime.now(UTC) - timedelta(days=1))
    write_keys(file, [replace(key, expires=past) if key.name == "old" else key for key in read_keys(file)])
    options = {
        "--serve.requests.body_seconds": SECONDS,
        "--serve.requests.idle_seconds": SECONDS,
        "--serve.requests.max_body_bytes": LARGEST,
        "--serve.requests.max_prompt_tokens": 300_000,
        "--serve.cors.origins": json.dumps([PAGE]),
        "--serve.docs": "false",
        "--serve.logging.level": "debug",
        "--serve.sessions.folder": folder / "sessions",
        "--keys_file": file,
        "--host": "0.0.0.0",
    }
    flags = [part for option in options.items() for part in option]
    with running(folder, "--model", f"tiny={export}", *flags, BDH_API_KEYS=f"environment:{OF_ENVIRONMENT}") as it:
        it.url = it.url.replace("0.0.0.0", "127.0.0.1")
        yield Guarded(it, keys, file, folder / "sessions")
