"""Client of an engine in its own process, for many concurrent callers.

A server's work per token (text, JSON, sockets) takes about as long as a small model's, and the interpreter lock would
let only one of the two run at a time. The client also survives the engine: if its process crashes or is killed, all
callers get an error at once, and the server can start another.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerFast

from bdh.data.template_process import TemplateProcess
from bdh.data.tokenizer import load_export_tokenizer
from bdh.errors import BDHError, ModelClosed
from bdh.inference import engine_rpc
from bdh.inference.async_model import AsyncModel, BoundedLock, Call, model_closed
from bdh.inference.engine_messages import (
    AddRequest,
    CallError,
    CallFunction,
    CallResult,
    CancelCall,
    CancelRequest,
    EngineFailed,
    EngineReady,
    FinishRequest,
    FrameDecoder,
    HandleTable,
    LoadFailed,
    ReleaseObject,
    RequestAdded,
    RequestRefused,
    Shutdown,
    StepOutput,
    encode_frame,
)
from bdh.inference.engine_process import EngineProcess, EngineSettings, resident_nbytes
from bdh.inference.outputs import RequestOutput, TextRequest
from bdh.inference.prompt_encoder import PromptEncoder
from bdh.inference.request import Event
from bdh.inference.stats import EngineStats, ModelInfo

T = TypeVar("T")

log = logging.getLogger(__name__)

PING_SECONDS = 2.0  # between pings of the engine
SILENT_SECONDS = 10.0  # without an answer to a ping, after which the engine counts as silent; a step takes far less


class EngineProtocol(asyncio.Protocol):
    """Receives messages from the engine's process in the event loop."""

    def __init__(self, on_message: Callable[[bytes], None], on_lost: Callable[[], None]):
        self.frames = FrameDecoder()
        self.on_message = on_message
        self.on_lost = on_lost

    def data_received(self, data: bytes) -> None:
        for payload in self.frames.feed(data):
            self.on_message(payload)

    def connection_lost(self, error: Exception | None) -> None:
        self.on_lost()


class ProcessLLM(AsyncModel):
    """`AsyncModel` with the engine in its own process, for one event loop. Create it with `open`.

    Attributes:
        lost: Set when the process has ended without being closed.
        pid: Id of the process.
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
        self._calls: dict[str, Call] = {}  # by request id
        self._call_ids = count()
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._ready: asyncio.Future[EngineReady] = self._loop.create_future()
        self._background_lock = BoundedLock()
        self._template: TemplateProcess | None = None
        self._pinging: asyncio.Task[None] | None = None
        self._pinged_at: float | None = None  # time of a ping without an answer
        self._closed = False

    @classmethod
    async def open(cls, process: EngineProcess, settings: EngineSettings) -> "ProcessLLM":
        """Let a process load a model, and wait until it is ready. If it fails, ends the process and raises BDHError."""
        self = cls(process, settings)
        try:
            await self._open()
        except BaseException:
            await self.close()
            raise
        return self

    async def _open(self) -> None:
        transport, _ = await self._loop.create_connection(
            lambda: EngineProtocol(self._on_message, self._on_lost), sock=self._process.socket
        )
        self._transport = transport
        transport.write(encode_frame(self._handles.dumps(self._settings)))
        tokenizer = asyncio.ensure_future(self._load_tokenizer())
        try:
            ready = await self._ready  # its error takes precedence over the tokenizer's
            encoder = PromptEncoder(await tokenizer, ready.model_info.vocab_size, ready.end_token_ids, self._template)
            super().__init__(encoder)
            self._model_info = ready.model_info
            self._pinging = self._loop.create_task(self._ping())
        finally:
            tokenizer.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _load_tokenizer(self) -> PreTrainedTokenizerFast:
        """Load the tokenizer, and start a process for its chat template. Raises BDHError."""
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
        return self._model_info

    @property
    def is_lost(self) -> bool:
        return self.lost.is_set()

    @property
    def resident_nbytes(self) -> int:
        return resident_nbytes(self.pid)

    def background_lock(self) -> BoundedLock:
        return self._background_lock

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        return await self._call(lambda call_id: CallFunction(call_id, function, arguments, in_thread=False))

    async def call_in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await self._call(lambda call_id: CallFunction(call_id, function, arguments, in_thread=True))

    @property
    def is_silent(self) -> bool:
        """Whether the process exists but does not answer pings: it is stopped, or hangs."""
        return self._pinged_at is not None and self._loop.time() - self._pinged_at > SILENT_SECONDS

    async def _ping(self) -> None:
        """Ping the engine periodically until it is closed or lost."""
        while not self._closed:
            self._pinged_at = self._loop.time()
            try:
                await self.call(engine_rpc.ping)
            except Exception as error:
                if not self._closed:  # an error is an answer too
                    log.warning("the engine answered a ping with an error: %s", error)
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
                self._process.process.kill()  # it reads no messages while it loads
            else:
                self._send(Shutdown())
            if self._transport is not None:
                self._transport.close()
        await asyncio.to_thread(self._process.end)
        if self._pinging is not None:  # the model was loaded; before that there are no threads
            self._shut_down_threads()
        if self._template is not None:
            await asyncio.to_thread(self._template.close)

    def exit_reason(self) -> str:
        """Describe how the process ended. May take some seconds."""
        return self._process.end()

    # ----------------------------------------------------------------------------------------------------- requests

    def _new_call(self, text_request: TextRequest, wants_deltas: bool) -> Call:
        return Call(self, text_request, wants_deltas)

    def _begin(self, call: Call) -> None:
        self._check_open()
        if call.text_request.request.params.num_beams > 1:
            searching = asyncio.ensure_future(self.call(engine_rpc.beam_search, call.text_request))
            searching.add_done_callback(lambda task: self._on_beam_search_done(call, task))
            return
        self._calls[call.text_request.request.id] = call
        self._send(AddRequest(call.text_request))

    def _on_beam_search_done(self, call: Call, task: "asyncio.Future[Any]") -> None:
        if task.cancelled():
            call.put(model_closed())
        elif error := task.exception():
            call.put(error if isinstance(error, Exception) else model_closed())
        else:
            call.put(None)
            call.put(task.result())

    def _drop(self, call: Call) -> None:
        if self._calls.pop(call.text_request.request.id, None) is not None and not self._closed:
            self._send(CancelRequest(call.text_request.request.id))

    async def _finish(self, call: Call) -> None:
        self._check_open()
        output = call.output
        if self._calls.pop(call.text_request.request.id, None) is None or output is None:
            return
        parts = output.continuations
        counts = [len(part.tokens) if part.finish_reason is None else -1 for part in parts]
        request_id = call.text_request.request.id
        states = await self._call(lambda call_id: FinishRequest(call_id, request_id, counts))
        for part, state in zip(parts, states, strict=True):
            if part.finish_reason is None:
                part.state = state

    # ---------------------------------------------------------------------------------------------- messages

    def _on_message(self, data: bytes) -> None:
        match self._handles.loads(data):
            case StepOutput(events, stats):
                self._stats = stats
                for event in events:
                    if (call := self._calls.get(event.request_id)) is not None:  # else it was dropped
                        self._on_event(call, event)
            case RequestAdded(request_id):
                if (call := self._calls.get(request_id)) is not None:
                    call.output = RequestOutput(call.text_request, self.prompt_encoder.tokenizer, call.wants_deltas)
                    call.put(None)
            case RequestRefused(request_id, error):
                if (call := self._calls.pop(request_id, None)) is not None:
                    call.put(error)
            case CallResult(call_id, value):
                if not (future := self._replies.pop(call_id)).done():
                    future.set_result(value)
            case CallError(call_id, error):
                if not (future := self._replies.pop(call_id)).done():
                    future.set_exception(error)
            case EngineFailed(error):
                calls, self._calls = self._calls, {}
                for call in calls.values():
                    call.put(RuntimeError(f"the engine failed, with all it had in work: {error}"))
            case EngineReady() as ready:
                if not self._ready.done():
                    self._ready.set_result(ready)
            case LoadFailed(error):
                if not self._ready.done():
                    self._ready.set_exception(error)

    def _on_event(self, call: Call, event: Event) -> None:
        """Add a token to its request, and pass the result on to the caller."""
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

    def _on_lost(self) -> None:
        """Handle the end of the process."""
        if self._closed:
            return
        self._closed = True
        self._stats = EngineStats()
        self._fail(RuntimeError("the engine failed, with all it had in work: its process is gone"))
        self.lost.set()

    def _fail(self, error: Exception) -> None:
        """Raise an error in all callers."""
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.put(error)
        replies, self._replies = self._replies, {}
        for future in replies.values():
            if not future.done():
                future.set_exception(error)
        if not self._ready.done():
            self._ready.set_exception(BDHError("the process that loads the model has ended; its log tells more"))
            self._ready.exception()  # there may be nobody to retrieve it

    async def _call(self, message: Callable[[int], CallFunction | FinishRequest]) -> Any:
        """Send a message and return its answer. Raises the exception in the answer, and BDHError if this is closed."""
        self._check_open()
        call_id = next(self._call_ids)
        future = self._replies[call_id] = self._loop.create_future()
        self._send(message(call_id))
        try:
            return await future
        except asyncio.CancelledError:
            if not self._closed:
                self._send(CancelCall(call_id))
            raise

    def _send(self, message: Any) -> None:
        assert self._transport is not None
        self._transport.write(encode_frame(self._handles.dumps(message)))

    def _release(self, number: int) -> None:
        """Release an object in the engine's process. Called in any thread."""

        def send() -> None:
            if not self._closed:
                self._send(ReleaseObject(number))

        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(send)

    def _check_open(self) -> None:
        if self.lost.is_set():
            raise RuntimeError("the engine failed: its process is gone")
        if self._closed:
            raise ModelClosed("this model is closed; make another one")
