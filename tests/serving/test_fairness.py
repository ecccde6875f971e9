"""Nobody's request keeps the others waiting for long, or fills the memory."""

import time

import httpx
import pytest

from bdh.inference.engine import Engine
from bdh.inference.request import Request
from bdh.inference.runner import ModelRunner
from tests.inference.small import letters, small_model
from tests.serving.running import Running


@pytest.fixture(scope="module")
def client(server: Running) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=60)


def test_more_texts_than_may_be_are_refused_whoever_writes_them(client: httpx.Client) -> None:
    for more in ({"max_tokens": 0, "echo": True}, {"max_tokens": 1}):
        answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "a", "n": 1_000_000, **more})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "n"


def test_a_giant_text_is_refused_before_it_is_tokenized(client: httpx.Client) -> None:
    text = "egg " * 990_000
    bodies: dict[str, dict[str, object]] = {
        "/v1/completions": {"prompt": text},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": text}]},
    }
    for path, body in bodies.items():
        answer = client.post(path, json={"model": "tiny", **body})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
        assert f"{len(text)} characters" in answer.json()["error"]["message"]


def test_many_texts_to_score_leave_the_engine_to_others(client: httpx.Client, server: Running) -> None:
    """They are read one after the other; all come to their end."""
    import threading

    body = {"model": "tiny", "prompt": "egg " * 100, "max_tokens": 0, "echo": True, "logprobs": 1}
    statuses: list[int] = []

    def score() -> None:
        statuses.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code)

    threads = [threading.Thread(target=score) for _ in range(8)]
    for thread in threads:
        thread.start()
    start = time.monotonic()
    answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 8})
    took = time.monotonic() - start
    for thread in threads:
        thread.join()
    assert answer.status_code == 200 and statuses == [200] * 8 and took < 10


def test_a_large_schema_is_refused(client: httpx.Client) -> None:
    schema = {"anyOf": [{"const": f"word {number}"} for number in range(20_000)]}
    form = {"type": "json_schema", "json_schema": {"name": "many", "schema": schema}}
    answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "a", "response_format": form})
    assert answer.status_code == 400 and "more than 65536 bytes" in answer.json()["error"]["message"]


def test_what_one_has_asked_is_not_told_to_another() -> None:
    """A kept beginning of a prompt serves its owner alone."""
    engine = Engine(ModelRunner(small_model(), 2))
    prompt = list(range(97, 123)) * 8

    def cached(owner: str | None) -> int:
        engine.add(Request(prompt, letters(max_new_tokens=1), prefix_owner=owner))
        found = 0
        while engine.busy:
            found += sum(event.cached for event in engine.step())
        return found

    assert [cached("alice") for _ in range(3)] == [0, 0, 192]
    assert [cached("bob") for _ in range(3)] == [0, 0, 192]
    assert [cached(None) for _ in range(3)] == [0, 0, 192]
