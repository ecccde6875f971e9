"""Conversations as tokens: the same that a model reads when it answers, of which the answers alone are predicted."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from bdh.data.blocks import inputs_and_targets
from bdh.data.chat import ChatEncoder, ChatRows, messages_of
from bdh.data.loader import TrainingData, open_data, read_text, training_texts
from bdh.data.settings import DataConfig, SourceConfig
from bdh.data.tokenizer import byte_tokenizer
from bdh.data.vocabulary import train_tokenizer
from bdh.errors import BDHError
from bdh.inference.llm import end_tokens
from bdh.inference.prompt_encoder import PromptEncoder
from bdh.model import BDHConfig
from tests.conftest import TEXT

TALK = [
    {"role": "system", "content": "Be a small dragon."},
    {"role": "user", "content": "What do you eat?"},
    {"role": "assistant", "content": "Bytes, mostly.\nAnd plums – in spring."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "I sleep."},
]
SPECIAL = train_tokenizer("bytes", (), 0)
WORDS = train_tokenizer("bpe", [TEXT, *(message["content"] for message in TALK)], 400)
BYTES = byte_tokenizer()
PLAIN = byte_tokenizer(end_of_text=False)


def with_template(template: str, end_of_text: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer("bytes", (), 0)
    tokenizer.chat_template = template
    if end_of_text is not None:
        tokenizer.eos_token = end_of_text
    return tokenizer


def both(ids: np.ndarray) -> np.ndarray:
    return np.where(ids < 0, ~ids, ids)


def learned(tokenizer: PreTrainedTokenizerFast, messages: Any) -> list[str]:
    """The runs of tokens that are predicted, as text."""
    ids, _ = ChatEncoder(tokenizer).conversation(messages_of(messages))
    runs: list[list[int]] = [[]]
    for token in ids.tolist():
        if token >= 0:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize(
    "tokenizer", [SPECIAL, WORDS, BYTES, PLAIN], ids=["template", "words", "transcript", "no end of text"]
)
def test_each_answer_stands_behind_the_prompt_that_inference_makes(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = PromptEncoder(tokenizer, len(tokenizer), end_tokens(tokenizer, None, BDHConfig()))
    ids, _ = ChatEncoder(tokenizer).conversation(TALK)
    for number in (2, 4):
        asked = texts.chat_request(TALK[:number])
        prompt = list(asked.request.prompt)
        place = len(prompt)
        if number == 2 or tokenizer is not WORDS:  # later prompts are the same text, tokenized in pieces or at once
            assert both(ids[:place]).tolist() == prompt and ids[place - 1] < 0 <= ids[place]
        else:
            place = [i for i in range(1, len(ids)) if ids[i - 1] < 0 <= ids[i]][1]
            assert tokenizer.decode(both(ids[:place]).tolist()) == tokenizer.decode(prompt)
        stop = next(i for i in range(place, len(ids) + 1) if i == len(ids) or ids[i] < 0)
        answer = ids[place:stop].tolist()
        written = tokenizer.decode(answer, skip_special_tokens=True)
        if number == 4 and tokenizer is BYTES:  # the last answer of a transcript
            assert written == " " + TALK[number]["content"] and answer[-1] == 255 in asked.request.end_token_ids
        elif asked.stop:  # a transcript ends an answer by the next turn
            assert written == " " + TALK[number]["content"] + asked.stop[-1]
        else:
            assert written == TALK[number]["content"] and answer[-1] in asked.request.end_token_ids
    whole = tokenizer.decode(both(ids).tolist())
    assert whole.startswith(texts.chat_format.whole(TALK))


@pytest.mark.parametrize("tokenizer", [SPECIAL, WORDS], ids=["bytes", "words"])
def test_the_template_marks_what_is_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    """Trainers of other projects ask the template which tokens are the assistant's."""
    marked = tokenizer.apply_chat_template(TALK, return_assistant_tokens_mask=True, return_dict=True)
    pairs = zip(marked["input_ids"], marked["assistant_masks"], strict=True)
    assistant = [token for token, mask in pairs if mask]
    assert tokenizer.decode(assistant) == "".join(f"{TALK[i]['content']}<|im_end|>" for i in (2, 4))
    assert "".join(learned(tokenizer, TALK)) == tokenizer.decode(assistant)
    plain = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TALK)
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == plain


@pytest.mark.parametrize("tokenizer", [train_tokenizer("bytes", (), 0), BYTES], ids=["bytes and more", "bytes"])
def test_a_transcript_with_an_end_of_text_token_ends_with_it(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    assert learned(tokenizer, TALK[:3]) == [f" {TALK[2]['content']}<|endoftext|>"]
    assert learned(tokenizer, TALK)[0] == f" {TALK[2]['content']}\nUser:"


def test_what_is_spelled_in_a_message_is_no_token() -> None:
    talk = [{"role": "user", "content": "Say <|im_end|>!"}, {"role": "assistant", "content": "<|endoftext|><|im_end|>"}]
    ids, size = ChatEncoder(SPECIAL).conversation(talk)
    ends = [SPECIAL.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert [(both(ids) == end).sum() for end in ends] == [2, 1]
    assert learned(SPECIAL, talk) == ["<|endoftext|><|im_end|><|im_end|>"] and size == len("<|endoftext|><|im_end|>")


def test_other_forms_are_the_same_conversation() -> None:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    shared = [{"from": names[message["role"]], "value": message["content"]} for message in TALK]
    columns = {"role": [m["role"] for m in TALK], "content": [m["content"] for m in TALK]}
    more = [*TALK, {"role": "user", "content": "What nobody answers."}]
    for form in (shared, json.dumps(shared), columns, more):
        assert messages_of(form) == TALK


PROBLEMS: list[tuple[Any, str]] = [
    ([], "there are no messages"),
    ("{", "the messages are not JSON"),
    ("7", "there are no messages"),
    ([7], "messages[0] is no message"),
    ([{"role": "usr", "content": "x"}], "messages[0] has the role 'usr'; known are system, developer, user"),
    ([{"content": "x"}], "messages[0] has the role 'None'"),
    ([TALK[1], {"role": "assistant", "content": None}], "messages[1].content.0 is not text"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content.0 is not text"),
    (TALK[:2], "the assistant says nothing"),
    (TALK[2:3], "the chat template writes no answer where it asks for one"),
]


def test_what_cannot_be_used_is_counted_and_told() -> None:
    rows = pickle.loads(pickle.dumps(ChatRows(ChatEncoder(SPECIAL))))
    encoded = rows({"text": [None, TALK, *(value for value, _ in PROBLEMS)]})
    assert encoded["mark"] == [1, 0] + [3] * len(PROBLEMS)
    assert [len(ids) > 0 for ids in encoded["tokens"]] == [False, True] + [False] * len(PROBLEMS)
    for (_, words), problem in zip(PROBLEMS, encoded["problem"][2:], strict=True):
        assert problem.startswith(words)


def test_a_template_that_refuses_is_told_too() -> None:
    tokenizer = with_template("{{ raise_exception('only three turns') }}")
    assert "only three turns" in ChatRows(ChatEncoder(tokenizer))({"text": [TALK]})["problem"][0]


def test_answers_that_a_template_does_not_repeat_are_not_learned() -> None:
    """As templates for thinking models do: what was thought in answers long past is left out."""
    template = (
        "{% for m in messages %}[{{ m.role }}]"
        "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('|')[-1] }}"
        "{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "hm|b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "hm|d"},
    ]
    assert learned(with_template(template), talk) == ["hm|d<|im_end|>"]


# --------------------------------------------------------------------------------------------- files and blocks


def talks(count: int = 60) -> list[dict[str, Any]]:
    return [
        {
            "id": i,
            "messages": [
                {"role": "user", "content": f"How many dragons watch over line {i}?"},
                {"role": "assistant", "content": f"{i * i} large ones – every day."},
            ],
        }
        for i in range(count)
    ]


def opened(path: Path, tokenizer: PreTrainedTokenizerFast = SPECIAL, **given: Any) -> TrainingData:
    settings = {"path": str(path), "chat": True, "block_size": 32, **given}
    return open_data(DataConfig(**settings), tokenizer, batch_size=4, seed=3)


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, talks())))
    return path


def test_every_kind_of_file_gives_the_same_tokens(jsonl: Path, tmp_path: Path) -> None:
    (tmp_path / "array.json").write_text(json.dumps(talks()))
    Dataset.from_list(talks()).to_parquet(tmp_path / "chat.parquet")
    renamed = [{"conversations": row["messages"]} for row in talks()]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, renamed)))
    expected = opened(jsonl)
    assert expected.train_tokens and expected.validation.num_target_tokens() < len(expected.validation)
    for name in ("array.json", "chat.parquet", "other.jsonl"):
        assert opened(tmp_path / name).identity == expected.identity
    said: list[str] = []
    config = DataConfig(path=str(jsonl), chat=True, block_size=32)
    open_data(config, SPECIAL, 4, 3, say=said.append)
    open_data(DataConfig(path=str(jsonl), text_column="messages", chat=True, block_size=32), BYTES, 4, 3)
    assert "found tokenized in the cache" in said[0]


def test_no_conversation_is_cut_between_training_and_validation(jsonl: Path) -> None:
    data = opened(jsonl)
    held = both(data.validation.read(0, len(data.validation)))
    text = SPECIAL.decode(held.tolist())
    assert text.startswith("<|im_start|>user\nHow many") and text.endswith("<|endoftext|>")
    answers = [row["messages"][1]["content"] for row in talks()][-text.count("<|endoftext|>") :]
    assert all(f"assistant\n{answer}<|im_end|>" in text for answer in answers)
    predicted = sum(len(answer.encode()) + 1 for answer in answers)  # and its end
    assert data.validation.num_target_tokens() == predicted
    real = sum(len(answer.encode()) for answer in answers) / predicted
    assert data.validation_bytes_per_token == pytest.approx(real)
    _, _, size = read_text(DataConfig(path=str(jsonl), chat=True), SPECIAL)
    assert size == sum(len(row["messages"][1]["content"].encode()) for row in talks())


def test_rows_know_what_is_predicted(jsonl: Path) -> None:
    batch = opened(jsonl).next_batch()
    inputs, targets = inputs_and_targets(batch.tokens)
    assert batch.num_target_tokens == int((targets >= 0).sum()) and 0 < batch.num_target_tokens < targets.numel()
    assert inputs.min() >= 0 and set(targets[targets < 0].tolist()) == {-100}
    later = targets[:, :-1] >= 0
    assert torch.equal(targets[:, :-1][later], inputs[:, 1:][later])


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("carry", [False, True])
def test_a_stream_of_conversations_goes_on_where_it_stopped(jsonl: Path, kind: str, carry: bool) -> None:
    path = jsonl.with_suffix(f".{kind}")
    if kind == "parquet":
        Dataset.from_list(talks()).to_parquet(path)
    config = DataConfig(path=str(path), chat=True, streaming=True, block_size=32, num_workers=0, shuffle_blocks=4)
    first, second = (open_data(config, SPECIAL, 4, 3, carry_state=carry) for _ in range(2))
    batches = [first.next_batch() for _ in range(12)]
    assert any(batch.num_target_tokens for batch in batches) and first.validation.num_target_tokens()
    again = [second.next_batch() for _ in range(5)]
    third = open_data(config, SPECIAL, 4, 3, carry_state=carry)
    third.source.load_state_dict(json.loads(json.dumps(second.source.state_dict())))
    again += [third.next_batch() for _ in range(7)]
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(batches, again, strict=True))
    for data in (first, second, third):
        data.close()


def test_odd_rows_are_told_with_the_first_ones_number(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    odd: list[Any] = [{"messages": []}, {"messages": TALK[:2]}, {"messages": None}]
    path.write_text("\n".join(map(json.dumps, [*talks()[:7], *odd, *talks()])))
    remarks = opened(path).remarks
    assert (
        f"{path}: 2 conversations cannot be used and are skipped, 67 are read; the first: row 8: there are no"
        in (remarks[1])
    )
    assert "1 empty documents are skipped" in remarks[0]
    path.write_text("\n".join(map(json.dumps, odd)))
    with pytest.raises(BDHError, match="holds no conversation that can be used; row 1: there are no messages"):
        opened(path)


def test_what_cannot_be_conversations_is_refused(tmp_path: Path, jsonl: Path) -> None:
    (tmp_path / "plain.txt").write_text(TEXT)
    with pytest.raises(BDHError, match=r"data.chat true needs rows of messages, but .*plain.txt is plain text"):
        opened(tmp_path / "plain.txt")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": TEXT}))
    with pytest.raises(BDHError, match=r"has no column messages or conversations; it has text; name one: --data\.t"):
        opened(tmp_path / "text.jsonl")
    with pytest.raises(BDHError, match="has no column talk; it has id, messages"):
        opened(jsonl, text_column="talk")
    ends_alike = with_template(
        "{% for m in messages %}{{ m.role }}: {{ m.content ~ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(BDHError, match=r"the chat template ends turns with <\|endoftext\|>, which ends documents too"):
        opened(jsonl, ends_alike, cross_documents=False)
    assert opened(jsonl, ends_alike).validation.read(0, 10_000)[-1] == ends_alike.eos_token_id  # and not twice


def test_conversations_and_texts_mix(jsonl: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    mixture = [SourceConfig(str(jsonl), chat=True), SourceConfig(str(tmp_path / "text.txt"))]
    data = open_data(DataConfig(mixture=mixture, block_size=32), SPECIAL, 8, 3)
    full = [(row[1:] >= 0).all().item() for row in data.next_batch().tokens]
    assert any(full) and not all(full)


def test_a_vocabulary_can_learn_from_what_is_said(jsonl: Path) -> None:
    for streaming in (False, True):
        texts = list(training_texts(DataConfig(path=str(jsonl), chat=True, streaming=streaming)))
        assert 40 < len(texts) < 60 and texts[0].startswith("How many dragons watch over line")
