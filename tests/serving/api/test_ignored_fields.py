"""Fields that clients send and that change nothing here: accepted, named in the log, and any other is refused."""

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.serving.running import Running

CONTROL = {"type": "ephemeral"}


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as client:
        yield client


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "seed": 1, **more}


def said(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def ignored(server: Running, answer: httpx.Response) -> str | None:
    """What the log line of a request says of ignored fields."""
    deadline = time.monotonic() + 10
    while True:
        for line in server.lines():
            if line.get("request_id") == answer.headers["x-request-id"] and line["message"] == "request":
                told: str | None = line.get("ignored")
                return told
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("reasoning_effort", "low"),
        ("cache_control", CONTROL),
        ("keep_alive", "5m"),
        ("keep_alive", -1),
        ("user", "ann"),
        ("metadata", {"task": "test"}),
        ("verbosity", "low"),
    ],
)
def test_fields_that_change_nothing(client: httpx.Client, server: Running, name: str, value: Any) -> None:
    plain = client.post("/v1/chat/completions", json=chat())
    answer = client.post("/v1/chat/completions", json=chat(**{name: value}))
    assert said(answer) == said(plain)
    assert ignored(server, answer) == name and ignored(server, plain) is None


def test_fields_of_messages(client: httpx.Client, server: Running) -> None:
    part = {"type": "text", "text": "Hi"}
    plain: list[dict[str, Any]] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [part]},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And now?"},
    ]
    fields = [
        {**plain[0], "cache_control": CONTROL},
        {**plain[1], "content": [{**part, "cache_control": CONTROL}]},
        {**plain[2], "reasoning_content": "The user says hello.", "name": "tiny"},
        plain[3],
    ]
    answer = client.post("/v1/chat/completions", json=chat(messages=fields))
    assert said(answer) == said(client.post("/v1/chat/completions", json=chat(messages=plain)))
    names = {"cache_control", "content[].cache_control", "reasoning_content", "name"}
    assert set((ignored(server, answer) or "").split(",")) == {f"messages[].{name}" for name in names}


def test_completions_and_sessions_take_them_too(client: httpx.Client, server: Running) -> None:
    body = {"max_tokens": 2, "keep_alive": 0, "user": "ann"}
    session = client.post("/v1/sessions", json={"model": "tiny"}).json()["id"]
    for path, more in (
        ("completions", {"model": "tiny", "prompt": "a"}),
        (f"sessions/{session}/messages", {"content": "a"}),
        (f"sessions/{session}/completions", {"prompt": "a"}),
    ):
        answer = client.post(f"/v1/{path}", json={**body, **more})
        assert said(answer) and ignored(server, answer) == "user,keep_alive"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"enable_thinking": False}, "enable_thinking"),
        ({"chat_template_kwargs": "none"}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "Hi", "reasoning_content": "x"}]}, "messages.0.reasoning_content"),
        ({"messages": [{"role": "user", "content": "Hi", "colour": "red"}]}, "messages.0.colour"),
    ],
)
def test_others_stay_refused(client: httpx.Client, body: dict[str, Any], param: str) -> None:
    refused = client.post("/v1/chat/completions", json=chat(**body))
    assert refused.status_code == 400 and refused.json()["error"]["param"] == param
