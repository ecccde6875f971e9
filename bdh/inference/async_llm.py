"""One engine for many callers: the model works in a thread of its own, callers await what comes of their requests."""

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import PreTrainedTokenizerFast

from bdh.errors import BDHError
from bdh.inference.answer import Answer, Completion, Delta, TextRequest
from bdh.inference.chat_format import Message
from bdh.inference.engine import EngineStats
from bdh.inference.llm import LLM, Prompt
from bdh.inference.params import SamplingParams
from bdh.inference.runner import Runner
from bdh.model import BDHForCausalLM


class Call:
    """A caller in wait for what comes of a request; made in its event loop, answered from the engine's thread."""

    def __init__(self, asked: TextRequest, wants_deltas: bool):
        self.asked = asked
        self.wants_deltas = wants_deltas
        self.answer: Answer | None = None
        self.loop = asyncio.get_running_loop()
        self.results: asyncio.Queue[list[Delta] | Completion | Exception] = asyncio.Queue()

    def hand(self, result: "list[Delta] | Completion | Exception") -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self.results.put_nowait, result)

    async def result(self) -> list[Delta] | Completion:
        result = await self.results.get()
        if isinstance(result, Exception):
            raise result
        return result


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
    ):
        self.llm = LLM(  # its engine is for the thread alone; what makes requests of texts is for everybody
            model,
            tokenizer,
            device=device,
            dtype=dtype,
            quantization=quantization,
            max_batch_size=max_batch_size,
            prefix_cache_bytes=prefix_cache_bytes,
        )
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._calls: dict[str, Call] = {}  # in work; the thread's own
        self._closing = False
        self._closed = False
        self._lock = threading.Lock()  # of `_closed`: no command is left behind
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
        return await self._completion(await asyncio.to_thread(self.llm.text_request, prompt, params))

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncGenerator[Delta]:
        """Continues a prompt; yields its text piece by piece. Raises as `generate`, when iterated."""
        return self._deltas(self.llm.text_request, prompt, params)

    async def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Completion:
        """The assistant's answer to a conversation, as `LLM.chat`. Raises as `generate`."""
        return await self._completion(await asyncio.to_thread(self.llm.chat_request, messages, params))

    def stream_chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> AsyncGenerator[Delta]:
        """As `chat`, piece by piece. Raises as `generate`, when iterated."""
        return self._deltas(self.llm.chat_request, messages, params)

    async def close(self) -> None:
        """Ends all requests, whose callers get a BDHError, and the thread."""

        def stop() -> None:
            self._closing = True

        with self._lock:
            if not self._closed:
                self._commands.put(stop)
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # -------------------------------------------------------------------------------------------- in the event loop

    async def _completion(self, asked: TextRequest) -> Completion:
        call = Call(asked, wants_deltas=False)
        self._command(lambda: self._begin(call))
        try:
            result = await call.result()
        finally:
            self._command(lambda: self._end(call), at_end=True)
        assert isinstance(result, Completion)
        return result

    async def _deltas(self, make: Callable[[Any, Any], TextRequest], what: Any, params: Any) -> AsyncGenerator[Delta]:
        asked = await asyncio.to_thread(make, what, params)
        self.llm.check_streamable(asked)
        call = Call(asked, wants_deltas=True)
        self._command(lambda: self._begin(call))
        try:
            unfinished = asked.request.params.n
            while unfinished:
                deltas = await call.result()
                assert isinstance(deltas, list)
                for delta in deltas:
                    unfinished -= delta.finish_reason is not None
                    yield delta
        finally:
            self._command(lambda: self._end(call), at_end=True)

    def _command(self, command: Callable[[], None], at_end: bool = False) -> None:
        """Has the thread do something. Raises BDHError if there is none any more, unless it is to end something."""
        with self._lock:
            if not self._closed:
                self._commands.put(command)
            elif not at_end:
                raise BDHError("this model is closed; make another AsyncLLM")

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
        """Does all that was told it; waits for the first if there is nothing else to do."""
        try:
            while True:
                self._commands.get(block=wait)()
                wait = False
        except queue.Empty:
            return

    def _begin(self, call: Call) -> None:
        if self._closing:
            call.hand(closed())
            return
        try:
            if call.asked.request.params.num_beams > 1:
                call.hand(self.llm.beam_search(call.asked))
            else:
                call.answer = self.llm.start(call.asked, call.wants_deltas)
                self._calls[call.asked.request.id] = call
        except Exception as error:  # of this request alone
            call.hand(error)

    def _end(self, call: Call) -> None:
        if self._calls.pop(call.asked.request.id, None) is not None and call.answer is not None:
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


def closed() -> BDHError:
    return BDHError("the model was closed before the text was complete")
