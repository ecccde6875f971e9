"""The official Python client against a real server: streams, many requests at once, and mistakes."""

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk

from tests.serving.official import BIAS, QUESTION, Dialect, Egg, assert_alike, complete
from tests.serving.running import Running, running

SECRET = "a-secret-for-tests-only"


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


# ------------------------------------------------------------------------------------------------------------ streams


def joined(dialect: Dialect, chunks: Iterable[Completion | ChatCompletionChunk]) -> list[dict[str, Any]]:
    """What the chunks of a stream say together: choices as the whole answer would have them."""
    found: dict[int, dict[str, Any]] = defaultdict(lambda: {"text": "", "logprobs": None, "finish_reason": None})
    ids = set()
    for chunk in chunks:
        ids.add((chunk.id, chunk.created, chunk.model, chunk.object))
        for choice in chunk.to_dict()["choices"]:  # type: ignore[attr-defined]
            one = found[choice["index"]]
            assert one["finish_reason"] is None
            one["finish_reason"] = choice["finish_reason"]
            one["text"] += (choice["text"] if dialect == "completions" else choice["delta"].get("content")) or ""
            for name, values in (choice["logprobs"] or {}).items():
                one["logprobs"] = one["logprobs"] or {}
                one["logprobs"][name] = None if values is None else [*(one["logprobs"].get(name) or []), *values]
    assert len(ids) == 1
    return [found[index] for index in sorted(found)]


def whole(dialect: Dialect, choices: Iterable[Any]) -> list[dict[str, Any]]:
    shown = []
    for choice in (choice.to_dict() for choice in choices):
        text = choice["text"] if dialect == "completions" else choice["message"]["content"]
        shown.append({"text": text, "logprobs": choice["logprobs"], "finish_reason": choice["finish_reason"]})
    return shown


CASES: list[dict[str, Any]] = [
    {},
    {"n": 3, "logprobs": 2},
    {"logit_bias": BIAS, "logprobs": 1, "stop": ["e", "a"]},
    {"logit_bias": {"255": 100, "260": 100}, "logprobs": 0},
    {"logit_bias": {"258": 100}, "logprobs": 0},
    {"echo": True, "logprobs": 3, "prompt": ["One", "Two"]},
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dialect", ["completions", "chat"])
def test_a_stream_says_what_the_answer_does(client: OpenAI, dialect: Dialect, case: dict[str, Any]) -> None:
    case = {"max_tokens": 20, "seed": 4, **case}
    create: Any = client.completions.create
    if dialect == "completions":
        case = {"prompt": "The dragon", **case}
    else:
        create = client.chat.completions.create
        top = case.pop("logprobs", None)
        case = {"messages": QUESTION, **case, **({} if top is None else {"logprobs": True, "top_logprobs": top})}
        case = {name: value for name, value in case.items() if name not in ("echo", "prompt")}
    answer = create(model="tiny", **case)
    chunks = list(create(model="tiny", stream=True, stream_options={"include_usage": True}, **case))
    assert chunks[-1].choices == [] and chunks[-1].usage.to_dict() == answer.usage.to_dict()
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert_alike(joined(dialect, chunks), whole(dialect, answer.choices))
    if dialect == "chat":
        assert next(chunk.choices[0].delta.role for chunk in chunks if chunk.choices) == "assistant"


def test_a_stream_without_usage(client: OpenAI) -> None:
    chunks = list(complete(client, stream=True))
    assert all(chunk.choices and "usage" not in chunk.to_dict() for chunk in chunks)  # type: ignore[attr-defined]


def test_stream_helper(client: OpenAI) -> None:
    """Events of the client's own making, with a schema and log-probabilities."""
    with client.chat.completions.stream(
        model="tiny", messages=QUESTION, response_format=Egg, seed=1, max_tokens=300, logprobs=True, top_logprobs=2
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    kinds = [event.type for event in events]
    done = next(event for event in events if event.type == "content.done")
    assert {"chunk", "content.delta", "logprobs.content.delta", "logprobs.content.done"} <= set(kinds)
    assert isinstance(done.parsed, Egg) and final.choices[0].message.parsed == done.parsed
    assert "".join(event.delta for event in events if event.type == "content.delta") == done.content
    plain = client.chat.completions.parse(
        model="tiny", messages=QUESTION, response_format=Egg, seed=1, max_tokens=300, logprobs=True, top_logprobs=2
    )
    assert plain.choices[0].message.content == done.content
    assert_alike(*(answer.choices[0].to_dict()["logprobs"] for answer in (plain, final)))


def test_streams_that_are_closed_end_at_once(client: OpenAI, server: Running) -> None:
    endless: Any = {"max_tokens": 60_000, "extra_body": {"ignore_eos": True}}
    for create in (
        lambda: complete(client, stream=True, **endless),
        lambda: client.chat.completions.create(model="tiny", messages=QUESTION, stream=True, n=4, **endless),
    ):
        stream: Any = create()
        assert next(iter(stream)) is not None
        assert server.metric("bdh_engine_running") > 0
        stream.close()
        server.wait_until_idle()


# -------------------------------------------------------------------------------------------------------- many at once


def test_async(client: OpenAI, server: Running) -> None:
    """More at once than there are slots: each gets what it gets alone."""

    async def work() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as many:
            assert [model.id async for model in many.models.list()] == ["tiny"]

            async def whole(seed: int) -> str:
                answer = await many.chat.completions.create(
                    model="tiny", messages=QUESTION, seed=seed, max_tokens=12, logit_bias=BIAS
                )
                return answer.choices[0].message.content or ""

            async def streamed(seed: int) -> str:
                chunks = await many.chat.completions.create(
                    model="tiny", messages=QUESTION, seed=seed, max_tokens=12, logit_bias=BIAS, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            async def parsed() -> str:
                answer = await many.chat.completions.parse(
                    model="tiny", messages=QUESTION, response_format=Egg, max_tokens=300
                )
                assert isinstance(answer.choices[0].message.parsed, Egg)
                return "parsed"

            return await asyncio.gather(*map(whole, range(8)), *map(streamed, range(8)), parsed())

    said = asyncio.run(work())
    assert said[:8] == said[8:16] and len(set(said[:8])) == 8
    alone = client.chat.completions.create(model="tiny", messages=QUESTION, seed=7, max_tokens=12, logit_bias=BIAS)
    assert alone.choices[0].message.content == said[7]


def test_a_task_that_is_cancelled_ends_its_request(server: Running) -> None:
    async def work() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            task = asyncio.create_task(
                client.completions.create(
                    model="tiny", prompt="x", max_tokens=60_000, n=2, extra_body={"ignore_eos": True}
                )
            )
            while not await asyncio.to_thread(server.metric, "bdh_engine_running"):
                assert not task.done()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(work())
    server.wait_until_idle()


# ------------------------------------------------------------------------------------------------------------- mistakes

PICTURE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://dragon.example/egg.png"}}]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}
NO_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "dragon"}}}

MISTAKES: list[tuple[Dialect, dict[str, Any], str]] = [
    ("completions", {"prompt": ""}, "prompt"),
    ("completions", {"prompt": []}, "prompt"),
    ("completions", {"prompt": [1, "a"]}, "prompt"),
    ("completions", {"prompt": [262]}, "prompt"),
    ("completions", {"suffix": "the end"}, "suffix"),
    ("completions", {"max_tokens": 0}, "max_tokens"),
    ("completions", {"max_tokens": 10**6}, "max_tokens"),
    ("completions", {"best_of": 1, "n": 2}, "best_of"),
    ("completions", {"best_of": 3, "stream": True}, "best_of"),
    ("completions", {"n": 1000}, "n"),
    ("completions", {"logit_bias": {"262": 1}}, "logit_bias"),
    ("completions", {"logit_bias": {"1": 101}}, "logit_bias.1"),
    ("completions", {"stop": [""]}, "stop"),
    ("completions", {"stop": ["a"] * 5}, "stop"),
    ("completions", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("completions", {"extra_body": {"min_tokens": 20}}, "min_tokens"),
    ("completions", {"extra_body": {"colour": "red"}}, "colour"),
    ("completions", {"extra_body": {"regex": "("}}, "regex"),
    ("chat", {"messages": []}, "messages"),
    ("chat", {"messages": [{"role": "dragon", "content": "x"}]}, "messages.0"),
    ("chat", {"messages": [{"role": "user"}]}, "messages.0.content"),
    ("chat", {"messages": [*QUESTION, PICTURE]}, "messages.1.content.0"),
    ("chat", {"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0"),
    ("chat", {"tools": [TOOL]}, "tools"),
    ("chat", {"modalities": ["text", "audio"]}, "modalities"),
    ("chat", {"temperature": 2.5}, "temperature"),
    ("chat", {"temperature": "warm"}, "temperature"),
    ("chat", {"top_logprobs": 2}, "top_logprobs"),
    ("chat", {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ("chat", {"response_format": {"type": "xml"}}, "response_format"),
    ("chat", {"response_format": NO_SCHEMA}, "response_format"),
    ("chat", {"moderation": {}}, "moderation"),
]


@pytest.mark.parametrize(("dialect", "fields", "param"), MISTAKES)
def test_mistakes(client: OpenAI, dialect: Dialect, fields: dict[str, Any], param: str) -> None:
    usual: dict[str, Any] = {"prompt": "x"} if dialect == "completions" else {"messages": QUESTION}
    create: Any = client.completions.create if dialect == "completions" else client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as raised:
        create(model="tiny", **{"max_tokens": 4, **usual, **fields})
    error = raised.value
    assert error.param == param and error.type == "invalid_request_error"
    said = error.body["message"]  # type: ignore[index]
    assert "\n" not in said and len(said) < 400 and param.split(".")[0] in said


def test_other_errors(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'huge'"):
        client.chat.completions.create(model="huge", messages=QUESTION)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="x")
    with pytest.raises(openai.APIStatusError) as raised:
        client.models.delete("tiny")
    assert raised.value.status_code == 405


def test_keys_and_limits(export: Path, tmp_path: Path) -> None:
    limits = ("--serve.limits.requests_per_minute", 3)
    with running(tmp_path, "--model", f"tiny={export}", *limits, BDH_API_KEYS=SECRET) as server:
        url = f"{server.url}/v1"
        with pytest.raises(openai.AuthenticationError) as wrong:
            OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
        assert wrong.value.code == "invalid_api_key"
        client = OpenAI(base_url=url, api_key=SECRET, max_retries=0)
        for _ in range(3):
            assert complete(client).choices
        with pytest.raises(openai.RateLimitError) as refused:
            complete(client)
        assert refused.value.code == "rate_limit_exceeded" and int(refused.value.response.headers["retry-after"]) >= 1
        assert httpx.get(f"{server.url}/health/ready").status_code == 200
