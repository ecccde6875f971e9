"""Renders conversations as text by the tokenizer's chat template, or as a plain transcript if it has none."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerFast

from bdh.errors import BDHError, one_line

Message = Mapping[str, str]  # {"role": "user", "content": "Hello"}
Renderer = Callable[[Sequence[Message], bool], str]  # messages, and whether the next answer is to begin at the end

# For tokenizers without a template, as text in books looks:
#
#     What the system message says.
#
#     User: Hello
#     Assistant: Good morning.
#     User: And now?
#     Assistant:
PLAIN_TEMPLATE = r"""
{%- for message in messages %}
    {%- if not loop.first %}{{ '\n' }}{% endif %}
    {%- if message['role'] == 'system' %}
        {{- message['content'] ~ '\n' }}
    {%- else %}
        {{- message['role'] | capitalize ~ ': ' ~ message['content'] }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\nAssistant:' }}
{%- endif %}
""".strip()

ANSWER, QUESTION = "\ue000answer\ue000", "\ue000question\ue000"  # stand for contents; private characters, in no text
FIRST_STAND_IN = 0x10F000  # private characters, one for each special token


@dataclass(frozen=True)
class AnswerEnd:
    """The end and the beginning of answers in a chat template.

    Attributes:
        token_ids: Special tokens that come after an answer.
        stop: Text that comes after an answer, if no special token does: a new turn.
        lead: White space that comes before an answer, and is no part of it.
    """

    token_ids: tuple[int, ...]
    stop: tuple[str, ...]
    lead: str


class ChatFormat:
    """Conversations in the form of one tokenizer.

    Args:
        tokenizer: Its chat template is used.
        renderer: Renders that template, say in another process; None renders it here. May raise any exception.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, renderer: Renderer | None = None):
        self.tokenizer = tokenizer
        self.renderer = renderer or self._render_here

    @property
    def template(self) -> str | dict[str, str]:
        """The template that renders conversations; of several, the named one."""
        return self.tokenizer.chat_template or PLAIN_TEMPLATE

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation, up to where the assistant is to answer.

        Raises:
            BDHError: A message is not one, or the template does not take these.
        """
        check_messages(messages)
        return self._render(messages, True)

    def whole(self, messages: Sequence[Message]) -> str:
        """The text of a conversation as far as it went. Raises BDHError as `render`."""
        check_messages(messages)
        return self._render(messages, False)

    def following(self, said: Sequence[Message], message: Message) -> str | None:
        """The text after the last answer of a conversation: its end, a new message, the beginning of the next answer.

        None where the template does not simply go on: where the text before the last answer would be another now.

        Raises:
            BDHError: As for `render`.
        """
        check_messages([*said, message])
        before = self._render(said[:-1], True)
        answer = {**said[-1], "content": ANSWER}  # what it says does not matter: it was read as it was written
        head, mark, tail = self._render([*said[:-1], answer, message], True).partition(ANSWER)
        goes_on = head.startswith(before) and not head[len(before) :].strip()
        return tail if mark and goes_on else None

    @cached_property
    def answer_end(self) -> AnswerEnd:
        """Finds the text around answers by rendering the template with one."""
        question = {"role": "user", "content": QUESTION}
        try:
            before = self._render([question], True)
            whole = self._render([question, {"role": "assistant", "content": ANSWER}, question], False)
        except BDHError:  # a template for something else: an end token is all that ends an answer
            return AnswerEnd((), (), "")
        head, _, tail = whole.partition(ANSWER)
        lead = head[len(before) :] if head.startswith(before) else ""
        between = tail.partition(QUESTION)[0].rstrip()
        if special := self._special_tokens(between):
            return AnswerEnd((special[0],), (), lead)
        return AnswerEnd((), (between,) if between else (), lead)

    @cached_property
    def end_token_ids(self) -> tuple[int, ...]:
        """Special tokens that end an answer: before another turn or as the last turn, in any template of the tokenizer.

        `answer_end` names the one of the default template between turns, which is the first of these. A renderer that
        is given renders the default template only, so that of the others nothing is known then.
        """
        question, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
        names = [] if isinstance(self.template, str) else list(self.template)
        ends = list(self.answer_end.token_ids)
        for name in [None, *names] if self.renderer == self._render_here else [None]:
            for messages in ([question, answer, question], [question, answer]):
                try:
                    whole = self._render(messages, False, name)
                except BDHError:  # as above
                    continue
                ends += self._special_tokens(whole.partition(ANSWER)[2].partition(QUESTION)[0])[:1]
        return tuple(dict.fromkeys(ends))

    def _special_tokens(self, text: str) -> list[int]:
        """The special tokens of a text, in order."""
        special = special_ids(self.tokenizer)
        return [token for token in self.tokenizer(text, add_special_tokens=False).input_ids if token in special]

    def _render(self, messages: Sequence[Message], answer_next: bool, name: str | None = None) -> str:
        """The text of messages in the default template, or here in the one of a name. Raises BDHError."""
        try:
            return (
                self.renderer(messages, answer_next) if name is None else self._render_here(messages, answer_next, name)
            )
        except Exception as error:  # a template is a program: it may raise any
            raise BDHError(f"the chat template does not take these messages: {one_line(error)}") from error

    def _render_here(self, messages: Sequence[Message], answer_next: bool, name: str | None = None) -> str:
        """The text of messages; `name` chooses among the templates of a tokenizer that has several."""
        text = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=self.template if isinstance(self.template, str) else name,  # None: the one named "default"
            add_generation_prompt=answer_next,
            tokenize=False,
        )
        return str(text)


class SpelledTokens:
    """Tells special tokens that a chat template writes from those that a message only spells, which are text.

    Before the template is rendered, each special token that a message spells is replaced by a stand-in, a character
    that occurs in no text. The rendered text is then tokenized in parts.

    Attributes:
        stand_ins: The stand-in of each special token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        special = tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
        self.stand_ins = {token: chr(FIRST_STAND_IN + i) for i, token in enumerate(special)}

    def hide(self, messages: Sequence[Message]) -> tuple[list[dict[str, str]], dict[str, str]]:
        """The messages, which have been checked, with stand-ins; and the special token of each stand-in in them."""
        hidden = [dict(message) for message in messages]
        found: dict[str, str] = {}
        for message in hidden:
            for token, stand_in in self.stand_ins.items():
                if token in message["content"]:
                    found[stand_in] = token
                    message["content"] = message["content"].replace(token, stand_in)
        return hidden, found


def restore(text: str, found: Mapping[str, str]) -> str:
    """A text as it is without stand-ins."""
    for stand_in, token in found.items():
        text = text.replace(stand_in, token)
    return text


def split_at_stand_ins(text: str, found: Mapping[str, str]) -> Iterator[tuple[str, bool]]:
    """The parts of a text, and whether each is the spelling of a special token."""
    for part in re.split(f"([{''.join(found)}])", text) if found else [text]:
        if part:
            yield found.get(part, part), part in found


def special_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """The ids of tokens that are no text."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(token for token, what in added if what.special)}


def check_messages(messages: Sequence[Message]) -> None:
    """Raises BDHError unless these are messages, each with a role and a content."""
    if not messages:
        raise BDHError("there are no messages; give at least one")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise BDHError(f"messages[{number}] is no message; give a role and a content, both text")
