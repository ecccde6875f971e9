"""One engine for many callers, in a process of its own: the one that serves them has its own interpreter and core.

What a server does for a token (text, JSON, sockets) takes about as long as a small model does, and Python would let
only one of the two go on at a time. It also outlives the engine: where that process is killed or crashes, all that wait
get an error at once, and the server can begin another.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerFast

from bdh.data.tokenizer import load_export_tokenizer
from bdh.errors import BDHError, ModelClosed
from bdh.inference import engine_rpc
from bdh.inference.async_model import AsyncModel, BoundedLock, Call, model_closed
from bdh.inference.engine_messages import FrameDecoder, HandleTable, encode_frame
from bdh.inference.engine_process import EngineProcess, EngineSettings, resident_nbytes
from bdh.inference.outputs import RequestOutput, TextRequest
from bdh.inference.prompt_encoder import PromptEncoder
from bdh.inference.request import Event
from bdh.inference.stats import EngineStats, ModelInfo
from bdh.inference.template_process import TemplateProcess

T = TypeVar("T")

log = logging.getLogger(__name__)

PING_SECONDS = 2.0  # between two questions whether the engine goes on
SILENT_SECONDS = 10.0  # without an answer, after which it counts as stopped: a step takes far less


class EngineProtocol(asyncio.Protocol):
    """The socket, in the event loop."""

    def __init__(self, on_message: Callable[[bytes], None], lost: Callable[[], None]):
        self.frames = FrameDecoder()
        self.on_message = on_message
        self.lost = lost

    def data_received(self, data: bytes) -> None:
        for message in self.frames.take(data):
            self.on_message(message)

    def connection_lost(self, error: Exception | None) -> None:
        self.lost()


class ProcessLLM(AsyncModel):
    """As `AsyncLLM`, with the engine in another process. For one event loop; `open` makes one.

    Attributes:
        lost: Is set when the process has ended, and nobody wanted it to.
        pid: Of the process.
    """

    def __init__(self, process: EngineProcess, settings: EngineSettings):
        self.lost = asyncio.Event()
        self.pid = process.process.pid
        self._process = process
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._handles = HandleTable(self._release)
        self._transport: asyncio.Transport | None = None
        self._stats = EngineStats()
        self._calls: dict[str, Call] = {}  # in work
        self._numbers = count()
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._ready: asyncio.Future[tuple[ModelInfo, tuple[int, ...]]] = self._loop.create_future()
        self._aside = BoundedLock()
        self._template: TemplateProcess | None = None
        self._pinging: asyncio.Task[None] | None = None
        self._pinged_at: float | None = None  # when the question was asked that is not answered yet
        self._closed = False

    @classmethod
    async def open(cls, process: EngineProcess, settings: EngineSettings) -> "ProcessLLM":
        """Has a process load a model; returns when it is ready. Raises BDHError if it cannot, and ends the process."""
        self = cls(process, settings)
        try:
            await self._open()
        except BaseException:
            await self.close()
            raise
        return self

    async def _open(self) -> None:
        transport, _ = await self._loop.create_connection(
            lambda: EngineProtocol(self._on_message, self._gone), sock=self._process.socket
        )
        self._transport = transport
        transport.write(encode_frame(self._handles.dumps(self._settings)))
        tokenizer = asyncio.ensure_future(self._load_tokenizer())
        try:
            model_info, ends = await self._ready  # its error is the one to tell
            super().__init__(PromptEncoder(await tokenizer, model_info.vocab_size, ends, self._template))
            self._figures = model_info
            self._pinging = self._loop.create_task(self._ping())
        finally:
            tokenizer.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _load_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, here; a chat template that came with it gets a process. Raises BDHError."""
        tokenizer = await asyncio.to_thread(load_export_tokenizer, Path(self._settings.model))
        if tokenizer.chat_template is not None and not self._closed:
            with suppress(ValueError):  # several templates and no default: the tokenizer says so with each chat
                self._template = TemplateProcess(tokenizer.get_chat_template(), tokenizer.special_tokens_map)
        return tokenizer

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def model_info(self) -> ModelInfo:
        return self._figures

    @property
    def is_lost(self) -> bool:
        return self.lost.is_set()

    @property
    def resident_nbytes(self) -> int:
        return resident_nbytes(self.pid)

    def background_lock(self) -> BoundedLock:
        return self._aside

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        return await self._ask("call", False, function, arguments)

    async def call_in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await self._ask("call", True, function, arguments)

    @property
    def is_silent(self) -> bool:
        """Whether the process is there and does not answer: it is stopped, or hangs."""
        return self._pinged_at is not None and self._loop.time() - self._pinged_at > SILENT_SECONDS

    async def _ping(self) -> None:
        """Asks the engine again and again whether it goes on, until it is closed or lost."""
        while not self._closed:
            self._pinged_at = self._loop.time()
            try:
                await self.call(engine_rpc.ping)
            except Exception as error:
                if not self._closed:  # an error is an answer too
                    log.warning("the engine answers whether it goes on with an error: %s", error)
            self._pinged_at = None
            await asyncio.sleep(PING_SECONDS)

    async def close(self) -> None:
        if self._pinging is not None:
            self._pinging.cancel()
        if not self._closed:
            self._closed = True
            is_loaded = self._ready.done() and not self._ready.exception()
            self._fail(model_closed())
            if not is_loaded or self._transport is None:
                self._process.process.kill()  # it would load to the end first
            else:
                self._send("close")
            if self._transport is not None:
                self._transport.close()
        await asyncio.to_thread(self._process.end)
        if hasattr(self, "texts"):
            self._shut_down_threads()
        if self._template is not None:
            await asyncio.to_thread(self._template.close)

    def how_it_ended(self) -> str:
        """How the process ended, in words. May take some seconds."""
        return self._process.end()

    # ----------------------------------------------------------------------------------------------------- requests

    def _new_call(self, text_request: TextRequest, wants_deltas: bool) -> Call:
        return Call(self, text_request, wants_deltas)

    def _begin(self, call: Call) -> None:
        self._check_open()
        if call.text_request.request.params.num_beams > 1:
            searching = asyncio.ensure_future(self.call(engine_rpc.beam_search, call.text_request))
            searching.add_done_callback(lambda task: self._found(call, task))
            return
        self._calls[call.text_request.request.id] = call
        self._send("add", call.text_request)

    def _found(self, call: Call, task: "asyncio.Future[Any]") -> None:
        """A beam search is over."""
        if task.cancelled():
            call.put(model_closed())
        elif error := task.exception():
            call.put(error if isinstance(error, Exception) else model_closed())
        else:
            call.put(None)
            call.put(task.result())

    def _drop(self, call: Call) -> None:
        if self._calls.pop(call.text_request.request.id, None) is not None and not self._closed:
            self._send("cancel", call.text_request.request.id)

    async def _finish(self, call: Call) -> None:
        self._check_open()
        output = call.output
        if self._calls.pop(call.text_request.request.id, None) is None or output is None:
            return
        parts = output.continuations
        counts = [len(part.tokens) if part.finish_reason is None else -1 for part in parts]
        states = await self._ask("finish", call.text_request.request.id, counts)
        for part, state in zip(parts, states, strict=True):
            if part.finish_reason is None:
                part.state = state

    # ----------------------------------------------------------------------------------------------- what comes back

    def _on_message(self, data: bytes) -> None:
        kind, *values = self._handles.loads(data)
        getattr(self, f"_on_{kind}")(*values)

    def _on_ready(self, model_info: ModelInfo, ends: tuple[int, ...]) -> None:
        if not self._ready.done():
            self._ready.set_result((model_info, ends))

    def _on_unable(self, error: BDHError) -> None:
        if not self._ready.done():
            self._ready.set_exception(error)

    def _on_added(self, request_id: str) -> None:
        if (call := self._calls.get(request_id)) is not None:
            call.output = RequestOutput(call.text_request, self.prompt_encoder.tokenizer, call.wants_deltas)
            call.put(None)

    def _on_refused(self, request_id: str, error: Exception) -> None:
        if (call := self._calls.pop(request_id, None)) is not None:
            call.put(error)

    def _on_events(self, events: list[tuple[Any, ...]], stats: dict[str, Any]) -> None:
        self._stats = EngineStats(**stats)
        for values in events:
            event = Event(*values)
            call = self._calls.get(event.request_id)
            if call is not None:  # else it was dropped meanwhile
                self._take(call, event)

    def _take(self, call: Call, event: Event) -> None:
        """Hands on what comes of a token."""
        output = call.output
        assert output is not None
        if event.error is not None:
            output.error = event.error
            self._drop(call)
            call.put(event.error)
            return
        output.take(event)
        if output.deltas:
            call.put(list(output.deltas))
            output.deltas.clear()
        if not output.unfinished:
            del self._calls[event.request_id]
            if not call.wants_deltas:
                call.put(output.completion())

    def _on_failed(self, error: Exception) -> None:
        """The engine failed, and has begun anew."""
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.put(RuntimeError(f"the engine failed, with all it had in work: {error}"))

    def _on_reply(self, number: int, result: Any) -> None:
        if not (future := self._replies.pop(number)).done():
            future.set_result(result)

    def _on_error(self, number: int, error: Exception) -> None:
        if not (future := self._replies.pop(number)).done():
            future.set_exception(error)

    def _gone(self) -> None:
        """The process is no more."""
        if self._closed:
            return
        self._closed = True
        self._stats = EngineStats()
        self._fail(RuntimeError("the engine failed, with all it had in work: its process is gone"))
        self.lost.set()

    def _fail(self, error: Exception) -> None:
        """Tells all that wait."""
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.put(error)
        replies, self._replies = self._replies, {}
        for future in replies.values():
            if not future.done():
                future.set_exception(error)
        if not self._ready.done():
            self._ready.set_exception(BDHError("the process that loads the model has ended; its log tells more"))
            self._ready.exception()  # though nobody may wait for it

    # ------------------------------------------------------------------------------------------------- what is sent

    async def _ask(self, kind: str, *values: Any) -> Any:
        """Sends a message that is answered. Raises as the answer, BDHError if this is closed."""
        self._check_open()
        number = next(self._numbers)
        future = self._replies[number] = self._loop.create_future()
        self._send(kind, number, *values)
        try:
            return await future
        except asyncio.CancelledError:
            if not self._closed:
                self._send("forget", number)
            raise

    def _send(self, *message: Any) -> None:
        assert self._transport is not None
        self._transport.write(encode_frame(self._handles.dumps(message)))

    def _release(self, number: int) -> None:
        """Nothing here stands for a thing there any more."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._let_go, number)

    def _let_go(self, number: int) -> None:
        if not self._closed:
            self._send("release", number)

    def _check_open(self) -> None:
        if self.lost.is_set():
            raise RuntimeError("the engine failed: its process is gone")
        if self._closed:
            raise ModelClosed("this model is closed; make another one")
