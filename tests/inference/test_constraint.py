"""Constrained output: everything allowed leads to a text that fits, and everything that fits is allowed."""

import json
import random
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from bdh.data.tokenizer import IncrementalDecoder, byte_level_symbols, byte_tokenizer
from bdh.data.vocabulary import SPECIAL_TOKENS, train_tokenizer
from bdh.errors import BDHError
from bdh.inference.constraint import SEARCHED, Constraint, Grammars
from bdh.inference.sampling_params import SamplingParams

KINDS = ("plain", "byte", "bytes", "bpe", "unigram", "wordpiece")  # plain: bytes without an end token
WRITE_ALL = ("plain", "byte", "bytes", "bpe")
TEXT = """The red dragon hatches: {"name": "Zoë", "age": 21, "tags": ["é", "龍"]} and watches. Zoë, 龍 and é watch.
0123456789 dragons hatch (x) [y] {z} \\ + - . , : true false null. The dragon watches; a b c d e f g h i j k l m n
o p q r s t u v w x y z, A B C D E F G H I J K L M N O P Q R S T U V W X Y Z. """

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "colour": {"enum": ["red", "Zoë 龍", 7, None]},
        "code": {"type": "string", "pattern": "^[A-C]{2}-[0-9]+$", "maxLength": 7},
        "where": {
            "type": "object",
            "properties": {"x": {"type": "integer", "minimum": -5, "maximum": 120}, "y": {"type": "boolean"}},
            "required": ["x"],
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": {"anyOf": [{"type": "null"}, {"const": "é"}]}, "maxItems": 4},
    },
    "required": ["colour", "where"],
    "additionalProperties": False,
}
ANY_KEYS = {"type": "object", "additionalProperties": {"enum": [1, True]}, "minProperties": 1, "maxProperties": 3}


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    sizes = {"bpe": 330, "unigram": 180, "wordpiece": 260}
    if kind in ("plain", "byte"):
        return byte_tokenizer(end_of_text=kind == "byte")
    return train_tokenizer(kind, [TEXT], sizes.get(kind, 0))  # type: ignore[arg-type]


@cache
def grammars_of(kind: str) -> Grammars:
    """For a model that has more tokens than the tokenizer."""
    return Grammars(tokenizer_of(kind), len(tokenizer_of(kind)) + 9)


def constrain(kind: str, **params: Any) -> Constraint:
    constraint = grammars_of(kind).constraint(SamplingParams(**params))
    assert constraint is not None
    return constraint


def ids_of(allowed: torch.Tensor) -> list[int]:
    return [int(token) for token in allowed.nonzero().flatten()]


def walk(kind: str, constraint: Constraint, seed: int) -> str:
    """A text of tokens drawn uniformly from those allowed, as the tokenizer decodes it."""
    tokenizer, draw = tokenizer_of(kind), random.Random(seed)
    ids: list[int] = []
    while not constraint.is_complete:
        assert len(ids) < 1500
        token = draw.choice(ids_of(constraint.allowed()))
        constraint.accept(token)
        ids.append(token)
    assert constraint.may_end
    text = tokenizer.decode(ids, skip_special_tokens=True)
    decoder = IncrementalDecoder(tokenizer)
    assert "".join(map(decoder.step, ids)) + decoder.end() == text
    return text


REGEXES = (
    r"[a-z ]{3,12}\.?",
    r"(red|é|龍)( (dragon|Zoë)){1,3}",
    r"^(yes|no)$",
    r"[A-Z][a-zé]{0,9}( [a-z]{1,5}){2}",
    r"([0-9]{2} )?Zoë",
    r"龍?",
    r"",
    r"(?s:.{4})",
)
TIGHT = (
    r"[0-9]{3}-[0-9]{4}",
    r"a/\"\\b\nc",
    r"([0-9]{2}-)?[a-z]{2}(,[é龍]){2}",
    r"[^a-z]{5}",
    r"\d{3}\\\D[^\d]\S:[+-]?[\d.]",
)


@pytest.mark.parametrize(
    ("kind", "regex"),
    [
        *((kind, regex) for kind in KINDS for regex in REGEXES),
        *((kind, regex) for kind in WRITE_ALL for regex in TIGHT),
        ("unigram", TIGHT[0]),
        ("unigram", TIGHT[2]),
        ("wordpiece", r"([0-9]{2}-)?[a-z]{2}( , [é龍]){2}"),  # its signs have a space before them, so no "12-"
    ],
)
def test_whatever_is_allowed_leads_to_a_match(kind: str, regex: str) -> None:
    for seed in range(6):
        text = walk(kind, constrain(kind, regex=regex), seed)
        assert re.fullmatch(regex, text), text


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "wordpiece"])
@pytest.mark.parametrize("schema", [SCHEMA, ANY_KEYS], ids=["nested", "any keys"])
def test_whatever_is_allowed_leads_to_json_of_the_schema(kind: str, schema: dict[str, Any]) -> None:
    for seed in range(6):
        text = walk(kind, constrain(kind, json_schema=schema), seed)
        found = json.loads(text)
        jsonschema.validate(found, schema)
        if schema is SCHEMA:  # names that are not in the schema can come twice, and are lost then
            assert json.dumps(json.loads(text), ensure_ascii=False) == text.replace(r"\/", "/")


def test_wordpiece_writes_json_with_its_spaces() -> None:
    schema = {"type": "array", "items": {"type": ["integer", "null"]}, "minItems": 2, "maxItems": 3}
    for seed in range(6):
        text = walk("wordpiece", constrain("wordpiece", json_schema=schema), seed)
        jsonschema.validate(json.loads(text), schema)
        assert " ," in text and "  " not in text
    with pytest.raises(BDHError, match="this tokenizer can write"):  # a space would come before the name's last quote
        constrain("wordpiece", json_schema=SCHEMA)


def test_json_is_written_as_json_dumps_does() -> None:
    value = {"a": 1, "b": [1, "x y"], "c": {}, 'é // /x/ # \\ " \n': None}
    for given_as in ({"const": value}, json.dumps({"const": value})):
        assert walk("byte", constrain("byte", json_schema=given_as), 0) == json.dumps(value, ensure_ascii=False)
    assert ids_of(constrain("byte", json_schema="true").allowed()) == sorted(b'"-0123456789[fnt{')


# ------------------------------------------------------------------------------------ exactly what fits, by brute force


def forms_of(kind: str) -> tuple[dict[int, bytes], dict[int, bytes]]:
    """What each token that is not special stands for, as the first of a text and after others."""
    tokens = {i: token for token, i in tokenizer_of(kind).get_vocab().items() if token not in SPECIAL_TOKENS}
    byte_of = {symbol: byte for byte, symbol in enumerate(byte_level_symbols())}
    later: Callable[[str], bytes] = {
        "unigram": lambda token: token.replace("▁", " ").encode(),
        "wordpiece": lambda token: (token[2:] if token.startswith("##") else " " + token).encode(),
    }.get(kind, lambda token: bytes(byte_of[symbol] for symbol in token))
    first = {i: token.encode() if kind == "wordpiece" else later(token) for i, token in tokens.items()}
    return first, {i: later(token) for i, token in tokens.items()}


def viable_beginnings(texts: set[bytes], later: Mapping[int, bytes]) -> set[bytes]:
    """The beginnings of texts that tokens can complete to one of them."""
    beginnings = {text[:length] for text in texts for length in range(len(text) + 1)}
    viable: set[bytes] = set()
    for beginning in sorted(beginnings, key=len, reverse=True):
        if beginning in texts or any(form and beginning + form in viable for form in later.values()):
            viable.add(beginning)
    return viable


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    texts=st.sets(
        st.lists(st.sampled_from(["a", "dragon", "hatch", "é", "龍", "😀", " ", ".", "-", "12", "##"]), max_size=5).map(
            "".join
        ),
        min_size=1,
        max_size=4,
    ),
    data=st.data(),
)
def test_a_token_is_allowed_exactly_if_a_text_can_follow(kind: str, texts: set[str], data: st.DataObject) -> None:
    first, later = forms_of(kind)
    wanted = {text.encode() for text in texts}
    viable = viable_beginnings(wanted, later)
    viable_first = {token for token, form in first.items() if form in viable}
    regex = "|".join(re.escape(text) for text in sorted(texts))
    if not viable_first and b"" not in wanted:
        with pytest.raises(BDHError, match="no text fits it"):
            constrain(kind, regex=regex)
        return
    constraint, text, forms, end = constrain(kind, regex=regex), b"", first, tokenizer_of(kind).eos_token_id
    while True:
        fitting = {token for token, form in forms.items() if text + form in viable}
        ends = {end} if text in wanted and end is not None else set()
        allowed = set(ids_of(constraint.allowed()))
        assert allowed == fitting | ends
        assert constraint.may_end == (text in wanted)
        assert constraint.is_complete == (text in wanted and not fitting)
        if not fitting:
            return
        token = data.draw(st.sampled_from(sorted(fitting)))
        constraint.accept(token)
        text, forms = text + forms[token], later


# --------------------------------------------------------------------------------------------- ends, and special tokens


def test_the_end_token_is_allowed_exactly_where_the_text_may_end() -> None:
    end = tokenizer_of("bpe").eos_token_id
    constraint = constrain("bpe", regex="ab?")
    assert end not in ids_of(constraint.allowed()) and not constraint.is_complete
    constraint.accept(tokenizer_of("bpe").get_vocab()["a"])
    assert end in ids_of(constraint.allowed()) and not constraint.is_complete
    other = constraint.copy()
    constraint.accept(end)
    assert constraint.is_complete and ids_of(constraint.allowed()) == []
    other.accept(tokenizer_of("bpe").get_vocab()["b"])
    assert other.is_complete and ids_of(other.allowed()) == [end]


def test_without_an_end_token_a_text_goes_on_where_it_can() -> None:
    constraint = constrain("plain", regex="a+")
    for _ in range(20):
        assert ids_of(constraint.allowed()) == [ord("a")] and not constraint.is_complete
        constraint.accept(ord("a"))
    constraint = constrain("plain", regex="ab?")
    constraint.accept(ord("a"))
    assert constraint.may_end and not constraint.is_complete and ids_of(constraint.allowed()) == [ord("b")]
    constraint.accept(ord("b"))
    assert constraint.is_complete and ids_of(constraint.allowed()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_and_unknown_ids_are_never_allowed(kind: str) -> None:
    tokenizer, constraint = tokenizer_of(kind), constrain(kind, regex=r"(?s:.*)")
    plain = {token for token in tokenizer.get_vocab().values() if token not in tokenizer.all_special_ids}
    ends = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    for _ in range(2):
        allowed = constraint.allowed()
        assert allowed.shape == (len(tokenizer) + 9,) and allowed.dtype == torch.bool and allowed.device.type == "cpu"
        assert set(ids_of(allowed)) <= plain | ends
        constraint.accept(min(plain & set(ids_of(allowed))))
    if kind not in WRITE_ALL:  # those have tokens for bytes that no text has
        assert set(ids_of(allowed)) == plain | ends


def test_ids_with_gaps_and_more_tokens_than_the_model_has() -> None:
    backend = Tokenizer(
        models.BPE(vocab={symbol: 3 * byte for byte, symbol in enumerate(byte_level_symbols())}, merges=[])
    )
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    constraint = Grammars(tokenizer, 3 * ord("e") + 1).constraint(SamplingParams(regex="[a-z]{2}"))
    assert constraint is not None
    for _ in range(2):
        assert ids_of(constraint.allowed()) == [3 * byte for byte in b"abcde"]
        constraint.accept(3 * ord("c"))
    assert constraint.is_complete


def test_constraints_of_one_grammar_go_their_own_ways() -> None:
    one, other = (constrain("byte", regex="ab|cd") for _ in range(2))
    one.accept(ord("a"))
    assert ids_of(one.allowed()) == [ord("b")] and ids_of(other.allowed()) == [ord("a"), ord("c")]
    assert ids_of(constrain("byte", regex="ab|cd").allowed()) == [ord("a"), ord("c")]
    assert grammars_of("byte").constraint(SamplingParams()) is None
    with pytest.raises(ValueError, match="token 100 does not fit"):
        one.accept(ord("d"))
    one.accept(ord("b"))
    assert one.is_complete


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"regex": "["}, "unclosed character class"),
        ({"regex": "a\n("}, "unclosed group"),
        ({"regex": "a\\"}, "backslash"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"\bred\b"}, "lookarounds not supported"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"regex": "\ud800"}, "surrogates"),
        ({"regex": r"[a&&b]"}, "no text fits it"),
        ({"json_schema": {"type": "dragon"}}, "Invalid type: dragon"),
        ({"json_schema": '{"properties": 3}'}, "properties must be an object"),
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum (5) is greater than maximum (3)"),
        ({"json_schema": {"allOf": [{"type": "string"}, {"type": "null"}]}}, "incompatible types"),
        ({"json_schema": {"not": {"type": "string"}}}, "Unimplemented keys"),
        ({"json_schema": {"$ref": "#/$defs/missing"}}, "does not exist"),
        ({"json_schema": {"$ref": "https://example.org/schema"}}, "not present"),
        ({"json_schema": {"type": "string", "pattern": "("}}, "unclosed group"),
        ({"json_schema": {"type": "string", "format": "dragon"}}, "Unknown format"),
        ({"json_schema": {"x-guidance": {"lenient": True}, "not": {}}}, "Unimplemented keys"),
        ({"json_schema": "false"}, "Unsatisfiable"),
    ],
    ids=str,
)
def test_what_cannot_be_followed_is_refused(asked: dict[str, Any], reason: str) -> None:
    with pytest.raises(BDHError, match=re.escape(reason)) as raised:
        constrain("byte", **asked)
    message = str(raised.value)
    assert message.startswith(next(iter(asked))) and len(message.splitlines()) == 1 and len(message) < 350


@pytest.mark.parametrize("where", ["regex", "pattern", "patternProperties"])
def test_a_very_long_expression_is_refused(where: str) -> None:
    long = "a?" * 2049  # as long as it takes: memory and time grow with the square
    schema: dict[str, Any] = {"items": [{"patternProperties": {long: {}}} if where != "pattern" else {"pattern": long}]}
    with pytest.raises(BDHError, match="it has 4098 characters; an expression may have 4096"):
        constrain("byte", **({"regex": long} if where == "regex" else {"json_schema": schema}))


def test_a_tokenizer_without_the_characters() -> None:
    assert "~" not in TEXT
    with pytest.raises(BDHError, match="this tokenizer can write"):
        constrain("unigram", regex="a~")
    with pytest.raises(BDHError, match="this tokenizer can write"):
        constrain("unigram", json_schema={"enum": ["a~", "~"]})
    assert walk("unigram", constrain("unigram", regex="a~|b"), 0) == "b"
    constraint = constrain(
        "unigram", json_schema={"enum": ["a~", "b"]}
    )  # only a regex is followed to its end beforehand
    for token in '"a':
        constraint.accept(tokenizer_of("unigram").get_vocab()[token])
    for _ in range(2):
        with pytest.raises(BDHError, match="no token that fits"):
            constraint.allowed()


def decoded_by(decoder: decoders.Decoder, tokens: list[str]) -> Grammars:
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    backend.decoder = decoder
    return Grammars(PreTrainedTokenizerFast(tokenizer_object=backend), len(tokens))


@pytest.mark.parametrize(
    ("decoder", "tokens", "regex", "written"),
    [
        (decoders.Metaspace(), ["▁a", "▁b", "c"], "a bc", [0, 1, 2]),  # the first space is left out
        (decoders.WordPiece(cleanup=True), ["a", "##b", ".", "x"], r"ab\. x", [0, 1, 2, 3]),
        (
            decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            ),
            ["▁a", "<0xC3>", "<0xA9>", "<0x20>", "▁"],
            "a é",
            [0, 3, 1, 2],
        ),
    ],
    ids=["metaspace", "cleaned wordpiece", "byte fallback"],
)
def test_other_decoders(decoder: decoders.Decoder, tokens: list[str], regex: str, written: list[int]) -> None:
    constraint = decoded_by(decoder, tokens).constraint(SamplingParams(regex=regex))
    assert constraint is not None
    for token in written:
        assert token in ids_of(constraint.allowed())
        constraint.accept(token)
    assert constraint.is_complete


def test_a_decoder_that_looks_ahead_is_refused() -> None:
    grammars = decoded_by(decoders.BPEDecoder(suffix="</w>"), ["a</w>", "b", "c</w>"])
    with pytest.raises(BDHError, match="decoder"):
        grammars.constraint(SamplingParams(regex="a"))


@pytest.mark.parametrize("depth", [65, 300, 420, 900])
@pytest.mark.parametrize("as_text", [True, False])
def test_a_schema_that_is_nested_too_deep_is_refused(depth: int, as_text: bool) -> None:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    with pytest.raises(BDHError, match="json_schema is nested more than 64 levels deep"):
        SamplingParams(json_schema=json.dumps(schema) if as_text else schema)


def test_a_schema_as_deep_as_may_be_is_followed() -> None:
    schema: dict[str, Any] = {"const": 1}
    for _ in range(63):
        schema = {"type": "array", "items": schema, "minItems": 1}
    assert grammars_of("byte").constraint(SamplingParams(json_schema=schema)) is not None


@pytest.mark.parametrize("keyword", ["minLength", "minItems", "minProperties"])
def test_a_length_that_no_text_reaches_is_refused(keyword: str) -> None:
    for number in (10**6, 1e300):
        schema = {"anyOf": [{"type": "null"}, {"type": "string", keyword: number}]}
        with pytest.raises(BDHError, match=f"{keyword} is .*; it may be 65536"):
            grammars_of("wordpiece").constraint(SamplingParams(json_schema=schema))


def test_a_long_search_leaves_most_of_the_time_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread sleeps after each step of a search, once that has taken BRISK_SECONDS."""
    pauses: list[float] = []
    monkeypatch.setattr("bdh.inference.constraint.time.sleep", pauses.append)
    monkeypatch.setattr("bdh.inference.constraint.BRISK_SECONDS", 0.0)
    assert grammars_of("wordpiece").constraint(SamplingParams(json_schema={"type": "string", "minLength": 3000}))
    assert 1000 < len(pauses) <= SEARCHED and min(pauses) > 0
