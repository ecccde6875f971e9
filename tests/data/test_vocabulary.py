"""Learned tokenizers: exact, the same every time, and files that need no bdh."""

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import jinja2
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from bdh.data.corpora import pydoc, stdlib
from bdh.data.vocabulary import SPECIAL_TOKENS, Kind, train_tokenizer
from bdh.errors import BDHError
from tests.conftest import environment

KINDS: list[Kind] = ["bpe", "wordpiece", "unigram", "bytes"]
TEXTS = pydoc()[:30]
TOKENIZERS = {kind: train_tokenizer(kind, TEXTS, 600) for kind in KINDS}
CHAT = [{"role": "user", "content": "Who are you?\n"}, {"role": "assistant", "content": "A dragon — é, 龍, 🐉."}]
SAMPLES = [TEXTS[3], "naïve \x00\r\n\t 😀 שלום", "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>", "", " ", "x" * 300]

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
code = st.text(st.sampled_from(list("ab_1230 \t\n\r.,:()<|>#'\"\0é🐉")), max_size=60)  # meets the rules for cutting
spelled = st.lists(any_text | code | st.sampled_from(SPECIAL_TOKENS), max_size=6).map("".join)
every_kind = pytest.mark.parametrize("kind", KINDS)
exact_kind = pytest.mark.parametrize("kind", ["bpe", "bytes"])


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The ids of a text whose special tokens, if it spells any, are plain characters."""
    ids: list[int] = tokenizer(text, split_special_tokens=True).input_ids
    return ids


WITHOUT_BDH = """
import json, sys
sys.modules["bdh"] = None
try:
    import bdh
except ImportError:
    pass
else:
    raise SystemExit("bdh can be imported")
from transformers import AutoTokenizer
given = json.load(sys.stdin)
answers = {}
for folder in given["folders"]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = [tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token]
    answers[folder] = {
        "ids": [tokenizer(text).input_ids for text in given["samples"]],
        "plain": [tokenizer(text, split_special_tokens=True).input_ids for text in given["samples"]],
        "special": special + tokenizer.extra_special_tokens,
        "special_ids": tokenizer.convert_tokens_to_ids(special + tokenizer.extra_special_tokens),
        "chat": tokenizer.apply_chat_template(given["chat"], add_generation_prompt=True, tokenize=False),
        "chat_ids": tokenizer.apply_chat_template(given["chat"], return_dict=False),
        "size": len(tokenizer),
        "clean_up": tokenizer.clean_up_tokenization_spaces,
    }
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What a process that has no bdh makes of the saved tokenizers, by kind."""
    home = tmp_path_factory.mktemp("saved")
    for kind, tokenizer in TOKENIZERS.items():
        tokenizer.save_pretrained(str(home / kind))
    away = tmp_path_factory.mktemp("away")
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_BDH],
        input=json.dumps({"folders": [str(home / kind) for kind in KINDS], "samples": SAMPLES, "chat": CHAT}),
        cwd=away,
        env=environment(HF_HOME=str(away / "hf")),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "longer than" not in done.stderr  # no maximum length to warn about
    answers = json.loads(done.stdout)
    return lambda kind: answers[str(home / kind)]


@every_kind
def test_opens_elsewhere_and_does_the_same(kind: Kind, elsewhere: Callable[[str], dict[str, Any]]) -> None:
    tokenizer, answer = TOKENIZERS[kind], elsewhere(kind)
    assert answer["ids"] == [tokenizer(text).input_ids for text in SAMPLES]
    assert answer["plain"] == [encode(tokenizer, text) for text in SAMPLES]
    assert tuple(answer["special"]) == SPECIAL_TOKENS
    assert answer["special_ids"] == tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert answer["chat"] == tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert answer["chat_ids"] == tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert answer["size"] == len(tokenizer) and answer["clean_up"] is False


@every_kind
def test_special_tokens_are_the_last_ids_and_not_written_out(kind: Kind) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(len(tokenizer) - 6, len(tokenizer)))
    assert set(tokenizer.all_special_ids) == set(ids)
    assert tokenizer("".join(SPECIAL_TOKENS)).input_ids == ids
    assert tokenizer.decode(ids) and tokenizer.decode(ids, skip_special_tokens=True) == ""
    assert tokenizer("help", add_special_tokens=True).input_ids == tokenizer("help", add_special_tokens=False).input_ids
    assert ids[0] == tokenizer.eos_token_id and ids[1] == tokenizer.bos_token_id and ids[2] == tokenizer.pad_token_id
    assert not set(ids) & set(encode(tokenizer, "".join(SPECIAL_TOKENS)))


@every_kind
def test_size_is_as_asked(kind: Kind) -> None:
    assert len(TOKENIZERS[kind]) == (261 if kind == "bytes" else 600)
    assert set(TOKENIZERS[kind].get_vocab().values()) == set(range(len(TOKENIZERS[kind])))


@exact_kind
@given(text=spelled)
@example(text="a\n\n\n   b:\n\n  \n\tc (\r\n) 12345 \u3000x" + " " * 600 + "y" * 200 + "-" * 200)
def test_nothing_is_lost(kind: Kind, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    assert tokenizer.decode(encode(tokenizer, text)) == text
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@given(text=any_text)
def test_bytes_are_bytes(text: str) -> None:
    assert encode(TOKENIZERS["bytes"], text) == list(text.encode())


@every_kind
@given(text=spelled.filter(lambda text: "\ufffd" not in text))
def test_streams_hand_on_whole_characters_only(kind: Kind, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = encode(tokenizer, text)
    stream = DecodeStream(skip_special_tokens=True)
    steps = [stream.step(tokenizer.backend_tokenizer, token) or "" for token in ids]
    assert "".join(steps) == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in step for step in steps)


def test_wordpiece_and_unigram_give_back_what_they_can() -> None:
    for text in TEXTS:
        assert TOKENIZERS["unigram"].decode(encode(TOKENIZERS["unigram"], text)) == text
    tokenizer = TOKENIZERS["wordpiece"]
    assert tokenizer.decode(encode(tokenizer, " The\nassert  statement ")) == "The assert statement"
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, "statements"))[-1].startswith("##")
    assert encode(tokenizer, "the") != encode(tokenizer, "The")
    accented = train_tokenizer("wordpiece", ["le café est là, élève"], 100)
    assert accented.decode(encode(accented, "là élève")) == "là élève"
    assert accented.decode(encode(accented, "ñ")) == "<|unk|>"


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_the_same_texts_give_the_same_file(kind: Kind) -> None:
    files = {train_tokenizer(kind, iter(TEXTS), 600).backend_tokenizer.to_str() for _ in range(3)}
    assert files == {TOKENIZERS[kind].backend_tokenizer.to_str()}


@settings(max_examples=20)
@given(words=st.lists(st.text("abcdé", min_size=1, max_size=6), min_size=1, max_size=60), room=st.integers(0, 40))
def test_nor_does_chance_decide_between_equals(words: list[str], room: int) -> None:
    for kind in ("wordpiece", "unigram"):
        files = {train_tokenizer(kind, [" ".join(words)], 17 + room, 1).backend_tokenizer.to_str() for _ in range(3)}
        assert len(files) == 1 and len(train_tokenizer(kind, [" ".join(words)], 17 + room)) <= 17 + room


def test_chat_template() -> None:
    tokenizer = TOKENIZERS["bpe"]
    text = "<|im_start|>user\nWho are you?\n<|im_end|>\n<|im_start|>assistant\nA dragon — é, 龍, 🐉.<|im_end|>\n"
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == text
    asked = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert asked == text + "<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer.apply_chat_template(CHAT, return_dict=False)) == text


@pytest.mark.parametrize(
    ("message", "missing"),
    [({"role": "user"}, "content"), ({"content": "x"}, "role"), ({"role": "user", "content": None}, "content")],
)
def test_chat_messages_that_lack_something(message: dict[str, str | None], missing: str) -> None:
    with pytest.raises(jinja2.TemplateError, match=f"message 3 has no {missing}"):
        TOKENIZERS["bpe"].apply_chat_template([*CHAT, message], tokenize=False)


@pytest.mark.parametrize(
    ("kind", "texts", "size", "words"),
    [
        ("bpe", [], 600, "there is no text"),
        ("wordpiece", ["", ""], 600, "there is no text"),
        ("unigram", iter([""]), 600, "there is no text"),
        ("wordpiece", [" \n\0"], 600, "there is no word"),
        ("bpe", ["some text"], 261, "vocab_size is 261; it must be at least 262 "),
        ("bpe", ["some text"], -1, "vocab_size is -1; it must be at least 262 "),
        ("unigram", ["ab ba"], 8, "vocab_size is 8; it must be at least 9 for the 3 characters"),
        ("unigram", ["ab ba"], -9, "vocab_size is -9; it must be at least 9 for the 3 characters"),
        ("wordpiece", ["ab, ba"], 10, "vocab_size is 10; it must be at least 11 for the 3 characters"),
        ("wordpiece", ["ab, ba"], -9, "vocab_size is -9; it must be at least 11 for the 3 characters"),
        ("bpe", ["some text"], 10**12, "vocab_size is 1000000000000; it must be at most 1048576"),
    ],
)
def test_mistakes(kind: Kind, texts: list[str], size: int, words: str) -> None:
    with pytest.raises(BDHError, match=words) as caught:
        train_tokenizer(kind, texts, size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "minimum"), [("bpe", 262), ("unigram", 9), ("wordpiece", 11)])
def test_the_minimum_is_enough(kind: Kind, minimum: int) -> None:
    assert len(train_tokenizer(kind, ["ab,ba" if kind == "wordpiece" else "ab ba"] * 9, minimum)) == minimum


def test_other_mistakes() -> None:
    with pytest.raises(BDHError, match="min_frequency is 0; it must be at least 1"):
        train_tokenizer("bpe", ["x"], 300, min_frequency=0)
    with pytest.raises(TypeError, match="texts must be str, not bytes"):
        train_tokenizer("bpe", [b"x"], 300)  # type: ignore[list-item]

    def failing() -> Iterator[str]:
        yield "x"
        raise BDHError("the corpus has a hole")

    with pytest.raises(BDHError, match="the corpus has a hole"):
        train_tokenizer("bpe", failing(), 300)
    assert len(train_tokenizer("bpe", ["half a \ud83d pair"], 300)) >= 262


def test_little_text_gives_fewer_tokens() -> None:
    for kind in ("bpe", "wordpiece", "unigram"):
        for text in ("a", "ab", "a b", "the the the", "\u3000a\u2581"):
            assert 7 <= len(train_tokenizer(kind, ["", text], 5000)) < 300


def test_texts_are_read_as_they_come() -> None:
    tracemalloc.start()
    train_tokenizer("bpe", ("x" * 999_999 + str(i) for i in range(30)), 300)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_texts_without_an_end(kind: Kind) -> None:
    tokenizer = train_tokenizer(kind, ["a" * 5_000_000, " " * 5_000_000 + "end", "\n " * 1_000_000], 300)
    assert len(tokenizer) > 6


def test_millions_of_spaces_can_be_encoded() -> None:
    text = " " * 10_000_001 + "x"  # more than the library's regular expressions are ready to step back over
    assert len(TOKENIZERS["bpe"].backend_tokenizer.encode(text).ids) > 10_000


def test_python_source_has_three_bytes_a_token() -> None:
    files = stdlib()
    cut = len(files) * 9 // 10
    tokenizer = train_tokenizer("bpe", files[:cut:3], 4096)
    held_out = files[cut:]
    n_bytes, n_tokens = (sum(map(len, parts)) for parts in zip(*((f.encode(), encode(tokenizer, f)) for f in held_out)))
    assert len(tokenizer) == 4096 and n_bytes / n_tokens > 3.3
