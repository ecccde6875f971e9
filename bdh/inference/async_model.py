"""A model that many wait for: what callers await of it, wherever its engine works.

`AsyncLLM` has the engine in a thread, `ProcessLLM` in a process of its own. Nothing here needs torch.
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
from bdh.inference.params import SamplingParams
from bdh.inference.prompt_encoder import Prompt, PromptEncoder
from bdh.inference.stats import EngineStats, ModelInfo

if TYPE_CHECKING:
    from bdh.inference.async_session import AsyncSession

T = TypeVar("T")

Result = list[Delta] | Completion | Exception | None  # None: the request is in the engine

SHORT_PROMPT = 4096  # characters, or tokens, that are made a request of sooner than a thread is asked to
THREADS = 2  # threads for longer ones, and as many for chats
MAX_PENDING_CALLS = 64  # long prompts for these threads, in equal shares for clients; texts to be scored


class BoundedLock:
    """Long work that is no request of the engine's: one at a time, so that requests go on; a few wait."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.waiting = 0

    async def __aenter__(self) -> None:
        if self.waiting >= MAX_PENDING_CALLS:
            raise QueueFull(f"{self.waiting} texts wait to be scored or looked into already; try again later")
        self.waiting += 1
        try:
            await self.turn.acquire()
        finally:
            self.waiting -= 1

    async def __aexit__(self, *error: object) -> None:
        self.turn.release()


class Call:
    """A request, as its caller has it: begun, and to be waited for in the caller's event loop.

    Attributes:
        text_request: The request.
        cached_tokens: How many of the prompt's tokens were not read, as a kept state had read them; known with the
            first result.
    """

    def __init__(self, model: "AsyncModel", text_request: TextRequest, wants_deltas: bool):
        self.text_request = text_request
        self.wants_deltas = wants_deltas
        self.output: RequestOutput | None = None  # changes as long as the request is in work
        self.results: deque[Result] = deque()
        self.available = asyncio.Event()
        self._model = model

    @property
    def cached_tokens(self) -> int:
        return 0 if self.output is None else self.output.cached_tokens

    def put(self, result: Result) -> None:
        """Hands a result to who waits. Only in its event loop."""
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
        """Pieces of the text, all that have come since the last ones; to the end. Raises as `AsyncModel.generate`."""
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
        """The whole. Raises as `AsyncModel.generate`."""
        result = await self.result()
        assert isinstance(result, Completion)
        return result

    async def finish(self) -> RequestOutput:
        """Ends what is left of the request at the last token that was reported; its answer, which nothing changes any
        more, with the states that the continuations left, if the request keeps them."""
        assert self.output is not None
        await self._model._finish(self)
        return self.output

    def drop(self) -> None:
        """Ends what is left of the request: its slots are free before the next step."""
        self._model._drop(self)


class AsyncModel(ABC):
    """Texts for any number of callers. A task that is cancelled, or an iterator that is closed, ends its request.

    What is wrong with one request is raised where it was made; if the engine fails, all that wait get a RuntimeError.
    Close it in the end: `async with …`, or `await model.close()`.

    Attributes:
        prompt_encoder: Makes requests of texts.
    """

    def __init__(self, prompt_encoder: PromptEncoder):
        self.prompt_encoder = prompt_encoder
        self._pending = PendingLimit(MAX_PENDING_CALLS)
        self._executor = FairExecutor(THREADS, "bdh-executor", self._pending)
        self._chat_executor = FairExecutor(THREADS, "bdh-chat", self._pending)  # a slow template delays chats only

    @property
    @abstractmethod
    def stats(self) -> EngineStats:
        """The engine's figures as they are now."""

    @property
    @abstractmethod
    def model_info(self) -> ModelInfo:
        """The model's."""

    @property
    def is_lost(self) -> bool:
        """Whether the engine is gone, with all states it had, though nobody closed it."""
        return False

    @property
    def is_silent(self) -> bool:
        """Whether the engine is there, and has not answered for long."""
        return False

    @property
    def resident_nbytes(self) -> int:
        """Memory of the process that the engine has for itself; 0 if it has none."""
        return 0

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> Completion:
        """Continues a prompt. With `num_beams`, nothing else goes on meanwhile.

        Raises:
            QueueFull: Too many wait (a BDHError).
            BDHError: The prompt or its params are wrong, or this is closed.
            RuntimeError: The engine failed.
        """
        return await self._completion(await self.text_request(prompt, params))

    async def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncGenerator[Delta]:
        """Continues a prompt; yields its text piece by piece. Raises as `generate`, when iterated."""
        async with aclosing(self._deltas(await self.text_request(prompt, params))) as deltas:
            async for delta in deltas:
                yield delta

    async def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Completion:
        """The assistant's answer to a conversation, as `LLM.chat`. Raises as `generate`."""
        return await self._completion(await self.chat_request(messages, params))

    async def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None
    ) -> AsyncGenerator[Delta]:
        """As `chat`, piece by piece. Raises as `generate`, when iterated."""
        async with aclosing(self._deltas(await self.chat_request(messages, params))) as deltas:
            async for delta in deltas:
                yield delta

    def session(self, system: str | None = None, params: SamplingParams | None = None) -> "AsyncSession":
        """A conversation that keeps its synapses, as `LLM.session`."""
        from bdh.inference.async_session import AsyncSession

        return AsyncSession(self, system, params)

    async def load_session(self, path: str | Path) -> "AsyncSession":
        """A session that was saved, by an `LLM` or here, to go on as if it had never been put away. Raises BDHError."""
        from bdh.inference.async_session import AsyncSession

        return await AsyncSession.load(self, path)

    async def fingerprint(self) -> str:
        """As `LLM.fingerprint`; worked out once, beside the engine."""
        return await self.call_in_thread(engine_rpc.fingerprint)

    # ----------------------------------------------------- for who wants to know more of a request than its text

    async def text_request(
        self, prompt: Prompt, params: SamplingParams | None = None, client: str | None = None
    ) -> TextRequest:
        """As `LLM.text_request`; a long prompt is tokenized beside the event loop, as `run_in_thread` does it."""
        if isinstance(prompt, str | list) and len(prompt) <= SHORT_PROMPT:
            return self.prompt_encoder.text_request(prompt, params)
        return await self.run_in_thread(lambda: self.prompt_encoder.text_request(prompt, params), client)

    async def chat_request(
        self, messages: Sequence[Message], params: SamplingParams | None = None, client: str | None = None
    ) -> TextRequest:
        """As `LLM.chat_request`, in a thread: the chat template is a program that may take any time."""
        return await self.render_in_thread(lambda: self.prompt_encoder.chat_request(messages, params), client)

    async def run_in_thread(self, function: Callable[[], T], client: str | None = None) -> T:
        """Calls a function that takes long in one of a few threads, which clients share evenly.

        Raises:
            QueueFull: Many calls wait, and the client has its share of them.
            Exception: As the function.
        """
        return await self._call_in(self._executor, function, client)

    async def render_in_thread(self, function: Callable[[], T], client: str | None = None) -> T:
        """As `run_in_thread`, for a function that renders the chat template, which the event loop must never do."""
        return await self._call_in(self._chat_executor, function, client)

    async def _call_in(self, executor: FairExecutor, function: Callable[[], T], client: str | None) -> T:
        try:
            return await executor.call(function, client)
        except ExecutorClosed as error:
            raise model_closed() from error

    @abstractmethod
    def background_lock(self) -> BoundedLock:
        """To be entered by who does long work in pieces, by `call`. Raises QueueFull then, if many wait."""

    async def start(self, text_request: TextRequest, wants_deltas: bool) -> Call:
        """Gives a request to the engine; returns when it is in the queue. Who does so ends it: `Call.drop` or `finish`.

        Args:
            text_request: The request.
            wants_deltas: Whether `Call.deltas` will be iterated, or else `Call.completion` awaited.

        Raises:
            BDHError: As for `generate`; QueueFull among them.
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
        """Has a function called where the engine works, between two steps; returns, or raises, what it does.

        Its first argument is the `LLM` there, then come these. Meanwhile nobody's text goes on: give it pieces of long
        work. It may be called in another process: then function, arguments and result go there and back by pickle, but
        that states, and what reads a model, stay there and are passed on as what stands for them.

        Raises:
            BDHError: This is closed; or as the function.
            RuntimeError: The engine failed for good.
        """

    @abstractmethod
    async def call_in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """As `call`, in a thread beside the engine: for what does not use the model itself, and takes long."""

    async def score(self, tokens: Sequence[int], top: int = 0) -> list[TokenLogprob]:
        """How likely each token of a text is after those before it, all but the first.

        Args:
            tokens: Token ids, at least one.
            top: How many of the likeliest to tell in the place of each.

        Raises:
            BDHError: A token is unknown, or the runner has no model.
        """
        async with self.background_lock():
            scorer = await self.call(engine_rpc.begin_scoring, list(tokens), top)
            while not await self.call(engine_rpc.score_piece, scorer):
                pass
            return await self.call(engine_rpc.scores, scorer)

    @abstractmethod
    async def close(self) -> None:
        """Ends all requests, whose callers get a BDHError, and the engine."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # ----------------------------------------------------------------------------------------------- for the engine

    def _shut_down_threads(self) -> None:
        """Lets the threads end, without waiting for them."""
        for executor in (self._executor, self._chat_executor):
            executor.shut_down()

    @abstractmethod
    def _new_call(self, text_request: TextRequest, wants_deltas: bool) -> Call:
        """A call for a caller in this event loop."""

    @abstractmethod
    def _begin(self, call: Call) -> None:
        """Gives a request to the engine; the call's first result is None, or why it is not taken."""

    @abstractmethod
    def _drop(self, call: Call) -> None:
        """Ends what is left of a request, soon."""

    @abstractmethod
    def _finish(self, call: Call) -> Awaitable[None]:
        """Ends what is left of a request, with the states of its continuations."""

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
    """What all get that wait for an engine which failed."""
    words = " ".join(str(error).split())[:200]
    failure = RuntimeError(f"the engine failed, with all it had in work: {type(error).__name__}: {words}")
    failure.__cause__ = error
    return failure


def model_closed() -> ModelClosed:
    return ModelClosed("the model was closed before the text was complete")
