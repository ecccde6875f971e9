"""State files: safetensors, with the fingerprint of their model."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bdh.atomic_files import replace_atomically
from bdh.errors import BDHError, error_text
from bdh.inference.state_metadata import FORMAT
from bdh.model import BDHConfig, BDHForCausalLM, BDHState

SIZES = ("vocab_size", "n_embd", "n_head", "n_layer", "n_neurons", "rope_theta", "layer_norm_eps")


def model_fingerprint(model: BDHForCausalLM) -> str:
    """Return the SHA-256 of a model's sizes and of its weights rounded to bfloat16, independent of its dtype.

    It covers how synapses decay and are written, where they do so in another way than the published one.
    """
    sizes = {name: getattr(model.config, name) for name in SIZES}
    if model.config.has_gates:
        half_lives = [None if life is None else float(life) for life in model.config.decay_half_lives or []]
        sizes.update(decay=model.config.decay, decay_half_lives=half_lives, write=model.config.write)
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(bits_of(weight.detach().to(torch.bfloat16)))
    return digest.hexdigest()


def bits_of(tensor: Tensor) -> Any:
    """Return the data of a tensor as bytes, without a copy on the CPU."""
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of the contents of a file."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(bits_of(tensor))
    return digest.hexdigest()


def save_state(path: str | Path, state: BDHState, fingerprint: str, metadata: Mapping[str, str]) -> None:
    """Write a state to a file atomically, replacing an existing one.

    The file is readable by its owner only, because a state reveals the text it has read.

    Args:
        path: The file; its folder must exist.
        state: Of any batch size.
        fingerprint: Of the model.
        metadata: What else is to be known, text by name.

    Raises:
        BDHError: The file cannot be written; what was there before is as it was.
    """
    path = Path(path).absolute()
    if path.is_dir():
        raise BDHError(f"{path} is a folder; name a file for the state")
    tensors = {f"synapses.{i}": S.detach().cpu().contiguous() for i, S in enumerate(state.synapses)}
    tensors["position"] = state.position.cpu()
    metadata = {**metadata, "format": FORMAT, "fingerprint": fingerprint, "length": str(state.length)}
    try:
        with replace_atomically(path, private=True) as partial:
            save_file(tensors, partial, {**metadata, "sha256": checksum(tensors, metadata)})
    except (OSError, SafetensorError) as error:
        raise BDHError(f"{path} cannot be written: {error_text(error)}") from error


def load_state(path: str | Path, config: BDHConfig, fingerprint: str) -> tuple[BDHState, dict[str, str]]:
    """Read a state written by `save_state`; return it, on the CPU, and its metadata.

    Raises:
        BDHError: There is no such file, it is damaged or something else, or the state is of another model.
    """
    path = Path(path)
    if not path.is_file():
        raise BDHError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; give the file of a saved state")
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            if metadata.get("format") != FORMAT:
                raise BDHError(f"{path} is no saved state that this version of bdh knows")
            if metadata.get("fingerprint") != fingerprint:
                raise BDHError(f"{path} is the state of another model; load the model it was saved with")
            # Copies: what a file gives is the file itself, and changes with it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
        if metadata.pop("sha256", None) != checksum(tensors, metadata):
            raise ValueError("it does not match its checksum")
        synapses = [tensors[f"synapses.{i}"] for i in range(config.n_layer)]
        state = BDHState(synapses, tensors["position"], int(metadata.pop("length")))
        check_state(state, config)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise BDHError(f"{path} is damaged: {error_text(error)}") from error
    return state, {name: text for name, text in metadata.items() if name not in ("format", "fingerprint")}


def check_state(state: BDHState, config: BDHConfig) -> None:
    """Raise ValueError if this cannot be a state of the model: checksums do not authenticate the file."""
    position = state.position  # (B,)
    if position.dtype != torch.int64 or position.dim() != 1 or not len(position) or position.min() < 0:
        raise ValueError("the positions are not one whole number from 0 on for each sequence")
    if state.length < 0:
        raise ValueError("the length is below 0")
    shape = (len(position), config.n_head, config.neurons_per_head, config.n_embd)
    if any(S.shape != shape for S in state.synapses):
        raise ValueError("the synapses do not have the model's sizes")
    if not all(S.dtype == torch.float32 and bool(S.isfinite().all()) for S in state.synapses):
        raise ValueError("the synapses are not finite float32 numbers")
