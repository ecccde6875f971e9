"""The process that has an engine: `python -m bdh.inference.engine_process FD`, begun by `ProcessLLM` and for it alone.

Its one thread does what it is told, lets the engine go on, and tells what came of each step. Tokens become text in the
other process; here only where a request has stop strings, so that it ends at the very token that completes one.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdh.errors import BDHError
from bdh.inference.engine_messages import FrameDecoder, ObjectTable, encode_frame

if TYPE_CHECKING:
    from bdh.inference.detokenizer import Detokenizer
    from bdh.inference.llm import LLM
    from bdh.inference.outputs import TextRequest
    from bdh.inference.request import Event

log = logging.getLogger("bdh.inference.engine_process")  # whatever it is called when it is run

THREADS = 4  # threads for what is done beside the engine
PIECE = 1 << 20  # bytes that are read at once
ONE_THREAD_BELOW = 100_000  # multiplications of an encoder in all layers: threads would wait for each other for longer
ENDS = (signal.SIGINT, signal.SIGTERM)
IDLE_SECONDS = 10.0  # without a request, after which memory that is not in use is given back
ENDING_SECONDS = 5.0  # for the process to end when it is told to


@dataclass(frozen=True)
class EngineSettings:
    """What an engine's process is begun with: the arguments of `LLM`, and how it logs.

    Attributes:
        log: Is called there first, to set up logging.
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
    """A process that loads what it is told and then works for `ProcessLLM`. It begins at once, and gets ready."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            # -P: files that lie in the working directory are no modules. A group of its own: Ctrl-C is not for it.
            command = [sys.executable, "-P", "-m", "bdh.inference.engine_process", str(theirs.fileno())]
            before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)  # until it has said that it ignores them
            try:
                self.process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, process_group=0
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def end(self) -> str:
        """Makes sure that it is over; how it ended, in words. Takes up to some seconds."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(ENDING_SECONDS)
        self.process.kill()
        code = self.process.wait()
        return f"was ended by {signal_name(-code)}" if code < 0 else f"ended with code {code}"

    def abandon(self) -> None:
        """Ends it at once: nobody has begun to use it."""
        self.socket.close()
        self.process.kill()
        self.process.wait()


def resident_nbytes(pid: int) -> int:
    """Memory of a process; 0 where that cannot be found out."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):  # it is gone, or there is no such file here
        return 0


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one without a name
        return f"signal {number}"


class Connection:
    """The connection to the other process. Whatever is wrong with it, this process has nothing more to do."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self.objects = ObjectTable()
        self._frames = FrameDecoder()
        self._selector = selectors.DefaultSelector()
        self._selector.register(connection, selectors.EVENT_READ)
        self._lock = threading.Lock()  # of sending

    def send(self, *message: Any) -> None:
        """Sends a message. Raises whatever pickle does about what cannot be sent."""
        data = encode_frame(self.objects.dumps(message))
        try:
            with self._lock:
                self.socket.sendall(data)
        except OSError:
            exit_process()

    def messages(self, wait: bool, seconds: float | None = None) -> list[Any]:
        """All that has come; waits for the first if need be, for so many seconds at most."""
        found: list[Any] = []
        if wait and seconds is not None and not self._selector.select(seconds):
            return found
        while not found:
            try:
                data = self.socket.recv(PIECE, 0 if wait else socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                exit_process()
            found += [self.objects.loads(one) for one in self._frames.take(data)]
        return found

    def exit_with_client(self, loaded: threading.Event) -> None:
        """Ends this process with the other one as long as nobody reads here, as the model is being loaded."""
        while not loaded.wait(0.2):
            try:
                if self.socket.recv(1, socket.MSG_PEEK):
                    continue
            except ConnectionError:  # the other process was killed
                pass
            exit_process()


def exit_process() -> None:
    """Ends this process at once, whatever its threads do: the one that it works for is gone, or wants it to."""
    logging.shutdown()
    os._exit(0)


class Worker:
    """The engine at work.

    Args:
        llm: Its engine is used; what it makes of tokens is not.
        connection: To who wants its work.
    """

    def __init__(self, llm: "LLM", connection: Connection):
        self.llm = llm
        self.connection = connection
        self.executor = ThreadPoolExecutor(THREADS, "bdh-rpc")
        self.detokenizers: dict[str, list[Detokenizer]] = {}  # of requests with stop strings
        self.rpc_futures: dict[int, Future[None]] = {}  # beside the engine

    def run(self) -> None:
        """Works until the other process is gone, or wants no more."""
        published = False  # what the load is
        release_at: float | None = None  # when memory that is not in use is given back, by the monotonic clock
        while True:
            busy = self.llm.engine.busy
            if not busy and not published:
                self.publish([])
            left = None if release_at is None else max(0.0, release_at - time.monotonic())
            for kind, *values in self.connection.messages(wait=not busy, seconds=left):
                getattr(self, f"on_{kind}")(*values)
            published = False
            if self.llm.engine.busy:
                self.step()
                published = not self.llm.engine.busy
                release_at = time.monotonic() + IDLE_SECONDS
            elif release_at is not None and time.monotonic() >= release_at:
                self.llm.engine.release()
                release_at = None

    # ------------------------------------------------------------------------------------------------ what it is told

    def on_add(self, text_request: "TextRequest") -> None:
        from bdh.inference.detokenizer import Detokenizer

        request = text_request.request
        try:
            self.llm.prepare(request)
            self.llm.engine.add(request)
        except Exception as error:  # of this request alone
            self.connection.send("refused", request.id, error if isinstance(error, BDHError) else portable_error(error))
            return
        if text_request.stop:
            count = request.params.best_of or request.params.n
            tokenizer = self.llm.tokenizer
            self.detokenizers[request.id] = [
                Detokenizer(tokenizer, text_request.stop, text_request.strip) for _ in range(count)
            ]
        self.connection.send("added", request.id)

    def on_cancel(self, request_id: str) -> None:
        self.llm.engine.cancel(request_id)
        self.detokenizers.pop(request_id, None)

    def on_finish(self, number: int, request_id: str, counts: list[int]) -> None:
        """Ends continuations; answers with the state of each that has read all of as many tokens but the last.

        One that is further on by now has read what the caller knows nothing of: of that there is no state.
        """

        def finish(llm: "LLM") -> list[Any]:
            self.detokenizers.pop(request_id, None)
            exact = [count == llm.engine.written(request_id, index) for index, count in enumerate(counts)]
            states = [llm.engine.finish(request_id, index) for index in range(len(counts))]
            return [state if kept else None for state, kept in zip(states, exact, strict=True)]

        self.reply(number, finish, ())

    def on_call(self, number: int, in_thread: bool, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if not in_thread:
            self.reply(number, function, arguments)
            return
        future = self.rpc_futures[number] = self.executor.submit(self.reply, number, function, arguments)
        future.add_done_callback(lambda _: self.rpc_futures.pop(number, None))

    def on_forget(self, number: int) -> None:
        """Nobody waits for an answer any more: what has not begun need not."""
        if (future := self.rpc_futures.get(number)) is not None:
            future.cancel()

    def reply(self, number: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        """Sends what a function returns, or raises."""
        try:
            self.connection.send("reply", number, function(self.llm, *arguments))
        except BDHError as error:
            self.connection.send("error", number, error)
        except Exception as error:
            self.connection.send("error", number, portable_error(error))

    def on_release(self, number: int) -> None:
        self.connection.objects.release(number)

    def on_close(self) -> None:
        exit_process()

    # ----------------------------------------------------------------------------------------------------- its work

    def step(self) -> None:
        """One step of the engine, and what came of it."""
        try:
            events = self.llm.engine.step()
            if self.detokenizers:
                events = [self.stopped(event) if event.request_id in self.detokenizers else event for event in events]
        except Exception as error:
            self.llm.restart_engine(error)
            self.detokenizers.clear()
            log.error("the engine failed, and begins anew", exc_info=error)
            self.connection.send("failed", portable_error(error))
            return
        self.llm.check_length(self.llm.engine.longest_position)
        self.publish(events)

    def stopped(self, event: "Event") -> "Event":
        """The event, as the last one of its continuation if a stop string is complete with it."""
        prompt_encoder = self.detokenizers[event.request_id]
        text = prompt_encoder[event.index]
        if event.error is None and event.finish_reason is None:
            text.step(event.token)
            if text.stopped:
                state = self.llm.engine.finish(event.request_id, event.index)
                event = replace(event, finish_reason="stop", state=state)
        if event.request_id not in self.llm.engine.groups:
            self.detokenizers.pop(event.request_id)
        return event

    def publish(self, events: "list[Event]") -> None:
        """Tells what came of a step, and the load after it."""
        self.connection.send("events", [tuple(vars(event).values()) for event in events], vars(self.llm.engine.stats))


def portable_error(error: BaseException) -> RuntimeError:
    """An exception that the other process can read, whatever this one is."""
    return RuntimeError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def main() -> None:
    for number in ENDS:  # the other process says when it is time
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
    connection = Connection(socket.socket(fileno=int(sys.argv[1])))
    loaded = threading.Event()
    threading.Thread(target=connection.exit_with_client, args=(loaded,), daemon=True).start()
    from bdh.cli.main import quiet_libraries

    quiet_libraries()
    importlib.import_module("bdh.inference.llm")  # takes seconds; meanwhile the other process finds out what to tell
    from bdh.inference import engine_rpc

    settings, *more = connection.messages(wait=True)
    if more:  # that it is no longer wanted
        exit_process()
    if settings.log is not None:
        settings.log()
    try:
        llm = load(settings)
    except BDHError as error:
        connection.send("unable", error)
        return
    except Exception as error:
        connection.send("unable", BDHError(f"the model in {settings.model} cannot be loaded: {portable_error(error)}"))
        return
    model_info = replace(engine_rpc.model_info(llm), loaded_nbytes=resident_nbytes(os.getpid()))
    connection.send("ready", model_info, llm.end_token_ids)
    loaded.set()
    Worker(llm, connection).run()


def load(settings: EngineSettings) -> "LLM":
    """The model, and threads as are best for it. Raises BDHError."""
    import torch

    from bdh.inference.llm import LLM

    llm = LLM(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        quantization=settings.quantization,
        max_batch_size=settings.max_batch_size,
        prefix_cache_bytes=settings.prefix_cache_bytes,
        queue_size=settings.queue_size,
    )
    config = llm.runner.config
    if llm.runner.device.type == "cpu" and config.n_layer * config.n_neurons * config.n_embd < ONE_THREAD_BELOW:
        torch.set_num_threads(1)
    return llm


if __name__ == "__main__":
    main()
