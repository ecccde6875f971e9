"""What is done for callers of an `AsyncModel` where its engine is, beside its requests.

Each function's first argument is the `LLM` there. They are found by their names from another process too, where torch
may not be loaded: so torch, and all that needs it, is imported where it is used.
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
    from bdh.inference.params import SamplingParams
    from bdh.inference.scoring import Scorer

_fingerprint = threading.Lock()  # it is worked out once


def model_info(llm: "LLM") -> ModelInfo:
    """The sizes of the model."""
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
    """Which model this is. Raises BDHError for a runner that has none."""
    with _fingerprint:
        return llm.fingerprint


def ping(llm: "LLM") -> None:
    """Does nothing: the answer says that the engine goes on."""


def prepare_grammar(llm: "LLM", params: "SamplingParams") -> None:
    """Compiles what constrains a request. Raises BDHError."""
    llm.prepare_grammar(params)


def beam_search(llm: "LLM", text_request: "TextRequest") -> "Completion":
    """The likeliest continuations. Raises BDHError."""
    return llm.beam_search(text_request)


def begin_scoring(llm: "LLM", tokens: Sequence[int], top: int) -> "Scorer":
    """Begins to score a text. Raises BDHError."""
    from bdh.inference.scoring import Scorer

    return Scorer(llm.model, tokens, top)


def score_piece(llm: "LLM", scorer: "Scorer") -> bool:
    """Scores the next tokens, if there are more; whether that was all."""
    if not scorer.done:
        scorer.read_piece()
    return scorer.done


def scores(llm: "LLM", scorer: "Scorer") -> "list[TokenLogprob]":
    return scorer.scores


def write_session(llm: "LLM", snapshot: "Snapshot", path: str | Path, more: Mapping[str, str]) -> None:
    """Writes a session to a file. Raises BDHError."""
    from bdh.inference.session_file import write_session

    write_session(path, snapshot, llm.runner.config, fingerprint(llm), more)


def read_session(llm: "LLM", path: str | Path) -> "SavedConversation":
    """Reads a session from a file. Raises BDHError."""
    from bdh.inference.session_file import read_session

    return read_session(path, llm.runner.config, fingerprint(llm))
