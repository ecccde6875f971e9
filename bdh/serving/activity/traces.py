"""Traces: what was seen of a model while it wrote a text, kept a while for those who asked for it."""

import asyncio
import base64
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from bdh.errors import BDHError
from bdh.serving.activity import trace_rpc
from bdh.serving.api.errors import bad_request, not_found
from bdh.serving.config import BrainSettings
from bdh.serving.sessions.ids import check_place, new_id

if TYPE_CHECKING:
    from bdh.inference.async_model import AsyncModel
    from bdh.insight import Observer, Record
    from bdh.model import BDHState
    from bdh.serving.api.logprobs import TokenTexts

PIECE = 64  # tokens of a prompt that are read at once: others go on in between
SHOWN = 256  # tokens of a prompt, its last, that are told at once
NEURON_TOKENS = 32  # that are told of a neuron


class Trace:
    """What was seen of one text. Work on it is done where the model works, piece by piece between the engine's steps.

    Attributes:
        id: "trc_" and 32 hexadecimal digits.
        model_name: What requests call the model.
        owner: The id of the key that it belongs to; None where no keys are asked for.
        record: Of the observer, where the model works.
        bins: Of its rasters.
        ids: The recorded tokens.
        seen: What was seen at each.
        prompt_tokens: How many of them are the prompt's.
    """

    def __init__(
        self,
        id: str,
        model_name: str,
        owner: str | None,
        llm: "AsyncModel",
        texts: "TokenTexts",
        record: "Record",
        bins: int,
    ):
        self.id = id
        self.model_name = model_name
        self.owner = owner
        self.llm = llm
        self.texts = texts
        self.record = record
        self.bins = bins
        self.ids: list[int] = []
        self.seen: list[trace_rpc.Seen] = []
        self.prompt_tokens = 0

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, tokens: Sequence[int], seen: Sequence[trace_rpc.Seen]) -> None:
        self.seen += seen
        self.ids += tokens

    def text(self, index: int) -> str:
        """The text of a token; bytes that are a part of a character, as <0xE2>."""
        text = self.texts.bytes(self.ids[index]).decode("utf-8", "surrogateescape")
        return "".join(f"<0x{ord(one) - 0xDC00:02X}>" if 0xDC80 <= ord(one) <= 0xDCFF else one for one in text)

    def tokens(self, start: int = 0) -> list[dict[str, Any]]:
        """The JSON of the recorded tokens from one on."""
        return [
            {
                "index": index,
                "id": self.ids[index],
                "text": self.text(index),
                "prompt": index < self.prompt_tokens,
                "share": [round(share, 6) for share in self.seen[index].shares],
                "raster": [base64.b64encode(layer).decode() for layer in self.seen[index].rasters],
            }
            for index in range(start, len(self))
        ]

    def whole(self) -> dict[str, Any]:
        """The JSON of all of it."""
        figures = self.llm.model_info
        return {
            "trace": self.id,
            "model": self.model_name,
            "n_layer": figures.n_layer,
            "n_head": figures.n_head,
            "n_neurons": figures.n_neurons,
            "bins": self.bins,
            "tokens": self.tokens(),
        }

    async def token(self, index: int) -> dict[str, Any]:
        """The JSON of what one token did. Raises ApiError 404 for one that there is not."""
        if index >= len(self):
            raise not_found(f"token {index} is not in this trace; it has {len(self)} so far, from 0")
        async with self.llm.background_lock():
            layers = [await self._layer(index, layer) for layer in range(self.llm.model_info.n_layer)]
        return {"index": index, "id": self.ids[index], "text": self.text(index), "layers": layers}

    async def neuron(self, layer: int, neuron: int) -> dict[str, Any]:
        """The JSON of what excited one neuron. Raises ApiError 404 for one that there is not."""
        figures = self.llm.model_info
        if layer >= figures.n_layer or neuron >= figures.n_neurons:
            last = f"{figures.n_layer - 1} and neuron {figures.n_neurons - 1}"
            raise not_found(f"there is no neuron {neuron} in layer {layer}; the last are layer {last}")
        found = await self.llm.call(trace_rpc.excited, self.record, layer, neuron, len(self), NEURON_TOKENS)
        return {
            "layer": layer,
            "neuron": neuron,
            "head": neuron * figures.n_head // figures.n_neurons,
            "fired": found.fired,
            "of": found.of,
            "tokens": [
                {"index": index, "text": self.text(index), "activity": activity} for index, activity in found.strongest
            ],
        }

    async def _layer(self, index: int, layer: int) -> dict[str, Any]:
        study, pieces = await self.llm.call(trace_rpc.begin_study, self.record, index, layer)
        for number in range(pieces):
            await self.llm.call(trace_rpc.study_piece, study, number)
        view = await self.llm.call(trace_rpc.view, study)
        sources = [{"index": index, "text": self.text(index), "weight": weight} for index, weight in view["sources"]]
        return {**view, "sources": sources}


class Watch:
    """One text while it is written: `prompt` first, then `tokens` as they come, and `close` in the end.

    It goes on without telling anything when the trace is full or no longer kept.

    Attributes:
        id: Of the trace.
    """

    def __init__(self, store: "TraceStore", trace: Trace, observer: "Observer", prompt: Sequence[int]):
        self.store = store
        self.trace = trace
        self.id = trace.id
        self.observer: Observer | None = observer
        self._prompt = prompt

    async def prompt(self) -> dict[str, Any]:
        """Reads the prompt; the JSON of its last tokens."""
        kept = self._prompt[-max(1, self.store.settings.max_tokens // 2) :]
        await self._read(self._prompt[: -len(kept)], kept=False)
        await self._read(kept)
        self.trace.prompt_tokens = len(self.trace)
        return self._told(max(0, len(self.trace) - SHOWN))

    async def tokens(self, new: Sequence[int]) -> dict[str, Any]:
        """Reads tokens that the model chose; the JSON of as many as are kept."""
        start = len(self.trace)
        if self.observer is not None:
            await self._read(new[: self._room])
        return self._told(start)

    def close(self) -> None:
        """Gives back the memory of its state. The trace stays."""
        self.observer = None

    @property
    def _room(self) -> int:
        """How many more tokens are kept."""
        return self.store.settings.max_tokens - len(self.trace)

    def _told(self, start: int) -> dict[str, Any]:
        return {"trace": self.id, "tokens": self.trace.tokens(start)}

    async def _read(self, tokens: Sequence[int], kept: bool = True) -> None:
        try:
            for start in range(0, len(tokens), PIECE):
                if (observer := self.observer) is None:
                    return
                self.store.touch(self.trace)
                piece = tokens[start : start + PIECE]
                if kept:
                    self.trace.add(piece, await self.trace.llm.call(trace_rpc.read, observer, piece))
                else:
                    await self.trace.llm.call(trace_rpc.skip, observer, piece)
                if not self._room:
                    self.close()
        except BaseException:  # its state may be anything
            self.close()
            raise


class TraceStore:
    """The traces of a server, of all its models. For one event loop.

    Args:
        settings: What is kept.
        place: What stands for this server in their ids, if it is one of several.

    Raises:
        BDHError: A setting cannot be.
    """

    def __init__(self, settings: BrainSettings, place: str = ""):
        for name in ("max_traces", "max_tokens"):
            if getattr(settings, name) < 1:
                raise BDHError(f"serve.brain.{name} is {getattr(settings, name)}; it must be at least 1")
        self.settings = settings
        self.place = place
        self._traces: OrderedDict[str, Trace] = OrderedDict()  # the one longest out of use first
        self._watches: WeakValueDictionary[str, Watch] = WeakValueDictionary()
        self._texts: WeakKeyDictionary[AsyncModel, TokenTexts] = WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._traces)

    async def begin(
        self,
        model_name: str,
        llm: "AsyncModel",
        owner: str | None,
        prompt_tokens: Sequence[int],
        state: "BDHState | None",
    ) -> Watch:
        """A new trace, and what is to be told of the text as it is written.

        Args:
            model_name: What requests call the model.
            llm: The model.
            owner: Whose trace it is.
            prompt_tokens: What the model reads before it writes; it knows them all.
            state: What it goes on from, if it is not the beginning. It is kept and not changed, and nobody else may
                change it.

        Raises:
            ApiError: 400, the server or the model does not let itself be watched.
        """
        if not self.settings.enabled:
            raise bad_request("the brain view is off on this server; leave brain out", "brain")
        if llm.model_info.n_parameters == 0:
            words = f"the model {model_name} cannot be watched, as its runner keeps no model; leave brain out"
            raise bad_request(words, "brain")
        texts = await self._texts_of(llm)
        observer, record, bins = await llm.call(trace_rpc.begin, self.settings.max_tokens, state)
        trace = Trace(new_id("trc", self.place), model_name, owner, llm, texts, record, bins)
        watch = Watch(self, trace, observer, prompt_tokens)
        if len(self._traces) >= self.settings.max_traces:
            self._drop(self._spare(owner).id)
        self._traces[watch.id] = watch.trace
        self._watches[watch.id] = watch
        return watch

    def get(self, id: str, owner: str | None) -> Trace:
        """A trace. Raises ApiError 404 if there is none, or it is somebody else's; 410 if it was elsewhere."""
        check_place(id, self.place, "ask for another text with brain")
        trace = self._traces.get(id)
        if trace is None or trace.owner != owner:
            raise not_found(f"there is no trace {id[:40]} here, or no more; traces are kept until newer ones come")
        self.touch(trace)
        return trace

    def touch(self, trace: Trace) -> None:
        """Remembers that a trace is in use."""
        if trace.id in self._traces:
            self._traces.move_to_end(trace.id)

    def delete(self, id: str, owner: str | None) -> None:
        """Forgets a trace. Raises ApiError as `get`."""
        self._drop(self.get(id, owner).id)

    def lose(self, llm: "AsyncModel") -> None:
        """Forgets the traces of a model that is no more."""
        for trace in [trace for trace in self._traces.values() if trace.llm is llm]:
            self._drop(trace.id)

    def _spare(self, owner: str | None) -> Trace:
        """The trace that makes room for another one of an owner's."""
        traces = list(self._traces.values())
        counts = Counter([owner, *(trace.owner for trace in traces)])
        most = max(counts[trace.owner] for trace in traces)
        theirs = (trace for trace in traces if counts[trace.owner] == most)
        return min(theirs, key=self._is_watched)  # of several the first

    def _is_watched(self, trace: Trace) -> bool:
        watch = self._watches.get(trace.id)
        return watch is not None and watch.observer is not None

    def _drop(self, id: str) -> None:
        del self._traces[id]
        if (watch := self._watches.get(id)) is not None:
            watch.close()

    async def _texts_of(self, llm: "AsyncModel") -> "TokenTexts":
        from bdh.serving.api.logprobs import TokenTexts

        if llm not in self._texts:
            self._texts[llm] = await asyncio.to_thread(
                TokenTexts, llm.prompt_encoder.tokenizer, llm.prompt_encoder.vocab_size
            )
        return self._texts[llm]
