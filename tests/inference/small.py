"""A small model whose text is letters, and tokenizers for it."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bdh.data.tokenizer import byte_tokenizer
from bdh.data.vocabulary import train_tokenizer
from bdh.inference.llm import LLM
from bdh.inference.runner import ModelRunner
from bdh.inference.sampling_params import SamplingParams
from bdh.model import BDHConfig, BDHForCausalLM

BYTES = byte_tokenizer()
PLAIN_BYTES = byte_tokenizer(end_of_text=False)  # of models that earlier versions trained
CHAT = train_tokenizer("bytes", [], 0)  # bytes, six special tokens and a chat template; models have an id more
LETTERS = {byte: -100.0 for byte in range(262) if chr(byte) not in " .abcdefghijklmnopqrstuvwxyz"}


def random_gates(model: BDHForCausalLM) -> BDHForCausalLM:
    """The model with random parameters of its gates, if it has any; they begin as zeros, the same in all heads."""
    generator = torch.Generator().manual_seed(0)
    if model.model.layer.gates is not None:
        for parameter in model.model.layer.gates.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def small_model(seed: int = 0, vocab_size: int = 256, **changes: Any) -> BDHForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "n_layer": 2,
        "n_embd": 16,
        "n_head": 2,
        "mlp_internal_dim_multiplier": 8,
        "initializer_range": 0.4,
    }
    config = BDHConfig(**{**sizes, "vocab_size": vocab_size, **changes})
    return random_gates(BDHForCausalLM(config).eval())


def letters(vocab_size: int = 256, **settings: object) -> SamplingParams:
    """Params of a text of letters, with a seed."""
    bias = {token: value for token, value in LETTERS.items() if token < vocab_size}
    return SamplingParams(**{"max_new_tokens": 30, "seed": 7, "logit_bias": bias, **settings})  # type: ignore[arg-type]


def small_llm(tokenizer: PreTrainedTokenizerFast = BYTES, n_slots: int = 4, **changes: Any) -> LLM:
    model = small_model(vocab_size=256 if len(tokenizer) == 256 else 262, **changes)
    return LLM(model, tokenizer, max_batch_size=n_slots)


class Tripwire(ModelRunner):
    """A runner that does something at its `at`-th decoding step."""

    def __init__(self, model: BDHForCausalLM, n_slots: int, at: int, happens: Callable[[], object]):
        super().__init__(model, n_slots)
        self.left = at
        self.happens = happens

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        self.left -= 1
        if self.left == 0:
            self.happens()
        return super().decode(slots, tokens)


@contextmanager
def ctrl_c_works() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where a shell had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
