"""An engine's process that is killed: its requests fail at once, in words; others go on, and another one is begun."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx

from tests.serving.running import Running, running

LONG = {"prompt": "abc", "max_tokens": 60_000, "ignore_eos": True}


def engines(server: Running) -> list[int]:
    """The processes that a server has begun, in the order of its models."""
    parent = server.process.pid
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in children if b"engine_process" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def ask(server: Running, model: str) -> httpx.Response:
    body = {"model": model, "prompt": "abc", "max_tokens": 5, "temperature": 0}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)


def events(stream: httpx.Response) -> list[dict[str, Any] | str]:
    lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_what_it_had_fails_and_all_else_goes_on(export: Path, tmp_path: Path) -> None:
    models = ("--model", f"one={export}", "--model", f"two={export}", "--serve.sessions.memory_bytes", "16384")
    with running(tmp_path, *models) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        said = ask(server, "one").json()["choices"][0]["text"]
        first, second = (client.post("/v1/sessions", json={"model": "one"}).json()["id"] for _ in range(2))
        for id in (first, second):  # there is room in memory for one
            answer = client.post(f"/v1/sessions/{id}/messages", json={"content": "Hi", "max_tokens": 5})
            assert answer.status_code == 200, answer.text
        with (
            client.stream("POST", "/v1/completions", json={**LONG, "model": "one", "stream": True}) as stream,
            client.stream("POST", "/v1/completions", json={**LONG, "model": "two", "stream": True}) as other,
        ):
            lines = stream.iter_lines()
            while not next(lines).startswith("data: "):
                pass
            os.kill(engines(server)[0], signal.SIGKILL)
            killed = time.monotonic()
            last = [line for line in lines if line][-1]
            assert time.monotonic() - killed < 2
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed"
            refused = ask(server, "one")
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "loading"
            assert int(refused.headers["retry-after"]) >= 1
            assert client.get("/health/live").status_code == 200 and client.get("/health/ready").status_code == 503
            assert ask(server, "two").json()["choices"][0]["text"] == said
            server.wait_until_ready()
            assert next(other.iter_lines())  # still written
        assert ask(server, "one").json()["choices"][0]["text"] == said
        assert client.get(f"/v1/sessions/{second}").status_code == 404  # its state was in that process
        answer = client.post(f"/v1/sessions/{first}/messages", json={"content": "Ho", "max_tokens": 5})
        assert answer.status_code == 200, answer.text  # this one was on disk
        server.wait_until_idle()
        errors = [line for line in server.lines() if line["level"] == "error"]
        assert any("the engine of one was ended by SIGKILL" in line["message"] for line in errors)


def test_one_that_ends_again_and_again_ends_the_server(export: Path, tmp_path: Path) -> None:
    with running(tmp_path, "--model", f"one={export}") as server:
        for number in range(3):
            os.kill(engines(server)[0], signal.SIGKILL)
            if number < 2:
                while httpx.get(f"{server.url}/health/ready").status_code == 200:
                    time.sleep(0.01)
                server.wait_until_ready()
        assert server.process.wait(20) == 2
        assert server.log.read_text().splitlines()[-1] == (
            "bdh serve: error: the engine of one ended 3 times in 60 seconds; it was ended by SIGKILL"
        )
