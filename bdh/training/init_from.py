"""Fine-tuning: a run that begins with the weights, the sizes and the tokenizer of a model there is."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from bdh.data.encoding import is_bytes
from bdh.data.tokenizer import load_tokenizer, same_tokenizer, vocabulary_size
from bdh.errors import BDHError
from bdh.model import BDHForCausalLM
from bdh.model.configuration_bdh import default_half_lives
from bdh.model.export import read_config
from bdh.training.config import ARCHITECTURE, SYNAPSES, ModelConfig, TrainConfig
from bdh.training.export import describe, load_any, model_config

GATES = "layer.gates."  # in the names of parameters


def find_start(where: Path) -> Path:
    """The export or the checkpoint that is meant by a path to one or to a run: of that, its best. Raises BDHError."""
    if not where.exists():
        raise BDHError(f"init_from {where} does not exist; give the folder of an export, a run or a checkpoint")
    if (where / "config.json").is_file():
        read_config(where)
        return where
    return describe(where)[1]


def starting_settings(where: str, tokenizer: str | None) -> dict[str, Any]:
    """The settings that follow from a model to begin with, for what was not said otherwise.

    Args:
        where: `init_from`.
        tokenizer: The tokenizer that is asked for; None for the model's own.

    Raises:
        BDHError: There is no such model, or no such tokenizer.
    """
    start = find_start(Path(where).expanduser()).absolute()
    config = describe(start)[0]
    sizes = {entry.name: getattr(config, entry.name) for entry in fields(ModelConfig) if entry.name != "kernels"}
    if tokenizer is None and (start / "tokenizer.json").is_file():
        tokenizer = str(start)
    if config.decay_half_lives == default_half_lives(config.n_head):  # or a run could not choose decay none alone
        sizes["decay_half_lives"] = None
    sizes["vocab_size"] = max(config.vocab_size, vocabulary_size(load_tokenizer(tokenizer)))
    return {"init_from": str(start), "model": sizes, "data": {"tokenizer": tokenizer}}


def check_start(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Refuses a run that cannot begin with its `init_from`; returns what is worth a line.

    Args:
        config: With `model.vocab_size` filled in.
        tokenizer: The run's.

    Raises:
        BDHError: There is no such model, its sizes are others, or its tokenizer is.
    """
    start = find_start(Path(str(config.init_from)))
    own, wanted = describe(start)[0], model_config(config)
    size = max(own.vocab_size, vocabulary_size(tokenizer))
    before = {name: getattr(own, name) for name in ARCHITECTURE} | {"vocab_size": size}
    different = {
        name: f"model.{name} {before[name]} -> {getattr(wanted, name)}"
        for name in ARCHITECTURE
        if getattr(wanted, name) != before[name]
    }
    if clashes := [words for name, words in different.items() if name not in SYNAPSES]:
        raise BDHError(f"init_from {start} has another architecture: {', '.join(clashes)}; leave these settings out")
    changes = ", ".join(different.values())
    if changes and config.lora.rank:
        raise BDHError(
            f"lora.rank is {config.lora.rank}, but adapters do not learn how synapses decay or are written: {changes}; "
            "leave these settings out, or train all weights"
        )
    learned = load_tokenizer(str(start.absolute())) if (start / "tokenizer.json").is_file() else None
    if learned is not None and not extends(learned, tokenizer):
        raise BDHError(
            f"data.tokenizer {config.data.tokenizer or 'bytes'} gives the model of {start} other tokens than it has "
            "learned; leave it out to take the model's own, or take one that only adds tokens to it"
        )
    notices = [f"synapses decay or are written differently from the model of init_from: {changes}"] if changes else []
    if learned is not None and learned.eos_token_id is None and tokenizer.eos_token_id is not None:
        notices.append(
            f"documents end with {tokenizer.eos_token}, token {tokenizer.eos_token_id}, which the model of init_from "
            "has not learned: its own tokenizer has no end-of-text token"
        )
    if size == own.vocab_size:
        return notices
    if config.lora.rank:
        raise BDHError(
            f"the tokenizer has {size} tokens and the model of {start} {own.vocab_size}; lora.rank {config.lora.rank} "
            "does not train new ones: keep the model's tokenizer, or train all weights"
        )
    grows = f"the vocabulary grows from {own.vocab_size} to {size} tokens, the new ones with small random weights"
    return [*notices, grows]


def extends(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> bool:
    """Whether `other` makes the same ids of every text as `one`, and knows no fewer tokens.

    Of byte tokenizers, one may have a special token with the id of the byte 0xFF, which is in no text.
    """
    if same_tokenizer(one, other):
        return True
    both_bytes = is_bytes(one) and is_bytes(other)
    names = ["normalizer", "pre_tokenizer", "decoder", *([] if both_bytes else ["model"])]
    parts = [json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (one, other)]
    if any(parts[0].get(name) != parts[1].get(name) for name in names):
        return False
    if both_bytes:
        return one.get_added_vocab().items() <= other.get_added_vocab().items()
    return one.get_vocab().items() <= other.get_vocab().items()


@torch.no_grad()
def load_start(model: BDHForCausalLM, where: Path) -> None:
    """Puts the weights of an export, a checkpoint or a run into a model.

    Tokens that are new to it keep their initial weights. So do gates that it does not have, and those of a decay whose
    half-lives are changed, which start from these.

    Raises:
        BDHError: There is no such model, or its files are damaged.
    """
    start, _ = load_any(find_start(where))
    weights = start.state_dict()
    keep_decay = model.config.decay_half_lives == start.config.decay_half_lives
    for name, tensor in model.state_dict().items():
        if GATES in name and (name not in weights or (f"{GATES}decay_" in name and not keep_decay)):
            continue
        tensor[: len(weights[name])] = weights[name].to(tensor)
