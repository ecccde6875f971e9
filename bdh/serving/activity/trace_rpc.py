"""Functions for traces that run in the engine's process, through `AsyncModel.call`.

`bdh.insight` is imported in the functions: the process of the server does not import torch.
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
class RecordedToken:
    """Activity at one token: for each layer the share of active neurons, and a raster."""

    shares: list[float]
    rasters: list[bytes]


@dataclass(frozen=True)
class NeuronExcitation:
    """Tokens that excited a neuron: their number, the number of all tokens, and the strongest with their activity."""

    fired: int
    of: int
    strongest: list[tuple[int, float]]


def start(llm: "LLM", max_tokens: int, state: "BDHState | None") -> "tuple[Observer, Record, int]":
    """Create an observer of the model from a state on; return it, its record, and the number of bins of its rasters.

    Raises BDHError if the runner has no model."""
    from bdh.insight import Observer

    observer = Observer(model_of(llm), max_tokens, state)
    return observer, observer.record, observer.record.rasters.shape[-1]


def skip(llm: "LLM", observer: "Observer", tokens: Sequence[int]) -> None:
    """Read tokens without recording them."""
    observer.skip(tokens)


def read(llm: "LLM", observer: "Observer", tokens: Sequence[int]) -> list[RecordedToken]:
    """Read tokens; return the activity at each."""
    record = observer.record
    start = len(record)
    observer.read(tokens)
    rows = range(start, len(record))
    return [
        RecordedToken(record.shares[row].tolist(), [raster.tobytes() for raster in record.rasters[row]]) for row in rows
    ]


def neuron_activity(
    llm: "LLM", record: "Record", layer: int, neuron: int, num_tokens: int, top: int
) -> NeuronExcitation:
    """Return which of the first `num_tokens` tokens excited a neuron, and the `top` strongest."""
    from bdh import insight

    activity = insight.neuron_activity(model_of(llm), record, layer, neuron)[:num_tokens]
    best = activity.topk(min(top, len(activity)))
    strongest = [pair for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True) if pair[1] > 0]
    return NeuronExcitation(int((activity > 0).sum()), len(activity), strongest)


def start_study(llm: "LLM", record: "Record", index: int, layer: int) -> "tuple[LayerStudy, int]":
    """Start the study of a token in a layer; return it with the number of chunks of the past that it reads."""
    from bdh.insight import LayerStudy

    study = LayerStudy(model_of(llm), record, index, layer)
    return study, len(study.pieces)


def study_chunk(llm: "LLM", study: "LayerStudy", number: int) -> None:
    study.read_past(study.pieces[number])


def view(llm: "LLM", study: "LayerStudy") -> dict[str, Any]:
    """Return the results of a study as the fields of `BrainLayer`, with sources as pairs of index and weight."""
    result = study.view()
    return {
        "layer": result.layer,
        "active": result.active,
        "share": round(result.share, 6),
        "neurons": [{"neuron": neuron, "activity": activity} for neuron, activity in result.neurons],
        "written": synapses(result.written),
        "read": synapses(result.read),
        "sources": result.sources,
        "log_decay": result.log_decay,
        "write_strength": result.write_strength,
    }


def synapses(connections: "Sequence[Synapse]") -> list[dict[str, Any]]:
    return [{"from": synapse.sender, "to": synapse.receiver, "strength": synapse.strength} for synapse in connections]


def model_of(llm: "LLM") -> "BDHForCausalLM":
    if llm.model is None:
        raise BDHError("its runner keeps no model")
    return llm.model
