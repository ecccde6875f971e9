"""More than a server can do: what is too much is refused at once, the rest is done, and who leaves costs nobody."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from bdh.serving.auth.key_file import add_key
from tests.serving.running import Running, running
from tests.serving.wire import Wire, statuses, wire

SLOTS, QUEUE = 2, 3
SECONDS = 1.5  # that a request may take
LONG = {"model": "tiny", "prompt": "abc", "max_tokens": 60_000, "ignore_eos": True}  # longer than any test
SHORT = {**LONG, "max_tokens": 20}


@pytest.fixture(scope="module")
def crowded(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with few places."""
    flags = ["--max_batch_size", SLOTS, "--serve.queue_size", QUEUE]
    with running(tmp_path_factory.mktemp("crowded"), "--model", f"tiny={export}", *flags) as it:
        yield it


@pytest.fixture(autouse=True)
def idle_again(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nothing of a test goes on after it."""
    yield
    for name in ("crowded", "limited"):
        if name in request.fixturenames:
            request.getfixturevalue(name).wait_until_idle()


def post(url: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)


def until(what: Callable[[], bool], seconds: float = 10.0) -> float:
    """Waits until something is so; how long it took."""
    begin = time.monotonic()
    while not what():
        assert time.monotonic() - begin < seconds
        time.sleep(0.005)
    return time.monotonic() - begin


def waiting(server: Running) -> float:
    return server.metric("bdh_engine_waiting")


def at_work(server: Running) -> float:
    return server.metric("bdh_engine_running")


def begun(url: str, path: str, body: dict[str, Any]) -> Wire:
    """A request that is sent, its answer not awaited."""
    content = json.dumps(body).encode()
    connection = Wire(url)
    connection.send(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode())
    connection.send(f"Content-Length: {len(content)}\r\n\r\n".encode(), content)
    return connection


@contextmanager
def full(server: Running) -> Iterator[None]:
    """All slots taken, until the block ends."""
    with ExitStack() as stack:
        for _ in range(SLOTS):
            stack.callback(begun(server.url, "/v1/completions", {**LONG, "stream": True}).close)
        until(lambda: at_work(server) == SLOTS)
        yield


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_the_queue_has_no_room_for_is_refused_at_once(crowded: Running) -> None:
    with ThreadPoolExecutor(QUEUE) as pool:
        with full(crowded):
            accepted = [pool.submit(post, crowded.url, {**SHORT, "seed": n}) for n in range(QUEUE)]
            until(lambda: waiting(crowded) == QUEUE)
            latencies = []
            with httpx.Client() as client:
                client.get(f"{crowded.url}/health/live")  # a connection
                for number in range(20):
                    begin = time.monotonic()
                    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
                    path, body = [("completions", {**SHORT, "stream": True}), ("chat/completions", chat)][number % 2]
                    refused = client.post(f"{crowded.url}/v1/{path}", json=body)
                    latencies.append(time.monotonic() - begin)
                    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
                    error = refused.json()["error"]
                    assert error["type"] == "requests" and error["code"] == "rate_limit_exceeded"
                    assert error["param"] is None and "3 requests wait already, of 3 that may" in error["message"]
            assert sorted(latencies)[10] < 0.2, latencies
            assert at_work(crowded) == SLOTS and waiting(crowded) == QUEUE  # and those inside felt nothing of it
        answers = [one.result() for one in accepted]
    assert [answer.status_code for answer in answers] == [200] * QUEUE
    assert {answer.json()["usage"]["completion_tokens"] for answer in answers} == {20}
    assert crowded.metric("bdh_requests_refused_total", reason="queue_full") >= 20


def test_of_a_burst_each_is_done_or_refused(crowded: Running) -> None:
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda n: post(crowded.url, {**SHORT, "max_tokens": 200, "seed": n}), range(40)))
    done = [answer for answer in answers if answer.status_code == 200]
    assert {answer.status_code for answer in answers} <= {200, 429}
    assert len(done) >= SLOTS + QUEUE - 1
    assert {answer.json()["usage"]["completion_tokens"] for answer in done} == {200}


def test_a_request_that_needs_more_places_than_are_left_is_refused_whole(crowded: Running) -> None:
    with full(crowded):
        refused = post(crowded.url, {**SHORT, "n": QUEUE + 1})
        assert refused.status_code == 429 and waiting(crowded) == 0
        refused = post(crowded.url, {**SHORT, "prompt": ["a", "b"], "n": 2})
        assert refused.status_code == 429
        until(lambda: waiting(crowded) == 0)


# ------------------------------------------------------------------------------------------------- clients that go away


STREAMED = [pytest.param(True, id="stream"), pytest.param(False, id="whole")]
TALK = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 60_000, "ignore_eos": True}


@pytest.mark.parametrize("stream", STREAMED)
@pytest.mark.parametrize(("path", "body"), [("/v1/completions", LONG), ("/v1/chat/completions", TALK)])
def test_who_goes_away_while_it_is_written_for_frees_its_place(
    crowded: Running, path: str, body: dict[str, Any], stream: bool
) -> None:
    before = crowded.metric("bdh_client_disconnects_total")
    connection = begun(crowded.url, path, {**body, "stream": stream})
    until(lambda: at_work(crowded) == 1)
    if stream:
        assert b"200 OK" in connection.socket.recv(1 << 12)
    connection.close()
    assert until(lambda: at_work(crowded) == 0) < 1
    until(lambda: crowded.metric("bdh_client_disconnects_total") == before + 1)
    line = [line for line in crowded.lines() if line.get("path") == path][-1]
    assert line["disconnected"] and line["status"] == (200 if stream else 499)


GET = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(("more", "answers"), [(GET[:-2], 2), (2 * GET + GET[:-2], 4)])
def test_requests_may_wait_for_the_answer_before(crowded: Running, more: bytes, answers: int) -> None:
    with closing(begun(crowded.url, "/v1/completions", {**SHORT, "max_tokens": 300})) as connection:
        connection.send(more, b"Connection: close\r\n\r\n")
        received = connection.rest()
    assert statuses(received) == [200] * answers
    assert b'"completion_tokens":300' in received.replace(b" ", b"")
    assert received.count(b'"owned_by"') == answers - 1 and b"connection: close" in received.lower()


@pytest.mark.parametrize("stream", STREAMED)
def test_who_goes_away_from_the_queue_leaves_it(crowded: Running, stream: bool) -> None:
    with full(crowded):
        others = [begun(crowded.url, "/v1/completions", {**LONG, "stream": stream}) for _ in range(QUEUE)]
        until(lambda: waiting(crowded) == QUEUE)
        others.pop(1).close()
        assert until(lambda: waiting(crowded) == QUEUE - 1) < 1
        assert at_work(crowded) == SLOTS
        for other in others:
            other.close()
        assert until(lambda: waiting(crowded) == 0) < 1


def test_who_goes_away_before_its_request_is_whole_leaves_nothing(crowded: Running) -> None:
    with wire(crowded.url) as connection:
        connection.send(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        time.sleep(0.1)
    assert post(crowded.url, SHORT).status_code == 200


def test_others_go_on_when_one_goes_away(crowded: Running) -> None:
    alone = post(crowded.url, {**SHORT, "max_tokens": 300, "seed": 5}).json()["choices"][0]["text"]
    with ThreadPoolExecutor(1) as pool:
        leaving = begun(crowded.url, "/v1/completions", {**LONG, "stream": True})
        until(lambda: at_work(crowded) == 1)
        staying = pool.submit(post, crowded.url, {**SHORT, "max_tokens": 300, "seed": 5})
        leaving.close()
        assert staying.result().json()["choices"][0]["text"] == alone


# --------------------------------------------------------------------------------------------------------------- limits


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("limited") / "keys.json"


@pytest.fixture(scope="module")
def keys(keys_file: Path) -> dict[str, str]:
    """What goes into the Authorization header, by the names of keys with different limits."""
    file = keys_file
    made = {
        "free": add_key(file, "free", requests_per_minute=100_000, tokens_per_minute=10_000_000)[1],
        "usual": add_key(file, "usual")[1],
        "few": add_key(file, "few", requests_per_minute=3)[1],
        "short": add_key(file, "short", tokens_per_minute=50)[1],
        "counter": add_key(file, "counter", tokens_per_minute=100)[1],
        "talker": add_key(file, "talker", tokens_per_minute=1000)[1],
    }
    return {name: f"Bearer {secret}" for name, secret in made.items()}


@pytest.fixture(scope="module")
def limited(export: Path, keys_file: Path, keys: dict[str, str]) -> Iterator[Running]:
    """A server with limits."""
    options = {
        "--keys_file": keys_file,
        "--serve.requests.seconds": SECONDS,
        "--serve.requests.max_prompt_tokens": 50,
        "--serve.requests.max_tokens": 60_000,
        "--serve.requests.max_choices": 4,
        "--serve.requests.max_prompts": 3,
        "--serve.limits.requests_per_minute": 200,
        "--max_batch_size": SLOTS,
    }
    flags = [part for option in options.items() for part in option]
    with running(keys_file.parent, "--model", f"tiny={export}", *flags) as it:
        yield it


def test_a_key_has_so_many_requests_a_minute(limited: Running, keys: dict[str, str]) -> None:
    left = []
    for _ in range(3):
        answer = post(limited.url, {**SHORT, "max_tokens": 1}, Authorization=keys["few"])
        assert answer.status_code == 200 and answer.headers["x-ratelimit-limit-requests"] == "3"
        left.append(answer.headers["x-ratelimit-remaining-requests"])
    assert left == ["2", "1", "0"]
    refused = post(limited.url, SHORT, Authorization=keys["few"])
    assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 61
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert refused.headers["x-ratelimit-reset-requests"][-1] == "s"
    error = refused.json()["error"]
    assert error["type"] == "requests" and error["code"] == "rate_limit_exceeded"
    assert "3 requests per minute for this key" in error["message"]
    streamed = post(limited.url, {**SHORT, "stream": True}, Authorization=keys["few"])
    assert streamed.status_code == 429 and streamed.headers["content-type"] == "application/json"
    usual = post(limited.url, SHORT, Authorization=keys["usual"])  # others have theirs
    assert usual.status_code == 200 and usual.headers["x-ratelimit-limit-requests"] == "200"


def test_a_key_has_so_many_tokens_a_minute(limited: Running, keys: dict[str, str]) -> None:
    body = {**SHORT, "prompt": "x" * 20, "max_tokens": 40}
    first = post(limited.url, body, Authorization=keys["short"])
    assert first.status_code == 200 and first.headers["x-ratelimit-limit-tokens"] == "50"
    assert first.headers["x-ratelimit-remaining-tokens"] == "0"  # 60 are used
    refused = post(limited.url, body, Authorization=keys["short"])
    assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 120
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0" and "x-ratelimit-reset-tokens" in refused.headers
    assert refused.json()["error"]["type"] == "tokens" and "50 tokens per minute" in refused.json()["error"]["message"]
    assert post(limited.url, body, Authorization=keys["free"]).status_code == 200


def test_tokens_of_a_session_are_counted_once(limited: Running, keys: dict[str, str]) -> None:
    headers = {"Authorization": keys["talker"]}
    with httpx.Client(base_url=f"{limited.url}/v1", headers=headers) as client:
        made = client.post("/sessions", json={"model": "tiny", "system": "x" * 20})
        assert made.headers["x-ratelimit-remaining-tokens"] == "980"
        used = 0
        for text in ("a", "b"):
            said = client.post(f"/sessions/{made.json()['id']}/messages", json={"content": text, "max_tokens": 1})
            used += said.json()["usage"]["total_tokens"]
            assert said.headers["x-ratelimit-remaining-tokens"] == str(1000 - used)


def test_tokens_that_are_only_counted_are_counted(limited: Running, keys: dict[str, str]) -> None:
    headers = {"Authorization": keys["counter"]}
    said, left = len("_user\nx_\n_assistant\n"), []  # a special token is one
    for path, more in (
        ("tokenize", {"prompt": "x" * 20}),
        ("tokenize", {"messages": [{"role": "user", "content": "x"}]}),
        ("detokenize", {"tokens": [65] * 30}),
        ("detokenize", {"tokens": [65] * (50 - said)}),
    ):
        answer = httpx.post(f"{limited.url}/v1/{path}", json={"model": "tiny", **more}, headers=headers)
        assert answer.status_code == 200
        left.append(int(answer.headers["x-ratelimit-remaining-tokens"]))
    assert left == [80, 80 - said, 50 - said, 0]
    refused = httpx.post(f"{limited.url}/v1/tokenize", json={"model": "tiny", "prompt": "x"}, headers=headers)
    assert refused.status_code == 429 and refused.json()["error"]["type"] == "tokens"


def test_tokens_of_a_stream_that_is_left_are_counted(limited: Running, keys: dict[str, str]) -> None:
    headers = {"Authorization": keys["free"]}
    before = int(post(limited.url, SHORT, **headers).headers["x-ratelimit-remaining-tokens"])
    stream = {**LONG, "stream": True}
    with httpx.stream("POST", f"{limited.url}/v1/completions", json=stream, headers=headers) as answer:
        for number, _ in enumerate(answer.iter_lines()):
            if number == 100:
                break
    until(lambda: at_work(limited) == 0)
    after = int(post(limited.url, SHORT, **headers).headers["x-ratelimit-remaining-tokens"])
    assert before - after > 50


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", LONG), ("/v1/chat/completions", TALK)])
def test_a_request_may_take_so_long(limited: Running, keys: dict[str, str], path: str, body: dict[str, Any]) -> None:
    headers = {"Authorization": keys["usual"]}

    def ask(stream: bool) -> tuple[httpx.Response, float]:
        begin = time.monotonic()
        answer = httpx.post(limited.url + path, json={**body, "stream": stream}, headers=headers, timeout=30)
        return answer, time.monotonic() - begin

    with ThreadPoolExecutor(4) as pool:  # two of them wait for a place all the time
        (whole, took), (stream, took_too), *queued = pool.map(ask, [False, True, False, True])
    for answer, seconds in [(whole, took), queued[0]]:
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        assert "not complete after 1.5 seconds" in answer.json()["error"]["message"]
        assert SECONDS - 0.1 < seconds < SECONDS + 3
    for answer, seconds in [(stream, took_too), queued[1]]:
        assert answer.status_code == 200 and SECONDS - 0.1 < seconds < SECONDS + 3
        *_, last = [line for line in answer.text.splitlines() if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        assert "[DONE]" not in answer.text
    until(lambda: at_work(limited) + waiting(limited) == 0, 2)
    assert post(limited.url, SHORT, **headers).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": "x" * 51}, "prompt"),
        ("completions", {"prompt": [1] * 51}, "prompt"),
        ("completions", {"prompt": ["x", "x" * 51]}, "prompt"),
        ("completions", {"prompt": "x" * 51, "stream": True}, "prompt"),
        ("completions", {"prompt": "x" * 51, "echo": True, "max_tokens": 0, "logprobs": 1}, "prompt"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 51}]}, "messages"),
        ("tokenize", {"prompt": "x" * 51}, "prompt"),
        ("tokenize", {"messages": [{"role": "user", "content": "x" * 51}]}, "messages"),
        ("tokenize", {"messages": [{"role": "user", "content": "x" * 45}]}, "messages"),  # with what is around it
        ("detokenize", {"tokens": [65] * 51}, "tokens"),
    ],
)
def test_a_prompt_may_be_so_long(
    limited: Running, keys: dict[str, str], path: str, body: dict[str, Any], param: str
) -> None:
    headers = {"Authorization": keys["free"]}
    refused = httpx.post(f"{limited.url}/v1/{path}", json={"model": "tiny", **body}, headers=headers)
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["code"] == "context_length_exceeded" and error["param"] == param
    assert "this server reads 50" in error["message"]
    assert post(limited.url, {**SHORT, "prompt": "x" * 50}, **headers).status_code == 200


def test_a_message_may_be_so_long(limited: Running, keys: dict[str, str]) -> None:
    headers = {"Authorization": keys["free"]}
    session = httpx.post(f"{limited.url}/v1/sessions", json={"model": "tiny"}, headers=headers).json()["id"]
    for path, body in (("messages", {"content": "x" * 51}), ("completions", {"prompt": "x" * 51})):
        refused = httpx.post(f"{limited.url}/v1/sessions/{session}/{path}", json=body, headers=headers)
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 5}, "n"),
        ({"best_of": 5}, "n"),
        ({"prompt": ["a", "b", "c"], "n": 2}, "n"),
        ({"n": 2**31 - 1}, "n"),
        ({"prompt": ["a"] * 4}, "prompt"),
        ({"max_tokens": 60_001}, "max_tokens"),
    ],
)
def test_there_may_be_so_many_texts(limited: Running, keys: dict[str, str], more: dict[str, Any], param: str) -> None:
    refused = post(limited.url, {**SHORT, **more}, Authorization=keys["free"])
    assert refused.status_code == 400 and refused.json()["error"]["param"] == param, refused.text
    assert post(limited.url, {**SHORT, "n": 4}, Authorization=keys["free"]).status_code == 200


def test_none_of_this_was_a_mistake_of_the_server(crowded: Running, limited: Running) -> None:
    for it in (crowded, limited):
        assert it.process.poll() is None
        for line in it.lines():
            assert line["level"] != "error" and line.get("status") != 500, line
