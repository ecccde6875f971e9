"""/v1/sessions of a real server: what was said stays, however an answer ended, and whose it is."""

import asyncio
import http.client
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from bdh.inference.async_llm import AsyncLLM
from bdh.inference.llm import LLM
from bdh.inference.sampling_params import SamplingParams
from bdh.inference.session import Session
from bdh.serving.config import ModelSettings, ServeConfig, SessionSettings
from bdh.serving.model_registry import ServedModel
from bdh.serving.sessions.store import SessionStore
from tests.inference.small import CHAT, LETTERS, small_model
from tests.serving.running import Running, running

SYSTEM = "You are a dragon."
SAID = {"max_tokens": 12, "seed": 7, "logit_bias": {str(token): bias for token, bias in LETTERS.items()}}
PARAMS = SamplingParams(max_new_tokens=12, seed=7, temperature=1.0, logit_bias=dict(LETTERS))
JSON = {"Content-Type": "application/json"}
ENDLESS = {**SAID, "max_tokens": 60_000}

ROUTES = (  # below /v1/sessions/{id}
    ("GET", "", None),
    ("DELETE", "", None),
    ("GET", "/state", None),
    ("POST", "/save", {"name": "x"}),
    ("POST", "/messages", {"content": "Hi"}),
    ("POST", "/completions", {"prompt": "Hi"}),
)


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{server.url}/v1", timeout=60) as it:
        yield it
        for session in it.get("/sessions").json()["data"]:
            assert it.delete(f"/sessions/{session['id']}").status_code == 204


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(small_model(vocab_size=262), CHAT)


def new(client: httpx.Client, **more: Any) -> str:
    answer = client.post("/sessions", json={"model": "tiny", **more})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def say(client: httpx.Client, id: str, text: str, **more: Any) -> dict[str, Any]:
    answer = client.post(f"/sessions/{id}/messages", json={"content": text, **SAID, **more})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def content(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def expected(session: Session, text: str | None = None) -> str:
    """What a session in this process says, or writes."""
    return "".join(delta.text for delta in (session.write(PARAMS) if text is None else session.send(text, PARAMS)))


def chunks(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    """The events of a stream, which must have an end."""
    for line in answer.iter_lines():
        if line == "data: [DONE]":
            return
        if line:
            yield json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream has no end")


def refused(answer: httpx.Response, status: int, words: str, code: str | None = None) -> None:
    """An error that says what it should, in a line."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert words in error["message"] and "\n" not in error["message"] and error["code"] == code


def test_a_conversation_goes_on(client: httpx.Client, llm: LLM) -> None:
    session = llm.session(SYSTEM)
    begun = client.post("/sessions", json={"model": "tiny", "system": SYSTEM, "name": "Dragon"})
    assert begun.status_code == 201
    card = begun.json()
    assert card["id"].startswith("ses_") and card["model"] == "tiny" and card["name"] == "Dragon"
    assert (card["position"], card["state_bytes"], card["busy"]) == (0, 16384, False)
    id, known = card["id"], 0
    for text in ("Who are you?", [{"type": "text", "text": "Inde"}, {"type": "text", "text": "ed?"}], "Hm."):
        answer = say(client, id, text)  # type: ignore[arg-type]
        plain = text if isinstance(text, str) else "Indeed?"
        assert content(answer) == expected(session, plain)
        assert answer["object"] == "chat.completion" and answer["session"] == id and answer["model"] == "tiny"
        usage = answer["usage"]
        assert usage["completion_tokens"] == 12 and usage["prompt_tokens"] + 12 == session.position - known + bool(
            known
        )
        known = session.position
    found = client.get(f"/sessions/{id}").json()
    assert found["messages"] == session.transcript and found["position"] == session.position
    assert [one for one in client.get("/sessions").json()["data"] if one["id"] == id] == [
        {name: value for name, value in found.items() if name != "messages"}
    ]


def test_an_answer_comes_as_a_stream(client: httpx.Client, llm: LLM) -> None:
    session, id = llm.session(), new(client)
    body = {"content": "Hi", **SAID, "stream": True, "stream_options": {"include_usage": True}, "logprobs": True}
    with client.stream("POST", f"/sessions/{id}/messages", json=body) as answer:
        pieces = list(chunks(answer))
    assert all(piece["session"] == id and piece["object"] == "chat.completion.chunk" for piece in pieces)
    choices = [choice for piece in pieces for choice in piece["choices"]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""} and choices[-1]["finish_reason"] == "length"
    assert "".join(choice["delta"].get("content", "") for choice in choices) == expected(session, "Hi")
    assert sum(len(choice["logprobs"]["content"]) for choice in choices if choice["logprobs"]) == 12
    assert pieces[-1]["choices"] == [] and pieces[-1]["usage"]["completion_tokens"] == 12
    assert not client.get(f"/sessions/{id}").json()["busy"]


def test_texts_are_read_and_written_on(client: httpx.Client, llm: LLM) -> None:
    session, id = llm.session(), new(client)
    where = f"/sessions/{id}/completions"
    session.read("A document. ")
    for stream in (False, True):
        body = {"prompt": "" if stream else "A document. ", "max_tokens": 0, "stream": stream}
        answer = client.post(where, json=body)
        if not stream:
            whole = answer.json()
            assert whole["choices"] == [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}]
            assert whole["usage"]["prompt_tokens"] == len("A document. ") - 1  # the last one waits
    assert client.get(f"/sessions/{id}").json()["position"] == len("A document. ")
    answer = client.post(where, json={**SAID, "logprobs": 2})
    assert answer.json()["choices"][0]["text"] == expected(session)
    assert len(answer.json()["choices"][0]["logprobs"]["tokens"]) == 12 and answer.json()["session"] == id
    session.read(" And then")
    with client.stream("POST", where, json={"prompt": " And then", **SAID, "stream": True}) as streamed:
        pieces = list(chunks(streamed))
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == expected(session)
    assert content(say(client, id, "Hi")) == expected(session, "Hi")
    answer = client.post(where, json=SAID)  # goes on with the answer, which was cut by max_tokens
    assert answer.json()["choices"][0]["text"] == expected(session)
    assert client.get(f"/sessions/{id}").json()["messages"] == session.transcript


def test_what_is_read_for_who_goes_away_is_counted(server: Running, client: httpx.Client) -> None:
    body = json.dumps({"prompt": "x" * 130_000, "max_tokens": 0})
    before = server.metric("bdh_usage_prompt_tokens_total")
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    connection.request("POST", f"/v1/sessions/{new(client)}/completions", body, JSON)
    deadline = time.monotonic() + 10
    while not server.metric("bdh_engine_running"):
        assert time.monotonic() < deadline
    connection.close()
    server.wait_until_idle()
    while server.metric("bdh_usage_prompt_tokens_total") - before < 129_999:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_it_does_one_thing_at_a_time_and_survives_clients_that_go_away(
    server: Running, client: httpx.Client, llm: LLM
) -> None:
    session, id = llm.session(SYSTEM), new(client, system=SYSTEM)
    assert content(say(client, id, "Hi")) == expected(session, "Hi")
    with client.stream("POST", f"/sessions/{id}/messages", json={"content": "Ho", **ENDLESS, "stream": True}) as answer:
        pieces = chunks(answer)
        while not next(pieces)["choices"][0]["delta"].get("content"):
            pass
        assert client.get(f"/sessions/{id}").json()["busy"]
        for method, path, body in (
            ("POST", "/messages", {"content": "Hm"}),
            ("POST", "/completions", {"prompt": "Hm"}),
            ("POST", "/completions", {"prompt": "Hm", "max_tokens": 0}),
            ("POST", "/save", {"name": "busy"}),
            ("GET", "/state", None),
            ("DELETE", "", None),
        ):
            refused(client.request(method, f"/sessions/{id}{path}", json=body), 409, "is busy", "session_busy")
    server.wait_until_idle()
    messages = client.get(f"/sessions/{id}").json()["messages"]
    assert len(messages) == 5 and messages[3]["content"] == "Ho" and messages[4]["content"]

    with pytest.raises(httpx.ReadTimeout):  # nothing was handed on, so nothing has happened
        client.post(f"/sessions/{id}/messages", json={"content": "Hm", **ENDLESS}, timeout=0.3)
    server.wait_until_idle()
    assert client.get(f"/sessions/{id}").json()["messages"] == messages
    assert content(say(client, id, "Hm"))


def test_saved_deleted_and_taken_away(client: httpx.Client, llm: LLM, tmp_path: Path) -> None:
    session, id = llm.session(SYSTEM), new(client, system=SYSTEM)
    for text in ("Hi", "Ho"):
        assert content(say(client, id, text)) == expected(session, text)
    saved = client.post(f"/sessions/{id}/save", json={"name": "taken.1"})
    assert saved.status_code == 200 and saved.json()["bytes"] > 16384
    [listed] = [one for one in client.get("/sessions").json()["saved"] if one["name"] == "taken.1"]
    assert listed["model"] == "tiny" and listed["bytes"] == saved.json()["bytes"]
    assert abs(listed["created"] - time.time()) < 60
    state = client.get(f"/sessions/{id}/state")
    assert state.headers["content-type"] == "application/octet-stream" and ".safetensors" in str(state.headers)
    (tmp_path / "state").write_bytes(state.content)
    assert client.delete(f"/sessions/{id}").status_code == 204
    copies = [new(client, saved="taken.1"), new(client, saved="taken.1", name="another")]
    assert client.delete("/sessions/saved/taken.1").status_code == 204
    loaded, text = llm.load_session(tmp_path / "state"), expected(session, "Hm")
    assert content(say(client, copies[0], "Hm")) == content(say(client, copies[1], "Hm")) == text
    assert expected(loaded, "Hm") == text and loaded.transcript == session.transcript
    assert [client.get(f"/sessions/{one}").json()["name"] for one in copies] == ["taken.1", "another"]
    refused(
        client.post("/sessions", json={"model": "tiny", "saved": "taken.1"}), 404, "taken.1", "saved_session_not_found"
    )
    refused(client.delete("/sessions/saved/taken.1"), 404, "taken.1", "saved_session_not_found")


def test_the_brain_can_be_watched(client: httpx.Client) -> None:
    id = new(client, system=SYSTEM)
    say(client, id, "Hi")
    answer = say(client, id, "Ho", brain=True)
    trace = client.get(f"/brain/{answer['brain']['trace']}").json()
    read, written = [[token for token in trace["tokens"] if token["prompt"] == prompt] for prompt in (True, False)]
    assert len(read) == answer["usage"]["prompt_tokens"] and len(written) == 12
    body = {**SAID, "stream": True, "brain": True}
    with client.stream("POST", f"/sessions/{id}/completions", json=body) as streamed:
        told = [token for piece in chunks(streamed) for token in piece.get("brain", {}).get("tokens", ())]
    assert len(told) == 13
    refused(
        client.post(f"/sessions/{id}/completions", json={"max_tokens": 0, "brain": True}), 400, "brain is for texts"
    )


def test_mistakes(client: httpx.Client) -> None:
    id = new(client)
    refused(client.post("/sessions", json={"model": "none"}), 404, "there is no model 'none'", "model_not_found")
    refused(client.post("/sessions", json={"model": "tiny", "saved": "x", "system": "y"}), 400, "leave system out")
    half = {"model": "tiny", "system": "\ud800"}
    refused(client.post("/sessions", content=json.dumps(half), headers=JSON), 400, "system is not valid text")
    before = client.get("/sessions").json()["data"]
    for length in (140_000, 4_000_000):
        answer = client.post("/sessions", json={"model": "tiny", "system": "x" * length})
        refused(answer, 400, "this server reads 131072", "context_length_exceeded")
        assert answer.json()["error"]["param"] == "system"
    assert client.get("/sessions").json()["data"] == before
    refused(client.post("/sessions", json={"model": "tiny", "state": 1}), 400, "state")
    refused(client.post(f"/sessions/{id}/messages", json={}), 400, "content")
    refused(client.post(f"/sessions/{id}/messages", json={"content": "Hi", "n": 2}), 400, "n")
    refused(client.post(f"/sessions/{id}/messages", json={"content": "Hi", "regex": "("}), 400, "regex")
    half = {"content": "\ud800"}
    refused(client.post(f"/sessions/{id}/messages", content=json.dumps(half), headers=JSON), 400, "half of one")
    refused(client.post(f"/sessions/{id}/completions", json={}), 400, "there is nothing to write on from")
    refused(client.post(f"/sessions/{id}/completions", json={"prompt": "x" * 140_000}), 400, "reads 131072 tokens",
            "context_length_exceeded")  # fmt: skip
    assert client.get(f"/sessions/{id}").json()["position"] == 0
    for unknown in ("ses_" + "0" * 32, "x", "ses_%00"):
        for method, path, body in ROUTES:
            answer = client.request(method, f"/sessions/{unknown}{path}", json=body)
            refused(answer, 404, "there is no session", "session_not_found")


@pytest.mark.parametrize(
    "name",
    ["../x", "%2e%2e%2fx", "..%2f..%2fx", "%2e%2e", "..", "/etc/passwd", "%2fetc%2fpasswd", "a%00b", "%0a", "a" * 65],
)
def test_no_name_leads_elsewhere(server: Running, client: httpx.Client, name: str) -> None:
    """Not even as nobody's HTTP library would send it."""
    id = new(client)
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    connection.request("DELETE", f"/v1/sessions/saved/{name}")
    answer = connection.getresponse()
    assert answer.status in (400, 404, 405) and json.loads(answer.read())["error"]["message"]
    connection.close()
    for given in (name, name.replace("%2e", ".").replace("%2f", "/").replace("%00", "\0").replace("%0a", "\n")):
        if not given.startswith(("%", "a%")):
            refused(client.post(f"/sessions/{id}/save", json={"name": given}), 400, "name")
            refused(client.post("/sessions", json={"model": "tiny", "saved": given}), 400, "saved")
    assert client.delete(f"/sessions/{id}").status_code == 204


def test_sessions_are_their_keys_and_saved_ones_outlive_the_server(export: Path, tmp_path: Path, llm: LLM) -> None:
    folder, session = tmp_path / "sessions", llm.session(SYSTEM)
    settings = {"folder": folder, "memory_bytes": 20_000, "max_sessions": 3}
    flags = [part for name, value in settings.items() for part in (f"--serve.sessions.{name}", value)]
    secrets = [f"{name}-0123456789abcdef" for name in ("ours", "theirs")]
    keys = f"ours:{secrets[0]},theirs:{secrets[1]}"
    with running(tmp_path, "--model", f"tiny={export}", *flags, BDH_API_KEYS=keys) as server:
        headers = [{"Authorization": f"Bearer {secret}"} for secret in secrets]
        ours, theirs = [httpx.Client(base_url=f"{server.url}/v1", headers=one, timeout=60) for one in headers]
        ids = [new(ours, system=SYSTEM) for _ in range(3)]
        refused(ours.post("/sessions", json={"model": "tiny"}), 429, "3 sessions", "too_many_sessions")
        for text in ("Hi", "Ho"):  # one state has room in memory, so they come and go
            answers = {content(say(ours, id, text)) for id in ids}
            assert answers == {expected(session, text)}
            assert server.metric("bdh_state_memory_bytes", place="sessions") <= 20_000
        assert ours.post(f"/sessions/{ids[0]}/save", json={"name": "mine"}).status_code == 200
        for method, path, body in ROUTES:
            answer = theirs.request(method, f"/sessions/{ids[0]}{path}", json=body)
            refused(answer, 404, "there is no session", "session_not_found")
        assert theirs.get("/sessions").json() == {"object": "list", "data": [], "saved": []}
        assert len(ours.get("/sessions").json()["data"]) == 3
        saved = {"model": "tiny", "saved": "mine"}
        refused(theirs.post("/sessions", json=saved), 404, "mine", "saved_session_not_found")
        refused(theirs.delete("/sessions/saved/mine"), 404, "mine", "saved_session_not_found")
        assert httpx.get(f"{server.url}/v1/sessions").status_code == 401
        owner = next(line["key"] for line in server.lines() if line.get("session"))
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    assert len(list(folder.glob(".bdh-sessions-*/*.safetensors"))) >= 2  # those that were put away

    async def next_server() -> None:
        store = SessionStore(SessionSettings(str(folder)))
        async with AsyncLLM(export) as its_llm:
            await store.start()
            served = ServedModel(ModelSettings(str(export), "tiny"), ServeConfig(), its_llm)
            kept = await store.reopen(owner, served, "mine", None)
            async with store.taken(kept) as reopened:
                turn = await reopened.send("Hm", PARAMS, wants_deltas=False)
            assert (await turn.completion()).text == expected(session, "Hm")
            while len(list(folder.iterdir())) > 2:  # what was left is being removed
                await asyncio.sleep(0.01)
            await store.close()

    asyncio.run(asyncio.wait_for(next_server(), 60))
    assert [path.name for path in folder.iterdir()] == ["saved"]
