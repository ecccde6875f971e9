"""Asynchronous interface to an engine that serves many concurrent callers.

`AsyncLLM` runs the engine in a thread, `ProcessLLM` in its own process. Imports no torch.
"""

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from bdh.data.chat_format import Message
from bdh.errors import ModelClosed, QueueFull
from bdh.inference import engine_rpc
from bdh.inference.fair_executor import ExecutorClosed, FairExecutor, PendingLimit
from bdh.inference.outputs import Completion, Delta, RequestOutput, TextRequest, TokenLogprob
from bdh.inference.prompt_encoder import Prompt, PromptEncoder
from bdh.inference.sampling_params import SamplingParams
from bdh.inference.stats import EngineStats, ModelInfo

if TYPE_CHECKING:
    from bdh.inference.async_session import AsyncSession

T = TypeVar("T")

Result = list[Delta] | Completion | Exception | None  # None: the engine has queued the request

SHORT_PROMPT = 4096  # characters, or tokens, up to which a prompt is encoded in the event loop
THREADS = 2  # for encoding longer prompts, and as many for chats
MAX_PENDING_CALLS = 64  # calls that wait for these threads, shared equally among clients; texts to be scored


class BoundedLock:
    """Lock with a bounded number of waiters, for long work between engine steps. Raises QueueFull on entering."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.waiting = 0

    async def __aenter__(self) -> None:
        if self.waiting >= MAX_PENDING_CALLS:
            raise QueueFull(f"{self.waiting} texts wait to be scored or studied already; try again later")
        self.waiting += 1
        try:
            await self.turn.acquire()
        finally:
            self.waiting -= 1

    async def __aexit__(self, *error: object) -> None:
        self.turn.release()


class Call:
    """A running request, whose results its caller awaits in one event loop.

    Attributes:
        text_request: The request.
        cached_tokens: Number of prompt tokens taken from the prefix cache; known with the first result.
    """

    def __init__(self, model: "AsyncModel", text_request: TextRequest, wants_deltas: bool):
        self.text_request = text_request
        self.wants_deltas = wants_deltas
        self.output: RequestOutput | None = None  # changes until the request ends
        self.results: deque[Result] = deque()
        self.available = asyncio.Event()
        self._model = model

    @property
    def cached_tokens(self) -> int:
        return 0 if self.output is None else self.output.cached_tokens

    def put(self, result: Result) -> None:
        """Add a result. To be called in the event loop of the caller."""
        self.results.append(result)
        self.available.set()

    async def result(self) -> list[Delta] | Completion | None:
        while not self.results:
            self.available.clear()
            await self.available.wait()
        result = self.results.popleft()
        if isinstance(result, Exception):
            raise result
        return result

    async def deltas(self) -> AsyncGenerator[list[Delta]]:
        """Yield all new pieces of the text at once, until the end. Raises as `AsyncModel.generate`."""
        unfinished = self.text_request.request.params.n
        while unfinished:
            deltas = await self.result()
            assert isinstance(deltas, list)
            while self.results and isinstance(more := self.results[0], list):
                deltas += more
                self.results.popleft()
            unfinished -= sum(delta.finish_reason is not None for delta in deltas)
            yield deltas

    async def completion(self) -> Completion:
        """Wait for the completion. Raises as `AsyncModel.generate`."""
        result = await self.result()
        assert isinstance(result, Completion)
        return result

    async def finish(self) -> RequestOutput:
        """End the request after the last reported token; return its final output.

        The output has the states of the continuations if the request keeps them.
        """
        assert self.output is not None
        await self._model._finish(self)
        return self.output

    def drop(self) -> None:
        """End the request; its slots are free before the next step."""
        self._model._drop(self)


class AsyncModel(ABC):
    """Asynchronous text generation for many callers.

    Cancelling a task or closing an iterator ends its request. Errors of a request are raised where it was made; if the
    engine fails, all callers get a RuntimeError. Close it after use: `async with …`, or `await model.close()`.

    Attributes:
        prompt_encoder: Encodes prompts into requests.
    """

    def __init__(self, prompt_encoder: PromptEncoder):
        self.prompt_encoder = prompt_encoder
        self._pending = PendingLimit(MAX_PENDING_CALLS)
        self._executor = FairExecutor(THREADS, "bdh-executor", self._pending)
        self._chat_executor = FairExecutor(THREADS, "bdh-chat", self._pending)  # a slow template delays chats only

    @property
    @abstractmethod
    def stats(self) -> EngineStats:
        """Counters and present load of the engine."""

    @property
    @abstractmethod
    def model_info(self) -> ModelInfo:
        """Sizes of the model."""

    @property
    def is_lost(self) -> bool:
        """Whether the engine, with all its states, is gone without having been closed."""
        return False

    @property
    def is_silent(self) -> bool:
        """Whether the engine exists but does not answer."""
        return False

    @property
    def resident_nbytes(self) -> int:
        """Resident memory of the engine's own process; 0 if it has none."""
        return 0

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> Completion:
        """Generate a continuation of a prompt. With `num_beams`, all other requests wait.

        Raises:
            QueueFull: Too many requests wait (a BDHError).
            BDHError: The prompt or its params are invalid, or this is closed.
            RuntimeError: The engine failed.
        """
        return await self._completion(await self.text_request(prompt, params))

    async def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncGenerator[Delta]:
        """Stream a continuation of a prompt piece by piece. Raises as `generate`, when iterated."""
        async with aclosing(self._deltas(await self.text_request(prompt, params))) as deltas:
            async for delta in deltas:
                yield delta

    async def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Completion:
        """Generate the assistant's reply to a conversation, as `LLM.chat`. Raises as `generate`."""
        return await self._completion(await self.chat_request(messages, params))

    async def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None
    ) -> AsyncGenerator[Delta]:
        """Stream the reply of `chat` piece by piece. Raises as `generate`, when iterated."""
        async with aclosing(self._deltas(await self.chat_request(messages, params))) as deltas:
            async for delta in deltas:
                yield delta

    def session(self, system: str | None = None, params: SamplingParams | None = None) -> "AsyncSession":
        """Start a conversation that keeps its state, as `LLM.session`."""
        from bdh.inference.async_session import AsyncSession

        return AsyncSession(self, system, params)

    async def load_session(self, path: str | Path) -> "AsyncSession":
        """Load a session saved by an `LLM` or an `AsyncModel`, and continue it exactly. Raises BDHError."""
        from bdh.inference.async_session import AsyncSession

        return await AsyncSession.load(self, path)

    async def fingerprint(self) -> str:
        """Compute `LLM.fingerprint` once, in a thread of the engine's process."""
        return await self.call_in_thread(engine_rpc.fingerprint)

    # ---------------------------------------------------------------------------------------- requests and calls

    async def text_request(
        self, prompt: Prompt, params: SamplingParams | None = None, client: str | None = None
    ) -> TextRequest:
        """Encode a prompt, as `LLM.text_request`; a long one in a thread."""
        if isinstance(prompt, str | list) and len(prompt) <= SHORT_PROMPT:
            return self.prompt_encoder.text_request(prompt, params)
        return await self.run_in_thread(lambda: self.prompt_encoder.text_request(prompt, params), client)

    async def chat_request(
        self, messages: Sequence[Message], params: SamplingParams | None = None, client: str | None = None
    ) -> TextRequest:
        """Encode a conversation, as `LLM.chat_request`, in a thread: a chat template may run for any time."""
        return await self.render_in_thread(lambda: self.prompt_encoder.chat_request(messages, params), client)

    async def run_in_thread(self, function: Callable[[], T], client: str | None = None) -> T:
        """Call a long-running function in one of a few threads of this process, shared evenly among clients.

        Raises:
            QueueFull: Too many calls wait, and the client has its share of them.
            Exception: The exception of the function.
        """
        return await self._call_in(self._executor, function, client)

    async def render_in_thread(self, function: Callable[[], T], client: str | None = None) -> T:
        """Call a function that renders the chat template in a thread, as `run_in_thread` does for others."""
        return await self._call_in(self._chat_executor, function, client)

    async def _call_in(self, executor: FairExecutor, function: Callable[[], T], client: str | None) -> T:
        try:
            return await executor.call(function, client)
        except ExecutorClosed as error:
            raise model_closed() from error

    @abstractmethod
    def background_lock(self) -> BoundedLock:
        """Return the lock to hold during long work that is done in several calls of `call`."""

    async def start(self, text_request: TextRequest, wants_deltas: bool) -> Call:
        """Queue a request in the engine. The caller must end it, by `Call.drop` or `Call.finish`.

        Args:
            text_request: The request.
            wants_deltas: Whether `Call.deltas` will be iterated, or else `Call.completion` awaited.

        Raises:
            BDHError: As for `generate`, including QueueFull.
        """
        if wants_deltas:
            self.prompt_encoder.check_streamable(text_request)
        params = text_request.request.params
        if params.regex is not None or params.json_schema is not None:
            with self._pending.counted(text_request.request.client):
                await self.call_in_thread(engine_rpc.prepare_grammar, params)
        call = self._new_call(text_request, wants_deltas)
        self._begin(call)
        try:
            await call.result()
        except BaseException:
            call.drop()
            raise
        return call

    @abstractmethod
    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call `function(llm, *arguments)` between two engine steps; return its result or raise its exception.

        All requests wait meanwhile, so split long work. With an engine in another process, function, arguments and
        result are pickled, except that states and objects that read a model stay there and are passed as handles.

        Raises:
            BDHError: This is closed; or the function raised it.
            RuntimeError: The engine failed permanently; or the function raised another exception.
        """

    @abstractmethod
    async def call_in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function as `call` does, in a thread next to the engine: for long work that does not use the model."""

    async def score(self, tokens: Sequence[int], top: int = 0) -> list[TokenLogprob]:
        """Compute the log-probability of each token of a text but the first, given the tokens before it.

        Args:
            tokens: Token ids, at least one.
            top: Number of the likeliest tokens to report at each position.

        Raises:
            BDHError: A token is not in the vocabulary, or the runner has no model.
        """
        async with self.background_lock():
            scorer = await self.call(engine_rpc.begin_scoring, list(tokens), top)
            while not await self.call(engine_rpc.score_chunk, scorer):
                pass
            return await self.call(engine_rpc.scores, scorer)

    @abstractmethod
    async def close(self) -> None:
        """End the engine and all requests, whose callers get a BDHError."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # ------------------------------------------------------------------------------------------ to be implemented

    def _shut_down_threads(self) -> None:
        """Shut the executors down without waiting for their threads."""
        for executor in (self._executor, self._chat_executor):
            executor.shut_down()

    @abstractmethod
    def _new_call(self, text_request: TextRequest, wants_deltas: bool) -> Call:
        """Create a call for a caller in the running event loop."""

    @abstractmethod
    def _begin(self, call: Call) -> None:
        """Queue a request in the engine; the call's first result is None, or the error if it was refused."""

    @abstractmethod
    def _drop(self, call: Call) -> None:
        """End a request without waiting."""

    @abstractmethod
    def _finish(self, call: Call) -> Awaitable[None]:
        """End a request, and store the states of its continuations."""

    async def _completion(self, text_request: TextRequest) -> Completion:
        call = await self.start(text_request, wants_deltas=False)
        try:
            return await call.completion()
        finally:
            call.drop()

    async def _deltas(self, text_request: TextRequest) -> AsyncGenerator[Delta]:
        call = await self.start(text_request, wants_deltas=True)
        try:
            async for deltas in call.deltas():
                for delta in deltas:
                    yield delta
        finally:
            call.drop()


def engine_failed(error: BaseException) -> RuntimeError:
    """Return the error raised in all callers of an engine that failed."""
    message = " ".join(str(error).split())[:200]
    failure = RuntimeError(f"the engine failed, with all it had in work: {type(error).__name__}: {message}")
    failure.__cause__ = error
    return failure


def model_closed() -> ModelClosed:
    return ModelClosed("the model was closed before the text was complete")
