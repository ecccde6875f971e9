"""Tokenizers learned from text, ready for documents and chats: byte-level BPE, WordPiece, Unigram; and plain bytes."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bdh.data.encoding import clean, pieces
from bdh.data.tokenizer import END_OF_TEXT, byte_level_symbols, bytes_backend
from bdh.errors import BDHError

Kind = Literal["bpe", "wordpiece", "unigram", "bytes"]

START_OF_TEXT, PADDING, UNKNOWN = "<|startoftext|>", "<|pad|>", "<|unk|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, START_OF_TEXT, PADDING, UNKNOWN, TURN_START, TURN_END)

# `generation` marks what the assistant writes, for trainers that learn from that alone.
CHAT_TEMPLATE = r"""
{%- for message in messages %}
    {%- if message['role'] is not string %}
        {{- raise_exception('message ' ~ loop.index ~ ' has no role, or one that is not text') }}
    {%- endif %}
    {%- if message['content'] is not string %}
        {{- raise_exception('message ' ~ loop.index ~ ' has no content, or one that is not text') }}
    {%- endif %}
    {{- '<|im_start|>' ~ message['role'] ~ '\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] ~ '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] ~ '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""".strip()

# What one token may span at most: a word, with the one space or sign before it | up to three digits | signs, with the
# line end after them and the indentation after that | empty lines | spaces. The last space before something goes with
# what follows it. Every repetition has a limit, because the library panics where it has to step back over millions of
# spaces, and because words without an end would make training slow.
SPLIT = "|".join(
    (
        r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]{1,64}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{M}\p{N}]{1,64}(?:[\r\n]\s{0,254}(?:(?<=[\r\n])|(?!\S)))?",
        r"\s{0,255}[\r\n](?=\S)",
        r"\s{1,255}(?!\S)",
        r"\s",
    )
)

MAX_TOKENS = 1 << 20  # the library reserves memory for all at once, and where there is not enough it ends the process
LONGEST_WORD = 100  # characters; WordPiece takes a longer word for an unknown one
CONTINUED = "##"
WORD_START = "\x01"  # a control character: the normalizer of WordPiece removes all of them from the text


def train_tokenizer(
    kind: Kind,
    texts: Iterable[str],
    vocab_size: int,
    min_frequency: int = 2,
    show_progress: bool = False,
    length: int | None = None,
) -> PreTrainedTokenizerFast:
    """Learns a tokenizer. The same texts give the same tokenizer, to the byte of its file.

    `bpe` and `bytes` give every text back exactly. `unigram` does if it has learned from each of the text's characters
    ("▁" comes back as a space). `wordpiece` gives back words and signs with a space between them. The six special
    tokens have the last six ids; none is added to a text by itself.

    Args:
        kind: `bpe` is byte-level; `wordpiece` is cased; `bytes` learns nothing: it is `byte_tokenizer()`, whose id 255
            is the end of a text, with the other special tokens after it.
        texts: Read once, as it comes; a long text is learned from in pieces. Not read for `bytes`.
        vocab_size: Tokens at most, the special ones included; fewer come out where the texts hold no more. Not read for
            `bytes`.
        min_frequency: How often a pair of tokens must occur to become one (`bpe` and `wordpiece`).
        show_progress: Whether to draw a bar on stderr.
        length: Number of texts, for the bar.

    Raises:
        BDHError: The texts are empty, vocab_size is too small for their characters or too large, or min_frequency is
            below 1.
        TypeError: A text is not a str.
    """
    if kind == "bytes":
        return _finish(bytes_backend(end_of_text=True))
    if vocab_size > MAX_TOKENS:
        raise BDHError(f"vocab_size is {vocab_size}; it must be at most {MAX_TOKENS}")
    if min_frequency < 1:
        raise BDHError(f"min_frequency is {min_frequency}; it must be at least 1")
    learned = {"bpe": _bpe, "wordpiece": _wordpiece, "unigram": _unigram}[kind]
    return _finish(learned(_Texts(texts, show_progress, length), vocab_size, min_frequency))


@dataclass(frozen=True)
class _Texts:
    """The texts on their way to the library, which takes a few hundred pieces of them at a time."""

    texts: Iterable[str]
    show_progress: bool
    length: int | None

    def teach(
        self, tokenizer: Tokenizer, trainer: trainers.Trainer, at_end: Callable[[set[str]], None] | None = None
    ) -> dict[str, Any]:
        """Trains the tokenizer's model; returns it as it stands in tokenizer.json.

        `at_end` gets all characters of the texts when they have been read, before the library starts to learn.

        Raises:
            BDHError: There is no text.
        """
        tokenizer.train_from_iterator(self._pieces(at_end), trainer=trainer, length=self.length)
        model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
        return model

    def _pieces(self, at_end: Callable[[set[str]], None] | None) -> Iterator[str]:
        characters: set[str] = set()
        piece = ""
        for text in self.texts:
            if not isinstance(text, str):
                raise TypeError(f"texts must be str, not {type(text).__name__}")
            for piece in pieces(clean(text)):
                if at_end:
                    characters.update(piece)
                yield piece
        if not piece:
            raise BDHError("there is no text to learn a tokenizer from")
        if at_end:
            at_end(characters)


def _check_room(vocab_size: int, needed: int, reason: str) -> None:
    """Raises BDHError unless `needed` tokens and the special ones fit."""
    minimum = needed + len(SPECIAL_TOKENS)
    if vocab_size < minimum:
        raise BDHError(f"vocab_size is {vocab_size}; it must be at least {minimum}{reason}")


def _bpe(texts: _Texts, vocab_size: int, min_frequency: int) -> Tokenizer:
    _check_room(vocab_size, 256, " for the bytes and the special tokens")
    tokenizer = bytes_backend()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        min_frequency=min_frequency,
        show_progress=texts.show_progress,
        initial_alphabet=byte_level_symbols(),
    )
    texts.teach(tokenizer, trainer)
    return tokenizer


def _wordpiece(texts: _Texts, vocab_size: int, min_frequency: int) -> Tokenizer:
    """WordPiece, its tokens learned as those of a BPE whose words begin with a mark.

    The library's own trainer numbers the "##" characters in the order of a hash table, which differs from run to run,
    and decides between equally frequent pairs by number.
    """
    normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False
    )
    words = pre_tokenizers.BertPreTokenizer()
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizer
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            words,
            pre_tokenizers.Split(Regex(rf"\S{{{LONGEST_WORD + 1},}}"), "removed"),
            pre_tokenizers.Metaspace(replacement=WORD_START, prepend_scheme="always", split=False),
        ]
    )
    # More than are needed: the mark, and the mark with one character, which is in the alphabet below already.
    trainer = trainers.BpeTrainer(
        vocab_size=2 * max(vocab_size, 0), min_frequency=min_frequency, show_progress=texts.show_progress
    )
    vocabulary = texts.teach(learner, trainer)["vocab"]
    symbols = sorted(vocabulary, key=vocabulary.__getitem__)  # in the order they were learned
    alphabet = [symbol for symbol in symbols if len(symbol) == 1 and symbol != WORD_START]
    if not alphabet:
        raise BDHError(f"there is no word of at most {LONGEST_WORD} characters in the texts to learn a tokenizer from")

    def continues(character: str) -> bool:  # signs and Chinese characters are words of their own
        return len(words.pre_tokenize_str(normalizer.normalize_str(f"a{character}a"))) == 1

    tokens = alphabet + [CONTINUED + character for character in alphabet if continues(character)]
    _check_room(vocab_size, len(tokens), f" for the {len(alphabet)} characters of the texts and the special tokens")
    for symbol in symbols:
        start = symbol.startswith(WORD_START)
        if len(symbol) > 1 + start:
            tokens.append(symbol[1:] if start else CONTINUED + symbol)
    tokens = tokens[: vocab_size - len(SPECIAL_TOKENS)] + list(SPECIAL_TOKENS)
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=UNKNOWN, max_input_chars_per_word=LONGEST_WORD))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUED, cleanup=False)
    return tokenizer


def _unigram(texts: _Texts, vocab_size: int, min_frequency: int) -> Tokenizer:
    """Unigram with "▁" for spaces. No space is put before a text, so that texts can be encoded in pieces."""
    room = vocab_size - len(SPECIAL_TOKENS)
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="never", split=False),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never", split=False)

    def check(characters: set[str]) -> None:
        needed = len({character.replace(" ", "▁") for character in characters})
        _check_room(vocab_size, needed, f" for the {needed} characters of the texts and the special tokens")

    # A hundred too many: the library never ends where just the characters fit.
    trainer = trainers.UnigramTrainer(
        vocab_size=max(room, 0) + 100, show_progress=texts.show_progress, special_tokens=[]
    )
    scores = texts.teach(tokenizer, trainer, check)["vocab"]
    special = [(token, 0.0) for token in SPECIAL_TOKENS]
    learned = _settled(scores, room)
    tokenizer.model = models.Unigram(learned + special, len(learned) + SPECIAL_TOKENS.index(UNKNOWN), False)
    return tokenizer


def _settled(scores: list[tuple[str, float]], room: int) -> list[tuple[str, float]]:
    """All characters and the best other tokens with their scores (log-probabilities), without what differs by chance.

    The library adds numbers up in the order of a hash table, which differs from run to run, and so do the last digits
    of the scores. Characters that are rare alone get the lowest score plus 0, 1, 2, … times 0.0001, in that order.
    """
    lowest = min(score for _, score in scores)
    by_chance = lowest + 1e-4 * (sum(len(token) == 1 for token, _ in scores) + 0.5)
    settled = [(token, round(lowest if len(token) == 1 and score < by_chance else score, 4)) for token, score in scores]
    settled.sort(key=lambda entry: (len(entry[0]) > 1, -entry[1], entry[0]))
    return sorted(settled[:room], key=lambda entry: (-entry[1], entry[0]))


def _finish(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer with its special tokens and the chat template."""
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    finished = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        eos_token=END_OF_TEXT,
        bos_token=START_OF_TEXT,
        pad_token=PADDING,
        unk_token=UNKNOWN,
        extra_special_tokens=[TURN_START, TURN_END],
    )
    finished.chat_template = CHAT_TEMPLATE
    return finished
