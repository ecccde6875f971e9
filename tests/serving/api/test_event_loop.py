"""Nothing that a client sends, or that a model brings along, keeps the server from answering."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from bdh.data.vocabulary import train_tokenizer
from bdh.errors import PromptTooLong
from bdh.inference.prompt_encoder import PromptEncoder
from bdh.model.export import save_export
from tests.inference.small import BYTES, small_model
from tests.serving.running import Running, running

LOOP = """
{%- for message in messages %}{{ message.content }}
    {%- if message.content == 'loop' %}
        {%- for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}
    {%- elif message.content == 'divide' %}{{ 1 / 0 }}{% endif %}
{%- endfor %}"""
BYTES_OF_A_LARGE_BODY = 3_900_000
QUICK = 1.0  # seconds, on a machine that does other things too; a frozen loop answers nothing for much longer


@contextmanager
def watched(server: Running) -> Iterator[list[float]]:
    """Asks again and again whether the server is alive; yields a list of the seconds that each answer takes."""
    took: list[float] = []
    ended = threading.Event()

    def watch() -> None:
        with httpx.Client(timeout=30) as client:
            while not ended.is_set():
                begin = time.perf_counter()
                assert client.get(f"{server.url}/health/live").status_code == 200
                took.append(time.perf_counter() - begin)
                time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield took
    finally:
        ended.set()
        thread.join()


def test_a_template_that_never_ends_delays_its_own_chat_only(tmp_path: Path) -> None:
    save_export(small_model(), BYTES, tmp_path / "tiny", "A tiny model for tests.\n")
    (tmp_path / "tiny" / "chat_template.jinja").write_text(LOOP)
    with running(tmp_path, "--model", tmp_path / "tiny") as server, httpx.Client(base_url=server.url) as client:

        def chat(content: str) -> httpx.Response:
            messages = [{"role": "user", "content": content}]
            body: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 1}
            return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)

        session = client.post("/v1/sessions", json={"model": "tiny"}).json()["id"]
        with watched(server) as took, ThreadPoolExecutor(3) as pool:
            hanging = [pool.submit(chat, "loop")]
            hanging.append(
                pool.submit(
                    httpx.post, f"{server.url}/v1/sessions/{session}/messages", json={"content": "loop"}, timeout=60
                )
            )
            done = client.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 3}, timeout=60)
            assert done.status_code == 200
            for answer in [one.result() for one in hanging]:
                assert answer.status_code == 400 and "takes more than 2 seconds" in answer.json()["error"]["message"]
        assert max(took) < QUICK and len(took) > 20
        divided = chat("divide")
        assert divided.status_code == 400 and "division by zero" in divided.json()["error"]["message"]
        assert chat("Hello").status_code == 200
        with ThreadPoolExecutor(1) as pool:
            last = pool.submit(chat, "loop")
            time.sleep(0.3)
            assert server.stop() == 0
            assert last.result().status_code in (400, 503)
        assert not any(line["level"] == "error" for line in server.lines())


def fill(piece: str) -> str:
    """As many pieces of a list as a large body has room for."""
    return ",".join([piece] * (BYTES_OF_A_LARGE_BODY // (len(piece) + 1)))


def test_large_bodies_do_not_delay_others(server: Running) -> None:
    user = '{"role":"user","content":"a"}'
    bodies = [
        ("completions", '"prompt":[' + fill("1") + "]"),
        ("completions", '"prompt":[' + fill("[1]") + "]"),
        ("completions", '"prompt":[' + fill('"a"') + "]"),
        ("completions", '"prompt":"a","stop_token_ids":[' + fill("1") + "]"),
        ("completions", '"prompt":"' + "a" * BYTES_OF_A_LARGE_BODY + '"'),
        ("completions", '"prompt":"a","x":[' + fill("[{}]") + "]"),
        ("chat/completions", '"messages":[' + fill(user) + "]"),
        ("chat/completions", '"messages":[{"role":"user","content":[' + fill('{"type":"text","text":"a"}') + "]}]"),
        ("chat/completions", f'"messages":[{user}],"tool_choice":"none","tools":[' + fill("{}") + "]"),
        ("tokenize", '"messages":[' + fill(user) + "]"),
        ("tokenize", '"prompt":"' + "a " * (BYTES_OF_A_LARGE_BODY // 2) + '"'),
        ("detokenize", '"tokens":[' + fill("1") + "]"),
    ]
    with watched(server) as took:
        for path, more in bodies:
            content = f'{{"model":"tiny",{more}}}'
            headers = {"Content-Type": "application/json"}
            answer = httpx.post(f"{server.url}/v1/{path}", content=content, headers=headers, timeout=60)
            assert answer.status_code == 400, (path, more[:40], answer.text[:200])
            assert json.loads(answer.text)["error"]["message"]
    assert max(took) < QUICK
    with Path(f"/proc/{server.process.pid}/status").open() as status:
        [peak] = [int(line.split()[1]) for line in status if line.startswith("VmHWM")]
    assert peak < 800_000  # kB


def test_a_text_of_far_too_many_tokens_is_not_tokenized_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is not known how many characters a token can stand for."""
    words = train_tokenizer("wordpiece", ["a b c dragon egg"], 64)
    texts = PromptEncoder(words, 64, ())
    texts.max_tokens = 1000
    encoded: list[int] = []
    encode = texts._encode

    def counted(text: str, literal: bool = False) -> list[int]:
        encoded.append(len(text))
        return encode(text, literal)

    monkeypatch.setattr(texts, "_encode", counted)
    with pytest.raises(PromptTooLong, match="more than 1000 tokens"):
        texts.encode("a b c " * 600_000)
    assert sum(encoded) < 200_000
    assert len(texts.encode("a b c " * 600)) == 1800  # the caller says how many are too many
    long_word = "x" * 200_000  # one unknown word
    assert len(texts.encode(long_word)) == 1
