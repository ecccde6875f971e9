"""Messages between the engine's process and its client: typed, pickled, and framed by a length prefix.

Both processes run the same program on one machine and share a socket pair that no other process can reach, so pickle is
safe here. Objects of the model, above all states, stay in the engine's process; the client gets a handle that is
resolved when it is sent back. An object is released when the client has no handle of it left.
"""

import io
import pickle
import struct
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Any

from bdh.errors import BDHError

if TYPE_CHECKING:
    from bdh.inference.outputs import TextRequest
    from bdh.inference.request import Event
    from bdh.inference.stats import EngineStats, ModelInfo

HEADER = struct.Struct("!Q")
REMOTE_TYPES = frozenset(
    {
        "bdh.model.modeling_bdh.BDHState",
        "bdh.inference.scoring.Scorer",
        "bdh.insight.observer.Observer",
        "bdh.insight.activity_record.Record",
        "bdh.insight.layer_study.LayerStudy",
    }
)

# ------------------------------------------------------------------------------------------------ client to engine


@dataclass(frozen=True)
class AddRequest:
    """Queue a request; answered by `RequestAdded` or `RequestRefused`."""

    text_request: "TextRequest"


@dataclass(frozen=True)
class CancelRequest:
    """End a request."""

    request_id: str


@dataclass(frozen=True)
class FinishRequest:
    """End a request and return the states of its continuations; answered by `CallResult`.

    Attributes:
        call_id: Identifies the answer.
        request_id: The request.
        counts: Number of tokens of each continuation that the client has received; -1 for a finished one.
    """

    call_id: int
    request_id: str
    counts: list[int]


@dataclass(frozen=True)
class CallFunction:
    """Call a function with the `LLM` and these arguments; answered by `CallResult` or `CallError`.

    Attributes:
        call_id: Identifies the answer.
        function: A module-level function.
        arguments: Arguments after the `LLM`.
        in_thread: Whether to call it in a thread instead of between two engine steps.
    """

    call_id: int
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    in_thread: bool


@dataclass(frozen=True)
class CancelCall:
    """Do not start a call that still waits for a thread: its caller was cancelled."""

    call_id: int


@dataclass(frozen=True)
class ReleaseObject:
    """Release an object of which the client has no handle left."""

    number: int


@dataclass(frozen=True)
class Shutdown:
    """End the process."""


# ------------------------------------------------------------------------------------------------ engine to client


@dataclass(frozen=True)
class EngineReady:
    """The model is loaded."""

    model_info: "ModelInfo"
    end_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class LoadFailed:
    """The model cannot be loaded; the process ends."""

    error: BDHError


@dataclass(frozen=True)
class RequestAdded:
    """The request is in the engine's queue."""

    request_id: str


@dataclass(frozen=True)
class RequestRefused:
    """The engine did not take the request."""

    request_id: str
    error: Exception


@dataclass(frozen=True)
class StepOutput:
    """The tokens of one engine step, and the engine's load after it."""

    events: "list[Event]"
    stats: "EngineStats"


@dataclass(frozen=True)
class EngineFailed:
    """A step failed: all requests are lost, and the engine was restarted."""

    error: Exception


@dataclass(frozen=True)
class CallResult:
    """The return value of a call."""

    call_id: int
    value: Any


@dataclass(frozen=True)
class CallError:
    """The exception of a call."""

    call_id: int
    error: Exception


# --------------------------------------------------------------------------------------------------------- framing


class RemoteHandle:
    """Reference to an object in the engine's process.

    Attributes:
        number: Its number in the `ObjectTable` of that process.
        owner: Handles of that process; a number means nothing in another one.
        length: Number of tokens that a state has read.
        nbytes: Size of a state.
    """

    def __init__(self, number: int, length: int, nbytes: int, owner: "HandleTable | None" = None):
        self.number = number
        self.owner = owner
        self.length = length
        self.nbytes = nbytes


def encode_frame(payload: bytes) -> bytes:
    return HEADER.pack(len(payload)) + payload


class FrameDecoder:
    """Splits a stream of bytes into messages."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Add received bytes; yield the messages that are complete."""
        self._bytes += data
        start = 0
        while len(self._bytes) >= start + HEADER.size:
            end = start + HEADER.size + HEADER.unpack_from(self._bytes, start)[0]
            if len(self._bytes) < end:
                break
            yield bytes(memoryview(self._bytes)[start + HEADER.size : end])
            start = end
        del self._bytes[:start]


def load_object(number: int) -> Any:
    """Stand for an object in a pickled message to the engine; replaced by `ObjectTable.loads`."""
    raise pickle.UnpicklingError("a message for an engine's process was read elsewhere")


def load_handle(number: int, length: int, nbytes: int) -> Any:
    """Stand for a handle in a pickled message from the engine; replaced by `HandleTable.loads`."""
    raise pickle.UnpicklingError("a message from an engine's process was read elsewhere")


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, reduce: Callable[[Any], Any]):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._reduce = reduce

    def reducer_override(self, obj: Any) -> Any:
        return self._reduce(obj)


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, name: str, function: Callable[..., Any]):
        super().__init__(io.BytesIO(data))
        self._name, self._function = name, function

    def find_class(self, module: str, name: str) -> Any:
        if module == __name__ and name == self._name:
            return self._function
        return super().find_class(module, name)


def _dumps(message: Any, reduce: Callable[[Any], Any]) -> bytes:
    file = io.BytesIO()
    _Pickler(file, reduce).dump(message)
    return file.getvalue()


@cache
def is_remote(kind: type) -> bool:
    """Return whether instances stay in the engine's process."""
    return f"{kind.__module__}.{kind.__qualname__}" in REMOTE_TYPES


class ObjectTable:
    """Objects in the engine's process to which the client has handles."""

    def __init__(self) -> None:
        self._objects: dict[int, Any] = {}
        self._numbers = count()

    def dumps(self, message: Any) -> bytes:
        return _dumps(message, self._reduce)

    def loads(self, data: bytes) -> Any:
        return _Unpickler(data, load_object.__name__, self._objects.__getitem__).load()

    def release(self, number: int) -> None:
        self._objects.pop(number, None)

    def _reduce(self, obj: Any) -> Any:
        if not is_remote(obj.__class__):
            return NotImplemented
        number = next(self._numbers)
        self._objects[number] = obj
        return load_handle, (number, getattr(obj, "length", 0), getattr(obj, "nbytes", 0))


class HandleTable:
    """Handles in the client's process.

    Args:
        release: Called with the number of an object when its last handle is gone, in any thread.
    """

    def __init__(self, release: Callable[[int], None]):
        self._release = release

    def dumps(self, message: Any) -> bytes:
        return _dumps(message, self._reduce)

    def loads(self, data: bytes) -> Any:
        return _Unpickler(data, load_handle.__name__, self._handle).load()

    def _handle(self, number: int, length: int, nbytes: int) -> RemoteHandle:
        remote = RemoteHandle(number, length, nbytes, self)
        weakref.finalize(remote, self._release, number).atexit = False
        return remote

    def _reduce(self, obj: Any) -> Any:
        if not isinstance(obj, RemoteHandle):
            return NotImplemented
        if obj.owner is not self:
            raise RuntimeError("the engine failed: this state was in a process that is gone")
        return load_object, (obj.number,)
