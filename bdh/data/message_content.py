"""The text of a message's content, which clients and data sets also give as a list of typed parts."""

from collections.abc import Iterable

from bdh.errors import BDHError

TEXT_TYPES = frozenset({"text", "refusal", "input_text", "output_text"})  # of parts of a message's content


class ContentError(BDHError):
    """A part of a message's content is not text.

    Attributes:
        name: The part's name, as "messages.0.content.1".
    """

    def __init__(self, name: str, words: str):
        super().__init__(f"{name} {words}")
        self.name = name


def content_text(parts: Iterable[tuple[str, object]], name: str) -> str:
    """The text of a message's content, in training and in requests to the server.

    Args:
        parts: The type and the text of each part of it.
        name: The content's name in messages of errors.

    Raises:
        ContentError: A part is an image or the like, or its text is missing.
    """
    texts = []
    for number, (kind, text) in enumerate(parts):
        if kind not in TEXT_TYPES:
            raise ContentError(f"{name}.{number}", f"is {str(kind)[:40]}; only text is read")
        if not isinstance(text, str):
            raise ContentError(f"{name}.{number}", "is not text")
        texts.append(text)
    return "".join(texts)
