"""Encodes prompts and conversations into requests. Needs the tokenizer only, and imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from numbers import Integral

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from bdh.data.chat_format import (
    ChatFormat,
    Message,
    Renderer,
    SpelledTokens,
    check_messages,
    restore,
    split_at_stand_ins,
)
from bdh.errors import BDHError, PromptTooLong
from bdh.inference.outputs import TextRequest
from bdh.inference.request import Request
from bdh.inference.sampling_params import SamplingParams

Prompt = str | Sequence[int]  # text, or its tokens

COUNTED_CHARACTERS = 1 << 16  # tokenized at once to check the length of a long text


class PromptEncoder:
    """Encodes prompts and conversations into requests for one model. Thread-safe.

    A special token that is spelled out in a message, such as `<|endoftext|>`, is encoded as plain text; so it is in
    every prompt if the tokenizer has no chat template. With one, prompts may be conversations rendered by the caller,
    so special tokens in them are encoded as such.

    Args:
        tokenizer: The model's tokenizer.
        vocab_size: The model's vocabulary size.
        end_token_ids: Tokens that end a text.
        renderer: Renders the chat template; None renders it in the calling thread.

    Attributes:
        max_tokens: Maximum number of tokens of a text, checked before it takes much memory. None: no limit.
    """

    max_tokens: int | None = None

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        vocab_size: int,
        end_token_ids: tuple[int, ...],
        renderer: Renderer | None = None,
    ):
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.end_token_ids = end_token_ids
        self.renderer = renderer
        tokenizer.backend_tokenizer.no_truncation()  # once, because it is not thread-safe
        tokenizer.backend_tokenizer.no_padding()

    @cached_property
    def chat_format(self) -> ChatFormat:
        return ChatFormat(self.tokenizer, self.renderer)

    @cached_property
    def spelled(self) -> SpelledTokens:
        return SpelledTokens(self.tokenizer)

    @cached_property
    def _literal(self) -> Tokenizer:
        """Copy of the tokenizer that encodes special tokens in a text as plain text."""
        literal = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        literal.encode_special_tokens = True
        return literal

    def encode(self, text: str, what: str = "the prompt", literal: bool = False) -> list[int]:
        """Encode a text without adding special tokens.

        Args:
            text: The text.
            what: Name of the text in errors.
            literal: Whether to encode special tokens in it as plain text in any case.

        Raises:
            BDHError: The text is not valid text.
            PromptTooLong: It has more than `max_tokens` tokens.
        """
        self._check(text, what)
        return self._encode(text, literal)

    def encode_rendered(self, text: str, found: Mapping[str, str], what: str = "the conversation") -> list[int]:
        """Encode a rendered conversation.

        Args:
            text: The conversation, with placeholders for the special tokens spelled out in its messages.
            found: The special token of each placeholder.
            what: Name of the text in errors.

        Raises:
            BDHError, PromptTooLong: As `encode`.
        """
        self._check(restore(text, found), what)
        parts = split_at_stand_ins(text, found)
        return [token for part, spelled in parts for token in self._encode(part, literal=spelled)]

    def chat_tokens(self, messages: Sequence[Message]) -> tuple[str, list[int]]:
        """Render and encode a conversation up to the beginning of the assistant's next reply.

        Raises:
            BDHError, PromptTooLong: As `encode`; or the chat template refuses these messages.
        """
        check_messages(messages)
        hidden, found = self.spelled.hide(messages)
        text = self.chat_format.render(hidden)
        return restore(text, found), self.encode_rendered(text, found)

    def _check(self, text: str, what: str) -> None:
        if not isinstance(text, str):
            raise BDHError(f"{what} is a {type(text).__name__}; give text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BDHError(f"{what} is not valid text: character {error.start} is half of one") from error
        if self.max_tokens is not None:
            self._check_length(text, what, self.max_tokens)

    def _encode(self, text: str, literal: bool = False) -> list[int]:
        if literal or self.tokenizer.chat_template is None:
            return list(self._literal.encode_batch_fast([text], add_special_tokens=False)[0].ids)
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def _check_length(self, text: str, what: str, most: int) -> None:
        """Raise PromptTooLong for a text with far too many tokens, without tokenizing all of it at once.

        Tokenization takes about a hundred bytes per token. Splitting the text anywhere may add some tokens, so only a
        text with more than twice the limit is refused here.
        """
        if len(text) <= max(most, COUNTED_CHARACTERS):
            return
        count = 0
        for start in range(0, len(text), COUNTED_CHARACTERS):
            count += len(self._encode(text[start : start + COUNTED_CHARACTERS]))
            if count > 2 * most:
                raise PromptTooLong(f"{what} has more than {most} tokens, the most that are read here; shorten it")

    def text_request(self, prompt: Prompt, params: SamplingParams | None = None) -> TextRequest:
        """Encode a prompt into a request. Raises BDHError."""
        params = params or SamplingParams()
        if isinstance(prompt, str):
            text, tokens = prompt, self.encode(prompt)
        elif not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise BDHError(f"the prompt is a {type(prompt).__name__}; give text, or a list of token ids")
        elif not all(isinstance(token, Integral) for token in prompt):
            raise BDHError("the prompt is a list of something else than token ids; give text, or whole numbers")
        else:
            tokens = [int(token) for token in prompt]
            known = [token for token in tokens if 0 <= token < self.vocab_size]
            text = self.tokenizer.backend_tokenizer.decode(known, skip_special_tokens=False)  # as text is streamed
        return TextRequest(Request(tokens, params, end_token_ids=self.end_token_ids), text, params.stop)

    def chat_request(self, messages: Sequence[Message], params: SamplingParams | None = None) -> TextRequest:
        """Encode a conversation into a request for the assistant's reply. Raises BDHError."""
        text, tokens = self.chat_tokens(messages)
        request = Request(tokens, params or SamplingParams(), keep_prefix=True)
        return self.as_chat_request(TextRequest(request, text))

    def as_chat_request(self, text_request: TextRequest) -> TextRequest:
        """Return the request with the end tokens, stop strings and stripping of a reply in a conversation."""
        end = self.chat_format.answer_end
        ends = tuple(dict.fromkeys((*self.end_token_ids, *self.chat_format.end_token_ids)))
        stop = (*text_request.request.params.stop, *end.stop)
        return replace(
            text_request, request=replace(text_request.request, end_token_ids=ends), stop=stop, strip=bool(end.lead)
        )

    def check_streamable(self, text_request: TextRequest) -> None:
        """Raise BDHError if the continuations to return are known at the end only."""
        params = text_request.request.params
        for name, value, usual in (
            ("num_beams", params.num_beams, 1),
            ("best_of", params.best_of or params.n, params.n),
        ):
            if value > usual:
                raise BDHError(
                    f"{name} is {value}, which cannot be streamed: the choice is made at the end; leave it out"
                )
