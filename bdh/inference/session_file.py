"""Session files: states, with everything else in the metadata."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bdh.data.chat_format import check_messages
from bdh.errors import BDHError
from bdh.inference.conversation import SavedConversation, Snapshot, from_json
from bdh.inference.state_file import load_state, save_state
from bdh.model import BDHConfig, BDHState


def write_session(
    path: str | Path, snapshot: Snapshot, config: BDHConfig, fingerprint: str, more: Mapping[str, str]
) -> None:
    """Write a session to a file atomically.

    Args:
        path: The file; its folder must exist.
        snapshot: The session.
        config: Of the model.
        fingerprint: Of the model.
        more: What else is to be known, text by name.

    Raises:
        BDHError: The file cannot be written; an older one is then as it was.
    """
    first = snapshot.state or BDHState.zeros(config, 1)
    states = [first] if snapshot.ahead is None else [first, snapshot.ahead]
    save_state(path, concatenate_states(states), fingerprint, {**more, "session": snapshot.about})


def read_session(path: str | Path, config: BDHConfig, fingerprint: str) -> SavedConversation:
    """Read a session file. Raises BDHError if it is invalid, or of another model."""
    states, metadata = load_state(path, config, fingerprint)
    try:
        about = json.loads(metadata["session"])
        from_json(about["params"])
        check_about(about, states.batch_size, config.vocab_size)
    except BDHError as error:
        raise BDHError(f"{path} is damaged: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise BDHError(f"{path} holds a state, but no session; give a file that a session was saved to") from error
    first = row(states, 0) if int(states.position[0]) else None
    return SavedConversation(first, None if about["ahead"] is None else row(states, 1), about)


def check_about(about: Mapping[str, Any], n_states: int, vocab_size: int) -> None:
    """Raise BDHError if the metadata is not that of a session with `n_states` states."""
    transcript, ahead = about["transcript"], about["ahead"]
    if not isinstance(about["system"], str | None):
        raise BDHError("the system message is no text")
    if not isinstance(transcript, list):
        raise BDHError("the transcript is no list of messages")
    if transcript:
        check_messages(transcript)
    for name, tokens in (("unread", about["unread"]), ("ahead", [] if ahead is None else ahead)):
        if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < vocab_size for token in tokens):
            raise BDHError(f"{name} is no list of the model's tokens")
    if n_states != (1 if ahead is None else 2):
        raise BDHError(f"there are {n_states} states; one is of the session, and one of what is ahead")
    if not all(isinstance(about[name], bool) for name in ("answering", "ended")):
        raise BDHError("answering and ended are not true or false")
    if about["answering"] and (not transcript or transcript[-1]["role"] != "assistant"):
        raise BDHError("there is no answer to go on with")


def concatenate_states(states: Sequence[BDHState]) -> BDHState:
    """Concatenate states of one sequence each on the CPU; a single state is not copied there."""
    states = [state.to("cpu") for state in states]
    if len(states) == 1:
        return states[0]
    layers = [
        torch.cat(layer) for layer in zip(*(state.synapses for state in states), strict=True)
    ]  # (B, h, N, D) each
    return BDHState(layers, torch.cat([state.position for state in states]), states[0].length)


def row(states: BDHState, index: int) -> BDHState:
    """Return the state of one sequence, a batch of one; a batch of one is not copied."""
    state = states.select(torch.tensor([index])) if states.batch_size > 1 else states
    return BDHState(state.synapses, state.position, int(state.position[0]))
