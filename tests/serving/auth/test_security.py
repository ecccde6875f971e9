"""Nobody comes in without a key, gets at what is another's, or learns what others said."""

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from bdh.serving.auth.key_file import revoke_key
from tests.serving.guarded import PAGE, SECONDS, Guarded
from tests.serving.running import Running, running
from tests.serving.wire import asked, statuses, wire

PROMPT = "The dragon's secret is PROMPTMARK"  # must never be in a log


def code_of(answer: httpx.Response) -> Any:
    return answer.json()["error"]["code"]


# ----------------------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("name", ["web", "environment"])
def test_a_key_opens(guarded: Guarded, name: str) -> None:
    assert httpx.get(f"{guarded.url}/v1/models", headers=guarded.headers(name)).status_code == 200


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (None, "no API key was given"),
        ("Bearer wrong", "not known here"),
        ("Basic d2ViOndlYg==", "no API key was given"),
        ("Bearer " + "x" * 50_000, "not known here"),
        ("Bearer \xe9\xff", "not known here"),
        ("Bearer {old}", "has expired"),
        ("Bearer {web}x", "not known here"),
        ("Bearer {web} {web}", "not known here"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_without_a_good_key_the_door_stays_shut(guarded: Guarded, method: str, header: str | None, words: str) -> None:
    headers = {} if header is None else {b"Authorization": header.format(**guarded.keys).encode("latin-1")}
    path = "/v1/models" if method == "GET" else "/v1/completions"
    refused = httpx.request(method, guarded.url + path, headers=headers)
    assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
    assert code_of(refused) == "invalid_api_key" and words in refused.json()["error"]["message"]


def test_every_address_that_costs_asks_for_a_key(guarded: Guarded, server: Running) -> None:
    documented = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    open_to_all = {"/health/live", "/health/ready", "/metrics"}
    assert len(documented) > 15
    for path, operations in documented.items():
        for method in operations:
            answer = httpx.request(method, guarded.url + path.replace("{", "").replace("}", ""))
            assert (answer.status_code == 401) == (path not in open_to_all), (method, path, answer.text)
    for path in ("/tokenize", "/detokenize", "/v1/nothing"):
        assert httpx.post(guarded.url + path).status_code == 401
    for path in ("/", "/page/main.js"):
        assert httpx.get(guarded.url + path).status_code == 200


def test_who_may_not_come_in_is_told_before_the_body_is_read(guarded: Guarded) -> None:
    with wire(guarded.url) as connection:
        connection.send(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n{")
        begin = time.monotonic()
        assert connection.answer().status == 401
        assert time.monotonic() - begin < SECONDS / 2
    assert (
        httpx.post(f"{guarded.url}/v1/completions", content=b"{").status_code == 401
    )  # and what it says is not looked at


def test_a_key_that_is_revoked_is_refused_within_a_second(guarded: Guarded) -> None:
    url, headers = f"{guarded.url}/v1/models", guarded.headers("doomed")
    assert httpx.get(url, headers=headers).status_code == 200
    revoke_key(guarded.file, "doomed")
    begin = time.monotonic()
    while (refused := httpx.get(url, headers=headers)).status_code == 200:
        assert time.monotonic() - begin < 1
    assert refused.status_code == 401 and "was revoked" in refused.json()["error"]["message"]
    assert httpx.get(url, headers=guarded.headers()).status_code == 200


def test_what_is_anothers_is_not_there(guarded: Guarded) -> None:
    mine, other = guarded.headers(), guarded.headers("other")
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 2, "brain": True}
    trace = httpx.post(f"{guarded.url}/v1/completions", json=body, headers=mine).json()["brain"]["trace"]
    session = httpx.post(f"{guarded.url}/v1/sessions", json={"model": "tiny"}, headers=mine).json()["id"]
    saved = httpx.post(f"{guarded.url}/v1/sessions/{session}/save", json={"name": "mine"}, headers=mine)
    assert saved.status_code == 200
    addresses: list[tuple[str, str, Any]] = [
        ("GET", f"/v1/brain/{trace}", None),
        ("GET", f"/v1/brain/{trace}/tokens/0", None),
        ("GET", f"/v1/brain/{trace}/neurons/0/0", None),
        ("DELETE", f"/v1/brain/{trace}", None),
        ("GET", f"/v1/sessions/{session}", None),
        ("GET", f"/v1/sessions/{session}/state", None),
        ("POST", f"/v1/sessions/{session}/messages", {"content": "a", "max_tokens": 1}),
        ("POST", f"/v1/sessions/{session}/completions", {"prompt": "a", "max_tokens": 1}),
        ("POST", f"/v1/sessions/{session}/save", {"name": "taken"}),
        ("DELETE", f"/v1/sessions/{session}", None),
        ("DELETE", "/v1/sessions/saved/mine", None),
        ("POST", "/v1/sessions", {"model": "tiny", "saved": "mine"}),
    ]
    for method, path, given in addresses:
        refused = httpx.request(method, guarded.url + path, json=given, headers=other)
        assert refused.status_code == 404, (method, path, refused.text)
    listed = httpx.get(f"{guarded.url}/v1/sessions", headers=other).json()
    assert listed["data"] == listed["saved"] == []
    for path in (f"/v1/brain/{trace}", f"/v1/sessions/{session}"):  # and nothing came of it
        assert httpx.get(guarded.url + path, headers=mine).status_code == 200
        assert httpx.delete(guarded.url + path, headers=mine).status_code == 204
    assert [one["name"] for one in httpx.get(f"{guarded.url}/v1/sessions", headers=mine).json()["saved"]] == ["mine"]


# ------------------------------------------------------------------------------------------ what comes back to a client


NASTY = [
    "x\r\nSet-Cookie: a=b",
    "x\n{}",
    "x\x00y",
    "x\x1b[31m",
    "é\u2028ü",
    "%0d%0aSet-Cookie:%20a=b",
    "../x",
    "x" * 500,
]


@pytest.mark.parametrize(
    "id", [b"a\xe9", b"%0d%0aSet-Cookie: a=b", b"x" * 65, b"a b", b"", b'a"b', b"../../x", b"a\tb", b"a,b"]
)
def test_only_a_plain_request_id_comes_back(server: Running, id: bytes) -> None:
    answer = httpx.get(f"{server.url}/v1/models", headers={b"X-Request-ID": id})
    assert answer.headers["x-request-id"].startswith("req_") and "set-cookie" not in answer.headers
    assert (
        httpx.get(f"{server.url}/v1/models", headers={"X-Request-ID": "a.b-c_1"}).headers["x-request-id"] == "a.b-c_1"
    )


@pytest.mark.parametrize("end", [b"\r", b"\n", b"\0", b"\r\n ", b"\r\n\t"])
def test_a_header_is_one_line(server: Running, end: bytes) -> None:
    head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-Request-ID: abc"
    with wire(server.url) as connection:
        connection.send(head, end, b"Set-Cookie: a=b\r\n\r\n")
        received = connection.rest()
    assert set(statuses(received)) <= {200, 400} and b"set-cookie" not in received.lower()


@pytest.mark.parametrize("name", NASTY)
def test_names_come_back_as_json_and_nowhere_else(server: Running, name: str) -> None:
    before = len(server.lines())
    unknown = httpx.post(f"{server.url}/v1/completions", json={"model": name, "prompt": "a"})
    assert unknown.status_code == 404 and code_of(unknown) == "model_not_found"
    made = httpx.post(f"{server.url}/v1/sessions", json={"model": "tiny", "name": name[:200]})
    kept = httpx.get(f"{server.url}/v1/sessions/{made.json()['id']}/state")
    assert made.json()["name"] == name[:200] and made.json()["id"] in kept.headers["content-disposition"]
    assert httpx.delete(f"{server.url}/v1/sessions/{made.json()['id']}").status_code == 204
    for answer in (unknown, made, kept):
        assert "set-cookie" not in answer.headers
        assert all(value.isprintable() and len(value) < 300 for value in answer.headers.values())
    deadline = time.monotonic() + 5
    while len(after := server.log.read_text().splitlines()[before:]) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert [json.loads(line)["message"] for line in after] == ["request"] * 4


UP = ["../", "..%2f", "%2e%2e/", "%2e%2e%2f", "..%5c", "..\\", "%252e%252e%252f", "....//", "/", "%2f", "%00", ".%00./"]


@pytest.mark.parametrize("up", UP)
def test_no_path_leads_out(guarded: Guarded, up: str) -> None:
    places = ["keys.json", "__init__.py", "etc/passwd"]
    paths = [f"/page/{up * n}{place}" for n in (1, 3, 9) for place in places]
    paths += [f"/v1/models/{up * n}{place}" for n in (1, 3) for place in places]
    paths += [f"/page/index.html{up}", f"/page/{up}", f"/{up * 9}etc/passwd", f"/v1/sessions/{up}keys.json"]
    for path in paths:
        with wire(guarded.url) as connection:
            connection.send(guarded.head(path, "Connection: close", method="GET"), b"\r\n")
            answer = connection.answer()
        assert answer.status in (400, 404), (path, answer)
        assert b"root:" not in answer.body and b"hash" not in answer.body
    for path in (
        f"/v1/sessions/saved/{up}{up}keys",
        f"/v1/sessions/saved/{up}{up}keys.json",
        f"/v1/sessions/{up}keys.json",
    ):
        with wire(guarded.url) as connection:
            connection.send(guarded.head(path, "Connection: close", method="DELETE"), b"\r\n")
            assert connection.answer().status in (400, 404, 405), path
    assert guarded.file.exists()


@pytest.mark.parametrize(
    "name",
    ["../x", "..", ".", "", "a/b", "a\\b", "/tmp/x", "a\0b", ".hidden", "a\n", "x" * 65, "é", "-x", "a b", "\ud800"],
)
def test_a_saved_session_has_a_plain_name(guarded: Guarded, name: str) -> None:
    headers = {**guarded.headers(), "Content-Type": "application/json"}
    session = httpx.post(f"{guarded.url}/v1/sessions", json={"model": "tiny"}, headers=headers).json()["id"]
    before = sorted(guarded.folder.parent.rglob("*"))
    url = f"{guarded.url}/v1/sessions/{session}"
    refused = httpx.post(f"{url}/save", content=json.dumps({"name": name}), headers=headers)
    reopened = httpx.post(
        f"{guarded.url}/v1/sessions", content=json.dumps({"model": "tiny", "saved": name}), headers=headers
    )
    assert httpx.delete(url, headers=headers).status_code == 204
    assert refused.status_code == reopened.status_code == 400
    assert sorted(guarded.folder.parent.rglob("*")) == before


# ----------------------------------------------------------------------------------------------------- how it is set up


def preflight(url: str, origin: str) -> httpx.Response:
    asks = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-bdh-session,x-stainless-retry-count",
    }
    return httpx.options(f"{url}/v1/chat/completions", headers=asks)


def test_no_other_page_may_call_unless_named(server: Running, guarded: Guarded) -> None:
    for url, origin in ((server.url, PAGE), (guarded.url, "https://evil.example"), (guarded.url, "null")):
        got = httpx.get(f"{url}/v1/models", headers={"Origin": origin})
        for answer in (preflight(url, origin), got):
            assert "access-control-allow-origin" not in answer.headers


def test_a_page_that_is_named_may_call(guarded: Guarded) -> None:
    asked_first = preflight(guarded.url, PAGE)
    assert asked_first.status_code == 200
    assert asked_first.headers["access-control-allow-origin"] == PAGE
    assert "POST" in asked_first.headers["access-control-allow-methods"]
    for header in ("authorization", "content-type", "x-bdh-session", "x-stainless-retry-count"):
        assert header in asked_first.headers["access-control-allow-headers"].lower()
    for key in ("web", "old"):  # errors, too, can be read
        answer = httpx.get(f"{guarded.url}/v1/models", headers={"Origin": PAGE, **guarded.headers(key)})
        assert answer.headers["access-control-allow-origin"] == PAGE and answer.headers["vary"] == "Origin"
        assert "access-control-allow-credentials" not in answer.headers
        shown = answer.headers["access-control-expose-headers"].lower().split(", ")
        assert {"x-request-id", "retry-after", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-requests"} < {*shown}


def test_a_page_cannot_make_a_browser_send_json_unasked(server: Running) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None):
        headers = {"Origin": "https://evil.example", **({} if kind is None else {"Content-Type": kind})}
        answer = httpx.post(f"{server.url}/v1/sessions", content='{"model":"tiny"}', headers=headers)
        assert answer.status_code == 400, kind


def test_the_description_can_be_turned_off(server: Running, guarded: Guarded) -> None:
    assert httpx.get(f"{server.url}/openapi.json").status_code == 200
    for path in ("/openapi.json", "/docs", "/redoc"):
        assert httpx.get(guarded.url + path).status_code == 404


def warnings(running: Running) -> list[str]:
    return [line["message"] for line in running.lines() if line["level"] == "warning"]


def test_it_is_for_this_machine_unless_told_otherwise(server: Running, guarded: Guarded) -> None:
    assert "//127.0.0.1:" in server.url and not any("open to the network" in line for line in warnings(server))
    assert "http://0.0.0.0:" in guarded.running.log.read_text()  # with keys
    assert not any("open to the network" in line for line in warnings(guarded.running))


def test_it_warns_where_it_is_open_to_all(export: Path, tmp_path: Path) -> None:
    with running(tmp_path, "--model", export, "--host", "0.0.0.0", ready=False) as it:
        deadline = time.monotonic() + 20
        while not any("open to the network without API keys" in line for line in warnings(it)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        it.process.kill()


# -------------------------------------------------------------------------------------------------------------- the log


def test_no_prompt_or_key_is_in_the_log(guarded: Guarded) -> None:
    url, headers = guarded.url, guarded.headers()
    body: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 3}
    talk = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 3}
    session = (
        f"{url}/v1/sessions/{httpx.post(f'{url}/v1/sessions', json={'model': 'tiny'}, headers=headers).json()['id']}"
    )
    requests: list[tuple[str, Any]] = [
        (f"{url}/v1/completions", body),
        (f"{url}/v1/completions", {**body, "stream": True, "brain": True}),
        (f"{url}/v1/completions", {**body, "echo": True, "logprobs": 2}),
        (f"{url}/v1/chat/completions", talk),
        (f"{url}/v1/chat/completions", {**talk, "stream": True, "user": PROMPT, "metadata": {PROMPT: PROMPT}}),
        (f"{url}/v1/tokenize", {"model": "tiny", "prompt": PROMPT}),
        (f"{session}/messages", {"content": PROMPT, "max_tokens": 2}),
        (f"{session}/completions", {"prompt": PROMPT, "max_tokens": 2}),
    ]
    for address, given in requests:
        assert httpx.post(address, json=given, headers=headers).status_code == 200, address
    wrong: list[tuple[str, Any]] = [
        (f"{url}/v1/completions", {**body, "model": PROMPT}),
        (f"{url}/v1/completions", {**body, PROMPT: 1}),
        (f"{url}/v1/completions", {**body, "regex": f"({PROMPT}"}),
        (f"{url}/v1/completions", {**body, "max_tokens": PROMPT}),
        (f"{url}/v1/chat/completions", {**talk, "messages": [{"role": PROMPT, "content": PROMPT}]}),
        (f"{session}/save", {"name": PROMPT}),
        (f"{url}/v1/completions?prompt={PROMPT}", [PROMPT]),
    ]
    for address, given in wrong:
        assert 400 <= httpx.post(address, json=given, headers=headers).status_code < 500
    for content in (PROMPT, f'{{"prompt": "{PROMPT}'):
        given_headers = {**headers, "Content-Type": "application/json"}
        assert httpx.post(f"{url}/v1/completions", content=content, headers=given_headers).status_code == 400
    odd = {**headers, "X-Request-ID": PROMPT, "User-Agent": PROMPT, "Referer": PROMPT, "Cookie": PROMPT}
    assert httpx.get(f"{url}/v1/models", headers=odd).status_code == 200
    assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer KEYMARK"}).status_code == 401
    assert httpx.get(f"{url}/v1/models", headers={"Authorization": "KEYMARK"}).status_code == 401
    asked(url, f"GET /v1/models HTTP/1.1\r\nAuthorization Bearer KEYMARK {PROMPT}\r\n\r\n".encode())
    log = guarded.running.log.read_text()
    assert log.count('"path": "/v1/completions"') > 8 and "key_" in log
    for secret in ("PROMPTMARK", "KEYMARK", *guarded.keys.values()):
        assert secret not in log


def test_none_of_all_this_was_a_mistake_of_the_server(server: Running, guarded: Guarded) -> None:
    for it in (server, guarded.running):
        assert it.process.poll() is None
        for line in it.log.read_text().splitlines():
            record = json.loads(line)
            assert record["level"] != "error" and record.get("status") not in (500, 504, 507), line
