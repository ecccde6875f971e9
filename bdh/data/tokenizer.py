"""Tokenizers: bytes, or any that `AutoTokenizer` opens; saved whole, and decoded as ids come."""

from itertools import takewhile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from bdh.atomic_files import replace_atomically
from bdh.data.source_errors import cache_problem, causes
from bdh.errors import BDHError, error_text, one_line


def byte_level_symbols() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary, by byte value.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_BYTE = 0xFF  # occurs in no UTF-8 text


def byte_tokenizer(end_of_text: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are the UTF-8 bytes of the text: a byte-level BPE of 256 symbols and no merges.

    It loses nothing, and saves as files that `AutoTokenizer` opens without `bdh`.

    Args:
        end_of_text: Whether id 255, which is no byte of UTF-8, is the special token `<|endoftext|>`, which begins and
            ends texts. False is for models that were trained without: there it is the byte 0xFF, and no token is
            special.
    """
    named = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT} if end_of_text else {}
    backend = bytes_backend(end_of_text)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **named)


def bytes_backend(end_of_text: bool = False) -> Tokenizer:
    """The bytes alone, for the `tokenizers` library: symbols without merges.

    Args:
        end_of_text: Whether `<|endoftext|>` takes the place of the byte 0xFF. It is not marked as special yet.
    """
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_level_symbols())}
    if end_of_text:
        vocabulary = {symbol: byte for symbol, byte in vocabulary.items() if byte != END_OF_TEXT_BYTE}
        vocabulary[END_OF_TEXT] = END_OF_TEXT_BYTE
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def load_tokenizer(name: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder or of a name on the hub; None and "bytes" are `byte_tokenizer()`, for a new model.

    Code that lies beside a tokenizer is not run.

    Raises:
        BDHError: There is none, it cannot be reached or read, or it is not of the fast kind.
    """
    if name is None or name == "bytes":
        return byte_tokenizer()
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "tokenizer.json").is_file():
        raise BDHError(f"data.tokenizer {name} has no tokenizer.json; give the folder of a tokenizer or of an export")
    if folder.is_file():
        raise BDHError(f"data.tokenizer {name} is a file; give the folder it lies in")
    try:
        if folder.is_dir():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
            use_once(tokenizer)
        else:
            from transformers import AutoTokenizer  # brings torch, which nothing else here needs

            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds; all mean the same to the user
        if not folder.is_dir() and (problem := cache_problem(causes(error))) is not None:
            raise BDHError(f"data.tokenizer {name} cannot be loaded from the hub: {problem}") from error
        where = "cannot be loaded" if folder.is_dir() else "is no folder here and cannot be loaded from the hub"
        raise BDHError(f"data.tokenizer {name} {where}: {one_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise BDHError(f"data.tokenizer {name} has no tokenizer.json; only tokenizers of the fast kind can be used")
    return tokenizer


def load_export_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that lies in an export. Raises BDHError."""
    if not (directory / "tokenizer.json").is_file():
        raise BDHError(f"{directory} has no tokenizer.json; put a tokenizer beside the model")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
        use_once(tokenizer)
        return tokenizer
    except Exception as error:  # the library raises many kinds for a damaged file; all mean the same to the user
        raise BDHError(f"the tokenizer in {directory} cannot be loaded: {one_line(error)}") from error


def use_once(tokenizer: PreTrainedTokenizerFast) -> None:
    """Encodes an empty text and decodes a token. Raises any exception where a setting that loading ignores is wrong.

    No other text will do: a tokenizer without an unknown token encodes the words of its vocabulary only.
    """
    tokenizer("", add_special_tokens=False, verbose=False)
    tokenizer.decode([min(tokenizer.get_vocab().values(), default=0)], skip_special_tokens=True)


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """The vocabulary size that a model needs for a tokenizer: its highest id plus one; ids may have gaps."""
    return max(tokenizer.get_vocab().values(), default=0) + 1


def same_tokenizer(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> bool:
    """Whether two tokenizers make the same ids of every text and end documents with the same token."""
    texts = (tokenizer.backend_tokenizer.to_str() for tokenizer in (one, other))
    return len(set(texts)) == 1 and one.eos_token_id == other.eos_token_id


def is_tokenizer(tokenizer: PreTrainedTokenizerFast, name: str | None) -> bool:
    """Whether a model's tokenizer is the one that a setting names.

    None and "bytes" name the byte tokenizer of that model, with or without an end-of-text token: earlier versions of
    `bdh` had one without.

    Raises:
        BDHError: As `load_tokenizer`.
    """
    if name is None or name == "bytes":
        return any(same_tokenizer(tokenizer, byte_tokenizer(end_of_text)) for end_of_text in (True, False))
    return same_tokenizer(tokenizer, load_tokenizer(name))


TOKENIZER_FILES = frozenset(
    {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"}
)


def check_tokenizer_target(directory: Path) -> None:
    """Refuses to put a tokenizer where something else is. Raises BDHError."""
    if directory.is_file():
        raise BDHError(f"{directory} is a file; name a folder for the tokenizer")
    if directory.is_dir() and any(path.name not in TOKENIZER_FILES for path in directory.iterdir()):
        raise BDHError(f"{directory} holds something that is not a tokenizer; name another folder, or empty it")


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Writes a tokenizer to a folder of its own, whole or not at all; one that is there already is replaced.

    Raises:
        BDHError: The folder holds something else, or cannot be written.
    """
    check_tokenizer_target(directory)
    directory = directory.absolute()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with replace_atomically(directory) as partial:
            tokenizer.save_pretrained(partial)
    except Exception as error:  # the library raises a bare Exception where the disk is full
        raise BDHError(f"{directory} cannot be written: {error_text(error)}") from error


MAX_BYTES = 4  # of a character in UTF-8
MAX_UNDECIDED = 16  # tokens that are held back, until the text of the first of them is settled


class IncrementalDecoder:
    """Text of ids as they come: each character as soon as it is complete, never half of one.

    Text that was emitted stays. Some decoders take it back: if a row of byte tokens turns out to be no valid text, they
    make replacement marks of all of it. Then only the text that was not emitted yet becomes marks.

    A step takes the same time however many invalid bytes, or tokens without text, came before it: of a long run only
    the last tokens stay pending.

    Attributes:
        tokens: All ids taken.
        pending: Those of which no text was emitted yet.
        length: Number of characters emitted.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, skip_special_tokens: bool = True):
        self.tokenizer = tokenizer.backend_tokenizer
        self.skip_special_tokens = skip_special_tokens
        self.skipped = frozenset(
            token for token, added in tokenizer.added_tokens_decoder.items() if added.special and skip_special_tokens
        )
        self.stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self.tokens: list[int] = []
        self.pending: list[int] = []
        self.undecided: list[int] = []  # the pending tokens that have text
        self.pieces: list[str] = []  # emitted; joined only when it is asked for, as a step must not get slower
        self.length = 0

    @property
    def written(self) -> str:
        """All text emitted."""
        return "".join(self.pieces)

    def step(self, token: int) -> str:
        """The text that this token completes; often empty."""
        self.tokens.append(token)
        self.pending.append(token)
        if not self._has_text(token):
            return "" if self.undecided else self._emit("", 1)
        self.undecided.append(token)
        try:
            text = self.stream.step(self.tokenizer, token) or ""
        except Exception:  # the library's own class, of which there is no name: the text before would be another now
            text = self._decode(self.undecided)
            self.stream = DecodeStream(ids=[token], skip_special_tokens=self.skip_special_tokens)
        if text:
            return self._emit(text, len(self.pending))
        return self._emit_beginning() if len(self.undecided) >= MAX_UNDECIDED else ""

    def end(self) -> str:
        """The text that was held back: bytes at the end that never became a character, as replacement marks."""
        whole = self._decode(self.tokens)
        is_same = whole.startswith(self.written)
        return self._emit(whole[self.length :] if is_same else self._decode(self.pending), len(self.pending))

    def _emit_beginning(self) -> str:
        """The text of the first undecided tokens, if those that follow them cannot change it.

        A character has four bytes at most: the text before the last four tokens is settled, unless a character reaches
        across that border; then it does not reach across the border before its first byte.
        """
        whole = self._decode(self.undecided)
        for count in range(len(self.undecided) - MAX_BYTES, len(self.undecided) - 2 * MAX_BYTES, -1):
            rest = self.undecided[count:]
            text = self._decode(self.undecided[:count])
            if text and text + self._decode(rest) == whole:
                break
        else:
            return ""
        remaining = len(rest)
        number = len(self.pending)
        while remaining:  # tokens without text lie between the others
            number -= 1
            remaining -= self._has_text(self.pending[number])
        self.stream = DecodeStream(ids=rest, skip_special_tokens=self.skip_special_tokens)
        self._emit(text, number)
        self.undecided = rest
        return text

    def _emit(self, text: str, count: int) -> str:
        """Emits the text of the first pending tokens, of so many."""
        del self.pending[:count]
        if not self.pending:
            self.undecided = []
        if text:
            self.pieces.append(text)
            self.length += len(text)
        return text

    def _has_text(self, token: int) -> bool:
        """Whether decoding does not leave the token out: special tokens if they are skipped, and unknown ids."""
        return token not in self.skipped and self.tokenizer.id_to_token(token) is not None

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=self.skip_special_tokens))


class OffsetDecoder(IncrementalDecoder):
    """An incremental decoder that also records where each token begins in the text.

    A token that begins in the middle of a character has the offset of that character. Bytes that are no text become
    replacement marks, each of which has an offset like any other character.

    Attributes:
        starts: The offset in `written` of each token whose text was emitted, in characters.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, skip_special_tokens: bool = True):
        super().__init__(tokenizer, skip_special_tokens)
        self.starts: list[int] = []

    def _emit(self, text: str, count: int) -> str:
        tokens = self.pending[:count]
        starts, whole = self._starts_of(tokens) if count > 1 else ([0] * count, len(text))
        shift = len(text) - whole  # decoders may leave out a space before the first token of a text
        self.starts += [self.length + min(max(start + shift, 0) if start else 0, len(text)) for start in starts]
        return super()._emit(text, count)

    def _starts_of(self, tokens: list[int]) -> tuple[list[int], int]:
        """The offsets of tokens in their own text, and the length of that text."""
        starts: list[int] = []
        decoded = ""
        with_text: list[int] = []
        for token in tokens:
            before = decoded
            if self._has_text(token):
                with_text.append(token)
                decoded = self._decode(with_text)
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, decoded, strict=False)))
            starts.append(max(0, min(same, len(decoded) - 1)))  # a token without a character of its own ends one
        return starts, len(decoded)
