"""What comes of a request: its tokens' text as it comes, and the completion at the end."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bdh.errors import BDHError
from bdh.inference.detokenizer import Detokenizer
from bdh.inference.request import Event, FinishReason, PromptLogprobs, Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from bdh.model import BDHState


@dataclass(frozen=True)
class TokenLogprob:
    """A token that was written, its log-probability under the model in nats, and the likeliest in its place."""

    token: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


def token_logprobs(tokens: Sequence[int], scores: PromptLogprobs) -> list[TokenLogprob]:
    """The log-probabilities of a prompt's tokens, token by token.

    Args:
        tokens: Those that the scores are of, so without the first of the prompt.
        scores: Their log-probabilities.
    """
    rows = zip(
        tokens,
        scores.logprobs.tolist(),
        scores.top_tokens.tolist(),
        scores.top_logprobs.tolist(),
        strict=True,
    )
    return [TokenLogprob(token, logprob, list(zip(top, values, strict=True))) for token, logprob, top, values in rows]


@dataclass(frozen=True)
class Delta:
    """A piece of a continuation.

    Attributes:
        text: What it adds; empty only with a finish_reason.
        index: Of which of the `n` continuations.
        finish_reason: "stop" or "length" on the last piece of a continuation, else None.
        tokens: Those that came since the last piece, an end token and those of a stop string among them.
        logprobs: Of these tokens, if asked for.
    """

    text: str
    index: int
    finish_reason: FinishReason | None
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True)
class Choice:
    """One whole continuation.

    Attributes:
        index: From 0; with `best_of`, in the order of likelihood.
        text: Without end token and stop string.
        tokens: All that were written, an end token and those of a stop string among them.
        finish_reason: "stop" at an end token, a stop string or a completed grammar; "length" at max_new_tokens.
        logprobs: Of each token, if asked for.
        cumulative_logprob: Of the whole, in nats, if log-probabilities were asked for or `best_of` needed them.
    """

    index: int
    text: str
    tokens: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None = None
    cumulative_logprob: float | None = None


@dataclass(frozen=True)
class Completion:
    """What came of one prompt.

    Attributes:
        prompt: As text.
        prompt_tokens: As it was read.
        choices: The continuations; none if there is an error.
        error: Why there is no answer: the constrained output came to where nothing that fits can follow.
        cached_tokens: How many of the prompt's tokens were not read, as a kept state had read them.
    """

    prompt: str
    prompt_tokens: list[int]
    choices: list[Choice]
    error: str | None = None
    cached_tokens: int = 0

    @property
    def text(self) -> str:
        """The text of the first choice. Raises BDHError if there is an error instead."""
        return self.raise_for_error().choices[0].text

    def raise_for_error(self) -> "Completion":
        """Itself. Raises BDHError if there is an error instead of an answer."""
        if self.error is not None:
            raise BDHError(self.error)
        return self


@dataclass(frozen=True)
class TextRequest:
    """A request for the engine, and what is to be made of its tokens.

    Attributes:
        request: Token ids in, token ids out.
        prompt: The prompt as text, for the completion.
        stop: Strings that the text ends before.
        strip: Whether white space at its beginning is left out.
    """

    request: Request
    prompt: str = ""
    stop: tuple[str, ...] = ()
    strip: bool = False


class Continuation:
    """One continuation of a request, as it comes."""

    def __init__(self, request: Request, index: int, text: Detokenizer):
        self.request = request
        self.index = index
        self.text = text
        self.pieces: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.cumulative_logprob = 0.0
        self.finish_reason: FinishReason | None = None
        self.state: BDHState | None = None  # has read the prompt and all tokens but the last, if the request keeps it
        self.tokens: list[int] = []
        self.shown = 0  # tokens that were in deltas

    def take(self, event: Event) -> str:
        """Takes a token; returns the text that it settles."""
        self.tokens.append(event.token)
        if event.logprob is not None:
            self.cumulative_logprob += event.logprob
            self.logprobs.append(TokenLogprob(event.token, event.logprob, event.top or []))
        text = "" if event.token in self.request.ends else self.text.step(event.token)
        if event.finish_reason is not None:
            text += self.text.end()
            self.finish_reason, self.state = event.finish_reason, event.state
        if self.text.stopped:
            self.finish_reason = "stop"
        if text:
            self.pieces.append(text)
        return text

    def delta(self, text: str) -> Delta:
        """A piece, with the tokens since the last one."""
        since = slice(self.shown, None)
        self.shown = len(self.tokens)
        logprobs = self.logprobs[since] if self.request.params.logprobs is not None else None
        return Delta(text, self.index, self.finish_reason, self.tokens[since], logprobs)

    def mean_logprob(self) -> float:
        return self.cumulative_logprob / max(len(self.tokens), 1)

    def choice(self, index: int) -> Choice:
        assert self.finish_reason is not None
        return Choice(
            index,
            "".join(self.pieces),
            self.tokens,
            self.finish_reason,
            self.logprobs if self.request.params.logprobs is not None else None,
            self.cumulative_logprob if self.logprobs else None,
        )


class RequestOutput:
    """All continuations of one request.

    Attributes:
        deltas: Pieces that nobody has taken yet, if they are wanted.
        error: What ended the request before its time.
        prompt_logprobs: Of the prompt's tokens but the first, if the request asks for them; known with the first token.
        first_at, last_at: When its first and its last token came, by `time.perf_counter`; 0 before.
    """

    def __init__(self, text_request: TextRequest, tokenizer: "PreTrainedTokenizerFast", wants_deltas: bool = False):
        self.text_request = text_request
        self.request = text_request.request
        params = self.request.params
        self.continuations = [
            Continuation(self.request, index, Detokenizer(tokenizer, text_request.stop, text_request.strip))
            for index in range(params.best_of or params.n)
        ]
        self.unfinished = len(self.continuations)
        self.wants_deltas = wants_deltas
        self.deltas: deque[Delta] = deque()
        self.error: BaseException | None = None
        self.cached_tokens = 0
        self.prompt_logprobs: PromptLogprobs | None = None
        self.first_at = self.last_at = 0.0

    def take(self, event: Event) -> bool:
        """Takes a token; whether a stop string is complete with it, so that the engine need not go on."""
        continuation = self.continuations[event.index]
        self.cached_tokens = max(self.cached_tokens, event.cached)
        self.prompt_logprobs = event.prompt_logprobs or self.prompt_logprobs
        self.last_at = time.perf_counter()
        self.first_at = self.first_at or self.last_at
        text = continuation.take(event)
        finished = continuation.finish_reason is not None
        self.unfinished -= finished
        if self.wants_deltas and (text or finished):
            self.deltas.append(continuation.delta(text))
        return finished and event.finish_reason is None

    def completion(self) -> Completion:
        """The whole, when all are finished; with `best_of`, the `n` of highest mean log-probability a token."""
        if self.error is not None:
            return Completion(self.text_request.prompt, list(self.request.prompt), [], str(self.error))
        parts, params = self.continuations, self.request.params
        if len(parts) > params.n:
            parts = sorted(parts, key=Continuation.mean_logprob, reverse=True)[: params.n]
        choices = [part.choice(index) for index, part in enumerate(parts)]
        return Completion(
            self.text_request.prompt, list(self.request.prompt), choices, cached_tokens=self.cached_tokens
        )
