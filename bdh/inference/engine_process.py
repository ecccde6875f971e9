"""Process that runs an engine: `python -m bdh.inference.engine_process FD`, started by `ProcessLLM`.

One thread alternates between handling messages and engine steps, and publishes the tokens of each step. The client
detokenizes; this process does so only for requests with stop strings, so that they end at the token that completes one.
"""

import importlib
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdh.errors import BDHError
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
    LoadFailed,
    ObjectTable,
    ReleaseObject,
    RequestAdded,
    RequestRefused,
    Shutdown,
    StepOutput,
    encode_frame,
)

if TYPE_CHECKING:
    from bdh.inference.detokenizer import Detokenizer
    from bdh.inference.llm import LLM
    from bdh.inference.outputs import TextRequest
    from bdh.inference.request import Event

log = logging.getLogger("bdh.inference.engine_process")  # __name__ is "__main__" in the process

THREADS = 4  # for calls in threads
RECEIVE_BYTES = 1 << 20  # read from the socket at once
ONE_THREAD_BELOW = 100_000  # multiplications of the encoders of all layers; several threads are slower below this
HANDLED_SIGNALS = (signal.SIGINT, signal.SIGTERM)
IDLE_SECONDS = 10.0  # without a request, after which unused memory is released
EXIT_SECONDS = 5.0  # for the process to end by itself


@dataclass(frozen=True)
class EngineSettings:
    """Arguments of the `LLM` in an engine process, and its logging.

    Attributes:
        log: Called first in the process, to configure logging.
    """

    model: str
    device: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    max_batch_size: int | None = None
    prefix_cache_bytes: int = 1 << 30
    queue_size: int = 4096
    log: Callable[[], None] | None = None


class EngineProcess:
    """An engine process, seen from the client. It starts at once, and imports what it needs until it has settings."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            # -P: files in the working directory are no modules. Its own process group: Ctrl-C does not reach it.
            command = [sys.executable, "-P", "-m", "bdh.inference.engine_process", str(theirs.fileno())]
            before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_SIGNALS)  # until the process ignores them
            try:
                self.process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, process_group=0
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def end(self) -> str:
        """Wait some seconds for the process to end, kill it if it does not, and describe how it ended."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(EXIT_SECONDS)
        self.process.kill()
        code = self.process.wait()
        return f"was ended by {signal_name(-code)}" if code < 0 else f"ended with code {code}"

    def abandon(self) -> None:
        """Kill a process that nobody uses yet."""
        self.socket.close()
        self.process.kill()
        self.process.wait()


def resident_nbytes(pid: int) -> int:
    """Return the resident memory of a process, or 0 where it is unknown."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):  # the process has ended, or the system has no /proc
        return 0


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


class Connection:
    """The socket to the client. Any error on it ends this process, which has no other client."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self.objects = ObjectTable()
        self._frames = FrameDecoder()
        self._selector = selectors.DefaultSelector()
        self._selector.register(connection, selectors.EVENT_READ)
        self._send_lock = threading.Lock()

    def send(self, message: Any) -> None:
        """Send a message. Raises the exception of pickle if it cannot be pickled."""
        data = encode_frame(self.objects.dumps(message))
        try:
            with self._send_lock:
                self.socket.sendall(data)
        except OSError:
            exit_process()

    def messages(self, wait: bool, seconds: float | None = None) -> list[Any]:
        """Return all received messages; `wait` waits for the first one, at most `seconds`."""
        messages: list[Any] = []
        if wait and seconds is not None and not self._selector.select(seconds):
            return messages
        while not messages:
            try:
                data = self.socket.recv(RECEIVE_BYTES, 0 if wait else socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                exit_process()
            messages += [self.objects.loads(payload) for payload in self._frames.feed(data)]
        return messages

    def exit_with_client(self, loaded: threading.Event) -> None:
        """End this process when the client ends, while the main thread loads the model and does not read."""
        while not loaded.wait(0.2):
            try:
                if self.socket.recv(1, socket.MSG_PEEK):
                    continue
            except ConnectionError:  # the client was killed
                pass
            exit_process()


def exit_process() -> None:
    """End this process at once, whatever its threads do."""
    logging.shutdown()
    os._exit(0)


class Worker:
    """Main loop of the process: handles messages, steps the engine, and publishes its tokens.

    Args:
        llm: Its engine is stepped here; its detokenization is not used.
        connection: To the client.
    """

    def __init__(self, llm: "LLM", connection: Connection):
        self.llm = llm
        self.connection = connection
        self.executor = ThreadPoolExecutor(THREADS, "bdh-rpc")
        self.detokenizers: dict[str, list[Detokenizer]] = {}  # of requests with stop strings
        self.futures: dict[int, Future[None]] = {}  # of calls in threads

    def run(self) -> None:
        """Run until the client is gone or sends `Shutdown`."""
        published = False  # whether the client knows the present load
        release_at: float | None = None  # when to release unused memory, by the monotonic clock
        while True:
            busy = self.llm.engine.busy
            if not busy and not published:
                self.publish([])
            left = None if release_at is None else max(0.0, release_at - time.monotonic())
            for message in self.connection.messages(wait=not busy, seconds=left):
                self.handle(message)
            published = False
            if self.llm.engine.busy:
                self.step()
                published = not self.llm.engine.busy
                release_at = time.monotonic() + IDLE_SECONDS
            elif release_at is not None and time.monotonic() >= release_at:
                self.llm.engine.release()
                release_at = None

    # ---------------------------------------------------------------------------------------------------- messages

    def handle(self, message: Any) -> None:
        match message:
            case AddRequest(text_request):
                self.add(text_request)
            case CancelRequest(request_id):
                self.llm.engine.cancel(request_id)
                self.detokenizers.pop(request_id, None)
            case FinishRequest(call_id, request_id, counts):
                self.reply(call_id, self.finish, (request_id, counts))
            case CallFunction(call_id, function, arguments, in_thread=False):
                self.reply(call_id, function, arguments)
            case CallFunction(call_id, function, arguments):
                future = self.futures[call_id] = self.executor.submit(self.reply, call_id, function, arguments)
                future.add_done_callback(lambda _: self.futures.pop(call_id, None))
            case CancelCall(call_id):
                if (waiting := self.futures.get(call_id)) is not None:
                    waiting.cancel()
            case ReleaseObject(number):
                self.connection.objects.release(number)
            case Shutdown():
                exit_process()

    def add(self, text_request: "TextRequest") -> None:
        from bdh.inference.detokenizer import Detokenizer

        request = text_request.request
        try:
            self.llm.prepare(request)
            self.llm.engine.add(request)
        except Exception as error:  # concerns this request alone
            self.connection.send(RequestRefused(request.id, portable_error(error)))
            return
        if text_request.stop:
            self.detokenizers[request.id] = [
                Detokenizer(self.llm.tokenizer, text_request.stop, text_request.strip)
                for _ in range(request.params.best_of or request.params.n)
            ]
        self.connection.send(RequestAdded(request.id))

    def finish(self, llm: "LLM", request_id: str, counts: list[int]) -> list[Any]:
        """End the continuations of a request, and return the state of each.

        A continuation that has written more than `counts` tokens has read some that the client does not know: it has
        no usable state, and None is returned for it.
        """
        self.detokenizers.pop(request_id, None)
        exact = [count == llm.engine.written(request_id, index) for index, count in enumerate(counts)]
        states = [llm.engine.finish(request_id, index) for index in range(len(counts))]
        return [state if usable else None for state, usable in zip(states, exact, strict=True)]

    def reply(self, call_id: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        """Call a function and send its result or exception."""
        try:
            self.connection.send(CallResult(call_id, function(self.llm, *arguments)))
        except Exception as error:
            self.connection.send(CallError(call_id, portable_error(error)))

    # ------------------------------------------------------------------------------------------------------- steps

    def step(self) -> None:
        """Step the engine and publish the tokens; after a failure, restart the engine."""
        try:
            events = self.llm.engine.step()
            if self.detokenizers:
                events = [
                    self.check_stop(event) if event.request_id in self.detokenizers else event for event in events
                ]
        except Exception as error:
            self.llm.restart_engine(error)
            self.detokenizers.clear()
            log.error("the engine failed and was restarted", exc_info=error)
            self.connection.send(EngineFailed(described(error)))
            return
        self.llm.check_length(self.llm.engine.longest_position)
        self.publish(events)

    def check_stop(self, event: "Event") -> "Event":
        """Return the event, as the last one of its continuation if it completes a stop string."""
        detokenizer = self.detokenizers[event.request_id][event.index]
        if event.error is None and event.finish_reason is None:
            detokenizer.step(event.token)
            if detokenizer.stopped:
                state = self.llm.engine.finish(event.request_id, event.index)
                event = replace(event, finish_reason="stop", state=state)
        if event.request_id not in self.llm.engine.groups:
            self.detokenizers.pop(event.request_id)
        return event

    def publish(self, events: "list[Event]") -> None:
        """Send the tokens of a step, and the load after it."""
        self.connection.send(StepOutput(events, self.llm.engine.stats))


def described(error: BaseException) -> RuntimeError:
    """Return an error that any process can unpickle, with the type and message of this one."""
    return RuntimeError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def portable_error(error: Exception) -> Exception:
    """Return a BDHError as it is, and any other error as one that any process can unpickle."""
    return error if isinstance(error, BDHError) else described(error)


def main() -> None:
    for number in HANDLED_SIGNALS:  # the client decides when to end
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)
    connection = Connection(socket.socket(fileno=int(sys.argv[1])))
    loaded = threading.Event()
    threading.Thread(target=connection.exit_with_client, args=(loaded,), daemon=True).start()
    from bdh.library_logging import quiet_libraries

    quiet_libraries()
    importlib.import_module("bdh.inference.llm")  # takes seconds, in which the client prepares the settings
    from bdh.inference import engine_rpc

    settings, *more = connection.messages(wait=True)
    if more:  # Shutdown
        exit_process()
    if settings.log is not None:
        settings.log()
    try:
        llm = load(settings)
    except BDHError as error:
        connection.send(LoadFailed(error))
        return
    except Exception as error:
        connection.send(LoadFailed(BDHError(f"the model in {settings.model} cannot be loaded: {described(error)}")))
        return
    model_info = replace(engine_rpc.model_info(llm), loaded_nbytes=resident_nbytes(os.getpid()))
    connection.send(EngineReady(model_info, llm.end_token_ids))
    loaded.set()
    Worker(llm, connection).run()


def load(settings: EngineSettings) -> "LLM":
    """Load the model and set the number of threads. Raises BDHError."""
    import torch

    from bdh.inference.llm import LLM

    llm = LLM(**{field.name: getattr(settings, field.name) for field in fields(settings) if field.name != "log"})
    config = llm.runner.config
    if llm.runner.device.type == "cpu" and config.n_layer * config.n_neurons * config.n_embd < ONE_THREAD_BELOW:
        torch.set_num_threads(1)
    return llm


if __name__ == "__main__":
    main()
