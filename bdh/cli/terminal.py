"""Output of generated text on a terminal."""

from typing import TextIO

# A terminal obeys these characters. U+2400 and on are pictures of the first 32; those from 0x80 on are short for ESC
# and a letter, and are shown as that.
_PICTURES = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: "\u2421",
    **{code: "\u241b" + chr(code - 0x40) for code in range(0x80, 0xA0)},
}


def visible(text: str) -> str:
    """Text in which each control character but newline and tab is a picture of it."""
    return text.translate(_PICTURES)


def show(text: str, stream: TextIO) -> None:
    """Writes text at once: as it is, but to a terminal nothing that it would obey."""
    stream.write(visible(text) if stream.isatty() else text)
    stream.flush()
