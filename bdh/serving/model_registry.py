"""The models of a server: loaded in processes of their own, found by name, and restarted if a process ends."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from importlib import import_module
from typing import TYPE_CHECKING

from bdh.errors import BDHError
from bdh.inference.engine_process import EngineProcess, EngineSettings
from bdh.inference.stats import queue_has_room
from bdh.serving.api.errors import ApiError, TooManyRequests, bad_request, not_found, unavailable
from bdh.serving.config import ModelSettings, ServeConfig
from bdh.serving.observability.logs import adopt, configure_logging

if TYPE_CHECKING:
    from bdh.inference.async_model import AsyncModel
    from bdh.inference.process_llm import ProcessLLM
    from bdh.serving.api.logprobs import TokenTexts

log = logging.getLogger(__name__)

MAX_RESTARTS, RESTART_SECONDS = 3, 60  # the server ends if an engine ends as often within this time
MAX_RETRY_SECONDS = 60  # in the Retry-After of a full queue


class ServedModel:
    """A loaded model.

    Attributes:
        name: Its name in requests.
        llm: The running model; replaced if its process ends.
        available: Whether the process runs.
    """

    def __init__(self, settings: ModelSettings, config: ServeConfig, llm: "AsyncModel"):
        self.name = settings.shown_name
        self.settings = settings
        self.limits = config.requests
        self.queue_size = config.queue_size
        self.llm = llm
        self.available = True
        self.created = int(time.time())
        self._request_seconds = 1.0  # moving average

    @cached_property
    def texts(self) -> "TokenTexts":
        from bdh.serving.api.logprobs import TokenTexts

        return TokenTexts(self.llm.prompt_encoder.tokenizer, self.llm.prompt_encoder.vocab_size)

    def check_queue(self, client: str, count: int = 1) -> None:
        """Raises ApiError if the queue has no room for so many continuations of a client, or the engine is lost."""
        if not self.available:
            raise loading(self.name)
        stats, size = self.llm.stats, self.queue_size
        if stats.waiting >= size and not queue_has_room(stats, client, count, size, 0):
            batches = stats.waiting / self.llm.model_info.n_slots
            seconds = min(MAX_RETRY_SECONDS, round(batches * self._request_seconds))
            message = f"{stats.waiting} requests wait already, of {size} that may; try again later"
            raise TooManyRequests(message, seconds, "queue_full")

    def record_request_seconds(self, seconds: float) -> None:
        """Update the estimate of the time that a request takes."""
        self._request_seconds += (seconds - self._request_seconds) / 16

    def check_num_choices(self, count: int) -> None:
        """Raises ApiError for a request of too many texts."""
        if count > (limit := self.limits.max_choices):
            raise bad_request(f"{count} texts are asked for; this server writes {limit} for one request at most", "n")

    def check_length(self, characters: int, param: str) -> None:
        """Raises ApiError for a text that must have too many tokens, before it is tokenized."""
        limit = self.limits.max_prompt_tokens
        if self.texts.longest and characters > limit * self.texts.longest:
            message = f"the prompt has {characters} characters; this server reads {limit} tokens"
            raise bad_request(message, param, "context_length_exceeded")

    def token_bound(self, texts: Sequence[str]) -> int:
        """Return an upper bound of the number of tokens of texts within the limit of a prompt: their bytes in UTF-8.

        The text that a normalizer or a chat template adds is not included.
        """
        limit = self.limits.max_prompt_tokens
        return sum(min(len(text.encode("utf-8", "surrogatepass")), limit) for text in texts)

    def check_prompt(self, tokens: Sequence[int], param: str) -> None:
        """Raises ApiError for a prompt that is too long, or empty, or has unknown tokens."""
        if not tokens:
            raise bad_request("the prompt is empty; give at least one token to go on from", param)
        if max(tokens) >= (size := self.llm.prompt_encoder.vocab_size):
            raise bad_request(f"the prompt has the token {max(tokens)}; the model's are 0 to {size - 1}", param)
        if len(tokens) > (limit := self.limits.max_prompt_tokens):
            message = f"the prompt has {len(tokens)} tokens; this server reads {limit} at most"
            raise bad_request(message, param, "context_length_exceeded")


class ModelRegistry:
    """All models of a server by name, each in a process of its own.

    Args:
        config: Settings of the server.
        spare: A started process for the first model.
        set_up_logging: Called in each of the processes; by default they log to stderr as this one.

    Attributes:
        loaded: The models that are loaded.
        on_lost: Called with a model whose process has ended, before another one is started.
        on_failed: Called with the error if a model cannot be served any more.
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
        self.on_lost: Callable[[ServedModel], None] = lambda served: None
        self.on_failed: Callable[[BDHError], None] = lambda error: None
        self._processes: dict[str, EngineProcess] = {}  # started and not used yet
        if spare is not None:
            self._processes[next(iter(self.settings))] = spare
        self._supervisors: list[asyncio.Task[None]] = []

    @property
    def ready(self) -> bool:
        return len(self.loaded) == len(self.settings)

    @property
    def silent(self) -> list[str]:
        """The models whose engines do not answer."""
        return [name for name, served in self.loaded.items() if served.llm.is_silent]

    def start_processes(self) -> None:
        """Start the processes of all models. Returns at once."""
        for name in self.settings:
            if name not in self._processes:
                self._processes[name] = EngineProcess()

    async def load(self) -> None:
        """Load all models. Raises BDHError for the first that cannot be loaded."""
        self.start_processes()
        await asyncio.gather(*(self._load(name) for name in self.settings))

    def get(self, name: str) -> ServedModel:
        """Return the model with a name. Raises ApiError: 404, or 503 while it is being loaded."""
        served = self.loaded.get(name)
        if served is not None:
            return served
        if name in self.settings:
            raise loading(name)
        known = ", ".join(self.settings)
        raise not_found(f"there is no model {name[:100]!r} here; there is {known}", "model_not_found", "model")

    def all(self) -> list[ServedModel]:
        """Return the loaded models, in the order of the settings. Raises ApiError 503 if there is none yet."""
        if not self.loaded:
            raise unavailable("the models are being loaded; try again in a moment", "loading", 2)
        return [self.loaded[name] for name in self.settings if name in self.loaded]

    async def close(self) -> None:
        for task in self._supervisors:
            task.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        await asyncio.gather(*(served.llm.close() for served in self.loaded.values()))
        self.end_unused_processes()

    def end_unused_processes(self) -> None:
        while self._processes:
            self._processes.popitem()[1].abandon()

    # ------------------------------------------------------------------------------------------------------ loading

    async def _load(self, name: str) -> None:
        start = time.monotonic()
        llm = await self._open(name)
        served = self.loaded[name] = ServedModel(self.settings[name], self.config, llm)
        self._supervisors.append(asyncio.create_task(self._supervise(served, llm)))
        log.info("model %s is ready after %.1f s", name, time.monotonic() - start)

    async def _open(self, name: str) -> "ProcessLLM":
        """Load a model in the process that was started for it, or in a new one. Raises BDHError and OSError."""
        await asyncio.to_thread(import_module, "bdh.inference.process_llm")  # takes seconds
        from bdh.inference.process_llm import ProcessLLM

        try:
            process = self._processes.pop(name, None) or EngineProcess()
            llm = await ProcessLLM.open(process, self._engine_settings(self.settings[name]))
            llm.prompt_encoder.max_tokens = self.config.requests.max_prompt_tokens
        except BDHError as error:
            raise BDHError(f"the model {name} cannot be served: {error}") from error
        adopt("transformers")  # it is imported by now, and has a handler of its own
        return llm

    async def _supervise(self, served: ServedModel, llm: "ProcessLLM") -> None:
        """Restart the process of a model whenever it ends, unless that happens too often."""
        losses: deque[float] = deque(maxlen=MAX_RESTARTS)
        while True:
            await llm.lost.wait()
            try:
                reason = await self._remove_lost(served, llm)
                losses.append(time.monotonic())
                if len(losses) == MAX_RESTARTS and losses[-1] - losses[0] < RESTART_SECONDS:
                    count = f"{MAX_RESTARTS} times in {RESTART_SECONDS} seconds"
                    raise BDHError(f"the engine of {served.name} ended {count}; it {reason}")
                served.llm = llm = await self._open(served.name)
            except Exception as error:
                if not isinstance(error, BDHError):
                    error = BDHError(f"the model {served.name} cannot be restarted: {error}")
                self.on_failed(error)
                return
            served.available = True
            self.loaded[served.name] = served
            log.info("model %s is ready again", served.name)

    async def _remove_lost(self, served: ServedModel, llm: "ProcessLLM") -> str:
        """Take a model whose process has ended out of service; return how the process ended."""
        served.available = False
        del self.loaded[served.name]
        self.on_lost(served)
        reason = await asyncio.to_thread(llm.exit_reason)
        log.error("the engine of %s %s; it is restarted", served.name, reason)
        await llm.close()
        return reason

    def _engine_settings(self, settings: ModelSettings) -> EngineSettings:
        return EngineSettings(
            settings.path,
            device=settings.device or "auto",
            dtype=settings.dtype or "auto",
            quantization=None if settings.quantization == "none" else settings.quantization,
            max_batch_size=settings.max_batch_size,
            prefix_cache_bytes=self.config.prefix_cache_bytes,
            queue_size=self.config.queue_size,
            log=partial(configure_engine_logging, self.set_up_logging),
        )


def loading(name: str) -> ApiError:
    return unavailable(f"the model {name} is being loaded; try again in a moment", "loading", 2)


def configure_engine_logging(set_up: Callable[[], None]) -> None:
    """Set up logging in an engine's process."""
    set_up()
    import transformers  # noqa: F401  # adds a handler of its own, which `adopt` removes

    adopt("transformers")
