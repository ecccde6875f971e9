"""Conversations as text: what a template writes around an answer, and what follows one."""

import pytest

from bdh.data.chat_format import AnswerEnd, ChatFormat
from bdh.data.tokenizer import byte_tokenizer
from bdh.errors import BDHError
from tests.inference.small import BYTES, CHAT

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Ho \n"}]
NEXT = {"role": "user", "content": "And?"}
HEADINGS = """
{%- for m in messages %}### {{ m.role }}:
{{ m.content | trim }}
{% endfor %}{% if add_generation_prompt %}### assistant:
{% endif %}"""
INSTRUCTIONS = """
{%- for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]
{%- else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"""


def format_with(template: str) -> ChatFormat:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.chat_template = template
    return ChatFormat(tokenizer)


def test_without_a_template_it_is_a_transcript() -> None:
    plain = ChatFormat(BYTES)
    assert plain.render([{"role": "system", "content": "Be kind."}, *MESSAGES, NEXT]) == (
        "Be kind.\n\nUser: Hi\nAssistant:  Ho \n\nUser: And?\nAssistant:"
    )
    assert plain.following(MESSAGES, NEXT) == "\nUser: And?\nAssistant:"
    assert plain.answer_end == AnswerEnd((), ("\nUser:",), " ")


def test_turns_between_special_tokens() -> None:
    chat = ChatFormat(CHAT)
    assert chat.following(MESSAGES, NEXT) == "<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    assert chat.answer_end == AnswerEnd((CHAT.convert_tokens_to_ids("<|im_end|>"),), (), "")


def test_turns_under_headings_end_at_the_next_one() -> None:
    headings = format_with(HEADINGS)
    assert headings.answer_end == AnswerEnd((), ("\n### user:",), "")
    assert headings.following(MESSAGES, NEXT) == "\n### user:\nAnd?\n### assistant:\n"  # though it trims what was said


def test_turns_that_the_end_token_ends() -> None:
    instructions = format_with(INSTRUCTIONS)
    assert instructions.answer_end == AnswerEnd((256,), (), " ")
    assert instructions.following(MESSAGES, NEXT) == " </s>[INST] And? [/INST]"


def test_every_end_of_a_turn_is_found() -> None:
    assert ChatFormat(CHAT).end_token_ids == (CHAT.convert_tokens_to_ids("<|im_end|>"),)
    assert format_with(HEADINGS).end_token_ids == () and ChatFormat(BYTES).end_token_ids == ()
    assert format_with("{{ raise_exception('no') }}").end_token_ids == ()


def test_the_last_turn_and_other_templates_may_end_differently() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>", "extra_special_tokens": ["<end>", "<call>"]})
    turns = "{% for m in messages %}{{ m.role ~ ' ' ~ m.content }}{{ '</s>' if loop.last else '<end>' }}{% endfor %}"
    calls = "{% for m in messages %}{{ m.content }}<call>{% endfor %}"
    tokenizer.chat_template = {"default": turns, "tool_use": calls}
    chat = ChatFormat(tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["<end>", "</s>", "<call>"])
    assert chat.answer_end.token_ids == (ids[0],) and chat.end_token_ids == tuple(ids)


@pytest.mark.parametrize("template", ["{{ messages | length }}{{ messages[0].content }}", "{{ messages[-1].content }}"])
def test_a_template_that_does_not_go_on(template: str) -> None:
    other = format_with(template)
    assert other.following(MESSAGES, NEXT) is None


def test_a_template_for_something_else_ends_no_answer_of_its_own() -> None:
    broken = format_with("{{ raise_exception('no') }}")
    assert broken.answer_end == AnswerEnd((), (), "")
    with pytest.raises(BDHError, match="the chat template does not take these messages: no"):
        broken.render(MESSAGES)
