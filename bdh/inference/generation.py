"""Text from a model: prompt in, continuation out, at a constant cost per token."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from bdh.data.tokenizer import IncrementalDecoder
from bdh.errors import BDHError
from bdh.model import BDHForCausalLM

GREEDY_BELOW = 1e-5  # dividing logits by less would overflow, and could only ever choose the likeliest token


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: Tokens to write at most.
        temperature: 0 always takes the likeliest token.
        top_k: Choose among this many likeliest tokens; 0 among all.
        top_p: Choose among the likeliest tokens that together hold this probability.
        seed: Of the choices; None takes the next random numbers of the process.
    """

    max_new_tokens: int = 256
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise BDHError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise BDHError(f"temperature is {self.temperature}; it must be at least 0 and finite")
        if self.top_k < 0:
            raise BDHError(f"top_k is {self.top_k}; it must be at least 0 (0 means all tokens)")
        if not 0 < self.top_p <= 1:
            raise BDHError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise BDHError(f"seed is {self.seed}; it must be at least 0 and below 2^63")

    def generation_config(self, end_of_text: int | None = None) -> GenerationConfig:
        """The library's settings; writing ends at the token `end_of_text`, if there is one."""
        choice = (
            {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
            if self.temperature > GREEDY_BELOW
            else {"do_sample": False}
        )
        ends = {} if end_of_text is None else {"eos_token_id": end_of_text, "pad_token_id": end_of_text}
        return GenerationConfig(max_new_tokens=self.max_new_tokens, **choice, **ends)


class TextStream(BaseStreamer):
    """Hands on the text of generated tokens as soon as it is whole characters, never half of one."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, write: Callable[[str], None]):
        self.decoder = IncrementalDecoder(tokenizer)
        self.write = write
        self.prompt_is_over = False

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt (first call, ignored) and then each token."""
        if self.prompt_is_over:
            for token in value.flatten().tolist():
                if text := self.decoder.step(token):
                    self.write(text)
        self.prompt_is_over = True

    def end(self) -> None:
        """Hands on what was held back: bytes at the end that never became a character, as replacement marks."""
        if text := self.decoder.end():
            self.write(text)


@torch.no_grad()
def generate_text(
    model: BDHForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    settings: SamplingSettings,
    write: Callable[[str], None] | None = None,
) -> str:
    """Continues a prompt; returns the continuation, and hands it to `write` piece by piece as it comes.

    The prompt is read once into the state; each token then costs the same, however long the text has become. The random
    state of the process is left as it was when a seed is given.

    Raises:
        BDHError: The prompt has no tokens, or cannot be encoded.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BDHError(f"the prompt is not valid text: character {error.start} is half of one") from error
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids  # (1, T)
    if ids.shape[1] == 0:
        raise BDHError("the prompt is empty; give at least one character to go on from")
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=settings.seed is not None):
        if settings.seed is not None:
            torch.manual_seed(settings.seed)
        output = model.generate(
            ids.to(model.device),
            attention_mask=torch.ones_like(ids, device=model.device),
            generation_config=settings.generation_config(tokenizer.eos_token_id),
            streamer=TextStream(tokenizer, write) if write else None,
        )
    model.train(was_training)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
