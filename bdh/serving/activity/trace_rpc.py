"""What is done for traces where a model works: errands for `AsyncModel.call`, whose results go to other processes.

All of `bdh.insight` is imported where it is used: a server's own process has no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bdh.errors import BDHError

if TYPE_CHECKING:
    from bdh.inference.llm import LLM
    from bdh.insight import LayerStudy, Observer, Record, Synapse
    from bdh.model import BDHForCausalLM, BDHState


@dataclass(frozen=True)
class Seen:
    """What the neurons did at one token: the share of each layer that was active, and a raster of each."""

    shares: list[float]
    rasters: list[bytes]


@dataclass(frozen=True)
class Excited:
    """Which tokens excited a neuron: how many of all, and the strongest, as numbers of tokens and the activity."""

    fired: int
    of: int
    strongest: list[tuple[int, float]]


def begin(llm: "LLM", max_tokens: int, state: "BDHState | None") -> "tuple[Observer, Record, int]":
    """One who looks at what the model does from a state on, what it keeps, and how many bins its rasters have.

    Raises BDHError where there is no model."""
    from bdh.insight import Observer

    observer = Observer(model_of(llm), max_tokens, state)
    return observer, observer.record, observer.record.rasters.shape[-1]


def skip(llm: "LLM", observer: "Observer", tokens: Sequence[int]) -> None:
    """Has tokens read that are not kept."""
    observer.skip(tokens)


def read(llm: "LLM", observer: "Observer", tokens: Sequence[int]) -> list[Seen]:
    """Has tokens read; what was seen at each."""
    record = observer.record
    start = len(record)
    observer.read(tokens)
    rows = range(start, len(record))
    return [Seen(record.shares[row].tolist(), [one.tobytes() for one in record.rasters[row]]) for row in rows]


def excited(llm: "LLM", record: "Record", layer: int, neuron: int, known: int, count: int) -> Excited:
    """Which of the first `known` tokens excited a neuron; of the strongest so many."""
    from bdh.insight import neuron_activity

    activity = neuron_activity(model_of(llm), record, layer, neuron)[:known]
    best = activity.topk(min(count, len(activity)))
    strongest = [pair for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True) if pair[1] > 0]
    return Excited(int((activity > 0).sum()), len(activity), strongest)


def begin_study(llm: "LLM", record: "Record", index: int, layer: int) -> "tuple[LayerStudy, int]":
    """The study of what a token did in a layer, and how many pieces of the past it is to be told to read."""
    from bdh.insight import LayerStudy

    study = LayerStudy(model_of(llm), record, index, layer)
    return study, len(study.pieces)


def study_piece(llm: "LLM", study: "LayerStudy", number: int) -> None:
    study.read_past(study.pieces[number])


def view(llm: "LLM", study: "LayerStudy") -> dict[str, Any]:
    """What was found, as JSON, but that sources are numbers of tokens and their weights."""
    found = study.view()
    return {
        "layer": found.layer,
        "active": found.active,
        "share": round(found.share, 6),
        "neurons": [{"neuron": neuron, "activity": activity} for neuron, activity in found.neurons],
        "written": synapses(found.written),
        "read": synapses(found.read),
        "sources": found.sources,
        "log_decay": found.log_decay,
        "write_strength": found.write_strength,
    }


def synapses(found: "Sequence[Synapse]") -> list[dict[str, Any]]:
    return [{"from": one.sender, "to": one.receiver, "strength": one.strength} for one in found]


def model_of(llm: "LLM") -> "BDHForCausalLM":
    if llm.model is None:
        raise BDHError("its runner keeps no model")
    return llm.model
