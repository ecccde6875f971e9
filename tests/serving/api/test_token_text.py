"""The tokens and log-probabilities in an answer are those of its text."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bdh.data.tokenizer import byte_level_symbols
from bdh.inference.detokenizer import Detokenizer
from bdh.inference.llm import LLM
from bdh.inference.outputs import Delta, TokenLogprob
from bdh.inference.prompt_encoder import PromptEncoder
from bdh.inference.sampling_params import SamplingParams
from bdh.serving.api.completions import locate_tokens
from bdh.serving.api.logprobs import LogprobWriter, TokenTexts
from bdh.serving.api.response_builder import ChatResponseBuilder, CompletionResponseBuilder, ResponseBuilder
from tests.inference.small import BYTES, CHAT, PLAIN_BYTES, small_llm

WORDS = [b" Hi", b"  ", b" there", b"\n\nUs", b"er:"]


def words_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, the words above, and an end token."""
    symbols = byte_level_symbols()
    vocabulary = {symbol: byte for byte, symbol in enumerate(symbols)}
    for word in WORDS:
        vocabulary.setdefault("".join(symbols[byte] for byte in word), len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, eos_token="<|end|>", pad_token="<|pad|>"
    )


TOKENIZER = words_tokenizer()
TEXTS = TokenTexts(TOKENIZER, len(TOKENIZER))
END, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
HI, SPACES, THERE, LEFT, RIGHT = (256 + number for number in (0, 1, 2, 3, 4))


def deltas_of(tokens: list[int], stop: Sequence[str], strip: bool, together: int) -> list[Delta]:
    """What comes of some tokens, the last of which ends the continuation; so many tokens at a time."""
    text, deltas = Detokenizer(TOKENIZER, stop, strip), []
    pieces: list[str] = []
    since: list[int] = []
    for number, token in enumerate(tokens, start=1):
        since.append(token)
        pieces.append("" if token == END else text.step(token))
        last = number == len(tokens) or text.stopped
        if last:
            pieces.append(text.end())
        if last or number % together == 0:
            logprobs = [TokenLogprob(one, -1.0) for one in since]
            deltas.append(Delta("".join(pieces), 0, "stop" if last else None, since, logprobs))
            pieces, since = [], []
        if last:
            break
    return deltas


def written(
    tokens: list[int], stop: Sequence[str] = (), strip: bool = True, together: int = 1
) -> tuple[str, list[Any]]:
    """The text of an answer, and its tokens as a chat reports them."""
    builder = ChatResponseBuilder("tiny", TEXTS)
    builder.logprobs[0] = LogprobWriter(TEXTS, frozenset([END]), strip)
    pieces = choices_of(builder, deltas_of(tokens, stop, strip, together))
    return (
        "".join(piece["delta"].get("content", "") for piece in pieces),
        [one for piece in pieces for one in piece["logprobs"]["content"]],
    )


def choices_of(builder: ResponseBuilder, deltas: list[Delta]) -> list[dict[str, Any]]:
    choices = [choice for delta in deltas for choice in builder.chunk_choices([delta])]
    return [choice.model_dump(exclude_unset=True) for choice in choices]


@pytest.mark.parametrize(
    ("tokens", "text", "shown"),
    [
        ([HI, THERE, END], "Hi there", ["Hi", " there"]),  # a token is cut where the answer begins
        ([SPACES, 32, HI, END], "Hi", ["Hi"]),
        ([SPACES, 32, 32, 10, 32], "    \n ", ["  ", " ", " ", "\n", " "]),  # nothing but white space
        ([HI, LEFT, RIGHT], "Hi", ["Hi"]),  # the stop string
        ([HI, 97, LEFT, 97, END], "Hia\n\nUsa", ["Hi", "a", "\n\nUs", "a"]),  # half of one
        ([SPACES, LEFT, RIGHT], "  ", ["  "]),
        ([PAD, HI, PAD, 97, END], "Hia", ["<|pad|>", "Hi", "<|pad|>", "a"]),
        ([END], "", []),
    ],
)
@pytest.mark.parametrize("together", [1, 2, 9])
def test_tokens_are_those_of_the_text(tokens: list[int], text: str, shown: list[str], together: int) -> None:
    content, logprobs = written(tokens, ["\n\nUser:"], together=together)
    assert content == text and [one["token"] for one in logprobs] == shown
    assert all(one["bytes"] is None or bytes(one["bytes"]).decode() == one["token"] for one in logprobs)


def test_a_token_is_cut_where_a_stop_string_begins() -> None:
    content, logprobs = written([HI, THERE, THERE], ["ere"], strip=False)
    assert content == " Hi th" and [one["token"] for one in logprobs] == [" Hi", " th"]


@given(
    st.lists(st.sampled_from([*range(256, 256 + len(WORDS)), *b" \nHa\xc3\xff"]), max_size=12),
    st.lists(st.sampled_from([" ", "th", "er:", "H\n", "\n\nUser:", "\ufffd"]), max_size=2),
    st.booleans(),
    st.integers(1, 4),
)
def test_bytes_of_the_tokens_are_the_text(tokens: list[int], stop: list[str], strip: bool, together: int) -> None:
    content, logprobs = written([*tokens, END], stop, strip, together)
    read = b"".join(bytes(one["bytes"] or []) for one in logprobs).decode("utf-8", "replace")
    if "\ufffd" not in read + content:  # of several bytes that are one mark, each is reported
        assert read == content
    assert (content == "") == (logprobs == [])


@pytest.mark.parametrize("together", [1, 3, 20])
def test_offsets_of_a_completion(together: int) -> None:
    tokens = [97, 0xE2, 34, 0xC3, 0xA9, HI, PAD, 0xE2, END]
    builder = CompletionResponseBuilder("tiny", TEXTS)
    builder.logprobs[0] = LogprobWriter(TEXTS, frozenset([END]), offset=10, report_end=True)
    pieces = choices_of(builder, deltas_of(tokens, [], False, together))
    text = "".join(piece["text"] for piece in pieces)
    assert text == 'a\ufffd"é Hi\ufffd'
    offsets = [start for piece in pieces for start in piece["logprobs"]["text_offset"]]
    assert offsets == [10, 11, 12, 13, 13, 14, 17, 17, 18]
    names = [name for piece in pieces for name in piece["logprobs"]["tokens"]]
    assert names == ["a", "bytes:\\xe2", '"', "bytes:\\xc3", "bytes:\\xa9", " Hi", "<|pad|>", "bytes:\\xe2", "<|end|>"]


def test_offsets_in_a_prompt_that_its_tokens_do_not_spell() -> None:
    """A vocabulary that loses upper case and what it does not know: offsets are those of the text that is echoed."""
    names = ["[UNK]", "the", "dragon", "##s"]
    tokenizer = Tokenizer(models.WordPiece({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    texts = PromptEncoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer), 4, ())
    text = "The   Dragons? the"
    asked = texts.text_request(text)
    assert list(asked.request.prompt) == [1, 2, 3, 0, 1]
    placed = locate_tokens(texts, asked.prompt, [TokenLogprob(token, -1.0) for token in asked.request.prompt])
    assert [one.offset for one in placed] == [0, 6, 12, 13, 15]
    given_as_ids = texts.text_request([1, 2, 3])
    placed = locate_tokens(texts, given_as_ids.prompt, [TokenLogprob(token, -1.0) for token in [1, 2, 3]])
    assert given_as_ids.prompt == "the dragons" and [one.offset for one in placed] == [0, 3, 10]


@pytest.mark.parametrize("bias", [{}, {32: 100.0}, {10: 100.0}])
@pytest.mark.parametrize("tokenizer", [BYTES, CHAT])
def test_chats_with_a_template_and_without(tokenizer: PreTrainedTokenizerFast, bias: dict[int, float]) -> None:
    """An answer of white space alone is not empty, and an answer's tokens do not begin before it."""
    llm: LLM = small_llm(tokenizer)
    params = SamplingParams(max_new_tokens=5, logprobs=0, seed=3, logit_bias=bias)
    asked = llm.chat_request([{"role": "user", "content": "Hi"}], params)
    [(_, completion)] = llm.run([asked])
    texts = TokenTexts(tokenizer, llm.vocab_size)
    builder = ChatResponseBuilder("tiny", texts)
    builder.add_logprobs(asked)
    whole = builder.choice(completion.raise_for_error().choices[0]).model_dump()
    content, logprobs = whole["message"]["content"], whole["logprobs"]["content"]
    read = b"".join(bytes(one["bytes"] or []) for one in logprobs)
    assert read.decode("utf-8", "replace") == content
    if bias:
        assert content == chr(next(iter(bias))) * 5 and len(logprobs) == 5
    assert content == completion.text


def test_the_end_of_a_text_is_no_byte() -> None:
    """In a vocabulary of bytes, token 255 is the end of a text; in those of earlier versions the byte 0xFF."""
    texts, plain = (TokenTexts(tokenizer, 256) for tokenizer in (BYTES, PLAIN_BYTES))
    assert texts.top_logprob(255, -1.0).model_dump() == {"token": "<|endoftext|>", "logprob": -1.0, "bytes": None}
    assert plain.top_logprob(255, -1.0).model_dump() == {"token": "bytes:\\xff", "logprob": -1.0, "bytes": [255]}
    assert texts.text(254) == "bytes:\\xfe" and texts.text(97) == "a" and texts.longest == plain.longest == 1


@pytest.mark.parametrize("dialect", ["completions", "chat"])
def test_tokens_and_text_agree_at_the_end_of_a_text(dialect: str) -> None:
    llm = small_llm(BYTES)
    params = SamplingParams(regex="(yes)+", seed=1, logit_bias={255: 100.0}, logprobs=1)
    (choice,) = llm.generate("a", params)[0].choices
    texts = TokenTexts(BYTES, 256)
    builder: ResponseBuilder = ChatResponseBuilder("tiny", texts)
    if dialect == "completions":
        builder = CompletionResponseBuilder("tiny", texts, top_logprobs=True)
    builder.logprobs[0] = LogprobWriter(texts, frozenset(llm.end_token_ids), report_end=builder.reports_end_tokens)
    shown = builder.choice(choice).model_dump()
    assert shown["finish_reason"] == "stop"
    if dialect == "chat":
        assert shown["message"]["content"] == "yes"
        assert [one["token"] for one in shown["logprobs"]["content"]] == ["y", "e", "s"]
    else:
        assert shown["text"] == "yes" and shown["logprobs"]["tokens"] == ["y", "e", "s", "<|endoftext|>"]
        assert shown["logprobs"]["text_offset"] == [0, 1, 2, 3]
