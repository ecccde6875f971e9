"""Exports: a folder that `from_pretrained()` reads, with or without `bdh` installed."""

import copy
import json
import re
from pathlib import Path

from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from bdh.atomic_files import replace_atomically
from bdh.data.chat_format import ChatFormat
from bdh.data.template_process import TemplateProcess
from bdh.data.tokenizer import load_export_tokenizer, vocabulary_size
from bdh.data.vocabulary import CHAT_TEMPLATE
from bdh.errors import BDHError, error_text, one_line
from bdh.model import BDHConfig, BDHForCausalLM
from bdh.model.weight_files import check_finite, check_weight_files

# What an export is made of; a folder that holds anything else is not replaced.
EXPORT_FILES = re.compile(
    r"README\.md|(generation_)?config\.json|(modeling|configuration)_bdh\.py|model.*\.safetensors(\.index\.json)?"
    r"|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.jinja|vocab\.json|merges\.txt"
)
EXPORT_FOLDERS = frozenset({"additional_chat_templates"})  # of tokenizers whose templates have names


def save_export(model: BDHForCausalLM, tokenizer: PreTrainedTokenizerFast | None, directory: Path, card: str) -> None:
    """Writes weights, configuration, modeling code, tokenizer and model card to a new folder, whole or not at all.

    An export that is there already is replaced, once the new one is complete.

    Raises:
        BDHError: The folder exists and is no export, or cannot be written.
    """
    check_target(directory)
    directory = directory.absolute()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with replace_atomically(directory) as partial:
            if tokenizer is not None:
                set_generation_tokens(model, tokenizer)
            model.save_pretrained(partial)
            if tokenizer is not None:
                with_max_length(tokenizer, model.config).save_pretrained(partial)
            (partial / "README.md").write_text(card, encoding="utf-8")
    except Exception as error:  # the tokenizer's writer raises a bare Exception where the disk is full
        raise BDHError(f"{directory} cannot be written: {error_text(error)}") from error


def set_generation_tokens(model: BDHForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Makes `generate()` of transformers end where the model ends a text or, in a conversation, its turn.

    Tokens that the generation config names already stay in it.
    """
    config = model.generation_config
    named = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [tokenizer.eos_token_id, *end_of_turn_ids(tokenizer), *named]
    unique = [token for token in dict.fromkeys(ends) if token is not None]
    config.eos_token_id = unique[0] if len(unique) == 1 else unique or None
    config.bos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id


def end_of_turn_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Special tokens that end an answer in any chat template of the tokenizer; those of the default one come first.

    A template that came with a model from elsewhere may never end: it is rendered in a process with limits, and adds no
    token if it exceeds them.
    """
    templates = tokenizer.chat_template
    if templates is None or templates == CHAT_TEMPLATE:  # our own
        return list(ChatFormat(tokenizer).end_token_ids)
    named = {"default": templates} if isinstance(templates, str) else templates
    ends: list[int] = []
    for name in sorted(named, key=lambda name: name != "default"):
        process = TemplateProcess(named[name], tokenizer.special_tokens_map)
        try:
            ends += ChatFormat(tokenizer, process).end_token_ids
        finally:
            process.close()
    return ends


def with_max_length(tokenizer: PreTrainedTokenizerFast, config: BDHConfig) -> PreTrainedTokenizerFast:
    """The tokenizer, naming as its longest text (`model_max_length`) how many tokens the model reads reliably.

    That is the training block of a model whose synapses do not decay. Evaluation harnesses read it to choose windows.
    """
    if config.training_block_size is None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = config.training_block_size if config.decay == "none" else VERY_LARGE_INTEGER
    return tokenizer


def check_target(directory: Path) -> None:
    """Refuses to put an export where something else is. Raises BDHError."""
    if directory.is_file():
        raise BDHError(f"{directory} is a file; name a folder for the export")
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    foreign = [
        path.name
        for path in directory.iterdir()
        if not (path.name in EXPORT_FOLDERS if path.is_dir() else EXPORT_FILES.fullmatch(path.name))
    ]
    try:
        is_bdh = json.loads((directory / "config.json").read_text(encoding="utf-8"))["model_type"] == "bdh"
    except (OSError, ValueError, KeyError, TypeError):
        is_bdh = False
    if foreign or not is_bdh:
        raise BDHError(f"{directory} holds something that is not an export; name another folder, or empty it")


def load_export(directory: str | Path) -> tuple[BDHForCausalLM, PreTrainedTokenizerFast]:
    """The model (float32 or as saved, in eval mode, on the CPU) and the tokenizer of an export.

    The code in the folder is not run: the model is built from this package's.

    Raises:
        BDHError: The folder is missing, is not a BDH export, or its files are damaged.
    """
    path = Path(directory)
    model = load_model_only(path)
    tokenizer = load_export_tokenizer(path)
    if (size := vocabulary_size(tokenizer)) > model.config.vocab_size:
        raise BDHError(f"{path}: the tokenizer has {size} tokens, the model {model.config.vocab_size}; they do not fit")
    return model, tokenizer


def load_model_only(path: Path) -> BDHForCausalLM:
    """The model of an export, as `load_export`, without the tokenizer. Raises BDHError."""
    config = read_config(path)
    check_weight_files(path, config)
    try:
        model = BDHForCausalLM.from_pretrained(path, config=config)
    except Exception as error:  # as above
        raise BDHError(f"the weights in {path} cannot be loaded: {one_line(error)}") from error
    check_finite(model.named_parameters(), path)
    return model.eval()


def read_config(path: Path) -> BDHConfig:
    """The configuration of an export. Raises BDHError."""
    if not path.is_dir():
        what = "is a file" if path.is_file() else "does not exist"
        raise BDHError(f"{path} {what}; give the folder of an export (bdh export RUN DIR makes one)")
    if not (path / "config.json").is_file():
        run = (path / "checkpoints").is_dir() or (path / "state.json").is_file()
        hint = f"bdh export {path} DIR makes an export of it" if run else "give the folder of an export"
        if (path / "adapter_config.json").is_file():
            hint = "it is an adapter; bdh export RUN DIR, without --adapter, merges one with its model"
        raise BDHError(f"{path} has no config.json; {hint}")
    try:
        settings, _ = BDHConfig.get_config_dict(path, local_files_only=True)
        model_type = settings.get("model_type")
        quantized = settings.get("quantization_config")
        config = BDHConfig.from_dict(settings) if model_type == "bdh" else None
    except Exception as error:  # the library raises many kinds for a damaged file
        raise BDHError(f"{path / 'config.json'} cannot be read: {one_line(error)}") from error
    if config is None:
        raise BDHError(f"{path} is a {model_type} model, not a bdh one")
    if quantized:
        raise BDHError(
            f"{path} was quantized when it was saved (quantization_config in config.json); give the export that it was "
            "made from: bdh serve and bdh generate quantize it with --quantization"
        )
    return config
