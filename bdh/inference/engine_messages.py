"""Messages between a process that has an engine and the one that uses it: a length, and a pickle of that many bytes.

The two are one program on one machine, joined by a pair of sockets that nobody else can reach: nothing in here comes
from outside. What belongs to the model, states above all, stays in the engine's process: a number stands for it, which
goes back as that thing. When nothing in the other process stands for it any more, it may go.
"""

import io
import pickle
import struct
import weakref
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

HEADER = struct.Struct("!Q")
REMOTE_TYPES = frozenset(
    {
        "bdh.model.modeling_bdh.BDHState",
        "bdh.inference.scoring.Scorer",
        "bdh.insight.observer.Observer",
        "bdh.insight.record.Record",
        "bdh.insight.study.LayerStudy",
    }
)


class RemoteHandle:
    """What stands for something that stays in the engine's process.

    Attributes:
        number: Of that thing there.
        owner: Of the process that it is in: numbers of others mean something else.
        length: Tokens that it has read, if it is a state.
        nbytes: That it takes, if it is a state.
    """

    def __init__(self, number: int, length: int, nbytes: int, owner: "HandleTable | None" = None):
        self.number = number
        self.owner = owner
        self.length = length
        self.nbytes = nbytes


def encode_frame(payload: bytes) -> bytes:
    return HEADER.pack(len(payload)) + payload


class FrameDecoder:
    """Bytes as they come, cut into messages."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def take(self, data: bytes) -> Iterator[bytes]:
        """The messages that are complete with these bytes."""
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
    """In a message to the engine's process: the thing of this number. `ObjectTable.loads` puts it in."""
    raise pickle.UnpicklingError("a message for an engine's process was read elsewhere")


def load_handle(number: int, length: int, nbytes: int) -> Any:
    """In a message from the engine's process: what stands for a thing. `HandleTable.loads` puts it in."""
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


class ObjectTable:
    """In the engine's process: what stays there, by number."""

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
        kind = type(obj)
        if f"{kind.__module__}.{kind.__qualname__}" not in REMOTE_TYPES:
            return NotImplemented
        number = next(self._numbers)
        self._objects[number] = obj
        return load_handle, (number, getattr(obj, "length", 0), getattr(obj, "nbytes", 0))


class HandleTable:
    """In the process that uses the engine: what stands for things there.

    Args:
        release: Is told the number of each that nothing stands for any more; by whichever thread.
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
            raise RuntimeError("the engine failed: what this stands for was in a process that is gone")
        return load_object, (obj.number,)
