"""Functions that clients of an `AsyncModel` call in the engine's process.

The first argument of each is the `LLM` there. The client imports this module without torch, so torch is imported inside
the functions.
"""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bdh.inference.stats import ModelInfo

if TYPE_CHECKING:
    from bdh.inference.conversation import SavedConversation, Snapshot
    from bdh.inference.llm import LLM
    from bdh.inference.outputs import Completion, TextRequest, TokenLogprob
    from bdh.inference.sampling_params import SamplingParams
    from bdh.inference.scoring import Scorer

_fingerprint = threading.Lock()  # for its single computation


def model_info(llm: "LLM") -> ModelInfo:
    """Return the sizes of the model."""
    runner, model = llm.runner, llm.model
    config = runner.config
    return ModelInfo(
        n_layer=config.n_layer,
        n_embd=config.n_embd,
        n_head=config.n_head,
        n_neurons=config.n_neurons,
        vocab_size=config.vocab_size,
        n_parameters=0 if model is None else sum(parameter.numel() for parameter in model.parameters()),
        state_nbytes=runner.state_nbytes,
        n_slots=runner.n_slots,
        device=runner.device.type,
        dtype="unknown" if model is None else str(model.dtype).removeprefix("torch."),
    )


def fingerprint(llm: "LLM") -> str:
    """Return the fingerprint of the model. Raises BDHError for a runner without one."""
    with _fingerprint:
        return llm.fingerprint


def ping(llm: "LLM") -> None:
    """Do nothing; the reply shows that the engine is alive."""


def prepare_grammar(llm: "LLM", params: "SamplingParams") -> None:
    """Compile the grammar of a request. Raises BDHError."""
    llm.prepare_grammar(params)


def beam_search(llm: "LLM", text_request: "TextRequest") -> "Completion":
    """Run a beam search. Raises BDHError."""
    return llm.beam_search(text_request)


def begin_scoring(llm: "LLM", tokens: Sequence[int], top: int) -> "Scorer":
    """Create a scorer of a text. Raises BDHError."""
    from bdh.inference.scoring import Scorer

    return Scorer(llm.model, tokens, top)


def score_chunk(llm: "LLM", scorer: "Scorer") -> bool:
    """Score the next chunk, if there is one; return whether the text is done."""
    if not scorer.done:
        scorer.read_chunk()
    return scorer.done


def scores(llm: "LLM", scorer: "Scorer") -> "list[TokenLogprob]":
    return scorer.scores


def write_session(llm: "LLM", snapshot: "Snapshot", path: str | Path, more: Mapping[str, str]) -> None:
    """Write a session to a file. Raises BDHError."""
    from bdh.inference.session_file import write_session

    write_session(path, snapshot, llm.runner.config, fingerprint(llm), more)


def read_session(llm: "LLM", path: str | Path) -> "SavedConversation":
    """Read a session from a file. Raises BDHError."""
    from bdh.inference.session_file import read_session

    return read_session(path, llm.runner.config, fingerprint(llm))
