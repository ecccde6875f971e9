"""One engine for many callers: the model works in a thread of its own, callers await what comes of their requests."""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerFast

from bdh.errors import ModelClosed
from bdh.inference import errands
from bdh.inference.answer import TextRequest
from bdh.inference.async_model import SHORT_PROMPT, Aside, AsyncModel, Call, Result, closed, engine_failed
from bdh.inference.figures import EngineStats, ModelFigures
from bdh.inference.llm import LLM
from bdh.inference.runner import Runner
from bdh.model import BDHForCausalLM

__all__ = ["SHORT_PROMPT", "AsyncLLM"]

T = TypeVar("T")


class Mailbox:
    """From the engine's thread into one event loop: what comes while the loop is busy comes there together."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self.letters: deque[tuple[Call, Result]] = deque()
        self.called = False  # the loop has been told, and has not looked yet
        self.aside = Aside()
        self.lock = threading.Lock()

    def post(self, call: Call, result: Result) -> None:
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
            call.put(result)


class ThreadCall(Call):
    """A call whose results come from the engine's thread, which alone has its answer until it has let go of it."""

    def __init__(self, model: "AsyncLLM", asked: TextRequest, wants_deltas: bool):
        super().__init__(model, asked, wants_deltas)
        self.mailbox = model._mailbox()

    def hand(self, result: Result) -> None:
        self.mailbox.post(self, result)


class AsyncLLM(AsyncModel):
    """As `LLM`, for any number of callers in any number of event loops. All of it but `close` may be used at once.

    After a failure of the engine it begins anew with what comes next. Arguments and errors as for `LLM`.
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
        super().__init__(self.llm)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._calls: dict[str, ThreadCall] = {}  # in work; the thread's own
        self._mailboxes: dict[asyncio.AbstractEventLoop, Mailbox] = {}
        self._closing = False
        self._closed = False
        self._lock = threading.Lock()  # of `_closed`: no command is left behind
        self._thread = threading.Thread(target=self._work, name="bdh-engine", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> EngineStats:
        return self.llm.engine.stats

    @cached_property
    def figures(self) -> ModelFigures:
        return errands.figures(self.llm)

    def aside(self) -> Aside:
        return self._mailbox().aside

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
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
                result = function(self.llm, *arguments)
            except Exception as caught:
                error = caught
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(settle, result, error)

        self._command(work)
        return await future

    async def call_beside(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.to_thread(function, self.llm, *arguments)

    async def close(self) -> None:
        def stop() -> None:
            self._closing = True

        with self._lock:
            if not self._closed:
                self._commands.put(stop)
        await asyncio.to_thread(self._thread.join)
        self._shut_down_threads()

    # -------------------------------------------------------------------------------------------- in the event loop

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

    def _new_call(self, asked: TextRequest, wants_deltas: bool) -> ThreadCall:
        return ThreadCall(self, asked, wants_deltas)

    def _begin(self, call: Call) -> None:
        assert isinstance(call, ThreadCall)
        self._command(lambda: self._add(call))

    def _drop(self, call: Call) -> None:
        self._command(lambda: self._end(call), at_end=True)

    async def _finish(self, call: Call) -> None:
        await self.call(lambda llm: self._end(call, keep=True))

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

    def _add(self, call: ThreadCall) -> None:
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
            for call in self._calls.values():
                call.hand(engine_failed(error))
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
