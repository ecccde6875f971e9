"""Traces: the recorded activity of a model during a text, kept for a while for the caller who asked for it."""

import base64
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from bdh.errors import BDHError
from bdh.serving.activity import trace_rpc
from bdh.serving.activity.schemas import (
    BrainChunk,
    BrainLayer,
    BrainReference,
    BrainToken,
    BrainTrace,
    NeuronDetails,
    TokenActivity,
    TokenDetails,
)
from bdh.serving.api.errors import bad_request, not_found
from bdh.serving.config import BrainSettings
from bdh.serving.sessions.ids import check_place, new_id

if TYPE_CHECKING:
    from bdh.insight import Observer, Record
    from bdh.model import BDHState
    from bdh.serving.model_registry import ServedModel

CHUNK = 64  # tokens that are read at once; other requests run in between
MAX_PROMPT_TOKENS_SENT = 256  # in the first chunk of a stream: the last tokens of the prompt
MAX_NEURON_TOKENS = 32  # in the details of a neuron


class ActivityTrace:
    """Recorded activity of one text. Its functions run in the engine's process, in steps between those of the engine.

    Attributes:
        id: "trc_" and 32 hexadecimal digits.
        owner: Id of the key that it belongs to; None without keys.
        record: The observer's record, in the engine's process.
        bins: Bins of its rasters.
        ids: The recorded tokens.
        seen: The activity at each of them.
        prompt_tokens: Number of these that are the prompt's.
    """

    def __init__(self, id: str, served: "ServedModel", owner: str | None, record: "Record", bins: int):
        self.id = id
        self.served = served
        self.llm = served.llm  # of this trace, also if the process of the model is restarted
        self.owner = owner
        self.record = record
        self.bins = bins
        self.ids: list[int] = []
        self.seen: list[trace_rpc.RecordedToken] = []
        self.prompt_tokens = 0

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, tokens: Sequence[int], seen: Sequence[trace_rpc.RecordedToken]) -> None:
        self.seen += seen
        self.ids += tokens

    def text(self, index: int) -> str:
        """Return the text of a token; bytes that are a part of a character as <0xE2>."""
        text = self.served.texts.bytes(self.ids[index]).decode("utf-8", "surrogateescape")
        return "".join(f"<0x{ord(char) - 0xDC00:02X}>" if 0xDC80 <= ord(char) <= 0xDCFF else char for char in text)

    def tokens(self, start: int = 0) -> list[BrainToken]:
        """Return the recorded tokens from an index on."""
        return [
            BrainToken(
                index=index,
                id=self.ids[index],
                text=self.text(index),
                prompt=index < self.prompt_tokens,
                share=[round(share, 6) for share in self.seen[index].shares],
                raster=[base64.b64encode(layer).decode() for layer in self.seen[index].rasters],
            )
            for index in range(start, len(self))
        ]

    def whole(self) -> BrainTrace:
        info = self.llm.model_info
        return BrainTrace(
            trace=self.id,
            model=self.served.name,
            n_layer=info.n_layer,
            n_head=info.n_head,
            n_neurons=info.n_neurons,
            bins=self.bins,
            tokens=self.tokens(),
        )

    async def token(self, index: int) -> TokenDetails:
        """Compute the details of one token. Raises ApiError 404 if it is not in the trace."""
        if index >= len(self):
            raise not_found(f"token {index} is not in this trace; it has {len(self)} so far, from 0")
        async with self.llm.background_lock():
            layers = [await self._layer(index, layer) for layer in range(self.llm.model_info.n_layer)]
        return TokenDetails(index=index, id=self.ids[index], text=self.text(index), layers=layers)

    async def neuron(self, layer: int, neuron: int) -> NeuronDetails:
        """Compute the tokens that excited one neuron. Raises ApiError 404 if the model does not have it."""
        info = self.llm.model_info
        if layer >= info.n_layer or neuron >= info.n_neurons:
            last = f"{info.n_layer - 1} and neuron {info.n_neurons - 1}"
            raise not_found(f"there is no neuron {neuron} in layer {layer}; the last are layer {last}")
        result = await self.llm.call(
            trace_rpc.neuron_activity, self.record, layer, neuron, len(self), MAX_NEURON_TOKENS
        )
        return NeuronDetails(
            layer=layer,
            neuron=neuron,
            head=neuron * info.n_head // info.n_neurons,
            fired=result.fired,
            of=result.of,
            tokens=[
                TokenActivity(index=index, text=self.text(index), activity=activity)
                for index, activity in result.strongest
            ],
        )

    async def _layer(self, index: int, layer: int) -> BrainLayer:
        study, num_chunks = await self.llm.call(trace_rpc.start_study, self.record, index, layer)
        for number in range(num_chunks):
            await self.llm.call(trace_rpc.study_chunk, study, number)
        view = await self.llm.call(trace_rpc.view, study)
        sources = [{"index": index, "text": self.text(index), "weight": weight} for index, weight in view["sources"]]
        return BrainLayer.model_validate({**view, "sources": sources})


class TraceRecorder:
    """Records one text while it is written: `read_prompt` first, then `read` as tokens arrive, and `close` at the end.

    It records nothing more once the trace is full or deleted.
    """

    def __init__(self, store: "TraceStore", trace: ActivityTrace, observer: "Observer", prompt: Sequence[int]):
        self.store = store
        self.trace = trace
        self.observer: Observer | None = observer
        self._prompt = prompt

    @property
    def id(self) -> str:
        return self.trace.id

    async def read_prompt(self) -> BrainChunk:
        """Read the prompt; return its last tokens."""
        recorded = self._prompt[-max(1, self.store.settings.max_tokens // 2) :]
        await self._read(self._prompt[: -len(recorded)], record=False)
        await self._read(recorded)
        self.trace.prompt_tokens = len(self.trace)
        return self._chunk(max(0, len(self.trace) - MAX_PROMPT_TOKENS_SENT))

    async def read(self, tokens: Sequence[int]) -> BrainChunk:
        """Read generated tokens; return those that the trace has room for."""
        start = len(self.trace)
        if self.observer is not None:
            await self._read(tokens[: self._capacity_left])
        return self._chunk(start)

    def reference(self) -> BrainReference:
        return BrainReference(trace=self.id)

    def close(self) -> None:
        """Release the memory of the observer's state. The trace stays."""
        self.observer = None

    @property
    def _capacity_left(self) -> int:
        return self.store.settings.max_tokens - len(self.trace)

    def _chunk(self, start: int) -> BrainChunk:
        return BrainChunk(trace=self.id, tokens=self.trace.tokens(start))

    async def _read(self, tokens: Sequence[int], record: bool = True) -> None:
        try:
            for start in range(0, len(tokens), CHUNK):
                if (observer := self.observer) is None:
                    return
                self.store.touch(self.trace)
                chunk = tokens[start : start + CHUNK]
                if record:
                    self.trace.add(chunk, await self.trace.llm.call(trace_rpc.read, observer, chunk))
                else:
                    await self.trace.llm.call(trace_rpc.skip, observer, chunk)
                if not self._capacity_left:
                    self.close()
        except BaseException:  # the observer's state is undefined
            self.close()
            raise


class TraceStore:
    """The traces of a server, of all its models. For one event loop.

    Args:
        settings: How many traces and tokens are kept.
        place: Identifies this server in ids, if it is one of several replicas.

    Raises:
        BDHError: A setting is invalid.
    """

    def __init__(self, settings: BrainSettings, place: str = ""):
        for name in ("max_traces", "max_tokens"):
            if getattr(settings, name) < 1:
                raise BDHError(f"serve.brain.{name} is {getattr(settings, name)}; it must be at least 1")
        self.settings = settings
        self.place = place
        self._traces: OrderedDict[str, ActivityTrace] = OrderedDict()  # the least recently used first
        self._recorders: WeakValueDictionary[str, TraceRecorder] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._traces)

    async def start(
        self, served: "ServedModel", owner: str | None, prompt_tokens: Sequence[int], state: "BDHState | None"
    ) -> TraceRecorder:
        """Start a trace.

        Args:
            served: The model.
            owner: Owner of the trace.
            prompt_tokens: Tokens that the model reads before it generates; all in its vocabulary.
            state: State before the prompt, if it is not the initial one. Nobody may change it.

        Raises:
            ApiError: 400 if the server or the model does not support it.
        """
        llm = served.llm
        if not self.settings.enabled:
            raise bad_request("the brain view is off on this server; leave brain out", "brain")
        if llm.model_info.n_parameters == 0:
            message = f"the model {served.name} cannot be watched, as its runner keeps no model; leave brain out"
            raise bad_request(message, "brain")
        observer, record, bins = await llm.call(trace_rpc.start, self.settings.max_tokens, state)
        trace = ActivityTrace(new_id("trc", self.place), served, owner, record, bins)
        recorder = TraceRecorder(self, trace, observer, prompt_tokens)
        if len(self._traces) >= self.settings.max_traces:
            self._drop(self._evictable(owner).id)
        self._traces[trace.id] = trace
        self._recorders[trace.id] = recorder
        return recorder

    def get(self, id: str, owner: str | None) -> ActivityTrace:
        """Return a trace. Raises ApiError 404 if there is none, or it has another owner; 410 if its replica is gone."""
        check_place(id, self.place, "ask for another text with brain")
        trace = self._traces.get(id)
        if trace is None or trace.owner != owner:
            raise not_found(f"there is no trace {id[:40]} here, or no more; traces are kept until newer ones come")
        self.touch(trace)
        return trace

    def touch(self, trace: ActivityTrace) -> None:
        """Mark a trace as the most recently used."""
        if trace.id in self._traces:
            self._traces.move_to_end(trace.id)

    def delete(self, id: str, owner: str | None) -> None:
        """Delete a trace. Raises ApiError as `get`."""
        self._drop(self.get(id, owner).id)

    def remove_lost(self, served: "ServedModel") -> None:
        """Delete the traces of a model whose process has ended."""
        for trace in [trace for trace in self._traces.values() if trace.llm is served.llm]:
            self._drop(trace.id)

    def _evictable(self, owner: str | None) -> ActivityTrace:
        """Return the trace to delete for another one of an owner: of the owner with most, sooner a complete one."""
        traces = list(self._traces.values())
        counts = Counter([owner, *(trace.owner for trace in traces)])
        most = max(counts[trace.owner] for trace in traces)
        candidates = (trace for trace in traces if counts[trace.owner] == most)
        return min(candidates, key=self._is_recording)  # the first of several

    def _is_recording(self, trace: ActivityTrace) -> bool:
        recorder = self._recorders.get(trace.id)
        return recorder is not None and recorder.observer is not None

    def _drop(self, id: str) -> None:
        del self._traces[id]
        if (recorder := self._recorders.get(id)) is not None:
            recorder.close()
