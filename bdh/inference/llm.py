"""Offline text generation with one model, its tokenizer and an engine. `AsyncLLM` serves concurrent callers."""

import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import GenerationConfig, PreTrainedTokenizerFast

from bdh.data.chat_format import Message
from bdh.data.tokenizer import vocabulary_size
from bdh.errors import BDHError
from bdh.inference.llm_engine import LLMEngine
from bdh.inference.outputs import Choice, Completion, Delta, TextRequest, TokenLogprob
from bdh.inference.prompt_encoder import Prompt
from bdh.inference.runner import ModelRunner, Runner, make_runner
from bdh.inference.sampling_params import SamplingParams
from bdh.inference.state_file import model_fingerprint
from bdh.model import BDHConfig, BDHForCausalLM
from bdh.model.device import choose_device
from bdh.model.export import load_export, load_model_only

if TYPE_CHECKING:
    from bdh.inference.session import Session

__all__ = ["LLM", "Choice", "Completion", "Delta", "Prompt", "TokenLogprob", "sample_texts"]

CPU_BATCH_SIZE, CUDA_BATCH_SIZE = 8, 64


class LLMOptions(TypedDict, total=False):
    """Keyword arguments of `LLM`, which `AsyncLLM` takes too."""

    device: str
    dtype: str
    quantization: str | None
    max_batch_size: int | None
    prefix_cache_bytes: int
    queue_size: int


class LLM(LLMEngine):
    """A language model for text generation. Not thread-safe.

    An exception during generation, including Ctrl-C, ends the requests it concerns; the `LLM` stays usable.

    Args:
        model: The folder of an export; or a model, which is moved and modified and must not be used elsewhere; or a
            runner (`device`, `dtype`, `quantization` and `max_batch_size` are then ignored).
        tokenizer: Tokenizer of a model or runner; an export has its own.
        device: "auto" (CUDA, then the CPU), "cpu", "cuda" or "mps".
        dtype: "float32", "bfloat16", or "auto" (bfloat16 on CUDA and with quantization, float32 otherwise).
        quantization: None, "int8" or "int4" weights, on the CPU.
        max_batch_size: Continuations decoded at once, each with its own state. None: 8; on CUDA as many as fit in half
            of the free memory, up to 64.
        prefix_cache_bytes: Size limit of the prefix cache; 0 disables it.
        queue_size: Continuations that may wait for a slot; more are refused with `QueueFull`.

    Raises:
        BDHError: The export cannot be loaded, the tokenizer does not fit the model, or the device does not support the
            settings.
    """

    def __init__(
        self,
        model: str | Path | BDHForCausalLM | Runner,
        tokenizer: PreTrainedTokenizerFast | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        quantization: str | None = None,
        max_batch_size: int | None = None,
        prefix_cache_bytes: int = 1 << 30,
        queue_size: int = 4096,
    ):
        whole = isinstance(max_batch_size, Integral) and not isinstance(max_batch_size, bool)
        if max_batch_size is not None and (not whole or max_batch_size < 1):
            raise BDHError(f"max_batch_size is {max_batch_size!r}; it must be a whole number, at least 1")
        if isinstance(model, str | Path):
            self.name = str(model)
            where = choose_device(device)
            if tokenizer is None:
                model, tokenizer = load_export(model)
            else:
                model = load_model_only(Path(model))
        elif isinstance(model, BDHForCausalLM):
            where = choose_device(device)
        tokenizer = checked_tokenizer(tokenizer, model.config)
        own: BDHForCausalLM | None
        if isinstance(model, BDHForCausalLM):
            own = model.to(where)
            n_slots = max_batch_size or default_batch_size(model.config, where)
            runner = make_runner(own, n_slots, dtype, quantization)
        else:
            runner, own = model, getattr(model, "model", None)
        ends = end_tokens(tokenizer, getattr(own, "generation_config", None), runner.config)
        super().__init__(runner, tokenizer, own, ends, prefix_cache_bytes, queue_size)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the model, independent of its dtype. Raises BDHError for a runner without a model."""
        if self.model is None:
            raise BDHError("sessions cannot be saved here: the runner keeps no model to know them by")
        return model_fingerprint(self.model)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[Completion]:
        """Generate continuations of one or several prompts, batched over the slots.

        Args:
            prompts: A text or a list of token ids, or several of them. No special tokens are added.
            params: For all prompts, or one for each.
            progress: Whether to show a progress bar on stderr.

        Returns:
            A completion for each prompt, in order. It has an `error` if its constrained text could not be continued.

        Raises:
            BDHError: A prompt or its params are invalid, and nothing was generated; or the constrained text of a single
                prompt, not given in a list, could not be continued.
        """
        text_requests = self._checked(prompts, params)
        done: dict[int, Completion] = {}
        console = Console(file=sys.stderr)
        with Progress(console=console, disable=not progress) as bar:
            task = bar.add_task("prompts", total=len(text_requests))
            for number, completion in self.run(text_requests):
                done[number] = completion
                bar.advance(task)
        if is_alone(prompts):
            done[0].raise_for_error()
        return [done[number] for number in range(len(text_requests))]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Stream a continuation of a prompt piece by piece; the pieces of `n` continuations are interleaved.

        Closing or dropping the iterator ends the request.

        Raises:
            BDHError: The prompt or its params are invalid, or cannot be streamed (best_of, num_beams).
        """
        return self.stream_of(self.text_request(prompt, params))

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Completion:
        """Generate the assistant's reply to a conversation, using the chat template or a plain transcript.

        The state after the reply goes into the prefix cache, so that the next turn reads its new messages only.

        Args:
            messages: Each with a "role" ("system", "user", "assistant") and a "content".
            params: As for `generate`.

        Raises:
            BDHError: As for `generate`, or the chat template refuses these messages.
        """
        text_request = self.chat_request(messages, params)
        self.check(text_request)
        return next(completion for _, completion in self.run([text_request])).raise_for_error()

    def stream_chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Iterator[Delta]:
        """Stream the reply of `chat` piece by piece. Raises BDHError as `chat` and `stream`."""
        return self.stream_of(self.chat_request(messages, params))

    def session(self, system: str | None = None, params: SamplingParams | None = None) -> "Session":
        """Start a conversation that keeps its state, so that only new messages are read.

        Args:
            system: System message.
            params: Default params of `send` and `write`.
        """
        from bdh.inference.session import Session

        return Session(self, system, params)

    def load_session(self, path: str | Path) -> "Session":
        """Load a saved session and continue it exactly. Raises BDHError."""
        from bdh.inference.session import Session

        return Session.load(self, path)

    def _checked(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[TextRequest]:
        """Return a request for each prompt. Raises BDHError for the first invalid one, with its number."""
        if not isinstance(prompts, Sequence):
            raise BDHError(
                f"the prompts are a {type(prompts).__name__}; give a text, a list of token ids, or a list of these"
            )
        several: list[Prompt] = [prompts] if is_alone(prompts) else list(prompts)  # type: ignore[list-item, arg-type]
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(several)
        if not isinstance(params, Sequence) or not all(isinstance(item, SamplingParams) for item in params):
            raise BDHError("the params are no SamplingParams; give one for all prompts, or a list of one for each")
        if len(params) != len(several):
            raise BDHError(
                f"there are {len(several)} prompts and {len(params)} params; give one for all, or one for each"
            )
        text_requests = []
        for number, (prompt, its_params) in enumerate(zip(several, params, strict=True)):
            try:
                text_requests.append(self.text_request(prompt, its_params))
                self.check(text_requests[-1])
            except BDHError as error:
                raise error if len(several) == 1 else BDHError(f"prompt {number + 1}: {error}") from error
        return text_requests


def is_alone(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Return whether this is a single prompt."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Integral))


def sample_texts(
    model: BDHForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], params: SamplingParams
) -> list[str]:
    """Generate with a model in place, for example during training: it is not moved, and its mode is restored.

    Raises:
        BDHError: A prompt has no tokens, or cannot be encoded.
    """
    was_training = model.training
    try:
        llm = LLM(ModelRunner(model, 1), tokenizer, prefix_cache_bytes=0)
        return [completion.text for completion in llm.generate(list(prompts), params)]
    finally:
        model.train(was_training)


def sample_answers(
    model: BDHForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], params: SamplingParams
) -> list[str]:
    """Generate replies to user messages, as `sample_texts` does. Raises BDHError, also if the chat template fails."""
    was_training = model.training
    try:
        llm = LLM(ModelRunner(model, 1), tokenizer, prefix_cache_bytes=0)
        return [llm.chat([{"role": "user", "content": prompt}], params).text for prompt in prompts]
    finally:
        model.train(was_training)


def checked_tokenizer(tokenizer: PreTrainedTokenizerFast | None, config: BDHConfig) -> PreTrainedTokenizerFast:
    """Return the tokenizer if it fits the model. Raises BDHError."""
    if tokenizer is None:
        raise BDHError("a model alone has no tokenizer; give one beside it")
    if (size := vocabulary_size(tokenizer)) > config.vocab_size:
        raise BDHError(f"the tokenizer has {size} tokens, the model {config.vocab_size}; they do not fit")
    return tokenizer


def default_batch_size(config: BDHConfig, device: torch.device) -> int:
    """Return the default number of slots on a device."""
    if device.type != "cuda":
        return CPU_BATCH_SIZE
    state = 4 * config.n_layer * config.n_neurons * config.n_embd  # bytes
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(CUDA_BATCH_SIZE, free // 2 // state))


def end_tokens(
    tokenizer: PreTrainedTokenizerFast, generation_config: GenerationConfig | None, config: BDHConfig
) -> tuple[int, ...]:
    """Return the tokens that end a text, from the tokenizer and the model's generation config."""
    named = getattr(generation_config, "eos_token_id", None)
    ends = [tokenizer.eos_token_id, *(named if isinstance(named, list | tuple) else [named])]
    if wrong := [end for end in ends if end is not None and (not isinstance(end, int) or isinstance(end, bool))]:
        raise BDHError(f"eos_token_id in generation_config.json is {wrong[0]!r}; it must be the number of a token")
    return tuple(dict.fromkeys(end for end in ends if end is not None and 0 <= end < config.vocab_size))
