"""The contents of a checkpoint besides tensors, saved and restored: tokenizer, data position, random states."""

import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from bdh import __version__
from bdh.data.loader import TrainingData
from bdh.data.tokenizer import is_tokenizer, load_tokenizer
from bdh.distributed.processes import Processes
from bdh.errors import BDHError
from bdh.training import checkpoint
from bdh.training.config import TrainConfig, from_dict
from bdh.training.run_state import RunState


def choose_tokenizer(config: TrainConfig, resume: Path | None) -> PreTrainedTokenizerFast:
    """The configuration's tokenizer; of a run that goes on, the checkpoint's own, which must not be another.

    A run on bytes that an earlier version began goes on without an end-of-text token.

    Raises:
        BDHError: It cannot be loaded, or is not the one that the checkpoint's model was trained with.
    """
    name = config.data.tokenizer
    if resume is None:
        return load_tokenizer(name)
    kept = checkpoint.tokenizer_of(resume)
    before = from_dict(checkpoint.read_state(resume)["config"]).data.tokenizer
    if name != before and not is_tokenizer(kept, name):
        raise BDHError(
            f"data.tokenizer {name or 'bytes'} is not the tokenizer of {resume}, whose model knows no other; leave it "
            "out, or begin a new run"
        )
    return kept


def position_mismatch(saved: dict[str, Any], config: TrainConfig, identity: dict[str, Any]) -> str | None:
    """Why a checkpoint's place in its text is no place in this one; None if it is.

    Args:
        saved: The checkpoint's state.
        config: The configuration to go on with.
        identity: Of the text to go on with.
    """
    before = from_dict(saved["config"])
    if saved["format"] < 2:
        return "the checkpoint is of an earlier version of bdh, which ordered the text in another way"
    if saved["text"] != identity:
        return "the text is not the one the checkpoint was trained on"
    names = ["streaming", "block_size"]
    if config.data.streaming:
        names += ["num_workers", "shuffle_blocks", "train_split"]
    changed = [f"data.{name}" for name in names if getattr(before.data, name) != getattr(config.data, name)]
    names = ["carry_state", "seed", *(["batch_size"] if config.training.carry_state else [])]
    changed += [
        f"training.{name}" for name in names if getattr(before.training, name) != getattr(config.training, name)
    ]
    return f"{' and '.join(changed)} changed" if changed else None


def state_to_save(
    state: RunState, config: TrainConfig, data: TrainingData, processes: Processes, base: str | None, hardware: str
) -> dict[str, Any]:
    """The JSON part of a checkpoint. All processes call it together.

    Args:
        state: How far the run is.
        config: Its settings.
        data: Its text, as far as it was read.
        processes: Who reads it.
        base: The fingerprint of the model that adapters stand beside, if there are any.
        hardware: What computes, in words.
    """
    progress = asdict(state)
    progress.pop("saved_at")
    everywhere = processes.gather((data.source.state_dict(), checkpoint.random_state()))
    return {
        **progress,
        "data": everywhere[0][0],
        "random": everywhere[0][1],
        **({} if processes.alone else by_process(everywhere, processes)),
        "text": data.identity,
        "config": asdict(config),
        "base": base,
        "hardware": hardware,
        "versions": {
            "bdh": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def by_process(everywhere: list[tuple[dict[str, Any], dict[str, Any]]], processes: Processes) -> dict[str, Any]:
    """The part of a checkpoint that each process after the first saves: its random states and its data position.

    Args:
        everywhere: The place in the text and the random states, by rank.
        processes: They.
    """
    each = len(everywhere) // processes.share.world  # so many read the same rows
    places = [place for place, _ in everywhere[::each]]
    kept: dict[str, Any] = {"random_by_process": [random for _, random in everywhere]}
    return kept if all(place == places[0] for place in places) else {**kept, "data_by_process": places}


def data_positions(saved: dict[str, Any]) -> list[dict[str, Any]]:
    """The places in the text in a checkpoint: of each process, or one if all have the same."""
    places: list[dict[str, Any]] = saved.get("data_by_process") or [saved["data"]]
    return places


def restore_random(saved: dict[str, Any], processes: Processes) -> None:
    """Puts back this process's random states; where there were as many processes as now, else those it has stay."""
    states = saved.get("random_by_process") or [saved["random"]]
    if len(states) == processes.size:
        checkpoint.restore_random_state(states[processes.rank])
