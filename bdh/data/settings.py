"""The settings of text: which, how it is read, how it is cut. Loads nothing heavy: the command line asks for them."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class SourceConfig:
    """One text of a mixture; the fields mean what they mean in DataConfig.

    Args:
        path: A file, a folder, a glob, an address, or the name of a dataset on the Hugging Face hub.
        weight: Share of the training tokens, relative to the other weights.
        config: Configuration of a dataset that has several.
        split: Which split to train on.
        validation_split: Which split to validate on; null cuts validation off the training split.
        revision: Branch, tag or commit of a dataset on the hub.
        text_column: The column with the text; null takes the only one there is.
        chat: Whether it is conversations.
    """

    path: str
    weight: float = 1.0
    config: str | None = None
    split: str = "train"
    validation_split: str | None = None
    revision: str | None = None
    text_column: str | None = None
    chat: bool = False


@dataclass
class DataConfig:
    """Text and how it is cut.

    Args:
        corpus: A corpus by name; data.path and data.mixture go before it.
        path: A .txt, .jsonl, .json, .csv or .parquet file (compressed or not), a folder or a glob of them, an address
            (https://…), or the name of a dataset on the Hugging Face hub.
        config: Configuration of a dataset that has several.
        split: Which split of a dataset to train on.
        validation_split: Which split of the dataset to validate on; null cuts data.train_split off the training split.
        revision: Branch, tag or commit of a dataset on the hub.
        text_column: The column with the text; null takes the only text column there is; of conversations, messages or
            conversations.
        chat: Whether data.path is conversations: rows of messages, each with a role and a content, of which the
            assistant's answers alone are learned and scored.
        mixture: Several texts with weights instead of one path: a list of {path: …, weight: …} with the settings above.
        streaming: Read while training, never all at once: for what does not fit on this disk, or not in this hour.
        tokenizer: A tokenizer's folder, or its name on the hub; null takes bytes, with a
            token for the end of a text.
        train_split: Share of the text to train on; the rest validates: the end of the text, or those documents of a
            stream whose checksum falls there.
        block_size: Tokens of a training sequence (T).
        cross_documents: Whether a token sees the documents before its own in the sequence; false begins every document
            with an empty memory.
        shuffle_blocks: A stream is shuffled within windows of this many blocks; 1 leaves its order.
        num_workers: Processes that read and tokenize a stream (each stream of a mixture); 0 does it between the steps.
        num_proc: Processes that tokenize before training begins; null takes one a core.
        cache_dir: Where downloaded corpora are kept; what comes through `datasets` lies where HF_HOME says.
    """

    corpus: Literal["pydoc", "stdlib", "shakespeare"] = "pydoc"
    path: str | None = None
    config: str | None = None
    split: str = "train"
    validation_split: str | None = None
    revision: str | None = None
    text_column: str | None = None
    chat: bool = False
    mixture: list[SourceConfig] = field(default_factory=list)
    streaming: bool = False
    tokenizer: str | None = None
    train_split: float = 0.9
    block_size: int = 512
    cross_documents: bool = True
    shuffle_blocks: int = 512
    num_workers: int = 2
    num_proc: int | None = None
    cache_dir: str = "~/.cache/bdh"

    def sources(self) -> list[SourceConfig]:
        """The texts to read, one for a path; none for a corpus by name."""
        if self.mixture:
            return self.mixture
        if self.path is None:
            return []
        return [
            SourceConfig(
                path=self.path,
                config=self.config,
                split=self.split,
                validation_split=self.validation_split,
                revision=self.revision,
                text_column=self.text_column,
                chat=self.chat,
            )
        ]

    def has_chats(self) -> bool:
        """Whether a text is conversations, of which only answers are predicted."""
        return any(source.chat for source in self.sources())


def data_config(settings: dict[str, Any]) -> DataConfig:
    """The DataConfig that `dataclasses.asdict` made `settings` from."""
    mixture = [SourceConfig(**entry) for entry in settings.get("mixture", [])]
    return DataConfig(**{**settings, "mixture": mixture})
