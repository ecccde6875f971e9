"""What a client sends may be too much, or nothing that it should be: it is refused, and costs little; byte by byte."""

import contextlib
import json
import time
from typing import Any

import httpx
import pytest

from tests.serving.guarded import LARGEST, Guarded
from tests.serving.running import Running
from tests.serving.wire import Wire, asked, statuses, wire


def code_of(answer: httpx.Response) -> Any:
    return answer.json()["error"]["code"]


# ------------------------------------------------------------------------------------------------ bodies and their ends


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(guarded: Guarded) -> None:
    with wire(guarded.url) as connection:
        connection.send(
            guarded.head("/v1/completions", f"Content-Length: {LARGEST + 1}", "Expect: 100-continue"), b"\r\n"
        )
        refused = connection.answer()
        assert refused.status == 413 and json.loads(refused.body)["error"]["code"] == "request_too_large"
        assert refused.headers["connection"] == "close" and connection.rest() == b""
    large = httpx.post(f"{guarded.url}/v1/completions", content=b"x" * (5 * LARGEST), headers=guarded.headers())
    assert large.status_code == 413  # also for clients that send it all the same


def test_a_body_as_large_as_may_be_is_read(guarded: Guarded) -> None:
    frame = '{"model":"none","prompt":""}'
    content = frame.replace('""', '"' + "x" * (LARGEST - len(frame)) + '"')
    headers = {**guarded.headers(), "Content-Type": "application/json"}
    assert len(content) == LARGEST
    assert code_of(httpx.post(f"{guarded.url}/v1/completions", content=content, headers=headers)) == "model_not_found"


def send_until_closed(connection: Wire, piece: bytes, most: int) -> int:
    """How many bytes a server takes until it closes the connection."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < most:
            connection.send(piece)
            sent += len(piece)
    return sent


@pytest.mark.parametrize(
    ("more", "piece"),
    [
        ("Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 0x10000 + b"\r\n"),  # a body
        ("Transfer-Encoding: chunked\r\n\r\n1;", b"x" * 0x10000),  # what a chunk says of itself
        ("Transfer-Encoding: chunked\r\n\r\n0\r\nX: ", b"x" * 0x10000),  # what follows a body
        ("Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X: y\r\n" * 10_000),
        ("X: ", b"x" * 0x10000),  # a head
        ("", b"X: y\r\n" * 10_000),
        ("Host", b"x" * 0x10000),
        ("\r\n", b"\r\n" * 0x8000),  # nothing between two requests
    ],
    ids=["body", "chunk", "trailer", "trailers", "header", "headers", "name", "nothing"],
)
def test_what_has_no_end_takes_no_memory(guarded: Guarded, more: str, piece: bytes) -> None:
    before = guarded.memory("VmRSS")
    with wire(guarded.url) as connection:
        connection.send(guarded.head(), more.encode())
        sent = send_until_closed(connection, piece, 256 << 20)
        answered = statuses(connection.rest())
    assert sent < 32 << 20  # most of it in buffers of the system
    assert set(answered) <= {400, 413}
    assert guarded.memory("VmRSS") - before < 16 << 20


def test_an_endless_body_is_answered(guarded: Guarded) -> None:
    with wire(guarded.url) as connection:
        connection.send(guarded.head("/v1/tokenize", "Transfer-Encoding: chunked"), b"\r\n")
        connection.send((b"10000\r\n" + b"x" * 0x10000 + b"\r\n") * (LARGEST // 0x10000) + b"1\r\nx\r\n")
        refused = connection.answer()
        assert refused.status == 413 and refused.headers["connection"] == "close" and connection.rest() == b""


def test_a_head_of_more_than_64_kib_is_refused(guarded: Guarded) -> None:
    for parts in (["x" * (64 << 10)], ["x" * 1000] * 65):
        with wire(guarded.url) as connection:
            connection.send(
                guarded.head("/v1/models", *(f"X-{n}: {part}" for n, part in enumerate(parts)), method="GET")
            )
            connection.send(b"\r\n")
            assert statuses(connection.rest()) == [400]
    with wire(guarded.url) as connection:
        connection.send(
            guarded.head("/v1/models", f"X: {'x' * (60 << 10)}", "Connection: close", method="GET"), b"\r\n"
        )
        assert statuses(connection.rest()) == [200]
    with wire(guarded.url) as connection:
        connection.send(b"GET /" + b"x" * (64 << 10) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert statuses(connection.rest()) == [400]


def test_what_follows_a_body_is_no_part_of_the_head(guarded: Guarded) -> None:
    with wire(guarded.url) as connection:
        connection.send(b"POST /v1/tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
        connection.send(f"Authorization: Bearer {guarded.keys['web']}\r\n\r\n".encode())
        assert connection.answer().status == 401
    body = b'{"model":"tiny","prompt":"abc"}'
    with wire(guarded.url) as connection:
        head = guarded.head("/v1/tokenize", "Transfer-Encoding: chunked", "Connection: close")
        connection.send(
            head, b"\r\n%x\r\n%b\r\n0\r\nContent-Type: text/plain\r\nX-Request-ID: late\r\n\r\n" % (len(body), body)
        )
        answer = connection.answer()
    assert answer.status == 200 and json.loads(answer.body)["count"] == 3 and answer.headers["x-request-id"] != "late"


TWICE = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"  # what is smuggled in


@pytest.mark.parametrize(
    "headers",
    [
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 5",
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: +5",
        "Content-Length: -5",
        "Content-Length: 0x5",
        "Content-Length: 5 5",
        "Content-Length: \xb2",
        "Content-Length:",
        "Content-Length: 18446744073709551621",
        "Content-Length: " + "9" * 5000,
        "Content-Length : 5",
        "Content-Length: 5\r\n\tX: y",
        "X: y\rContent-Length: 5",
        "X: y\0\r\nContent-Length: 5",
        "Transfer-Encoding: identity",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        "Transfer-Encoding: \x0bchunked",
        "Transfer-Encoding : chunked",
    ],
)
def test_where_a_body_ends_is_never_guessed(server: Running, headers: str) -> None:
    head = b"POST /v1/tokenize HTTP/1.1\r\nHost: localhost\r\n" + headers.encode("latin-1") + b"\r\n\r\n"
    assert asked(server.url, head + b"0\r\n\r\n" + TWICE) == [400]


@pytest.mark.parametrize(
    "chunk",
    [
        b"0x5\r\n12345\r\n",
        b"-1\r\n12345\r\n",
        b"5\n12345\r\n",
        b"5\r\n12345XX",
    ],
)
def test_a_chunk_is_exactly_what_it_says(server: Running, chunk: bytes) -> None:
    head = b"POST /v1/tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert asked(server.url, head + chunk + b"0\r\n\r\n" + TWICE) == [400]


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /v1/models/\xe9 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost x\r\n\r\n",
        b"\0" * 100,
    ],
)
def test_what_is_no_http_is_refused(server: Running, request_: bytes) -> None:
    assert asked(server.url, request_ + TWICE) == [400]


def test_who_asks_for_another_protocol_gets_this_one(server: Running) -> None:
    body = b'{"model":"tiny","prompt":"abc"}'
    with wire(server.url) as connection:
        for protocol in ("h2c", "websocket"):
            upgrade = f"Connection: Upgrade\r\nUpgrade: {protocol}\r\nContent-Length: {len(body)}\r\n"
            connection.send(b"POST /v1/tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
            connection.send(upgrade.encode(), b"\r\n", body)
            answer = connection.answer()
            assert answer.status == 200 and json.loads(answer.body)["count"] == 3
    assert not [line for line in server.lines() if "pip install" in line["message"]]


# ---------------------------------------------------------------------------------------------------- JSON of all kinds


def deep(depth: int, opening: str = "[", middle: str = "", closing: str = "]") -> str:
    return opening * depth + middle + closing * depth


def chat(field: str) -> str:
    return '{"model":"tiny","messages":[{"role":"user","content":"a"}],"max_tokens":1,' + field + "}"


def schema(text: str) -> str:
    return chat('"response_format":{"type":"json_schema","json_schema":{"name":"a","schema":' + text + "}}")


def completion(field: str) -> str:
    return '{"model":"tiny","prompt":"a","max_tokens":1,' + field + "}"


HALF = r'"x\ud800y"'
ODD = {
    "deep lists": ("completions", deep(100_000)),
    "deep objects": ("completions", '{"a":' * 100_000),
    "deep tools": ("chat/completions", chat('"tools":' + deep(500))),
    "rather deep schema": ("chat/completions", schema(deep(320, '{"items":', "{}", "}"))),
    "deep schema": ("chat/completions", schema(deep(400, '{"items":', "{}", "}"))),
    "deep regex": ("completions", completion('"regex":"' + deep(2000, "(", "a", ")") + '"')),
    "long regex": ("completions", completion('"regex":"' + "a?" * 100_000 + '"')),
    "long pattern": ("chat/completions", schema('{"type":"string","pattern":"' + "a?" * 100_000 + '"}')),
    "NaN": ("completions", completion('"temperature":NaN')),
    "Infinity": ("completions", completion('"temperature":Infinity')),
    "NaN in a schema": ("chat/completions", schema('{"enum":[NaN]}')),
    "-Infinity in a schema": ("chat/completions", schema('{"type":"number","minimum":-Infinity}')),
    "NaN as a bias": ("completions", completion('"logit_bias":{"1":NaN}')),
    "NaN as a token": ("completions", '{"model":"tiny","prompt":[NaN]}'),
    "NaN alone": ("completions", "NaN"),
    "large number": ("completions", completion('"n":' + "9" * 4000)),
    "very large number": ("completions", completion('"n":' + "9" * 5000)),
    "large float": ("completions", completion('"top_p":1e999')),
    "large token": ("detokenize", '{"model":"tiny","tokens":[1' + "0" * 30 + "]}"),
    "negative token": ("detokenize", '{"model":"tiny","tokens":[-1]}'),
    "half in a model": ("completions", '{"model":' + HALF + ',"prompt":"a"}'),
    "half in a prompt": ("completions", '{"model":"tiny","prompt":' + HALF + "}"),
    "half in prompts": ("completions", '{"model":"tiny","prompt":["a",' + HALF + "]}"),
    "half in a stop": ("completions", completion('"stop":' + HALF)),
    "half in a regex": ("completions", completion('"regex":' + HALF)),
    "half as a field": ("completions", completion(HALF + ":1")),
    "half as a bias": ("completions", completion('"logit_bias":{' + HALF + ":1}")),
    "half in a message": ("chat/completions", '{"model":"tiny","messages":[{"role":"user","content":' + HALF + "}]}"),
    "half as a role": ("chat/completions", '{"model":"tiny","messages":[{"role":' + HALF + ',"content":"a"}]}'),
    "half in a schema": ("chat/completions", schema('{"enum":[' + HALF + "]}")),
    "half as a property": ("chat/completions", schema('{"properties":{' + HALF + ":{}}}")),
    "half in a tokenized text": ("tokenize", '{"model":"tiny","prompt":' + HALF + "}"),
    "half in a system message": ("sessions", '{"model":"tiny","system":' + HALF + "}"),
    "no UTF-8": ("completions", '{"model":"\udcff"}'),
    "nothing": ("completions", ""),
    "null": ("completions", "null"),
    "two": ("completions", "{}{}"),
}


@pytest.mark.parametrize("what", ODD)
def test_odd_json_is_the_clients_mistake(server: Running, what: str) -> None:
    path, text = ODD[what]
    content = text.encode("utf-8", "surrogateescape")
    answer = httpx.post(f"{server.url}/v1/{path}", content=content, headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500, answer.text
    message = answer.json()["error"]["message"]
    assert message and len(message) < 1000


@pytest.mark.parametrize(
    "field", ['"user":' + HALF, '"metadata":{' + HALF + ":" + HALF + "}", '"tools":[NaN],"tool_choice":"none"']
)
def test_odd_json_that_nobody_looks_at_is_harmless(server: Running, field: str) -> None:
    answer = httpx.post(
        f"{server.url}/v1/chat/completions", content=chat(field), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code in (200, 400), answer.text


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("completions", '{"model":"tiny","prompt":[' + ",".join(["{}"] * 300_000) + "]}"),
        ("chat/completions", '{"model":"tiny","messages":[' + ",".join(["{}"] * 300_000) + "]}"),
        ("completions", completion(",".join(f'"x{n}":1' for n in range(90_000)))),
        ("completions", completion('"logit_bias":{' + ",".join(f'"x{n}":1' for n in range(90_000)) + "}")),
        ("completions", completion('"metadata":{' + ",".join(f'"x{n}":1' for n in range(90_000)) + "}")),
        ("completions", completion('"stop_token_ids":[' + ",".join(["-1"] * 300_000) + "]")),
        ("detokenize", '{"model":"tiny","tokens":[' + ",".join(["-1"] * 300_000) + "]}"),
    ],
    ids=["prompts", "messages", "fields", "biases", "metadata", "stops", "tokens"],
)
def test_a_million_mistakes_cost_no_more_than_one(guarded: Guarded, path: str, text: str) -> None:
    headers = {**guarded.headers(), "Content-Type": "application/json"}
    before, begin = guarded.memory("VmRSS"), time.monotonic()
    answer = httpx.post(f"{guarded.url}/v1/{path}", content=text, headers=headers)
    assert answer.status_code == 400 and len(answer.text) < 1000
    assert time.monotonic() - begin < 2 and guarded.memory("VmRSS") - before < 100 << 20


def test_none_of_all_this_was_a_mistake_of_the_server(server: Running, guarded: Guarded) -> None:
    for it in (server, guarded.running):
        assert it.process.poll() is None
        for line in it.log.read_text().splitlines():
            record = json.loads(line)
            assert record["level"] != "error" and record.get("status") not in (500, 504, 507), line
