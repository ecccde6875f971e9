"""The models of a server: loaded side by side with its beginning, and found by their names."""

import asyncio
import logging
import time
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from bdh.errors import BDHError
from bdh.serving.config import ModelSettings, ServeConfig
from bdh.serving.errors import bad_request, not_found, unavailable
from bdh.serving.logs import adopt

if TYPE_CHECKING:
    from bdh.inference.async_llm import AsyncLLM
    from bdh.serving.token_text import TokenTexts

log = logging.getLogger(__name__)


class ServedModel:
    """One model, once it is loaded.

    Attributes:
        name: What requests call it.
        llm: The model at work.
    """

    def __init__(self, settings: ModelSettings, config: ServeConfig, llm: "AsyncLLM"):
        self.name = settings.shown_name
        self.settings = settings
        self.limits = config.requests
        self.llm = llm
        self.created = int(time.time())

    @classmethod
    async def load(cls, settings: ModelSettings, config: ServeConfig) -> "ServedModel":
        """Raises BDHError if it cannot be loaded."""
        return await asyncio.to_thread(cls._load, settings, config)

    @classmethod
    def _load(cls, settings: ModelSettings, config: ServeConfig) -> "ServedModel":
        from bdh.inference.async_llm import AsyncLLM

        adopt("transformers")  # is loaded by now, and would write lines of its own kind
        llm = AsyncLLM(
            settings.path,
            device=settings.device or "auto",
            dtype=settings.dtype or "auto",
            quantization=None if settings.quantization == "none" else settings.quantization,
            max_batch_size=settings.max_batch_size,
            prefix_cache_bytes=config.prefix_cache_bytes,
            queue_size=config.queue_size,
        )
        return cls(settings, config, llm)

    @cached_property
    def texts(self) -> "TokenTexts":
        from bdh.serving.token_text import TokenTexts

        return TokenTexts(self.llm.llm.tokenizer, self.llm.llm.runner.config.vocab_size)

    def check_length(self, characters: int, param: str) -> None:
        """Raises ApiError for text that is too long to be worth tokenizing: it must have too many tokens."""
        if self.texts.longest and characters > self.limits.max_prompt_tokens * self.texts.longest:
            raise bad_request(
                f"the prompt has {characters} characters; this server reads {self.limits.max_prompt_tokens} tokens",
                param,
                "context_length_exceeded",
            )

    def check_prompt(self, tokens: Sequence[int], param: str) -> None:
        """Raises ApiError for a prompt that is too long, or empty, or has unknown tokens."""
        if not tokens:
            raise bad_request("the prompt is empty; give at least one token to go on from", param)
        if max(tokens) >= (size := self.llm.llm.runner.config.vocab_size):
            raise bad_request(f"the prompt has the token {max(tokens)}; the model's are 0 to {size - 1}", param)
        if len(tokens) > self.limits.max_prompt_tokens:
            raise bad_request(
                f"the prompt has {len(tokens)} tokens; this server reads {self.limits.max_prompt_tokens} at most",
                param,
                "context_length_exceeded",
            )

    def card(self) -> dict[str, Any]:
        """The JSON of its `ModelCard`."""
        runner = self.llm.llm.runner
        config = runner.config
        figures = {
            "n_layer": config.n_layer,
            "n_embd": config.n_embd,
            "n_head": config.n_head,
            "n_neurons": config.n_neurons,
            "vocab_size": config.vocab_size,
            "n_parameters": self.n_parameters,
            "state_bytes": runner.state_nbytes,
            "slots": runner.n_slots,
            "device": runner.device.type,
            "dtype": self.dtype,
            "quantization": None if self.settings.quantization == "none" else self.settings.quantization,
            "chat_template": self.llm.llm.tokenizer.chat_template is not None,
            "max_prompt_tokens": self.limits.max_prompt_tokens,
            "max_tokens": self.limits.max_tokens,
        }
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "bdh", "bdh": figures}

    @cached_property
    def n_parameters(self) -> int:
        model = self.llm.llm.model
        return 0 if model is None else sum(parameter.numel() for parameter in model.parameters())

    @cached_property
    def dtype(self) -> str:
        model = self.llm.llm.model
        return "unknown" if model is None else str(model.dtype).removeprefix("torch.")


class Models:
    """All models of a server, by name. Until one is loaded it is known by its name only."""

    def __init__(self, config: ServeConfig):
        self.config = config
        self.settings = {settings.shown_name: settings for settings in config.model_settings()}
        self.loaded: dict[str, ServedModel] = {}

    @property
    def ready(self) -> bool:
        return len(self.loaded) == len(self.settings)

    async def load(self) -> None:
        """Loads one after the other. Raises BDHError for the first that cannot be."""
        for name, settings in self.settings.items():
            start = time.monotonic()
            try:
                self.loaded[name] = await ServedModel.load(settings, self.config)
            except BDHError as error:
                raise BDHError(f"the model {name} cannot be served: {error}") from error
            log.info("model %s is ready after %.1f s", name, time.monotonic() - start)

    def get(self, name: str, param: str | None = "model") -> ServedModel:
        """A model by the name that a request gives. Raises ApiError: 404, or 503 while it is being loaded."""
        served = self.loaded.get(name)
        if served is not None:
            return served
        if name in self.settings:
            raise unavailable(f"the model {name} is being loaded; try again in a moment", "loading", 2)
        known = ", ".join(self.settings)
        raise not_found(f"there is no model {name[:100]!r} here; there is {known}", "model_not_found", param)

    def all(self) -> list[ServedModel]:
        """Those that are loaded, in the order of the settings. Raises ApiError 503 if there is none yet."""
        if not self.loaded:
            raise unavailable("the models are being loaded; try again in a moment", "loading", 2)
        return [self.loaded[name] for name in self.settings if name in self.loaded]

    async def close(self) -> None:
        for served in self.loaded.values():
            await served.llm.close()
