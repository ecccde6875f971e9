"""A chat template in a process of its own: within limits on time, memory and output, whatever the template does."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bdh.data.chat_format import ChatFormat
from bdh.data.template_process import TemplateProcess
from bdh.data.tokenizer import byte_tokenizer
from bdh.errors import BDHError
from tests.inference.small import CHAT

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Ho \n"}]
HOSTILE = """
{%- set what = messages[0].content %}
{%- if what == 'loop' %}
    {%- for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}
{%- elif what == 'number' %}{{ ((messages | length + 9) ** (10 ** 8)) % 7 }}
{%- elif what == 'memory' %}{{ ('x' * 10 ** 10) | length }}
{%- elif what == 'text' %}{{ 'x' * 10 ** 7 }}
{%- elif what == 'division' %}{{ 1 / 0 }}
{%- elif what == 'recursion' %}{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}
{%- elif what == 'escape' %}{{ ''.__class__.__mro__ }}
{%- else %}{{ what }}{% endif %}"""


@pytest.fixture(scope="module")
def hostile() -> Iterator[TemplateProcess]:
    process = TemplateProcess(HOSTILE, {}, cpu_seconds=0.5)
    yield process
    process.close()


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_it_renders_what_the_tokenizer_renders() -> None:
    process = TemplateProcess(CHAT.get_chat_template(), CHAT.special_tokens_map)
    here, there = ChatFormat(CHAT), ChatFormat(CHAT, process)
    try:
        odd = user("\ud800 é \x00 \n")
        assert there.render(odd) == here.render(odd)
        assert there.whole(MESSAGES) == here.whole(MESSAGES)
        assert there.following(MESSAGES, MESSAGES[0]) == here.following(MESSAGES, MESSAGES[0])
        assert there.answer_end == here.answer_end
    finally:
        process.close()
    with pytest.raises(BDHError, match="closed"):
        process(MESSAGES, True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loop", "takes more than 0.5 seconds"),
        ("number", "takes more than 0.5 seconds"),  # one call of C code, which nothing in the same process ends
        ("memory", "too much memory"),
        ("text", "its text has 10000000 characters"),
        ("division", "division by zero"),
        ("recursion", "recursion"),
        ("escape", "unsafe"),
    ],
)
def test_whatever_it_does_is_refused_and_the_next_one_is_rendered(
    hostile: TemplateProcess, text: str, expected: str
) -> None:
    with pytest.raises(BDHError, match=f"the chat template does not take these messages: .*{expected}"):
        ChatFormat(byte_tokenizer(), hostile).render(user(text))
    assert hostile(user("hello"), True) == "hello"


def test_it_does_not_see_the_keys_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDH_API_KEYS", "web:secret")
    process = TemplateProcess("{{ messages[0].content }}", {})
    try:
        assert process(user("a"), True) == "a"
        assert b"BDH_API_KEYS" not in Path(f"/proc/{process._process.pid}/environ").read_bytes()
    finally:
        process.close()


def test_it_is_ended_while_it_renders() -> None:
    process = TemplateProcess(HOSTILE, {}, cpu_seconds=60)
    errors: list[BDHError] = []

    def render() -> None:
        try:
            process(user("loop"), True)
        except BDHError as error:
            errors.append(error)

    thread = threading.Thread(target=render)
    thread.start()
    time.sleep(0.2)
    process.close()
    thread.join(30)
    assert not thread.is_alive() and len(errors) == 1 and process._process.poll() is not None


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{% for", "{{ messages[0].content + 1 }}", "{{ 10 ** 10 ** 'a' }}"]
)
def test_a_broken_template_here_is_a_users_error_too(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(BDHError, match="the chat template does not take these messages"):
        ChatFormat(tokenizer).render(MESSAGES)
