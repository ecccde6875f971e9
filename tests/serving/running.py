"""Real `bdh serve` processes on loopback ports."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import environment

READY_SECONDS = 60.0


class Running:
    """A server that runs.

    Attributes:
        url: Its address, as "http://127.0.0.1:45678".
        process: Its process.
        log: The file with its lines.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path, patience: float = READY_SECONDS):
        self.process = process
        self.log = log
        self.patience = patience
        self.url = self._wait_for(r"serving .* at (http://\S+?)\"")

    def lines(self) -> list[dict[str, Any]]:
        """What it has logged so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's values whose labels are these."""
        total = 0.0
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            found = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
            if found and all(f'{label}="{value}"' in (found[1] or "") for label, value in labels.items()):
                total += float(found[2])
        return total

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.patience
        while httpx.get(f"{self.url}/health/ready").status_code != 200:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def wait_until_idle(self, seconds: float = 10.0) -> None:
        """Waits until no continuation is in work or waits."""
        deadline = time.monotonic() + seconds
        while self.metric("bdh_engine_running") + self.metric("bdh_engine_waiting"):
            assert time.monotonic() < deadline, httpx.get(f"{self.url}/metrics").text
            time.sleep(0.02)

    def stop(self, how: int = signal.SIGTERM, seconds: float = 30.0) -> int:
        """Ends it by a signal; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(seconds)

    def _wait_for(self, pattern: str) -> str:
        deadline = time.monotonic() + self.patience
        while not (found := re.search(pattern, self.log.read_text())):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        return found[1]


@contextmanager
def running(
    folder: Path, *argv: object, ready: bool = True, patience: float = READY_SECONDS, **variables: str
) -> Iterator[Running]:
    """`bdh serve ARGV…` on a free port, its log in the folder; ended when the block is."""
    log = folder / f"serve-{time.monotonic_ns()}.log"
    command = [sys.executable, "-m", "bdh", "serve", *map(str, argv)]
    if not any(str(argument).startswith("--port") for argument in argv):
        command += ["--port", "0"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(**variables), stderr=file, stdout=subprocess.DEVNULL
        )
    try:
        server = Running(process, log, patience)
        if ready:
            server.wait_until_ready()
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
