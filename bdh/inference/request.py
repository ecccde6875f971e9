"""What goes into the engine and what comes out: requests and events."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Self

import numpy as np

from bdh.errors import BDHError
from bdh.inference.params import SamplingParams

if TYPE_CHECKING:
    from bdh.model import BDHState

FinishReason = Literal["stop", "length"]


@dataclass(eq=False)
class Request:
    """What to write on from, and how.

    Attributes:
        prompt: Tokens to read first, at least one.
        params: How tokens are chosen; `n`, or `best_of`, continuations are written.
        id: A name of its own; made if it is not given.
        end_token_ids: Tokens that end a text, unless `params.ignore_eos`.
        state: What to go on from instead of the beginning, a batch of one; it is copied, not changed.
        keep_state: Whether the last event of a continuation carries the state it left.
        prefix_owner: Whose kept beginnings it may use and leave some to.
        client: Who made it: clients have equal shares of the slots and of the queue.
        prompt_logprobs: None, or for how many of the likeliest tokens to report log-probabilities in the place of each
            token of the prompt, besides the token's own. Such a prompt is read from its first token on.
        keep_prefix: Whether the state it left goes into the prefix cache: the next prompt of a chat goes on from there.
    """

    prompt: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    end_token_ids: tuple[int, ...] = ()
    state: "BDHState | None" = None
    keep_state: bool = False
    keep_prefix: bool = False
    prefix_owner: str | None = None
    client: str | None = None
    prompt_logprobs: int | None = None

    @cached_property
    def ends(self) -> frozenset[int]:
        """All tokens that end a continuation; they are no part of its text."""
        return frozenset(self.params.stop_token_ids) | frozenset(() if self.params.ignore_eos else self.end_token_ids)


@dataclass(frozen=True)
class PromptLogprobs:
    """Log-probabilities of the tokens of a prompt but the first, each after those before it, in nats.

    Attributes:
        logprobs: Of the tokens themselves, (T) float32.
        top_tokens: The k likeliest tokens in the place of each, likeliest first, (T, k) int32.
        top_logprobs: Their log-probabilities, (T, k) float32.
    """

    logprobs: np.ndarray
    top_tokens: np.ndarray
    top_logprobs: np.ndarray

    @classmethod
    def join(cls, parts: "Sequence[Self]") -> Self:
        """Those of consecutive parts of a prompt, at least one."""
        fields = (
            [part.logprobs for part in parts],
            [part.top_tokens for part in parts],
            [part.top_logprobs for part in parts],
        )
        return cls(*map(np.concatenate, fields))


@dataclass(frozen=True)
class Event:
    """One token of a continuation.

    Attributes:
        request_id: Whose.
        index: Which of the request's continuations, from 0.
        token: The token; one that ends the text is reported too.
        logprob: Its log-probability under the model, in nats, if asked for.
        top: The likeliest tokens and their log-probabilities, if asked for.
        finish_reason: Why the continuation ends here: "stop" at an end token or a completed grammar, "length" at
            `max_new_tokens`; None while it goes on.
        state: With `keep_state`, on the last event: the state after the prompt and all tokens but this last one, which
            was chosen and never read.
        cached: On the first token: how many of the prompt's tokens were not read, as a kept state had read them.
        prompt_logprobs: On the first token of one continuation of a request that asks for them.
        error: What keeps a constrained continuation from going on; it ends, and `token` is -1.
    """

    request_id: str
    index: int
    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None
    finish_reason: FinishReason | None = None
    state: "BDHState | None" = None
    cached: int = 0
    error: BDHError | None = None
    prompt_logprobs: PromptLogprobs | None = None
