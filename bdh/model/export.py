"""Exports: a folder that `from_pretrained()` reads, with or without `bdh` installed."""

import shutil
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

from bdh.errors import BDHError
from bdh.model import BDHConfig, BDHForCausalLM


def save_export(model: BDHForCausalLM, tokenizer: PreTrainedTokenizerFast | None, directory: Path, card: str) -> None:
    """Writes weights, configuration, modeling code, tokenizer and model card to a new folder, whole or not at all.

    Raises:
        BDHError: The folder exists and is no export, or cannot be written.
    """
    check_target(directory)
    partial = directory.with_name(f".partial-{directory.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise BDHError(f"{directory} cannot be written: {getattr(error, 'strerror', None) or error}") from error


def check_target(directory: Path) -> None:
    """Refuses to put an export where something else is. Raises BDHError."""
    if directory.is_file():
        raise BDHError(f"{directory} is a file; name a folder for the export")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / "config.json").exists():
        raise BDHError(f"{directory} holds something that is not an export; name another folder, or empty it")


def load_export(directory: str | Path) -> tuple[BDHForCausalLM, PreTrainedTokenizerFast]:
    """The model (float32 or as saved, in eval mode, on the CPU) and the tokenizer of an export.

    The code in the folder is not run: the model is built from this package's.

    Raises:
        BDHError: The folder is missing, is not a BDH export, or its files are damaged.
    """
    path = Path(directory)
    model = load_model_only(path)
    if not (path / "tokenizer.json").is_file():
        raise BDHError(f"{path} has no tokenizer.json; put a tokenizer beside the model")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    except Exception as error:  # the library raises many kinds for a damaged file; all mean the same to the user
        raise BDHError(f"the tokenizer in {path} cannot be loaded: {_one_line(error)}") from error
    if len(tokenizer) > model.config.vocab_size:
        raise BDHError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}; they do not fit"
        )
    return model, tokenizer


def load_model_only(path: Path) -> BDHForCausalLM:
    """The model of an export, as `load_export`, without the tokenizer. Raises BDHError."""
    config = read_config(path)
    if not any(path.glob("*.safetensors")):
        raise BDHError(f"{path} has no weights (model.safetensors)")
    try:
        model, report = BDHForCausalLM.from_pretrained(path, config=config, output_loading_info=True)
    except Exception as error:  # as above
        raise BDHError(f"the weights in {path} cannot be loaded: {_one_line(error)}") from error
    if wrong := sorted(report["missing_keys"]):
        raise BDHError(f"the weights in {path} are incomplete: {', '.join(wrong)} missing")
    return model.eval()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def read_config(path: Path) -> BDHConfig:
    """The configuration of an export. Raises BDHError."""
    if not path.is_dir():
        what = "is a file" if path.is_file() else "does not exist"
        raise BDHError(f"{path} {what}; give the folder of an export (bdh export RUN DIR makes one)")
    if not (path / "config.json").is_file():
        run = (path / "checkpoints").is_dir() or (path / "state.json").is_file()
        hint = f"bdh export {path} DIR makes an export of it" if run else "give the folder of an export"
        raise BDHError(f"{path} has no config.json; {hint}")
    try:
        settings, _ = BDHConfig.get_config_dict(path, local_files_only=True)
        if settings.get("model_type") != "bdh":
            raise BDHError(f"{path} is a {settings.get('model_type')} model, not a bdh one")
        return BDHConfig.from_dict(settings)
    except (OSError, ValueError) as error:
        raise BDHError(f"{path / 'config.json'} cannot be read: {_one_line(error)}") from error
