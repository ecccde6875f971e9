"""Nobody's request keeps the others waiting for long, or fills the memory."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from bdh.inference.engine import Engine
from bdh.inference.request import Request
from bdh.inference.runner import ModelRunner
from bdh.serving.auth.key_file import add_key
from tests.inference.small import letters, small_model
from tests.serving.running import Running, running


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


@pytest.fixture(scope="module")
def shared(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, dict[str, str]]]:
    """A server of few slots, and keys of it."""
    folder = tmp_path_factory.mktemp("shared")
    file = folder / "keys.json"
    keys = {name: add_key(file, name)[1] for name in ("greedy", "modest")}
    keys["short"] = add_key(file, "short", tokens_per_minute=2000)[1]
    keys["single"] = add_key(file, "single", concurrent_requests=1)[1]
    flags = ["--keys_file", file, "--max_batch_size", 2, "--serve.queue_size", 126]
    with running(folder, "--model", f"tiny={export}", *flags) as it:
        yield it, {name: f"Bearer {secret}" for name, secret in keys.items()}


ENDLESS = {"model": "tiny", "prompt": "a", "max_tokens": 60_000, "ignore_eos": True, "stream": True}


def test_one_key_does_not_lock_out_the_others(shared: tuple[Running, dict[str, str]]) -> None:
    server, keys = shared
    url, headers = f"{server.url}/v1", {name: {"Authorization": secret} for name, secret in keys.items()}
    short = {"model": "tiny", "prompt": "b", "max_tokens": 8, "ignore_eos": True, "seed": 1}
    alone = httpx.post(f"{url}/completions", json=short, headers=headers["modest"], timeout=60)
    with httpx.stream("POST", f"{url}/completions", json={**ENDLESS, "n": 128}, headers=headers["greedy"]) as stream:
        lines = stream.iter_lines()  # which ends the request when it is gone
        assert stream.status_code == 200 and next(lines)
        assert server.metric("bdh_engine_running") == 2 and server.metric("bdh_engine_waiting") == 126
        refused = httpx.post(f"{url}/completions", json=short, headers=headers["greedy"], timeout=60)
        assert refused.status_code == 429 and "wait already" in refused.json()["error"]["message"]
        beside = httpx.post(f"{url}/completions", json=short, headers=headers["modest"], timeout=60)
        session = httpx.post(f"{url}/sessions", json={"model": "tiny"}, headers=headers["modest"]).json()["id"]
        message = {"content": "Hi", "max_tokens": 4}
        said = httpx.post(f"{url}/sessions/{session}/messages", json=message, headers=headers["modest"], timeout=60)
        assert beside.json()["choices"] == alone.json()["choices"] and said.status_code == 200
        assert server.metric("bdh_engine_preempted_total") >= 2
        assert server.metric("bdh_engine_running") == 2
    server.wait_until_idle()
    assert server.metric("bdh_state_memory_bytes", place="preempted") == 0


def test_parallel_requests_do_not_write_past_the_limit_of_tokens(shared: tuple[Running, dict[str, str]]) -> None:
    server, keys = shared
    body = {"model": "tiny", "prompt": "a", "max_tokens": 900, "ignore_eos": True}
    headers = {"Authorization": keys["short"]}

    def ask(number: int) -> httpx.Response:
        return httpx.post(f"{server.url}/v1/completions", json={**body, "seed": number}, headers=headers, timeout=60)

    with ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(ask, range(30)))
    written = [one.json()["usage"]["completion_tokens"] for one in answers if one.status_code == 200]
    refused = [one for one in answers if one.status_code == 429]
    assert written == [900, 900] and len(refused) == 28
    assert all(one.json()["error"]["type"] == "tokens" and int(one.headers["retry-after"]) >= 1 for one in refused)


def test_a_key_has_so_many_requests_at_once(shared: tuple[Running, dict[str, str]]) -> None:
    server, keys = shared
    headers = {"Authorization": keys["single"]}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json=ENDLESS) as stream:
            lines = stream.iter_lines()
            assert next(lines)
            refused = client.get("/v1/models")
            assert refused.status_code == 429 and "1 requests at once" in refused.json()["error"]["message"]
            assert httpx.get(f"{server.url}/health").status_code == 200
        server.wait_until_idle()
        assert client.get("/v1/models").status_code == 200
    assert server.metric("bdh_requests_refused_total", reason="concurrency_limit") == 1
