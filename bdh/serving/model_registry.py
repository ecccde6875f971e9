"""The models of a server: loaded side by side with its beginning, found by their names, and begun again if need be."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from bdh.errors import BDHError
from bdh.inference.engine_process import EngineProcess, EngineSettings
from bdh.serving.api.errors import bad_request, not_found, unavailable
from bdh.serving.config import ModelSettings, ServeConfig
from bdh.serving.observability.logs import adopt, configure_logging

if TYPE_CHECKING:
    from bdh.inference.async_model import AsyncModel
    from bdh.inference.process_llm import ProcessLLM
    from bdh.serving.api.logprobs import TokenTexts

log = logging.getLogger(__name__)

MOST_LOST, LOST_SECONDS = 3, 60  # engines of a model that may end in so short a time


def log_like_the_server(set_up: Callable[[], None]) -> None:
    """Sets up logging in an engine's process."""
    set_up()
    import transformers  # noqa: F401  # has a handler of its own, and writes lines of its own kind

    adopt("transformers")


class ServedModel:
    """One model, once it is loaded.

    Attributes:
        name: What requests call it.
        llm: The model at work; another one after its process was lost.
    """

    def __init__(self, settings: ModelSettings, config: ServeConfig, llm: "AsyncModel"):
        self.name = settings.shown_name
        self.settings = settings
        self.limits = config.requests
        self.llm = llm
        self.created = int(time.time())

    @cached_property
    def texts(self) -> "TokenTexts":
        from bdh.serving.api.logprobs import TokenTexts

        return TokenTexts(self.llm.prompt_encoder.tokenizer, self.llm.prompt_encoder.vocab_size)

    def check_length(self, characters: int, param: str) -> None:
        """Raises ApiError for text that is too long to be worth tokenizing: it must have too many tokens."""
        if self.texts.longest and characters > self.limits.max_prompt_tokens * self.texts.longest:
            raise bad_request(
                f"the prompt has {characters} characters; this server reads {self.limits.max_prompt_tokens} tokens",
                param,
                "context_length_exceeded",
            )

    def token_bound(self, texts: Sequence[str]) -> int:
        """An upper bound of the number of tokens of texts that are within the limit of a prompt: their bytes in UTF-8.

        The text that a normalizer or a chat template adds is not in it.
        """
        most = self.limits.max_prompt_tokens
        return sum(min(len(text.encode("utf-8", "surrogatepass")), most) for text in texts)

    def check_prompt(self, tokens: Sequence[int], param: str) -> None:
        """Raises ApiError for a prompt that is too long, or empty, or has unknown tokens."""
        if not tokens:
            raise bad_request("the prompt is empty; give at least one token to go on from", param)
        if max(tokens) >= (size := self.llm.prompt_encoder.vocab_size):
            raise bad_request(f"the prompt has the token {max(tokens)}; the model's are 0 to {size - 1}", param)
        if len(tokens) > self.limits.max_prompt_tokens:
            raise bad_request(
                f"the prompt has {len(tokens)} tokens; this server reads {self.limits.max_prompt_tokens} at most",
                param,
                "context_length_exceeded",
            )

    def card(self) -> dict[str, Any]:
        """The JSON of its `ModelCard`."""
        sizes = self.llm.model_info
        figures = {
            "n_layer": sizes.n_layer,
            "n_embd": sizes.n_embd,
            "n_head": sizes.n_head,
            "n_neurons": sizes.n_neurons,
            "vocab_size": sizes.vocab_size,
            "n_parameters": sizes.n_parameters,
            "state_bytes": sizes.state_nbytes,
            "slots": sizes.n_slots,
            "device": sizes.device,
            "dtype": sizes.dtype,
            "quantization": None if self.settings.quantization == "none" else self.settings.quantization,
            "chat_template": self.llm.prompt_encoder.tokenizer.chat_template is not None,
            "max_prompt_tokens": self.limits.max_prompt_tokens,
            "max_tokens": self.limits.max_tokens,
        }
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "bdh", "bdh": figures}


class ModelRegistry:
    """All models of a server, by name, each in a process of its own. Until one is loaded it is known by its name only.

    Args:
        config: Of the server.
        spare: A process that was begun before its settings were known, for the first model.
        set_up_logging: Is called in each of the processes; else they log to their stderr as this one should.

    Attributes:
        lost: Is called with a model whose process has ended unasked, before another one is begun for it.
        failed: Is called with why a model cannot be served any more.
    """

    def __init__(
        self,
        config: ServeConfig,
        spare: EngineProcess | None = None,
        set_up_logging: Callable[[], None] | None = None,
    ):
        self.config = config
        self.set_up_logging = set_up_logging or partial(configure_logging, config.logging)
        self.settings = {settings.shown_name: settings for settings in config.model_settings()}
        self.loaded: dict[str, ServedModel] = {}
        self.lost: Callable[[ServedModel], None] = lambda served: None
        self.failed: Callable[[BDHError], None] = lambda error: None
        self._processes: dict[str, EngineProcess] = {}  # that nobody has begun to use
        if spare is not None:
            self._processes[next(iter(self.settings))] = spare
        self._keeping: list[asyncio.Task[None]] = []

    @property
    def ready(self) -> bool:
        return len(self.loaded) == len(self.settings)

    @property
    def silent(self) -> list[str]:
        """The models whose engines do not answer."""
        return [name for name, served in self.loaded.items() if served.llm.is_silent]

    def begin(self) -> None:
        """Begins to load all models, in their processes. Returns at once."""
        for name in self.settings:
            if name not in self._processes:
                self._processes[name] = EngineProcess()

    async def load(self) -> None:
        """Waits for all of them. Raises BDHError for the first that cannot be loaded."""
        self.begin()
        await asyncio.gather(*(self._load(name) for name in self.settings))

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
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        await asyncio.gather(*(served.llm.close() for served in self.loaded.values()))
        self.abandon()

    def abandon(self) -> None:
        """Ends the processes that nobody has waited for."""
        while self._processes:
            self._processes.popitem()[1].abandon()

    # ------------------------------------------------------------------------------------------------------ loading

    async def _load(self, name: str) -> None:
        start = time.monotonic()
        llm = await self._open(name)
        served = self.loaded[name] = ServedModel(self.settings[name], self.config, llm)
        self._keeping.append(asyncio.create_task(self._keep(served, llm)))
        log.info("model %s is ready after %.1f s", name, time.monotonic() - start)

    async def _open(self, name: str) -> "ProcessLLM":
        """A model, by the process that was begun for it, or a new one. Raises BDHError, and OSError."""
        await asyncio.to_thread(import_module, "bdh.inference.process_llm")  # takes seconds
        from bdh.inference.process_llm import ProcessLLM

        try:
            process = self._processes.pop(name, None) or EngineProcess()
            llm = await ProcessLLM.open(process, self._engine_settings(self.settings[name]))
            llm.prompt_encoder.max_tokens = self.config.requests.max_prompt_tokens
        except BDHError as error:
            raise BDHError(f"the model {name} cannot be served: {error}") from error
        adopt("transformers")  # is loaded by now, and would write lines of its own kind
        return llm

    async def _keep(self, served: ServedModel, llm: "ProcessLLM") -> None:
        """Begins another process for a model whenever it has lost its own; not if that happens too often."""
        ends: deque[float] = deque(maxlen=MOST_LOST)
        while True:
            await llm.lost.wait()
            try:
                how = await self._lose(served, llm)
                ends.append(time.monotonic())
                if len(ends) == MOST_LOST and ends[-1] - ends[0] < LOST_SECONDS:
                    words = f"the engine of {served.name} ended {MOST_LOST} times in {LOST_SECONDS} seconds; it {how}"
                    raise BDHError(words)
                served.llm = llm = await self._open(served.name)
            except Exception as error:
                if not isinstance(error, BDHError):
                    error = BDHError(f"the model {served.name} cannot be begun again: {error}")
                self.failed(error)
                return
            self.loaded[served.name] = served
            log.info("model %s is ready again", served.name)

    async def _lose(self, served: ServedModel, llm: "ProcessLLM") -> str:
        """Takes a model whose process is gone out of service; how that ended."""
        del self.loaded[served.name]
        self.lost(served)
        how = await asyncio.to_thread(llm.exit_reason)
        log.error("the engine of %s %s; another one is begun", served.name, how)
        await llm.close()
        return how

    def _engine_settings(self, settings: ModelSettings) -> EngineSettings:
        return EngineSettings(
            settings.path,
            device=settings.device or "auto",
            dtype=settings.dtype or "auto",
            quantization=None if settings.quantization == "none" else settings.quantization,
            max_batch_size=settings.max_batch_size,
            prefix_cache_bytes=self.config.prefix_cache_bytes,
            queue_size=self.config.queue_size,
            log=partial(log_like_the_server, self.set_up_logging),
        )
