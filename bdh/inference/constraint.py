"""Constrained decoding: output that matches a regular expression or a JSON schema.

llguidance compiles the constraint to a grammar over bytes, and computes which byte strings of a vocabulary may come
next. This module provides the vocabulary: the bytes that each token adds to the decoded text, and, for tokenizers that
cannot encode every text, the texts that they can.
"""

import json
import re
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bdh.data.token_bytes import token_bytes
from bdh.errors import BDHError
from bdh.inference.sampling_params import SamplingParams

CACHED = 32  # compiled grammars that are kept
LONGEST = 4096  # characters of an expression; with a row of a million "a?" the library takes minutes, and all memory
MOST_LEAST = 1 << 16  # minLength and the like: no text that a request may write is longer
LEAST = ("minLength", "minItems", "minProperties")
BRISK_SECONDS = 0.05  # of a search, after which it leaves most of the time to other threads
PAUSE = 3.0  # times what a step of the search took
SEARCHED = 2000  # beginnings of texts to go through when looking for one that a tokenizer can write
LIMITS = LLParserLimits(verbose_errors=False)

# All tokens that fit are allowed, not only those that the tokenizer would make of a text that is forced.
HEADER = '%llguidance {"no_forcing": true}\n'

# JSON is written as json.dumps writes it, so that no model can go on with spaces for ever. Where a tokenizer has no
# space but those before its words and signs (wordpiece), there may be one wherever JSON allows white space.
SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
MAYBE_SPACED = {"whitespace_pattern": " "}
CLOSING = '"}],:'  # what ends parts of JSON: first choice when a short text is looked for

UTF8_BYTES = frozenset(bytes([byte]) for byte in range(0xF5) if byte not in (0xC0, 0xC1))


class Grammars:
    """Compiler of constraints for one tokenizer, with a cache of the last grammars.

    The text that fits is the one that the tokenizer's decoder makes of the completion alone: with wordpiece there is no
    space before the first word, and a "##" piece that comes first keeps its "##"; with unigram a "▁" is a space there,
    too. Special tokens but the end token are never allowed, nor ids that only the model has.

    A regular expression must match the whole text. It is in the syntax of Rust's regex crate: as that of Python's `re`,
    but without look-around, word boundaries and back-references; `\\d` is 0 to 9, and `\\w` has a few characters more
    than Python's (combining marks). JSON (draft 2020-12) has its properties in the order of the schema, and what the
    schema says is followed or refused; `not`, `if`, `uniqueItems`, `contains`, references to other documents and a
    `oneOf` whose parts overlap are refused. One thing is neither: a name that is not among the `properties` may come
    twice in an object.

    Threads may share it, but not its constraints.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int):
        """vocab_size is the model's. Nothing is done before the first constraint."""
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self._compiled = lru_cache(CACHED)(self._compile)

    def constraint(self, params: SamplingParams) -> "Constraint | None":
        """Return the constraint of a request at the beginning of its text; None if it has none.

        Raises:
            BDHError: The expression or schema is wrong or cannot be followed, this tokenizer can write no text that
                fits, or its decoder is of an unknown kind.
        """
        if params.regex is not None:
            return self._compiled("regex", params.regex).copy()
        schema = params.json_schema
        if schema is not None:
            return self._compiled("json_schema", schema if isinstance(schema, str) else json.dumps(dict(schema))).copy()
        return None

    @cached_property
    def vocabulary(self) -> "Vocabulary":
        return Vocabulary.of(self.tokenizer, self.vocab_size)

    def _compile(self, kind: str, source: str) -> "Constraint":
        wrong = f"{kind} {source[:60]!r}{'…' if len(source) > 60 else ''} cannot be followed"
        try:
            grammar = self._regex(source) if kind == "regex" else self._json(json.loads(source))
            matcher = LLMatcher(self.vocabulary.library, HEADER + grammar, log_level=0, limits=LIMITS)
        except ValueError as error:
            raise BDHError(f"{wrong}: {error}") from error
        if matcher.is_error():
            raise BDHError(f"{wrong}: {_reason(matcher)}")
        constraint = Constraint(self.vocabulary, matcher)
        if not self.vocabulary.can_finish(constraint):
            raise BDHError(f"{wrong}: no text fits it that this tokenizer can write")
        return constraint

    def _regex(self, source: str) -> str:
        check_length(source)
        if (len(source) - len(source.rstrip("\\"))) % 2 == 1:  # the library would leave it out
            raise ValueError("nothing follows the backslash at its end")
        expression = regex_to_lark(source, "d") or "(?:)"  # of nothing, the two strokes would begin a comment
        writable = self.vocabulary.writable
        return f"start: TEXT\nTEXT: /{expression}/" + (f" & /{writable}/" if writable else "")

    def _json(self, schema: dict[str, object] | bool) -> str:
        spaces = SPACED if b" " in self.vocabulary.later else MAYBE_SPACED
        given = schema if isinstance(schema, dict) else {} if schema else {"enum": []}
        for pattern in patterns(given):
            check_length(pattern)
        for name, number in least_sizes(given):
            if number > MOST_LEAST:
                raise ValueError(f"{name} is {number:g}; it may be {MOST_LEAST}")
        return "start: %json " + json.dumps({**given, "x-guidance": spaces})


def check_length(expression: str) -> None:
    """Raise ValueError for an expression that is too long."""
    if len(expression) > LONGEST:
        raise ValueError(f"it has {len(expression)} characters; an expression may have {LONGEST}")


def objects(schema: object) -> Iterator[dict[str, object]]:
    """Yield all objects in a schema."""
    parts = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            parts += part.values()
            yield part


def least_sizes(schema: object) -> Iterator[tuple[str, float]]:
    """Yield the keywords and values of all minimum sizes in a schema."""
    for part in objects(schema):
        for name in LEAST:
            if isinstance(number := part.get(name), int | float):
                yield name, number


def patterns(schema: object) -> Iterator[str]:
    """Yield all regular expressions in a schema."""
    for part in objects(schema):
        if isinstance(pattern := part.get("pattern"), str):
            yield pattern
        if isinstance(named := part.get("patternProperties"), dict):
            yield from named


class Constraint:
    """Constraint on the next token of one request, after the accepted ones.

    Without an end token in the tokenizer, a text that may end here but may also go on does go on, until `is_complete`
    or until something else ends it.

    Attributes:
        at_start: Whether no token has come yet.
        may_end: Whether the text so far fits, whole.
    """

    def __init__(self, vocabulary: "Vocabulary", matcher: LLMatcher, at_start: bool = True):
        self.vocabulary = vocabulary
        self.at_start = at_start
        self.may_end: bool = matcher.is_accepting()
        self._matcher = matcher
        self._ended = False
        self._allowed: Tensor | None = None

    def copy(self) -> "Constraint":
        """Return an independent copy. Not after the end token."""
        copy = Constraint(self.vocabulary, self._matcher.deep_copy(), self.at_start)
        copy._allowed = self._allowed
        return copy

    def allowed(self) -> Tensor:
        """Return the mask of allowed next tokens, (V,) bool on the CPU; the end token only if the text may end here.

        No token is allowed after the end token and, in a vocabulary without one, when the text is complete. The result
        is not to be changed.

        Raises:
            BDHError: The text cannot go on. Either the grammar has become too large for the library, or the schema asks
                for what this tokenizer cannot write (one that has tokens for all bytes can write everything).
        """
        if self._allowed is None:
            self._allowed = torch.from_numpy(self._next())
        return self._allowed

    def accept(self, token: int) -> None:
        """Append a token to the text.

        Raises:
            ValueError: It is not allowed here.
            BDHError: As `allowed`.
        """
        if not self.allowed()[token]:
            raise ValueError(f"token {token} does not fit what the output is constrained to")
        if token == self.vocabulary.end:
            self._ended = True
        elif not self._matcher.consume_token(self.vocabulary.library_id(token, self.at_start)):
            raise BDHError(f"the constrained output cannot go on: {_reason(self._matcher)}")
        else:
            self.may_end = self._matcher.is_accepting()
        self.at_start = False
        self._allowed = None

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end may follow, or the end token has come: the request is finished."""
        if self._ended or not self.may_end:
            return self._ended
        return int(self.allowed().sum()) == (self.vocabulary.end is not None)

    def _next(self) -> np.ndarray:
        vocabulary = self.vocabulary
        allowed = np.zeros(vocabulary.size, np.bool_)
        if self._ended:
            return allowed
        if not self._matcher.is_stopped():
            mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)  # a bit for each of the library's ids
            bits = np.unpackbits(mask, bitorder="little").view(np.bool_)
            allowed = bits[vocabulary.first_ids] if self.at_start else bits[: vocabulary.size]
        if not self.may_end and not allowed.any():
            reason = _reason(self._matcher) or "this tokenizer has no token that fits here"
            raise BDHError(f"the constrained output cannot go on: {reason}")
        if vocabulary.end is not None:
            allowed[vocabulary.end] = self.may_end
        return allowed


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Byte strings of the tokens of a tokenizer, and the vocabulary of the library.

    Attributes:
        first: The bytes of each token where it is the first of a text; none for one that is never allowed.
        later: The bytes it adds to a text.
        end: The end token, None if there is none.
        first_ids: (V,) int64, the library's ids of first tokens; those of later ones are the tokens themselves.
        library: Has later tokens, then first ones that differ from them, then an end token.
    """

    first: Sequence[bytes]
    later: Sequence[bytes]
    end: int | None
    first_ids: np.ndarray
    library: LLTokenizer

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> "Vocabulary":
        """Create the vocabulary of a model with vocab_size tokens. Raises BDHError for an unknown kind of decoder."""
        first, later = token_bytes(tokenizer, vocab_size)
        differ = [token for token in range(vocab_size) if first[token] != later[token]]
        first_ids = np.arange(vocab_size)
        first_ids[differ] = np.arange(vocab_size, vocab_size + len(differ))
        library = LLTokenizer(TokenizerWrapper(_Tokens([*later, *(first[token] for token in differ), b""])))
        end = tokenizer.eos_token_id
        return cls(first, later, end if end is not None and end < vocab_size else None, first_ids, library)

    @property
    def size(self) -> int:
        return len(self.later)

    def library_id(self, token: int, at_start: bool) -> int:
        return int(self.first_ids[token]) if at_start else token

    @cached_property
    def writes_everything(self) -> bool:
        """Whether there is a token for every byte: then each text, and each beginning of one, can be gone on with."""
        return UTF8_BYTES.issubset(self.first) and UTF8_BYTES.issubset(self.later)

    @cached_property
    def letters(self) -> tuple[list[int], list[int]]:
        """First and later tokens that are not put together from others: what all can write, these can.

        Sorted for `can_finish`: what closes JSON, then the shortest.
        """
        first, later = (
            {form.decode(errors="surrogateescape"): token for token, form in enumerate(forms) if form}
            for forms in (self.first, self.later)
        )
        return [first[text] for text in _letters(first, later)], [later[text] for text in _letters(later, later)]

    @cached_property
    def writable(self) -> str | None:
        """A regular expression for the texts that the tokens can write; None for all texts, or if it is not known."""
        if self.writes_everything:
            return None
        first, later = self.letters
        try:
            return f"(?:{_either(self.first[i] for i in first)}(?:{_either(self.later[i] for i in later)})*)?"
        except UnicodeDecodeError:  # some tokens, but not all bytes, are parts of characters
            return None

    def can_finish(self, constraint: Constraint) -> bool:
        """Whether the tokens can write a text that fits; True, too, where a search does not tell soon."""
        pending: list[tuple[bytes, Constraint, int | None]] = [(b"", constraint, None)]  # and a token to go on with
        seen = {b""}
        pace = Pace()
        for _ in range(1 if self.writes_everything else SEARCHED):
            if not pending:
                return False
            text, here, token = pending.pop()
            try:
                with pace.step():
                    if token is not None:
                        here = here.copy()
                        here.accept(token)
                    allowed = here.allowed()
            except BDHError:
                continue
            if here.may_end or self.writes_everything:
                return True
            forms, letters = (self.first, self.letters[0]) if here.at_start else (self.later, self.letters[1])
            for letter in reversed(letters):
                if allowed[letter] and (longer := text + forms[letter]) not in seen:
                    seen.add(longer)
                    pending.append((longer, here, letter))
        return bool(pending)


class Pace:
    """Leaves most of the time to other threads once a search takes long: the library lets no other run meanwhile."""

    _turn = threading.Lock()  # one long search at a time

    def __init__(self) -> None:
        self._began = time.perf_counter()

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step of the search, and a pause after it."""
        started = time.perf_counter()
        if started - self._began < BRISK_SECONDS:
            yield
            return
        with self._turn:
            started = time.perf_counter()
            try:
                yield
            finally:
                time.sleep(PAUSE * (time.perf_counter() - started))


class _Tokens:
    """A vocabulary as the library's wrapper wants it. Texts are never tokenized: nothing is forced (see HEADER)."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes]):
        # the library takes two bytes or more from 0xff on for a special token
        self.tokens = [b"" if token[:1] == b"\xff" else token for token in tokens]
        self.eos_token_id = len(tokens) - 1

    def __call__(self, text: bytes) -> list[int]:
        return []


def _letters(heads: Collection[str], tails: Collection[str]) -> list[str]:
    """Those of the heads that are not put together from another head and tails."""

    def order(text: str) -> tuple[int, bool, int, str]:
        bare = text.strip()
        return CLOSING.index(bare) if bare and bare in CLOSING else len(CLOSING), not bare, len(text), text

    return sorted((text for text in heads if not _is_made_up(text, heads, tails)), key=order)


def _is_made_up(text: str, heads: Collection[str], tails: Collection[str]) -> bool:
    if len(text) > 1 and text[0] in heads and all(character in tails for character in text[1:]):
        return True  # from single characters, as nearly all are
    ends = {n for n in range(1, len(text)) if text[:n] in heads}
    for end in range(2, len(text) + 1):
        if any(n in ends and text[n:end] in tails for n in range(1, end)):
            ends.add(end)
    return len(text) in ends


def _either(forms: Iterable[bytes]) -> str:
    """A regular expression for any of the texts, those that differ in their last character put together."""
    last: dict[str, str] = {}
    for text in (form.decode() for form in forms):
        last[text[:-1]] = last.get(text[:-1], "") + text[-1]
    return "(?:" + "|".join(f"{_escaped(stem)}[{_escaped(characters)}]" for stem, characters in last.items()) + ")"


def _escaped(text: str) -> str:
    return "".join(f"\\x{{{ord(character):x}}}" for character in text)


def _reason(matcher: LLMatcher) -> str:
    """Return the error of the library in one line, without excerpts; empty if only no token fits."""
    words = re.split(r"\n\s*\d+ \| |\n<", matcher.get_error())[0]
    words = words.rsplit("\nerror: ", 1)[-1]
    words = re.sub(r"(?s)^at \d+\(\d+\): (invalid regex .*\(in regex\): |failed to compile JSON schema: )?", "", words)
    words = " ".join(re.sub(r"(?s); \w+ in regex /.*", "", words).split())[:200]
    return "" if words == "NoExtensionBias" else words
