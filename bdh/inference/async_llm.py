"""One engine for many callers: the model works in a thread of its own, callers await what comes of their requests."""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from transformers import PreTrainedTokenizerFast

from bdh.errors import ModelClosed, QueueFull
from bdh.inference.answer import Answer, Completion, Delta, TextRequest, TokenLogprob
from bdh.inference.chat_format import Message
from bdh.inference.engine import EngineStats
from bdh.inference.llm import LLM, Prompt
from bdh.inference.params import SamplingParams
from bdh.inference.runner import Runner
from bdh.inference.scoring import Scorer
from bdh.model import BDHForCausalLM

if TYPE_CHECKING:
    from bdh.inference.async_session import AsyncSession

T = TypeVar("T")

SHORT_PROMPT = 4096  # characters, or tokens, that are made a request of sooner than a thread is asked to
BESIDE = 2  # threads for longer ones
MOST_WAITING = 64  # long prompts for these threads; texts to be scored


class Mailbox:
    """From the engine's thread into one event loop: what comes while the loop is busy comes there together."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self.letters: deque[tuple[Call, list[Delta] | Completion | Exception | None]] = deque()
        self.called = False  # the loop has been told, and has not looked yet
        self.aside = Aside()
        self.lock = threading.Lock()

    def post(self, call: "Call", result: "list[Delta] | Completion | Exception | None") -> None:
        with self.lock:
            self.letters.append((call, result))
            called, self.called = self.called, True
        if not called:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self.loop.call_soon_threadsafe(self.empty)

    def empty(self) -> None:
        with self.lock:
            letters, self.letters = self.letters, deque()
            self.called = False
        for call, result in letters:
            call.results.append(result)
            call.came.set()


class Aside:
    """Long work that is no request of the engine's: one at a time, so that requests go on; a few wait."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.waiting = 0

    async def __aenter__(self) -> None:
        if self.waiting >= MOST_WAITING:
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
        asked: The request.
        cached_tokens: How many of the prompt's tokens were not read, as a kept state had read them; known with the
            first result.
    """

    def __init__(self, llm: "AsyncLLM", asked: TextRequest, wants_deltas: bool):
        self.asked = asked
        self.wants_deltas = wants_deltas
        self.answer: Answer | None = None  # the engine's thread's, until it has let go of the request
        self.results: deque[list[Delta] | Completion | Exception | None] = deque()  # None: it is in the engine
        self.came = asyncio.Event()
        self.mailbox = llm._mailbox()
        self._llm = llm

    @property
    def cached_tokens(self) -> int:
        return 0 if self.answer is None else self.answer.cached_tokens

    def hand(self, result: "list[Delta] | Completion | Exception | None") -> None:
        self.mailbox.post(self, result)

    async def result(self) -> list[Delta] | Completion | None:
        while not self.results:
            self.came.clear()
            await self.came.wait()
        result = self.results.popleft()
        if isinstance(result, Exception):
            raise result
        return result

    async def deltas(self) -> AsyncGenerator[list[Delta]]:
        """Pieces of the text, all that have come since the last ones; to the end. Raises as `AsyncLLM.generate`."""
        unfinished = self.asked.request.params.n
        while unfinished:
            deltas = await self.result()
            assert isinstance(deltas, list)
            while self.results and isinstance(more := self.results[0], list):
                deltas += more
                self.results.popleft()
            unfinished -= sum(delta.finish_reason is not None for delta in deltas)
            yield deltas

    async def completion(self) -> Completion:
        """The whole. Raises as `AsyncLLM.generate`."""
        result = await self.result()
        assert isinstance(result, Completion)
        return result

    async def finish(self) -> Answer:
        """Ends what is left of the request at the last token that was reported; its answer, which nothing changes any
        more, with the states that the continuations left, if the request keeps them."""
        answer = self.answer
        assert answer is not None
        await self._llm.call(lambda: self._llm._end(self, keep=True))
        return answer

    def drop(self) -> None:
        """Ends what is left of the request: its slots are free before the next step."""
        self._llm._command(lambda: self._llm._end(self), at_end=True)


class AsyncLLM:
    """As `LLM`, for any number of callers in any number of event loops. All of it but `close` may be used at once.

    A task that is cancelled, or an iterator that is closed, ends its request. What is wrong with one request is raised
    where it was made; if the engine fails, all that wait get a RuntimeError, and it begins anew with what comes next.

    Close it in the end: `async with AsyncLLM(…) as llm`, or `await llm.close()`. Arguments and errors as for `LLM`.
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
        self.llm = LLM(  # its engine is for the thread alone; what makes requests of texts is for everybody
            model,
            tokenizer,
            device=device,
            dtype=dtype,
            quantization=quantization,
            max_batch_size=max_batch_size,
            prefix_cache_bytes=prefix_cache_bytes,
            queue_size=queue_size,
        )
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._calls: dict[str, Call] = {}  # in work; the thread's own
        self._mailboxes: dict[asyncio.AbstractEventLoop, Mailbox] = {}
        self._beside = ThreadPoolExecutor(BESIDE, "bdh-beside")
        self._pending = 0  # in it; changed in event loops
        self._closing = False
        self._closed = False
        self._lock = threading.Lock()  # of `_closed`: no command is left behind
        self._fingerprint_lock = threading.Lock()  # it is worked out once
        self._thread = threading.Thread(target=self._work, name="bdh-engine", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> EngineStats:
        """The engine's figures as they are now."""
        return self.llm.engine.stats

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
        """As `LLM.fingerprint`; worked out once, beside the event loop."""
        return await asyncio.to_thread(self._fingerprint)

    def _fingerprint(self) -> str:
        with self._fingerprint_lock:
            return self.llm.fingerprint

    # ----------------------------------------------------- for who wants to know more of a request than its text

    async def text_request(self, prompt: Prompt, params: SamplingParams | None = None) -> TextRequest:
        """As `LLM.text_request`; a long prompt is tokenized beside the event loop."""
        if isinstance(prompt, str | list) and len(prompt) <= SHORT_PROMPT:
            return self.llm.text_request(prompt, params)
        return await self.beside(lambda: self.llm.text_request(prompt, params))

    async def chat_request(self, messages: Sequence[Message], params: SamplingParams | None = None) -> TextRequest:
        """As `LLM.chat_request`; a long conversation is tokenized beside the event loop."""
        if sum(len(str(message.get("content"))) for message in messages) + 64 * len(messages) <= SHORT_PROMPT:
            return self.llm.chat_request(messages, params)
        return await self.beside(lambda: self.llm.chat_request(messages, params))

    async def beside(self, function: Callable[[], T]) -> T:
        """Calls what takes long in one of a few threads. Raises QueueFull if many wait for them, or as it does."""
        with self._lock:
            if self._pending >= MOST_WAITING:
                raise QueueFull(f"{self._pending} long prompts wait to be tokenized already; try again later")
            self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._beside, function)
        finally:
            with self._lock:
                self._pending -= 1

    def aside(self) -> Aside:
        """To be entered by who does long work in pieces, by `call`. Raises QueueFull then, if many wait."""
        return self._mailbox().aside

    async def start(self, asked: TextRequest, wants_deltas: bool) -> Call:
        """Gives a request to the engine; returns when it is in the queue. Who does so ends it: `Call.drop` or `finish`.

        Args:
            asked: The request.
            wants_deltas: Whether `Call.deltas` will be iterated, or else `Call.completion` awaited.

        Raises:
            BDHError: As for `generate`; QueueFull among them.
        """
        if wants_deltas:
            self.llm.check_streamable(asked)
        params = asked.request.params
        if params.regex is not None or params.json_schema is not None:
            await self.beside(lambda: self.llm.prepare_grammar(params))
        call = Call(self, asked, wants_deltas)
        self._command(lambda: self._begin(call))
        try:
            await call.result()
        except BaseException:
            call.drop()
            raise
        return call

    async def call(self, function: Callable[[], T]) -> T:
        """Has the engine's thread call a function between two steps; returns, or raises, what the function does.

        Meanwhile nobody's text goes on: give it pieces of long work. Raises BDHError if this is closed.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: Exception | None) -> None:
            if future.done():  # the caller has gone
                return
            if error is None:
                future.set_result(result)  # type: ignore[arg-type]
            else:
                future.set_exception(error)

        def work() -> None:
            result, error = None, None
            if future.cancelled():
                return
            try:
                if self._closing:
                    raise closed()
                result = function()
            except Exception as caught:
                error = caught
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(settle, result, error)

        self._command(work)
        return await future

    async def score(self, tokens: Sequence[int], top: int = 0) -> list[TokenLogprob]:
        """How likely each token of a text is after those before it, all but the first.

        Args:
            tokens: Token ids, at least one.
            top: How many of the likeliest to tell in the place of each.

        Raises:
            BDHError: A token is unknown, or the runner has no model.
        """
        async with self.aside():
            scorer = await self.call(lambda: Scorer(self.llm.model, tokens, top))
            while not scorer.done:
                await self.call(scorer.read_piece)
        return scorer.scores

    async def close(self) -> None:
        """Ends all requests, whose callers get a BDHError, and the thread."""

        def stop() -> None:
            self._closing = True

        with self._lock:
            if not self._closed:
                self._commands.put(stop)
        await asyncio.to_thread(self._thread.join)
        self._beside.shutdown(wait=False, cancel_futures=True)

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # -------------------------------------------------------------------------------------------- in the event loop

    async def _completion(self, asked: TextRequest) -> Completion:
        call = await self.start(asked, wants_deltas=False)
        try:
            return await call.completion()
        finally:
            call.drop()

    async def _deltas(self, asked: TextRequest) -> AsyncGenerator[Delta]:
        call = await self.start(asked, wants_deltas=True)
        try:
            async for deltas in call.deltas():
                for delta in deltas:
                    yield delta
        finally:
            call.drop()

    def _mailbox(self) -> Mailbox:
        loop = asyncio.get_running_loop()
        with self._lock:
            for other in [other for other in self._mailboxes if other.is_closed()]:
                del self._mailboxes[other]
            return self._mailboxes.setdefault(loop, Mailbox(loop))

    def _command(self, command: Callable[[], None], at_end: bool = False) -> None:
        """Has the thread do something. Raises BDHError if there is none any more, unless it is to end something."""
        with self._lock:
            if not self._closed:
                self._commands.put(command)
            elif not at_end:
                raise ModelClosed("this model is closed; make another AsyncLLM")

    # ---------------------------------------------------------------------------------------- in the engine's thread

    def _work(self) -> None:
        """The thread: does what it is told, and lets the engine go on while there are requests."""
        try:
            while not self._closing:
                self._obey(wait=not self._calls)
                if self._calls and not self._closing:
                    self._step()
        finally:  # also where this code is wrong: nobody waits in vain
            with self._lock:
                self._closed = True
            self._closing = True
            for call in self._calls.values():
                call.hand(closed())
            self._obey(wait=False)

    def _obey(self, wait: bool) -> None:
        """Does all that it was told so far; waits for the first if there is nothing else to do.

        What is told meanwhile waits for the next time, so that long work in many calls leaves steps in between.
        """
        for _ in range(max(self._commands.qsize(), int(wait))):
            self._commands.get()()

    def _begin(self, call: Call) -> None:
        if self._closing:
            call.hand(closed())
            return
        try:
            if call.asked.request.params.num_beams > 1:
                completion = self.llm.beam_search(call.asked)
                call.hand(None)
                call.hand(completion)
            else:
                call.answer = self.llm.start(call.asked, call.wants_deltas)
                self._calls[call.asked.request.id] = call
                call.hand(None)
        except Exception as error:  # of this request alone
            call.hand(error)

    def _end(self, call: Call, keep: bool = False) -> None:
        if self._calls.pop(call.asked.request.id, None) is not None and call.answer is not None:
            if keep:
                self.llm.finish(call.answer)
            else:
                self.llm.drop(call.answer)

    def _step(self) -> None:
        """One step of the engine, and what came of it to those who wait."""
        try:
            self.llm.step()
        except Exception as error:  # the LLM has made a new engine
            words = " ".join(str(error).split())[:200]
            for call in self._calls.values():
                failure = RuntimeError(f"the engine failed, with all it had in work: {type(error).__name__}: {words}")
                failure.__cause__ = error
                call.hand(failure)
            self._calls.clear()
            return
        for name, call in list(self._calls.items()):
            answer = call.answer
            assert answer is not None
            if answer.deltas:
                call.hand(list(answer.deltas))
                answer.deltas.clear()
            if isinstance(answer.error, Exception):
                call.hand(answer.error)
            elif not answer.unfinished and not call.wants_deltas:
                call.hand(answer.completion())
            if answer.error is not None or not answer.unfinished:
                del self._calls[name]


def closed() -> ModelClosed:
    return ModelClosed("the model was closed before the text was complete")
