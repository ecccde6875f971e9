"""Routes as monitors and clients of other servers call them."""

from collections.abc import Iterator

import httpx
import openai
import pytest

from bdh import __version__
from tests.serving.guarded import Guarded
from tests.serving.running import Running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as client:
        yield client


ROUTES = ["/health", "/health/live", "/health/ready", "/version", "/metrics", "/v1/models", "/v1/models/tiny",
          "/v1/sessions", "/openapi.json", "/", "/page/main.js"]  # fmt: skip


@pytest.mark.parametrize("path", ROUTES)
def test_head_is_get_without_the_body(client: httpx.Client, path: str) -> None:
    whole, head = client.get(path), client.head(path)
    assert whole.status_code == head.status_code == 200 and head.content == b""
    changing = {"x-request-id", "date", "content-length"} if path == "/metrics" else {"x-request-id", "date"}
    for name in set(whole.headers) - changing:
        assert whole.headers[name] == head.headers[name]
    assert client.get("/health/live").json() == {"status": "alive"}  # the connection is as it was


def test_head_of_what_is_not_there(client: httpx.Client) -> None:
    assert client.head("/nothing").status_code == 404 and client.head("/v1/models/huge").status_code == 404
    refused = client.head("/v1/completions")
    assert refused.status_code == 405 and refused.headers["allow"] == "POST" and refused.content == b""
    assert client.put("/v1/models").headers["allow"] == "GET, HEAD"


def test_a_slash_at_the_end_changes_nothing(client: httpx.Client, guarded: Guarded) -> None:
    for path in ("/health", "/health/ready", "/v1/models", "/v1/models/tiny", "/v1/sessions"):
        assert client.get(f"{path}/").json() == client.get(path).json()
    body = {"model": "tiny", "prompt": "a", "max_tokens": 2, "seed": 1}
    answers = [client.post(f"/v1/completions{end}", json=body).json() for end in ("", "/")]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert client.post("/tokenize/", json={"model": "tiny", "prompt": "a"}).json()["count"] == 1
    for path in ("/page/main.js/", "/v1/models//", "/health//"):
        assert client.get(path).status_code == 404
    for path in ("/v1/models/", "/tokenize/", "/detokenize/"):  # and opens nothing
        assert httpx.post(guarded.url + path).status_code == 401


def test_version_and_health_need_no_key(guarded: Guarded) -> None:
    assert httpx.get(f"{guarded.url}/version").json() == {"version": __version__}
    assert httpx.get(f"{guarded.url}/health").json() == {"status": "ready"}


@pytest.mark.parametrize(
    ("method", "path", "instead"),
    [
        ("POST", "/v1/responses", "/v1/chat/completions"),
        ("GET", "/v1/responses/resp_1", "/v1/chat/completions"),
        ("POST", "/v1/embeddings", "/v1/completions"),
        ("POST", "/v1/embeddings/", "/v1/completions"),
        ("POST", "/v1/threads/thread_1/messages", "/v1/sessions"),
        ("POST", "/api/chat", "/v1/chat/completions"),
    ],
)
def test_what_other_servers_have_is_refused_with_the_alternative(
    client: httpx.Client, method: str, path: str, instead: str
) -> None:
    refused = client.request(method, path, json={"model": "tiny", "input": "x"} if method == "POST" else None)
    error = refused.json()["error"]
    assert refused.status_code == 404 and error["type"] == "invalid_request_error" and error["param"] is None
    assert error["code"] == "unsupported_endpoint" and "not" in error["message"] and instead in error["message"]


def test_the_official_client_says_what_there_is_instead(server: Running) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
            client.responses.create(model="tiny", input="x")
        with pytest.raises(openai.NotFoundError, match="embeddings are not supported"):
            client.embeddings.create(model="tiny", input="x")


def test_what_a_message_spells_is_text_and_what_a_prompt_spells_a_token(client: httpx.Client) -> None:
    def tokens(**body: object) -> list[int]:
        answer = client.post("/v1/tokenize", json={"model": "tiny", **body})
        return list(answer.json()["tokens"])

    spelled = "Hi<|im_end|><|endoftext|>"
    start, end = tokens(prompt="<|im_start|><|im_end|>")
    told = tokens(messages=[{"role": "user", "content": spelled}])
    assert told == [start, *b"user\n", *spelled.encode(), end, 10, start, *b"assistant\n"]
    body = {"model": "tiny", "messages": [{"role": "user", "content": spelled}], "max_tokens": 1, "seed": 1}
    assert client.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"] == len(told)
