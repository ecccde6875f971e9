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
from bdh.inference import engine_rpc
from bdh.inference.async_model import SHORT_PROMPT, AsyncModel, BoundedLock, Call, Result, engine_failed, model_closed
from bdh.inference.llm import LLM
from bdh.inference.outputs import TextRequest
from bdh.inference.runner import Runner
from bdh.inference.stats import EngineStats, ModelInfo
from bdh.model import BDHForCausalLM

__all__ = ["SHORT_PROMPT", "AsyncLLM"]

T = TypeVar("T")


class EventQueue:
    """From the engine's thread into one event loop: what comes while the loop is busy comes there together."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self.messages: deque[tuple[Call, Result]] = deque()
        self.scheduled = False  # the loop has been told, and has not looked yet
        self.background_lock = BoundedLock()
        self.lock = threading.Lock()

    def post(self, call: Call, result: Result) -> None:
        with self.lock:
            self.messages.append((call, result))
            scheduled, self.scheduled = self.scheduled, True
        if not scheduled:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self.loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        with self.lock:
            messages, self.messages = self.messages, deque()
            self.scheduled = False
        for call, result in messages:
            call.put(result)


class ThreadCall(Call):
    """A call whose results come from the engine's thread, which alone has its answer until it has let go of it."""

    def __init__(self, model: "AsyncLLM", text_request: TextRequest, wants_deltas: bool):
        super().__init__(model, text_request, wants_deltas)
        self.events = model._event_queue()

    def put_threadsafe(self, result: Result) -> None:
        self.events.post(self, result)


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
        self._event_queues: dict[asyncio.AbstractEventLoop, EventQueue] = {}
        self._closing = False
        self._closed = False
        self._lock = threading.Lock()  # of `_closed`: no command is left behind
        self._thread = threading.Thread(target=self._run, name="bdh-engine", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> EngineStats:
        return self.llm.engine.stats

    @cached_property
    def model_info(self) -> ModelInfo:
        return engine_rpc.model_info(self.llm)

    def background_lock(self) -> BoundedLock:
        return self._event_queue().background_lock

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
                    raise model_closed()
                result = function(self.llm, *arguments)
            except Exception as caught:
                error = caught
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(settle, result, error)

        self._command(work)
        return await future

    async def call_in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
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

    def _event_queue(self) -> EventQueue:
        loop = asyncio.get_running_loop()
        with self._lock:
            for other in [other for other in self._event_queues if other.is_closed()]:
                del self._event_queues[other]
            return self._event_queues.setdefault(loop, EventQueue(loop))

    def _command(self, command: Callable[[], None], at_end: bool = False) -> None:
        """Has the thread do something. Raises BDHError if there is none any more, unless it is to end something."""
        with self._lock:
            if not self._closed:
                self._commands.put(command)
            elif not at_end:
                raise ModelClosed("this model is closed; make another AsyncLLM")

    def _new_call(self, text_request: TextRequest, wants_deltas: bool) -> ThreadCall:
        return ThreadCall(self, text_request, wants_deltas)

    def _begin(self, call: Call) -> None:
        assert isinstance(call, ThreadCall)
        self._command(lambda: self._add(call))

    def _drop(self, call: Call) -> None:
        self._command(lambda: self._end(call), at_end=True)

    async def _finish(self, call: Call) -> None:
        await self.call(lambda llm: self._end(call, keep=True))

    # ---------------------------------------------------------------------------------------- in the engine's thread

    def _run(self) -> None:
        """The thread: does what it is told, and lets the engine go on while there are requests."""
        try:
            while not self._closing:
                self._run_commands(wait=not self._calls)
                if self._calls and not self._closing:
                    self._step()
        finally:  # also where this code is wrong: nobody waits in vain
            with self._lock:
                self._closed = True
            self._closing = True
            for call in self._calls.values():
                call.put_threadsafe(model_closed())
            self._run_commands(wait=False)

    def _run_commands(self, wait: bool) -> None:
        """Does all that it was told so far; waits for the first if there is nothing else to do.

        What is told meanwhile waits for the next time, so that long work in many calls leaves steps in between.
        """
        for _ in range(max(self._commands.qsize(), int(wait))):
            self._commands.get()()

    def _add(self, call: ThreadCall) -> None:
        if self._closing:
            call.put_threadsafe(model_closed())
            return
        try:
            if call.text_request.request.params.num_beams > 1:
                completion = self.llm.beam_search(call.text_request)
                call.put_threadsafe(None)
                call.put_threadsafe(completion)
            else:
                call.output = self.llm.start(call.text_request, call.wants_deltas)
                self._calls[call.text_request.request.id] = call
                call.put_threadsafe(None)
        except Exception as error:  # of this request alone
            call.put_threadsafe(error)

    def _end(self, call: Call, keep: bool = False) -> None:
        if self._calls.pop(call.text_request.request.id, None) is not None and call.output is not None:
            if keep:
                self.llm.finish(call.output)
            else:
                self.llm.drop(call.output)

    def _step(self) -> None:
        """One step of the engine, and what came of it to those who wait."""
        try:
            self.llm.step()
        except Exception as error:  # the LLM has made a new engine
            for call in self._calls.values():
                call.put_threadsafe(engine_failed(error))
            self._calls.clear()
            return
        for name, call in list(self._calls.items()):
            output = call.output
            assert output is not None
            if output.deltas:
                call.put_threadsafe(list(output.deltas))
                output.deltas.clear()
            if isinstance(output.error, Exception):
                call.put_threadsafe(output.error)
            elif not output.unfinished and not call.wants_deltas:
                call.put_threadsafe(output.completion())
            if output.error is not None or not output.unfinished:
                del self._calls[name]
