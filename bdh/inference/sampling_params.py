"""Sampling parameters of a request."""

import json
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from bdh.errors import BDHError, one_line

GREEDY_BELOW = 1e-5  # dividing logits by less could only ever choose the likeliest token

MAX_SCHEMA_DEPTH = 64  # lists and objects of a JSON schema inside one another

_INF = float("inf")
_LARGEST = sys.float_info.max

INTEGERS = {  # field: least value; none has a greatest, but the seed
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "top_k": 0,
    "logprobs": 0,
    "n": 1,
    "best_of": 1,
    "seed": 0,
    "num_beams": 1,
}
REALS = {  # field: least and greatest value, and whether the least is allowed itself
    "temperature": (0, _LARGEST, True),
    "top_p": (0, 1, False),
    "min_p": (0, 1, True),
    "typical_p": (0, 1, False),
    "repetition_penalty": (0.01, 100, True),
    "presence_penalty": (-2, 2, True),
    "frequency_penalty": (-2, 2, True),
}
OPTIONAL = frozenset({"logprobs", "best_of", "seed"})


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of a request. Validated on creation.

    Attributes:
        max_new_tokens: Tokens to write at most.
        min_new_tokens: No end token before this many.
        temperature: Divides the logits; below 1e-5 the likeliest token is always taken.
        top_k: Choose among exactly this many likeliest tokens, of equally likely ones those with smaller ids; 0 among
            all.
        top_p: Choose among the fewest likeliest tokens that together hold this probability.
        min_p: Choose among tokens at least this many times as likely as the likeliest.
        typical_p: Choose among the fewest tokens that together hold this probability, taken by how near their surprisal
            is to the expected one (locally typical sampling, Meister et al. 2022).
        repetition_penalty: Divides positive and multiplies negative logits of tokens in the prompt or the output.
        presence_penalty: Is subtracted from the logits of tokens in the output.
        frequency_penalty: Is subtracted from a token's logit as often as it is in the output.
        logit_bias: Is added to the logits of these token ids; from -100 to 100.
        stop: Strings the text ends before.
        stop_token_ids: Tokens that end it.
        ignore_eos: Whether to write on past the model's own end token.
        logprobs: None for no log-probabilities, 0 for those of the chosen tokens, k for those of the k likeliest too.
        n: Continuations to return.
        best_of: Continuations to draw, of which the likeliest n are returned; None draws n.
        seed: Of the draws, at least 0 and below 2^63; None for one that differs every time.
        num_beams: More than 1 looks for the likeliest continuation by beam search instead of drawing.
        regex: The whole text must match it.
        json_schema: The text must be JSON of this schema, given as a mapping or as JSON text.

    Raises:
        BDHError: A value is of the wrong type or out of range, or two values cannot go together.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1
    best_of: int | None = None
    seed: int | None = None
    num_beams: int = 1
    regex: str | None = None
    json_schema: str | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, least in INTEGERS.items():
            self._check_integer(name, least)
        for name, (low, high, low_allowed) in REALS.items():
            self._check_real(name, low, high, low_allowed)
        if not isinstance(self.ignore_eos, bool):
            raise BDHError(f"ignore_eos is {_shown(self.ignore_eos)}; it must be true or false")
        self._check_collections()
        self._check_constraints()
        self._check_together()

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise BDHError for token ids that a model with `vocab_size` tokens does not have."""
        for name, ids in (("logit_bias", self.logit_bias or ()), ("stop_token_ids", self.stop_token_ids)):
            for token in ids:
                if token >= vocab_size:
                    raise BDHError(f"{name} has the token {token}; the model's tokens are 0 to {vocab_size - 1}")

    def _check_integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is None and name in OPTIONAL:
            return
        if not _is(value, Integral):
            raise BDHError(f"{name} is {_shown(value)}; it must be a whole number")
        if value < least or (name == "seed" and value >= 2**63):
            below = " and below 2^63" if name == "seed" else ""
            zero = " (0 means all tokens)" if name == "top_k" else ""
            raise BDHError(f"{name} is {value}; it must be at least {least}{below}{zero}")
        object.__setattr__(self, name, int(value))  # numpy's, say, are no JSON

    def _check_real(self, name: str, low: float, high: float, low_allowed: bool) -> None:
        value = getattr(self, name)
        if not _is(value, Real):
            raise BDHError(f"{name} is {_shown(value)}; it must be a number")
        try:
            number = float(value)
        except OverflowError:  # a whole number too great
            number = _INF
        if not (low < number <= high or (low_allowed and number == low)):  # NaN is neither
            lower = f"{'at least' if low_allowed else 'above'} {low:g}"
            upper = "finite" if high == _LARGEST else f"at most {high:g}"
            raise BDHError(f"{name} is {value}; it must be {lower} and {upper}")
        object.__setattr__(self, name, number)

    def _check_collections(self) -> None:
        """Validate the collections, and store immutable copies."""
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, list | tuple) or not all(isinstance(text, str) for text in stop):
            raise BDHError(f"stop is {_shown(stop)}; it must be a string or a list of strings")
        if "" in stop:
            raise BDHError(f"stop is {_shown(stop)}; each string must have a character at least")
        ids = self.stop_token_ids
        if not isinstance(ids, list | tuple) or not all(_is(token, Integral) and token >= 0 for token in ids):
            raise BDHError(f"stop_token_ids is {_shown(ids)}; it must be a list of token ids, whole numbers from 0")
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(int(token) for token in ids))
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping):
            raise BDHError(f"logit_bias is {_shown(self.logit_bias)}; it must map token ids to numbers")
        for token, bias in self.logit_bias.items():
            if not _is(token, Integral) or token < 0:
                raise BDHError(f"logit_bias has the token {_shown(token)}; it must be a whole number of at least 0")
            if not _is(bias, Real) or not -100 <= bias <= 100:
                raise BDHError(f"logit_bias of token {token} is {_shown(bias)}; it must be a number from -100 to 100")
        object.__setattr__(self, "logit_bias", {int(token): float(bias) for token, bias in self.logit_bias.items()})

    def _check_constraints(self) -> None:
        """Check the types of the constraints; `Grammars` checks whether they can be compiled."""
        if self.regex is not None and not isinstance(self.regex, str):
            raise BDHError(f"regex is {_shown(self.regex)}; it must be a string")
        schema = self.json_schema
        if self.regex is not None and schema is not None:
            raise BDHError(f"regex is {_shown(self.regex)} and json_schema is given too; leave one of them out")
        if schema is None:
            return
        if not isinstance(schema, str | Mapping):
            raise BDHError(f"json_schema is {_shown(schema)}; it must be a mapping or JSON text")
        if not isinstance(schema, str):
            check_depth(schema)
        try:
            read = json.loads(schema) if isinstance(schema, str) else json.loads(json.dumps(dict(schema)))
        except (TypeError, ValueError, RecursionError) as error:
            raise BDHError(f"json_schema is {_shown(schema)}; it must be JSON: {one_line(error)}") from error
        if not isinstance(read, dict | bool):
            raise BDHError(f"json_schema is {_shown(schema)}; it must be a JSON object or true or false")
        check_depth(read)

    def _check_together(self) -> None:
        if self.min_new_tokens > self.max_new_tokens:
            raise BDHError(
                f"min_new_tokens is {self.min_new_tokens}; it must be at most max_new_tokens {self.max_new_tokens}"
            )
        if self.best_of is not None and self.best_of < self.n:
            raise BDHError(f"best_of is {self.best_of}; it must be at least n {self.n}")
        if self.num_beams > 1:
            self._check_beams()
        elif self.best_of is not None and self.best_of > self.n and self.greedy:
            raise BDHError(
                f"temperature is {self.temperature} and best_of is {self.best_of}; the temperature must be at least "
                f"{GREEDY_BELOW:g}, or all continuations are the same"
            )

    def _check_beams(self) -> None:
        if self.n > self.num_beams:
            raise BDHError(f"n is {self.n}; it must be at most num_beams {self.num_beams}")
        draws = None if self.best_of in (None, self.n) else self.best_of
        others = {"best_of": draws, "regex": self.regex, "json_schema": self.json_schema, "logprobs": self.logprobs}
        for name, value in others.items():
            if value is not None:
                raise BDHError(f"{name} is {_shown(value)} and num_beams is {self.num_beams}; leave one of them out")


def check_depth(schema: object) -> None:
    """Raise BDHError for a JSON schema that is nested too deeply for the functions that process it."""
    level = [schema]
    for _ in range(MAX_SCHEMA_DEPTH + 1):
        holders = [part for part in level if isinstance(part, Mapping | list | tuple)]
        if not holders:
            return
        level = [one for part in holders for one in (part.values() if isinstance(part, Mapping) else part)]
    raise BDHError(f"json_schema is nested more than {MAX_SCHEMA_DEPTH} levels deep; give a flatter one")


def _is(value: object, kind: type) -> bool:
    """Return whether a value is a number of this kind; booleans are not."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _shown(value: object) -> str:
    return " ".join(reprlib.repr(value).split())[:150]
