"""What a server writes: one line a record, a request's id on all of its lines, and no text of a user unless asked."""

import http.client
import json
import logging
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bdh.serving.observability.logs import LineFormatter, TextFormatter, printable
from tests.conftest import environment

SECRET = "the-dragon-sleeps-under-the-hill"
KEY = "bdh_0123456789abcdef"


class Logged:
    """A server in a process of its own, and the lines that it writes to stderr."""

    def __init__(self, path: Path, **settings: object):
        self.path = path
        with path.open("wb") as stderr:
            command = [sys.executable, "-m", "tests.serving.logged", json.dumps({"format": "json", **settings})]
            self.process = subprocess.Popen(command, stderr=stderr, env=environment(), cwd=Path(__file__).parents[3])
        self.port = int(self.wait_for(r"127\.0\.0\.1:(\d+)"))

    def wait_for(self, pattern: str) -> str:
        for _ in range(300):
            if found := re.search(pattern, self.path.read_text()):
                return found.group(1)
            time.sleep(0.05)
        raise AssertionError(self.path.read_text())

    def ask(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(method, path, None if body is None else json.dumps(body), headers or {})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer

    def records(self, request_id: str | None = None) -> list[dict[str, Any]]:
        """The lines as JSON, or those of a request, of which the last one tells what became of it."""
        for _ in range(200):
            found = [json.loads(line) for line in self.path.read_text().splitlines()]
            found = [one for one in found if request_id in (None, one.get("request_id"))]
            if any(one["message"] == "request" for one in found):
                return found
            time.sleep(0.02)
        raise AssertionError(self.path.read_text())

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logged]:
    made = Logged(tmp_path_factory.mktemp("logs") / "stderr")
    yield made
    made.stop()


def test_a_request_is_told_in_one_line_and_its_id_is_on_all(server: Logged) -> None:
    headers = {"X-Request-ID": "my.request-1", "Authorization": f"Bearer {KEY}"}
    answer = server.ask("POST", f"/v1/echo/a?key={KEY}", {"prompt": SECRET}, headers)
    assert answer.status == 200
    assert answer.headers.get_all("x-request-id") == ["my.request-1"]
    *before, last = server.records("my.request-1")
    assert [one["message"] for one in before] == ["a line of the handler", "a line of a thread"]
    assert before[0]["tokens"] == 3
    assert before[1]["level"] == "warning"
    assert list(last)[:5] == ["time", "level", "logger", "message", "request_id"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", last["time"])
    told = {"method": "POST", "path": "/v1/echo/{name}", "status": 200, "client": "127.0.0.1", "logger": "bdh.access"}
    fields = {"model": "m" * 200, "key": "key_1", "key_name": "alice", "prompt_tokens": 3, "message_": "x"}
    assert told.items() | fields.items() <= last.items()
    assert 0 <= last["seconds"] < 10
    assert "disconnected" not in last


@pytest.mark.parametrize("bad", ["a b", "x" * 65, "é", "", "a;b", 'a"b', "a\tb"])
def test_ids_that_could_break_something_are_replaced(server: Logged, bad: str) -> None:
    answer = server.ask("GET", "/health/live", headers={"X-Request-ID": bad})
    assert re.fullmatch(r"req_[0-9a-f]{32}", answer.headers["x-request-id"])


def test_no_header_comes_from_a_broken_line(server: Logged) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: a\n\tSet-Cookie: b=c\r\n\r\n")
        answer = raw.recv(10000)
    assert b"set-cookie" not in answer.lower()


def test_unknown_paths_and_routine_questions(server: Logged) -> None:
    missed = server.ask("GET", "/nothing/here?key=abc").headers["x-request-id"]
    (line,) = server.records(missed)
    assert (line["path"], line["status"]) == ("/nothing/here", 404)
    routine = server.ask("GET", "/health/live").headers["x-request-id"]
    server.ask("GET", "/v1/echo/a")
    assert routine not in server.path.read_text()  # every few seconds, for ever
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", "/metrics")
    figures = connection.getresponse().read().decode()
    assert 'bdh_http_requests_total{endpoint="unknown",model="",status="404"}' in figures
    assert 'bdh_http_requests_total{endpoint="/v1/echo/{name}",model="",status="405"}' in figures
    assert "nothing" not in figures


def test_a_failure_is_told_without_the_words_of_its_request(server: Logged) -> None:
    answer = server.ask("POST", "/v1/fail", {"prompt": SECRET}, {"X-Request-ID": "fails"})
    assert answer.status == 500
    assert answer.headers["x-request-id"] == "fails"
    lines = server.records("fails")
    assert [one["status"] for one in lines if one["message"] == "request"] == [500]
    server.wait_for(r"(Exception in ASGI application)")  # by uvicorn, when all is over
    (trace,) = [one["exc_info"] for one in server.records("fails") if "exc_info" in one]
    assert "pydantic_core._pydantic_core.ValidationError: (not shown" in trace
    assert "KeyError: (not shown" in trace
    assert "raise KeyError(text) from error" in trace


def test_a_client_that_goes_away_and_an_answer_that_breaks_off(server: Logged) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", "/v1/stream", headers={"X-Request-ID": "leaves"})
    connection.getresponse().read(5)
    connection.close()
    (line,) = server.records("leaves")
    assert (line["status"], line["disconnected"]) == (200, True)
    with pytest.raises(http.client.IncompleteRead):
        server.ask("GET", "/v1/broken", headers={"X-Request-ID": "breaks"})
    server.wait_for(r"(the engine stopped)")
    lines = server.records("breaks")
    (line,) = [one for one in lines if one["message"] == "request"]
    assert line["broken_off"] and "disconnected" not in line
    assert any("RuntimeError: the engine stopped" in one.get("exc_info", "") for one in lines)


def test_no_text_and_no_key_was_written(server: Logged) -> None:
    server.ask("POST", "/v1/echo/a", {"prompt": SECRET}, {"Authorization": f"Bearer {KEY}"})
    written = server.path.read_text()
    assert SECRET not in written and SECRET.upper() not in written and KEY not in written
    assert "a line for who looks for faults" not in written
    assert "Uvicorn running on" in written and "color_message" not in written
    assert all(json.loads(line)["message"] for line in written.splitlines())


def test_prompts_are_written_if_asked_for_and_keys_never(tmp_path: Path) -> None:
    server = Logged(tmp_path / "stderr", prompts=True, level="debug")
    try:
        server.ask("POST", "/v1/echo/a", {"prompt": SECRET}, {"Authorization": f"Bearer {KEY}", "X-Request-ID": "r"})
        lines = server.records("r")
        assert (lines[-1]["prompt"], lines[-1]["answer"]) == (SECRET, SECRET.upper())
        assert lines[1]["message"] == "a line for who looks for faults"
        assert KEY not in server.path.read_text()
    finally:
        server.stop()


# ------------------------------------------------------------------------------------------------------------- as text


def record(message: str, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("bdh.test", logging.WARNING, __file__, 1, message, (), None)
    vars(made).update(fields)
    return made


def test_text_is_one_line_that_is_harmless_to_a_terminal() -> None:
    line = TextFormatter(False).format(record("a\nb\x1b[2J", model="x status=200", path="/v1", seconds=0.5, key=None))
    assert re.fullmatch(r'\S+Z warning a\\nb\\x1b\[2J model="x status=200" path=/v1 seconds=0.5', line)
    assert printable("Größe 🐉") == "Größe 🐉"


def test_json_is_one_line_whatever_is_in_it() -> None:
    line = LineFormatter(False).format(record("a\nb\u2028", path=Path("/x"), text="\ud800"))
    assert len(line.splitlines()) == 1
    assert json.loads(line)["message"] == "a\nb\u2028"


@pytest.mark.parametrize("with_words", [True, False])
def test_groups_of_exceptions(with_words: bool) -> None:
    try:
        try:
            raise ValueError(SECRET)
        except ValueError as error:
            raise ExceptionGroup("two", [error, OSError("disk full")]) from None
    except ExceptionGroup as error:
        made = record("failed", exc_info=(type(error), error, error.__traceback__))
    text = TextFormatter(with_words).format(made)
    assert "OSError: disk full" in text and "ValueError" in text
    assert (SECRET in text.replace(f"raise ValueError({SECRET!r})", "")) == with_words
