"""Asynchronous interface to an engine in a thread of this process, for many concurrent callers."""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, Unpack

from transformers import PreTrainedTokenizerFast

from bdh.errors import ModelClosed
from bdh.inference import engine_rpc
from bdh.inference.async_model import SHORT_PROMPT, AsyncModel, BoundedLock, Call, Result, engine_failed, model_closed
from bdh.inference.llm import LLM, LLMOptions
from bdh.inference.outputs import TextRequest
from bdh.inference.runner import Runner
from bdh.inference.stats import EngineStats, ModelInfo
from bdh.model import BDHForCausalLM

__all__ = ["SHORT_PROMPT", "AsyncLLM"]

T = TypeVar("T")


class EventQueue:
    """Passes results from the engine's thread to one event loop, batching those posted while the loop is busy."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self.messages: deque[tuple[Call, Result]] = deque()
        self.scheduled = False  # whether `drain` is scheduled in the loop
        self.background_lock = BoundedLock()
        self.lock = threading.Lock()

    def post(self, call: Call, result: Result) -> None:
        with self.lock:
            self.messages.append((call, result))
            scheduled, self.scheduled = self.scheduled, True
        if not scheduled:
            with suppress(RuntimeError):  # the loop is closed
                self.loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        with self.lock:
            messages, self.messages = self.messages, deque()
            self.scheduled = False
        for call, result in messages:
            call.put(result)


class ThreadCall(Call):
    """Request of a caller whose results come from the engine's thread, which alone changes its output."""

    def __init__(self, model: "AsyncLLM", text_request: TextRequest, wants_deltas: bool):
        super().__init__(model, text_request, wants_deltas)
        self.events = model._event_queue()

    def put_threadsafe(self, result: Result) -> None:
        self.events.post(self, result)


class AsyncLLM(AsyncModel):
    """Asynchronous `LLM` for any number of concurrent callers in any number of event loops.

    The engine is restarted after a failure. Takes the arguments and raises the errors of `LLM`.
    """

    def __init__(
        self,
        model: str | Path | BDHForCausalLM | Runner,
        tokenizer: PreTrainedTokenizerFast | None = None,
        **options: Unpack[LLMOptions],
    ):
        self.llm = LLM(model, tokenizer, **options)  # only the thread may use its engine; encoding is thread-safe
        super().__init__(self.llm)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._calls: dict[str, ThreadCall] = {}  # by request id; used by the thread alone
        self._event_queues: dict[asyncio.AbstractEventLoop, EventQueue] = {}
        self._closing = False
        self._closed = False
        self._lock = threading.Lock()  # for `_closed`, so that no command is lost
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
            if future.done():  # the caller was cancelled
                return
            if error is None:
                future.set_result(result)  # type: ignore[arg-type]
            else:
                future.set_exception(error)

        def run() -> None:
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

        self._command(run)
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
        """Queue a command for the thread. Raises BDHError if this is closed, unless the command only ends a request."""
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
        """Run commands, and step the engine while there are requests."""
        try:
            while not self._closing:
                self._run_commands(wait=not self._calls)
                if self._calls and not self._closing:
                    self._step()
        finally:  # after any error, so that no caller waits forever
            with self._lock:
                self._closed = True
            self._closing = True
            for call in self._calls.values():
                call.put_threadsafe(model_closed())
            self._run_commands(wait=False)

    def _run_commands(self, wait: bool) -> None:
        """Run the commands queued so far; `wait` waits for the first one.

        Commands queued in the meantime run after the next step, so that many long ones do not stop the engine.
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
        except Exception as error:  # concerns this request alone
            call.put_threadsafe(error)

    def _end(self, call: Call, keep: bool = False) -> None:
        if self._calls.pop(call.text_request.request.id, None) is not None and call.output is not None:
            if keep:
                self.llm.finish(call.output)
            else:
                self.llm.drop(call.output)

    def _step(self) -> None:
        """Step the engine and pass the results on to the callers."""
        try:
            self.llm.step()
        except Exception as error:  # the LLM has restarted its engine
            for call in self._calls.values():
                call.put_threadsafe(engine_failed(error))
            self._calls.clear()
            return
        for request_id, call in list(self._calls.items()):
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
                del self._calls[request_id]
