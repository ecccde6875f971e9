"""The mean of several models' weights."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bdh.data.tokenizer import same_tokenizer
from bdh.errors import BDHError
from bdh.model import BDHForCausalLM
from bdh.model.export import check_target, save_export
from bdh.model.model_card import model_card
from bdh.training.config import ARCHITECTURE
from bdh.training.export import load_any


def average(sources: list[Path], directory: Path) -> None:
    """Writes the export of the mean of the weights, summed in float64.

    Args:
        sources: Checkpoints, runs (their latest checkpoint) or exports, of one architecture.
        directory: The export to write.

    Raises:
        BDHError: Something is missing or damaged, or the architectures differ; nothing is written.
    """
    check_target(directory)
    mean: BDHForCausalLM | None = None
    tokenizer: PreTrainedTokenizerFast | None = None
    total: dict[str, Tensor] = {}
    for source in sources:
        model, words = load_any(source)
        if mean is None:
            mean, tokenizer = model, words
        clashes = [name for name in ARCHITECTURE if getattr(model.config, name) != getattr(mean.config, name)]
        if clashes:
            listed = ", ".join(f"{k} {getattr(mean.config, k)} and {getattr(model.config, k)}" for k in clashes)
            raise BDHError(f"{sources[0]} and {source} have different architectures: {listed}")
        if (words is None) != (tokenizer is None) or (words and tokenizer and not same_tokenizer(words, tokenizer)):
            raise BDHError(f"{sources[0]} and {source} have different tokenizers")
        for name, tensor in model.state_dict().items():
            total[name] = total.get(name, torch.zeros(())) + tensor.double()
    assert mean is not None
    mean.load_state_dict({name: (tensor / len(sources)).to(torch.float32) for name, tensor in total.items()})
    rows = {f"{number}": f"{source}" for number, source in enumerate(sources, 1)}
    card = model_card(f"Average of {len(sources)} models", mean.config, [("Averaged", rows)])
    save_export(mean, tokenizer, directory, card)
