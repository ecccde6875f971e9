"""The official Python client against a real server: models, completions and chats."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams

from bdh.serving.api.request_schemas import ChatRequest, CompletionRequest
from tests.serving.official import BIAS, QUESTION, Egg, assert_alike, complete, texts
from tests.serving.running import Running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


# ------------------------------------------------------------------------------------------------------------- models


def test_models(client: OpenAI) -> None:
    (listed,) = client.models.list()
    assert listed.id == "tiny" and listed.object == "model" and listed.created > 1.7e9 and listed.owned_by == "bdh"
    assert client.models.retrieve("tiny") == listed
    assert client.models.retrieve("tiny").to_dict()["bdh"]["n_neurons"] == 128  # type: ignore[index]
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("huge")
    assert raised.value.code == "model_not_found" and raised.value.param == "model"


# -------------------------------------------------------------------------------------------------------- completions


def test_completion(client: OpenAI) -> None:
    answer = complete(client, user="somebody", seed=6)  # with which no end token is written
    assert answer.object == "text_completion" and answer.model == "tiny" and answer.id.startswith("cmpl-")
    assert (answer._request_id or "").startswith("req_") and answer.system_fingerprint
    (choice,) = answer.choices
    assert choice.finish_reason == "length" and choice.logprobs is None
    usage = answer.usage
    assert usage is not None and usage.prompt_tokens == len("The dragon") and usage.completion_tokens == 8
    assert usage.total_tokens == 18


def test_prompts(client: OpenAI) -> None:
    """Text, texts, tokens and lists of them say the same."""
    one, two = (texts(complete(client, prompt))[0] for prompt in ("One", "Two"))
    ids = [list(word.encode()) for word in ("One", "Two")]
    assert texts(complete(client, ["One", "Two"])) == texts(complete(client, ids)) == [one, two]
    assert texts(complete(client, ids[1])) == [two]


def test_seeds(client: OpenAI) -> None:
    again = [texts(complete(client, seed=9)) for _ in range(2)]
    assert again[0] == again[1] != texts(complete(client, seed=10))
    assert texts(complete(client, seed=-1)) == texts(complete(client, seed=-1))
    cold = {texts(complete(client, seed=seed, temperature=0))[0] for seed in range(3)}
    assert len(cold) == 1
    assert texts(complete(client, top_p=0)) == list(cold)


def test_several(client: OpenAI) -> None:
    answer = complete(client, ["One", "Two"], n=2)
    assert len(set(texts(answer))) == 4
    best = complete(client, n=2, best_of=5, logprobs=0, seed=6)
    assert best.usage is not None and best.usage.completion_tokens == 5 * 8
    sums = [sum(choice["logprobs"]["token_logprobs"]) for choice in best.to_dict()["choices"]]  # type: ignore[attr-defined]
    assert sums == sorted(sums, reverse=True) and len(sums) == 2


def test_biases_and_penalties(client: OpenAI) -> None:
    assert texts(complete(client, logit_bias={"65": 100})) == ["AAAAAAAA"]
    few = {str(token): 90 for token in b"abcdefgh"}
    (text,) = texts(complete(client, logit_bias=few, temperature=0, frequency_penalty=2, presence_penalty=2))
    (plain,) = texts(complete(client, logit_bias=few, temperature=0))
    assert len(set(text)) > len(set(plain))


def test_stop(client: OpenAI) -> None:
    (whole,) = texts(complete(client, logit_bias=BIAS, max_tokens=30))
    answer = complete(client, logit_bias=BIAS, max_tokens=30, stop=["?", whole[7:9], "!", whole[20:23]])
    (choice,) = answer.choices
    assert choice.text == whole[: whole.index(whole[7:9])] and choice.finish_reason == "stop"
    assert texts(complete(client, logit_bias=BIAS, max_tokens=30, stop=whole[9])) == [whole[: whole.index(whole[9])]]
    forced = complete(client, logit_bias={"255": 100}).choices[0]  # its end token
    assert forced.text == "" and forced.finish_reason == "stop"


@pytest.mark.parametrize("count", range(6))
def test_completion_logprobs(client: OpenAI, count: int) -> None:
    answer = complete(client, logit_bias=BIAS, logprobs=count)
    (choice,) = answer.choices
    told = choice.logprobs
    assert told is not None and "".join(told.tokens or []) == choice.text
    assert told.text_offset == list(range(8)) and len(told.token_logprobs or []) == 8
    assert all(value < 0 for value in told.token_logprobs or [])
    if count == 0:
        assert told.top_logprobs is None
    else:
        taken = zip(told.top_logprobs or [], told.tokens or [], told.token_logprobs or [], strict=True)
        for top, token, logprob in taken:
            assert top[token] == logprob and count <= len(top) <= count + 1


def test_scoring(client: OpenAI) -> None:
    """As evaluation harnesses do it: the log-probabilities of a text, with or without one token after it."""
    prompts = [list(b"The dragon hatched"), list(b"A text")]
    scored = complete(client, prompts, max_tokens=0, echo=True, logprobs=1, temperature=0)
    assert texts(scored) == ["The dragon hatched", "A text"]
    assert scored.usage is not None and scored.usage.completion_tokens == 0 and scored.usage.prompt_tokens == 24
    for bias in ({}, {"255": 100}, {"257": 100}, BIAS):  # any token, the end token, one without text, a letter
        more = complete(client, prompts, max_tokens=1, echo=True, logprobs=1, temperature=0, logit_bias=bias)
        for prompt, choice, one_more in zip(prompts, scored.choices, more.choices, strict=True):
            told, other = choice.logprobs, one_more.logprobs
            assert told is not None and other is not None and told.token_logprobs and other.token_logprobs
            assert len(told.token_logprobs) == len(prompt) and told.token_logprobs[0] is None
            assert_alike(other.token_logprobs[:-1], told.token_logprobs)
            assert_alike((other.top_logprobs or [])[:-1], told.top_logprobs)
            assert told.text_offset == list(range(len(prompt)))


def test_scores_are_what_writing_tells(client: OpenAI) -> None:
    written = complete(client, "One ", max_tokens=12, logprobs=2, logit_bias=BIAS)
    text = "One " + texts(written)[0]
    scored = complete(client, text, max_tokens=0, echo=True, logprobs=2)
    told, again = written.choices[0].logprobs, scored.choices[0].logprobs
    assert told is not None and again is not None
    assert (again.token_logprobs or [])[4:] == pytest.approx(told.token_logprobs, abs=1e-4)
    echoed = complete(client, "One ", max_tokens=12, logprobs=2, logit_bias=BIAS, echo=True)
    assert texts(echoed) == [text] and echoed.choices[0].logprobs is not None
    assert echoed.choices[0].logprobs.text_offset == list(range(16))


def test_offsets_of_what_is_echoed(client: OpenAI) -> None:
    """They count characters of the text that is echoed, names of special tokens and halves of characters among them."""
    prompt = [257, *"a€".encode(), 258, ord("b")]
    choice = complete(client, prompt, max_tokens=3, echo=True, logprobs=1, logit_bias=BIAS).choices[0]
    told = choice.logprobs
    assert told is not None and told.tokens is not None and told.text_offset is not None
    assert choice.text.startswith("<|pad|>a€<|unk|>b") and len(told.tokens) == 10
    for token, start in zip(told.tokens, told.text_offset, strict=True):
        assert token.startswith("bytes:") or choice.text[start:].startswith(token)
    assert told.text_offset[2:5] == [8, 8, 8]
    broken = complete(client, [97, 226, 34, 98], max_tokens=0, echo=True, logprobs=0).choices[0]  # half a character
    assert broken.text == 'a\ufffd"b' and broken.logprobs is not None and broken.logprobs.text_offset == [0, 1, 2, 3]


# --------------------------------------------------------------------------------------------------------------- chat


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "developer", "content": "Be short."},
            {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}], "name": "ann"},
            {"role": "assistant", "content": "Hello, Ann."},
            {"role": "user", "content": "And now?"},
        ],
        n=3,
        seed=2,
        max_completion_tokens=6,
        metadata={"task": "test"},
        store=False,
    )
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    for choice in answer.choices:
        assert choice.message.role == "assistant" and choice.message.refusal is None and choice.logprobs is None
        assert choice.finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 18


def test_instructions_of_developers_and_systems_are_the_same(client: OpenAI) -> None:
    said = []
    for content in ("Be kind.", [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]):
        for role in ("system", "developer"):
            messages: list[Any] = [{"role": role, "content": content}, *QUESTION]
            answer = client.chat.completions.create(model="tiny", messages=messages, seed=3, max_tokens=6)
            said.append(answer.choices[0].message.content)
    assert len(set(said)) == 1


def test_a_conversation_goes_on(client: OpenAI) -> None:
    """Answers go back as they came, also parsed ones."""
    messages = [*QUESTION]
    for _ in range(2):
        plain = client.chat.completions.create(model="tiny", messages=messages, seed=3, max_tokens=6)
        messages += [plain.choices[0].message, *QUESTION]
        parsed = client.chat.completions.parse(model="tiny", messages=messages, response_format=Egg, max_tokens=300)
        messages += [parsed.choices[0].message, *QUESTION]
    assert len(messages) == 9


def test_chat_stop_and_end(client: OpenAI) -> None:
    def ask(**more: Any) -> Any:
        return client.chat.completions.create(
            model="tiny", messages=QUESTION, seed=3, **{"max_tokens": 30, "logit_bias": BIAS, **more}
        ).choices[0]

    whole = ask().message.content
    cut = ask(stop=[whole[5:7], "?"])
    assert cut.message.content == whole[: whole.index(whole[5:7])] and cut.finish_reason == "stop"
    ended = ask(logit_bias={"260": 100}, logprobs=True)
    assert ended.message.content == "" and ended.finish_reason == "stop" and ended.logprobs.content == []


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_chat_logprobs(client: OpenAI, count: int) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=QUESTION, seed=3, max_tokens=12, logprobs=True, top_logprobs=count
    )
    (choice,) = answer.choices
    assert choice.logprobs is not None and choice.logprobs.content is not None and choice.logprobs.refusal is None
    read = b"".join(bytes(one.bytes or []) for one in choice.logprobs.content)
    assert read.decode("utf-8", "replace").lstrip() == choice.message.content
    for one in choice.logprobs.content:
        top = [other.logprob for other in one.top_logprobs]
        assert len(top) == count and top == sorted(top, reverse=True) and one.logprob <= max(top, default=0)


def test_json(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=QUESTION,
        response_format={"type": "json_object"},
        logit_bias={str(ord("}")): 100},
        max_tokens=50,
    )
    assert json.loads(answer.choices[0].message.content or "") == {} and answer.choices[0].finish_reason == "stop"
    schema = {"type": "object", "properties": {"red": {"type": "boolean"}}, "required": ["red"]}
    shape: Any = {"type": "json_schema", "json_schema": {"name": "egg", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(
        model="tiny", messages=QUESTION, response_format=shape, max_tokens=200, logit_bias={str(ord("}")): 100}
    )
    assert set(json.loads(answer.choices[0].message.content or "")) == {"red"}


def test_parse(client: OpenAI) -> None:
    for seed in range(3):
        answer = client.chat.completions.parse(
            model="tiny", messages=QUESTION, response_format=Egg, seed=seed, max_tokens=300
        )
        egg = answer.choices[0].message.parsed
        assert isinstance(egg, Egg) and Egg.model_validate_json(answer.choices[0].message.content or "") == egg
        assert answer.choices[0].finish_reason == "stop"
    beta = client.beta.chat.completions.parse(model="tiny", messages=QUESTION, response_format=Egg, max_tokens=300)
    assert isinstance(beta.choices[0].message.parsed, Egg)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="tiny", messages=QUESTION, response_format=Egg, max_tokens=3)


def test_cached_tokens(client: OpenAI) -> None:
    """What a prompt has in common with earlier ones is not read again, in multiples of 64 tokens."""
    manual = "A dragon that hatches looks around, and remembers what it sees. " * 10  # 640 tokens
    for ask in (
        lambda number: complete(client, f"{manual}Question {number}?"),
        lambda number: client.chat.completions.create(
            model="tiny",
            messages=[{"role": "system", "content": manual[::-1]}, {"role": "user", "content": f"{number}?"}],
            max_tokens=4,
        ),
    ):
        cached = []
        for number in range(4):
            usage = ask(number).usage  # type: ignore[no-untyped-call]
            assert usage is not None and usage.prompt_tokens_details is not None and usage.prompt_tokens > 640
            cached.append(usage.prompt_tokens_details.cached_tokens or 0)
        assert cached[0] == 0 and cached[-1] >= 640 and cached[-1] % 64 == 0


def test_every_field_of_the_client_is_known() -> None:
    assert set(CompletionParams.__annotations__) <= set(CompletionRequest.model_fields)
    assert set(ChatParams.__annotations__) - set(ChatRequest.model_fields) == {"moderation"}
