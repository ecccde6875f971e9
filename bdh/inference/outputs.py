"""Output of a request: deltas of text while it runs, and a completion at the end."""

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
    """A token, its log-probability under the model in nats, and the likeliest tokens at its position."""

    token: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


def token_logprobs(tokens: Sequence[int], scores: PromptLogprobs) -> list[TokenLogprob]:
    """Convert the log-probabilities of a prompt into a list, one entry for each token.

    Args:
        tokens: The scored tokens: all of the prompt but the first.
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
        text: Added text; empty only with a finish_reason.
        index: Index of the continuation, of `n`.
        finish_reason: "stop" or "length" on the last piece of a continuation, else None.
        tokens: Tokens since the last piece, including an end token and the tokens of a stop string.
        logprobs: Log-probabilities of these tokens, if requested.
    """

    text: str
    index: int
    finish_reason: FinishReason | None
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True)
class Choice:
    """A finished continuation.

    Attributes:
        index: Index from 0; with `best_of`, in the order of likelihood.
        text: Text without end token and stop string.
        tokens: All generated tokens, including an end token and the tokens of a stop string.
        finish_reason: "stop" at an end token, a stop string or a completed grammar; "length" at max_new_tokens.
        logprobs: Log-probabilities of the tokens, if requested.
        cumulative_logprob: Sum of the log-probabilities in nats, if they were requested or needed for `best_of`.
    """

    index: int
    text: str
    tokens: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None = None
    cumulative_logprob: float | None = None


@dataclass(frozen=True)
class Completion:
    """The finished continuations of one prompt.

    Attributes:
        prompt: Text of the prompt.
        prompt_tokens: Tokens of the prompt.
        choices: The continuations; empty if there is an error.
        error: Message if the constrained text could not be continued, else None.
        cached_tokens: Number of prompt tokens taken from the prefix cache.
    """

    prompt: str
    prompt_tokens: list[int]
    choices: list[Choice]
    error: str | None = None
    cached_tokens: int = 0

    @property
    def text(self) -> str:
        """Text of the first choice. Raises BDHError if there is an error."""
        return self.raise_for_error().choices[0].text

    def raise_for_error(self) -> "Completion":
        """Return the completion itself. Raises BDHError if it has an error."""
        if self.error is not None:
            raise BDHError(self.error)
        return self


@dataclass(frozen=True)
class TextRequest:
    """An encoded request, with settings for its detokenization.

    Attributes:
        request: The request to the engine, of token ids.
        prompt: The prompt as text.
        stop: Stop strings, which are not part of the text.
        strip: Whether to strip white space from the beginning of the text.
    """

    request: Request
    prompt: str = ""
    stop: tuple[str, ...] = ()
    strip: bool = False


class Continuation:
    """A continuation that is being generated."""

    def __init__(self, request: Request, index: int, text: Detokenizer):
        self.request = request
        self.index = index
        self.text = text
        self.pieces: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.cumulative_logprob = 0.0
        self.finish_reason: FinishReason | None = None
        self.state: BDHState | None = None  # after all tokens but the last, if the request keeps it
        self.tokens: list[int] = []
        self.reported = 0  # tokens that were in deltas

    def take(self, event: Event) -> str:
        """Add a token; return the text that it completes."""
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
        """Return a delta with this text and the tokens since the last one."""
        since = slice(self.reported, None)
        self.reported = len(self.tokens)
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
    """Output of one request while it runs: all its continuations.

    Attributes:
        deltas: Deltas that have not been consumed yet, with `wants_deltas`.
        error: The error that ended the request early.
        prompt_logprobs: Log-probabilities of the prompt, if requested; known with the first token.
        first_at, last_at: Times of the first and the last token, by `time.perf_counter`; 0 before.
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
        """Add a token; return whether it completed a stop string, so that the engine must end the continuation."""
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
        """Return the completion; with `best_of`, of the `n` continuations with the highest mean log-probability."""
        if self.error is not None:
            return Completion(self.text_request.prompt, list(self.request.prompt), [], str(self.error))
        parts, params = self.continuations, self.request.params
        if len(parts) > params.n:
            parts = sorted(parts, key=Continuation.mean_logprob, reverse=True)[: params.n]
        choices = [part.choice(index) for index, part in enumerate(parts)]
        return Completion(
            self.text_request.prompt, list(self.request.prompt), choices, cached_tokens=self.cached_tokens
        )
