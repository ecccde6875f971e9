"""Checkpoints: everything a run needs to go on as if nothing had happened.

    checkpoints/
      checkpoint-0001000/   shard-*.safetensors   weights and optimizer, by torch.distributed.checkpoint
                            tokenizer.json …      the tokenizer's files
                            state.json            step, data position, random states, configuration, best loss
                            manifest.json         size and SHA-256 of the other files, written last
      latest -> …  best -> …

A checkpoint is written under a temporary name, synced, and renamed, so that a kill at any moment leaves the last
complete one. Nothing in it is a pickle: tensors are safetensors, the rest is JSON.
"""

import base64
import hashlib
import json
import random
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedTokenizerFast

from bdh.atomic_files import sync
from bdh.data.tokenizer import byte_tokenizer, load_tokenizer
from bdh.distributed.head_sharding import shard, unshard
from bdh.distributed.tensor_parallel import HeadNames
from bdh.errors import BDHError, one_line
from bdh.json_text import to_json
from bdh.model.weight_files import check_finite
from bdh.training.optimizer import CombinedOptimizer

NAME = re.compile(r"(?:superseded-\d+-)?checkpoint-(\d{7,})")
FORMAT = 2
READABLE = (1, 2)  # 1 had no tokenizer and another order of the text
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
WHOLE = HeadNames()
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # what is frozen is read from elsewhere


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        directory: `runs/NAME/checkpoints`.
        keep: How many of the last stay; the best one stays besides.
    """

    def __init__(self, directory: Path, keep: int):
        self.directory = directory
        self.keep = keep

    def paths(self) -> list[Path]:
        """All checkpoints by step, oldest first, damaged ones included."""
        if not self.directory.is_dir():
            return []
        found = [path for path in self.directory.glob("checkpoint-*") if NAME.fullmatch(path.name)]
        return sorted(found, key=step_of)

    def latest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is whole, and a line about each newer one that is not."""
        complaints: list[str] = []
        for path in reversed(self.paths()):
            reason = damage(path)
            if reason is None:
                return path, complaints
            complaints.append(f"{path} is damaged: {reason}")
        return None, complaints

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        tokenizer: PreTrainedTokenizerFast,
        processes: ProcessGroup | None = None,
    ) -> Path:
        """Writes a checkpoint, renames it into place, moves the links, and removes the oldest beyond `keep`.

        All processes of a run call it together: each writes tensors, or parts of them, that it has; the first one does
        all else.

        Args:
            step: Optimizer steps done.
            tensors: What `collect` returned, or copies of it.
            state: All else, as JSON; `best_checkpoint` names the best checkpoint so far.
            tokenizer: Its files are saved.
            processes: The group of those that save; None for one alone.

        Raises:
            OSError: The disk is full or not writable. The partial files are gone, the older checkpoints untouched.
        """
        final = self.directory / f"checkpoint-{step:07d}"
        partial = self.directory / f".partial-{final.name}"
        first = processes is None or processes.rank() == 0
        try:
            if first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True, exist_ok=True)
            with _as_one_process():
                dcp_save(
                    dict(unshard(tensors.items())),
                    storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True),
                    process_group=processes,
                    no_dist=processes is None,
                )
            if first:
                self._complete(partial, final, {"format": FORMAT, "step": step, **state}, tokenizer)
        except BaseException as error:
            if first:
                shutil.rmtree(partial, ignore_errors=True)
            raise _cause(error) from error
        if first:
            self._remove_old(state.get("best_checkpoint"))
        return final

    def _complete(self, partial: Path, final: Path, state: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
        """Adds what is not tensors, and gives the folder its name once all of it is on the disk."""
        tokenizer.save_pretrained(partial)
        _write_json(partial / "state.json", state)
        _write_json(partial / "manifest.json", {file.name: _fingerprint(file) for file in sorted(partial.iterdir())})
        for file in [*partial.iterdir(), partial]:
            sync(file)
        if final.exists():
            self.set_aside(final)
        partial.rename(final)
        sync(self.directory)
        self.link(final.name, state.get("best_checkpoint"))

    def set_aside_after(self, step: int) -> list[Path]:
        """Renames checkpoints later than `step`, so that a run taken up at an older one does not mix with them."""
        return [self.set_aside(path) for path in self.paths() if step_of(path) > step]

    def set_aside(self, path: Path) -> Path:
        """Renames a checkpoint to `superseded-…`, under which it can still be exported but is no part of the run."""
        number = sum(1 for _ in self.directory.glob(f"superseded-*-{path.name}"))
        return path.rename(self.directory / f"superseded-{number}-{path.name}")

    def clean(self) -> None:
        """Removes what killed processes left half-written. Only for who holds the run's lock."""
        for partial in self.directory.glob(".partial-*"):
            shutil.rmtree(partial, ignore_errors=True)

    def link(self, latest: str, best: str | None) -> None:
        """Points `latest` and `best` at checkpoints by name; without a best one there is no such link."""
        for name, target in (("latest", latest), ("best", best)):
            temporary = self.directory / f".{name}.tmp"
            temporary.unlink(missing_ok=True)
            if target is None:
                (self.directory / name).unlink(missing_ok=True)
            else:
                temporary.symlink_to(target)
                temporary.replace(self.directory / name)

    def _remove_old(self, best: str | None) -> None:
        for path in self.paths()[: -self.keep]:
            if path.name != best:
                shutil.rmtree(path, ignore_errors=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = NAME.fullmatch(path.name)
    if match is None:
        raise BDHError(f"{path} is not a checkpoint; its name should look like checkpoint-0001000")
    return int(match[1])


def damage(path: Path) -> str | None:
    """Describes the first fault of a checkpoint's files; None if each has its recorded size and SHA-256."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if "state.json" not in manifest:
            return "manifest.json is incomplete"
        for name, expected in manifest.items():
            file = path / Path(name).name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
            if _fingerprint(file) != expected:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read ({type(error).__name__})"
    return None


@contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """Raises BDHError for any exception that a checkpoint's content causes: checksums do not say who wrote it."""
    try:
        yield
    except BDHError:
        raise
    except (Exception, CheckpointException) as error:  # which is none
        raise BDHError(f"{path} is damaged: {one_line(_cause(error))}") from error


def read_state(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint. Raises BDHError if it is damaged, or of a format this version does not know."""
    with naming_damage(path):
        state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError("state.json holds no object")
    if state.get("format") not in READABLE:
        raise BDHError(f"{path} has checkpoint format {state.get('format')}; this version of bdh reads up to {FORMAT}")
    return state


def load(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | CombinedOptimizer,
    carried: dict[str, Tensor] | None = None,
    names: HeadNames = WHOLE,
) -> dict[str, Any]:
    """Puts a checkpoint into a model and its optimizer, whoever wrote it, and returns the rest.

    Each process reads what it has itself: all of a tensor, or the part of a `DTensor` that is here. Tensors in
    `carried` are overwritten with the checkpoint's.
    """
    state = read_state(path)
    tensors = collect(model, optimizer, carried, names)
    with naming_damage(path):
        _read_tensors(path, tensors)
        tensors = {names.local_name(name): tensor for name, tensor in tensors.items()}
        set_model_state_dict(model, _under("model.", tensors), options=_TRAINED)
        settings = get_optimizer_state_dict(model, optimizer, options=_FLAT)
        set_optimizer_state_dict(model, optimizer, {**settings, **_under("optimizer.", tensors)}, options=_FLAT)
    return state


def tokenizer_of(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint. Raises BDHError.

    One that has none was written by an earlier version, which had bytes without an end-of-text token.
    """
    if not (path / "tokenizer.json").is_file():
        return byte_tokenizer(end_of_text=False)
    return load_tokenizer(str(path.resolve()))


def load_weights(path: Path, model: nn.Module) -> None:
    """Puts a checkpoint's weights, nothing else, into a model of its architecture. Raises BDHError if it is damaged."""
    tensors = _model_tensors(model)
    with naming_damage(path):
        _read_tensors(path, tensors)
        set_model_state_dict(model, _under("model.", tensors), options=_TRAINED)
    check_finite(model.named_parameters(), path)


def check_size(path: Path, n_parameters: int) -> None:
    """Raises BDHError for a configuration of more parameters than a checkpoint's files have bytes."""
    nbytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    if n_parameters > nbytes:
        raise BDHError(
            f"{path} is damaged: its configuration has {n_parameters:,} parameters, and its files {nbytes:,} bytes"
        )


def find_checkpoint(
    where: Path, prefer: Literal["latest", "best"] = "latest", report: Callable[[str], None] = lambda line: None
) -> Path:
    """The checkpoint meant by a path to one, to a link to one, or to a run.

    Args:
        where: A checkpoint's folder, or a run's.
        prefer: Which one of a run.
        report: Told a line about each damaged checkpoint passed over.

    Raises:
        BDHError: There is nothing there, or a checkpoint named by itself is damaged.
    """
    if where.is_symlink() and where.parent.name == "checkpoints":  # latest or best, perhaps of a checkpoint now gone
        where = where.parent / where.readlink() if where.exists() else where.parent
    if not where.exists():
        raise BDHError(f"{where} does not exist; give a run's folder or one of its checkpoints")
    if where.name in ("", "..") or NAME.fullmatch(where.resolve().name):
        where = where if NAME.fullmatch(where.name) else where.resolve()
    if NAME.fullmatch(where.name):
        if reason := damage(where):
            older, _ = CheckpointStore(where.parent, keep=1).latest()
            hint = f"; the newest whole one is {older}" if older else ""
            raise BDHError(f"{where} is damaged: {reason}{hint}")
        return where
    store = CheckpointStore(where if where.name == "checkpoints" else where / "checkpoints", keep=1)
    best = store.directory / "best"
    if prefer == "best" and best.is_symlink():
        best = store.directory / best.readlink().name
        reason = damage(best)
        if reason is None:
            return best
        report(f"the best checkpoint, {best}, is damaged: {reason}")
    latest, complaints = store.latest()
    for line in complaints:
        report(line)
    if latest is None:
        raise BDHError(f"{where} holds no whole checkpoint")
    return latest


def random_state() -> dict[str, Any]:
    """The random states of Python, NumPy and torch, as JSON."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _to_text(torch.get_rng_state()),
        "cuda": [_to_text(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Puts back what `random_state` returned; CUDA's only where as many devices are present."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_from_text(state["torch"]))
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_from_text(text) for text in state["cuda"]])


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    weights: dict[str, Any] = get_model_state_dict(model, options=_TRAINED)
    return {f"model.{name}": tensor for name, tensor in weights.items()}


def collect(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | CombinedOptimizer,
    carried: dict[str, Tensor] | None = None,
    names: HeadNames = WHOLE,
) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, not copied: weights, the optimizer's moments, a carried state.

    Args:
        model: Its weights.
        optimizer: Its moments; its settings come from the configuration.
        carried: Tensors of a carried state.
        names: What parameters here are called in the whole model.
    """
    moments: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    kept = {f"optimizer.{name}": value for name, value in moments.items() if isinstance(value, Tensor)}
    memory = {f"carried.{name}": tensor for name, tensor in (carried or {}).items()}
    return {names.global_name(name): tensor for name, tensor in {**_model_tensors(model), **kept, **memory}.items()}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _read_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    whole = dict(unshard(tensors.items()))
    with _as_one_process():
        dcp_load(whole, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    shard(whole, tensors)


@contextmanager
def _as_one_process() -> Iterator[None]:
    """Silences the remark that no process group is there: one process is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _cause(error: BaseException) -> BaseException:
    """The original exception inside the one that torch.distributed.checkpoint wraps it in."""
    if isinstance(error, CheckpointException):
        causes = [cause for cause, _ in error.failures.values()]
        return next((cause for cause in causes if isinstance(cause, OSError)), causes[0] if causes else error)
    return error


def _write_json(path: Path, content: Any) -> None:
    path.write_text(to_json(content, indent=1), encoding="utf-8")


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _to_text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _from_text(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
