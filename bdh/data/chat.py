"""Conversations to token ids of which the answers alone are predicted.

What a model reads while it learns is what it will read when it answers: the text is the one that `ChatFormat` makes for
inference, an answer begins where inference asks for one, and its end, which it has to learn as well, is what inference
stops at. Each answer is tokenized by itself, as one that is being written stands behind a prompt that was.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from bdh.data.chat_format import ChatFormat, SpelledTokens, restore, split_at_stand_ins
from bdh.data.encoding import Encoder, clean, encode_utf8
from bdh.data.message_content import content_text
from bdh.data.tokenizer import vocabulary_size
from bdh.errors import BDHError

CHAT_COLUMNS = ("messages", "conversations")  # where they are looked for
ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_ROLES = {"human": "user", "gpt": "assistant", "function": "tool", "observation": "tool"}  # as in ShareGPT
LAYOUT = 2  # goes into the fingerprint: raise it when the same conversations give other tokens

Messages = list[dict[str, str]]
Segment = tuple[str, bool]  # text, and whether it is predicted


class ChatEncoder(Encoder):
    """Turns conversations into token ids, ~id where a token is not predicted. It can be pickled.

    A message that spells a special token gets the token's characters, never the token itself.

    Attributes:
        dtype: The smallest signed type that the vocabulary fits.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        super().__init__(tokenizer)
        self.dtype = np.min_scalar_type(-vocabulary_size(tokenizer))
        self.format = ChatFormat(tokenizer)
        self.end = self.format.answer_end
        self.end_text = tokenizer.convert_ids_to_tokens(self.end.token_ids[0]) if self.end.token_ids else ""
        self.ending = ~self.ending.astype(self.dtype)
        self.with_special = Tokenizer.from_str(self.backend.to_str())  # takes special tokens for what they are
        self.spelled = SpelledTokens(tokenizer)

    @property
    def key(self) -> list[Any]:
        return [*super().key, "chat", self.format.template, LAYOUT]

    @property
    def ends_turns_with_documents(self) -> bool:
        """Whether a turn ends with the token that ends documents, so that one cannot be told from the other."""
        return self.end_of_text in self.end.token_ids

    def conversation(self, messages: Messages) -> tuple[np.ndarray, int]:
        """The tokens of a conversation, what ends it included, and the UTF-8 bytes of its answers. Raises BDHError."""
        messages, found = self.spelled.hide(messages)
        pieces, open_end = self.pieces(messages)
        if open_end and self.end_of_text is None:  # what ends an answer is the next turn, and there is none
            pieces[-1] = (pieces[-1][0] + "".join(self.end.stop[:1]), True)
        parts, size = [], 0
        for text, predicted in pieces:
            ids = np.array(self._ids(text, found), dtype=self.dtype)
            parts.append(ids if predicted else ~ids)
            if predicted:
                size += len(encode_utf8(restore(text.removesuffix(self.end_text), found)))
        if open_end and self.end_of_text is not None:
            parts.append(~self.ending)
        elif self.end_of_text is None or parts[-1][-1] not in (self.end_of_text, ~self.end_of_text):
            parts.append(self.ending)
        return np.concatenate(parts), size

    def pieces(self, messages: Messages) -> tuple[list[Segment], bool]:
        """The text of a conversation in pieces, answers apart; and whether the last answer has no end of its own.

        An answer that the template does not write where it asks for one, as some do with those long past, is text like
        the rest.

        Raises:
            BDHError: The template does not take these messages, or that is true of all answers.
        """
        whole = self.format.whole(messages)
        pieces: list[Segment] = []
        place, ended = 0, True
        for number, message in enumerate(messages):
            if number == 0 or message["role"] != "assistant":
                continue
            before = self.format.render(messages[:number])
            answer = self._answer(whole, len(before), message["content"]) if whole.startswith(before) else None
            if answer is None or len(before) < place:
                continue
            stop, ended = answer
            pieces += [(whole[place : len(before)], False), (whole[len(before) : stop], True)]
            place = stop
        if not pieces:
            raise BDHError("the chat template writes no answer where it asks for one")
        open_end = not ended and not whole[place:].strip()
        return [*pieces, *([(whole[place:], False)] if whole[place:] else [])], open_end

    def _answer(self, whole: str, begin: int, content: str) -> tuple[int, bool] | None:
        """The end of the answer that begins at an index, its end token included, and whether it has one; None if no
        answer begins there."""
        for text in (content, content.strip()):
            at = whole.find(text, begin)
            if at >= 0 and not whole[begin:at].strip():
                stop = at + len(text)
                break
        else:
            return None
        for mark in filter(None, (self.end_text, *self.end.stop)):
            at = whole.find(mark, stop)
            if at >= 0 and not whole[stop:at].strip():
                return at + len(mark), True
        return stop, False

    def _ids(self, text: str, found: Mapping[str, str]) -> list[int]:
        """Token ids of a text in which special tokens are ones but for those that stand-ins stand for."""
        ids: list[int] = []
        for part, spelled in split_at_stand_ins(text, found):
            backend = self.backend if spelled else self.with_special
            ids += backend.encode(part, add_special_tokens=False).ids
        return ids


class ChatRows:
    """Encodes a batch of conversations, as `Rows` does texts. It can be pickled."""

    def __init__(self, encoder: ChatEncoder):
        self.encoder = encoder

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """{"text": messages, or their JSON} -> `tokens`, `bytes` of answers, `mark` 1 empty, 2 U+FFFD, 3 unusable.

        `problem` is what makes a conversation unusable, empty where nothing does.
        """
        rows = [self._row(value) for value in batch["text"]]
        tokens, sizes, marks, problems = ([row[i] for row in rows] for i in range(4))
        return {"tokens": tokens, "bytes": sizes, "mark": marks, "ends": [True] * len(rows), "problem": problems}

    def _row(self, value: Any) -> tuple[np.ndarray, int, int, str]:
        nothing = np.empty(0, dtype=self.encoder.dtype)
        if value is None:
            return nothing, 0, 1, ""
        try:
            messages = messages_of(value)
            tokens, size = self.encoder.conversation(messages)
        except BDHError as error:
            return nothing, 0, 3, str(error)
        return tokens, size, 2 if any("\ufffd" in message["content"] for message in messages) else 0, ""


def messages_of(value: Any) -> Messages:
    """The messages of a row up to the last answer, in one form whatever form they came in.

    Args:
        value: A list of {"role", "content"} or {"from", "value"}, or the JSON of one. A content is text, or a list of
            parts of text, which are joined.

    Raises:
        BDHError: It is something else, a role is unknown, a content is not text, or the assistant says nothing.
    """
    if isinstance(value, str):
        value = _from_json(value)
    if isinstance(value, Mapping):  # a list of messages in columns
        value = [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    if not isinstance(value, list | tuple) or not value:
        raise BDHError("there are no messages")
    messages = list(_checked(list(value)))
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise BDHError("the assistant says nothing")
    return messages[: answers[-1] + 1]


def _from_json(text: str) -> Any:
    """The value of JSON; of a text in it, which was made JSON twice, the value of that. Raises BDHError."""
    try:
        value = json.loads(text)
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise BDHError("the messages are not JSON") from error


def _checked(messages: list[Any]) -> Iterator[dict[str, str]]:
    for number, message in enumerate(messages):
        if isinstance(message, str):
            message = _from_json(message)
        if not isinstance(message, Mapping):
            raise BDHError(f"messages[{number}] is no message")
        role, content = (_first(message, names) for names in (("role", "from"), ("content", "value")))
        role = OTHER_ROLES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise BDHError(f"messages[{number}] has the role {str(role)[:40]!r}; known are {', '.join(ROLES)}")
        yield {"role": role, "content": clean(content_text(_content_parts(content), f"messages[{number}].content"))}


def _content_parts(content: Any) -> Iterator[tuple[str, Any]]:
    """The type and the text of each part of a content: a text, a part, a list of them, or a list in columns."""
    if isinstance(content, Mapping):
        content = [dict(zip(content, row, strict=False)) for row in zip(*content.values(), strict=False)]
    for part in content if isinstance(content, list | tuple) and content else [content]:
        if isinstance(part, Mapping):
            yield part.get("type", "text"), _first(part, ("text", "refusal"))
        else:
            yield "text", part


def _first(message: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((message[name] for name in names if message.get(name) is not None), None)
