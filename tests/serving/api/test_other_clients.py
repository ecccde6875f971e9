"""Clients besides the official one for Python: LangChain, LiteLLM and the official one for Node.

They are imported where they are used: importing each takes seconds.
"""

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.serving.official import Egg
from tests.serving.running import Running

NODE = Path(__file__).parents[1] / "node"
MESSAGES: list[Any] = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Which dragon hatched?"}]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the server is talked to."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    monkeypatch.setenv("LITELLM_MODE", "PRODUCTION")  # reads no .env file


@pytest.fixture
def said(server: Running) -> Iterator[str]:
    """What the official client is told, which all are to be told."""
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES, seed=3, max_tokens=12)
        yield answer.choices[0].message.content or ""
    server.wait_until_idle()


def test_langchain(server: Running, said: str) -> None:
    from langchain_openai import ChatOpenAI
    from langchain_openai import OpenAI as Completions

    usual: dict[str, Any] = {"model": "tiny", "base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0}
    chat = ChatOpenAI(**{**usual, "max_tokens": 12}, seed=3, temperature=1, stream_usage=True, logprobs=True)
    answer = chat.invoke(MESSAGES)
    assert answer.content == said and answer.response_metadata["finish_reason"] == "length"
    assert answer.usage_metadata is not None and answer.usage_metadata["output_tokens"] == 12
    chunks = list(chat.stream(MESSAGES))
    assert len(chunks) > 3 and "".join(str(chunk.content) for chunk in chunks) == said
    assert [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata] == [answer.usage_metadata]
    assert [one.content for one in chat.batch([MESSAGES] * 3)] == [said] * 3
    assert asyncio.run(chat.ainvoke(MESSAGES)).content == said

    eggs = ChatOpenAI(**{**usual, "max_tokens": 300}).with_structured_output(Egg, method="json_schema")
    assert isinstance(eggs.invoke("An egg?"), Egg) and isinstance(list(eggs.stream("An egg?"))[-1], Egg)

    words = Completions(**usual, max_tokens=8, seed=5, temperature=1)
    assert "".join(words.stream("One")) == words.invoke("One")
    assert len(words.generate(["One", "Two"]).generations) == 2


def test_litellm(server: Running, said: str) -> None:
    import litellm

    litellm.telemetry = False
    litellm.suppress_debug_info = True
    usual: dict[str, Any] = {
        **{"model": "openai/tiny", "api_base": f"{server.url}/v1", "api_key": "none", "num_retries": 0},
        **{"messages": MESSAGES, "seed": 3, "max_tokens": 12},
    }
    answer = litellm.completion(**usual)
    assert answer.choices[0].message.content == said and answer.choices[0].finish_reason == "length"
    chunks = list(litellm.completion(**usual, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == said
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens == 12

    async def work() -> list[str]:
        answers = await asyncio.gather(*(litellm.acompletion(**usual) for _ in range(3)))
        streamed = [chunk async for chunk in await litellm.acompletion(**usual, stream=True)]
        pieces = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
        return [*(one.choices[0].message.content for one in answers), pieces]

    assert asyncio.run(work()) == [said] * 4
    egg = litellm.completion(**{**usual, "max_tokens": 300}, response_format=Egg)
    assert Egg.model_validate_json(egg.choices[0].message.content)
    completions = {**usual, "model": "text-completion-openai/tiny", "prompt": "One"}
    del completions["messages"]
    assert litellm.text_completion(**completions).choices[0].text
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**usual, temperature=5)
    with pytest.raises(litellm.NotFoundError, match="no model"):
        litellm.completion(**{**usual, "model": "openai/huge"})


@pytest.fixture(scope="module")
def node() -> str:
    """The `node` command, with the packages of its client beside the script. `./run test` has them installed before."""
    for name in ("node", "npm"):
        if shutil.which(name) is None:
            pytest.fail(f"{name} is needed to test the Node client; install it (on Debian: apt-get install nodejs npm)")
    if not (NODE / "node_modules" / "openai").is_dir():
        done = subprocess.run(["npm", "install"], cwd=NODE, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"npm install in {NODE} failed: {done.stderr}"
    return "node"


def test_node(server: Running, said: str, node: str) -> None:
    done = subprocess.run([node, NODE / "client.mjs", f"{server.url}/v1"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["chat"] == said
    assert Egg.model_validate(told["egg"])
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.completions.create(model="tiny", prompt=["One", "Two"], max_tokens=8, seed=5)
        assert told["completions"] == [choice.text for choice in answer.choices]
    server.wait_until_idle()
