"""Checkpoints in the published layout, in and out.

The reference code keeps `embed.weight` (V, D), `encoder` and `encoder_v` (h, D, N), `decoder` (h*N, D) and `lm_head`
(D, V), all as bare parameters, and a buffer `attn.freqs` that follows from the sizes. Ours are `nn.Linear`s, whose
weights are (out, in): the same numbers, transposed. Converting there and back therefore changes no bit.
"""

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bdh.atomic_files import replace_atomically
from bdh.errors import BDHError, error_text, one_line
from bdh.json_text import to_json
from bdh.model import BDHConfig, BDHForCausalLM
from bdh.model.export import check_target, load_model_only, save_export
from bdh.model.model_card import model_card
from bdh.model.weight_files import FLOATS, check_finite

NAMES = ("embed.weight", "encoder", "encoder_v", "decoder", "lm_head")
PUBLISHED_FIELDS = ("n_layer", "n_embd", "n_head", "mlp_internal_dim_multiplier", "vocab_size", "dropout")
CONFIG_FIELDS = (*PUBLISHED_FIELDS, "rope_theta", "layer_norm_eps")  # fixed numbers in the published code
DEFAULT_LAYERS = 6


def convert(
    source: Path, directory: Path, given: dict[str, Any], tokenizer: PreTrainedTokenizerFast | None = None
) -> list[str]:
    """Writes the export of a published checkpoint.

    Args:
        source: A .safetensors file, or a .pt file holding a state dict.
        directory: The export to write.
        given: Configuration fields that the caller knows; they go before the file's metadata.
        tokenizer: Put beside the model, if the vocabulary has room for it.

    Returns:
        What had to be assumed, a line each.

    Raises:
        BDHError: The file is missing, unreadable, not of this layout, or contradicts the configuration.
    """
    check_target(directory)
    tensors, recorded = read_published(source)
    config, notes = work_out_config(tensors, recorded, given)
    dtype = functools.reduce(torch.promote_types, (tensors[name].dtype for name in NAMES))
    model = BDHForCausalLM(config).to(dtype)
    load_published(model, tensors)
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        notes.append(f"no tokenizer is written: it has {len(tokenizer)} tokens, the model {config.vocab_size}")
        tokenizer = None
    card = model_card(source.stem, config, [("Origin", {"converted from": source.name})])
    save_export(model.eval(), tokenizer, directory, card)
    return notes


def save_published(export: Path, target: Path) -> None:
    """Writes an export as a published checkpoint: .safetensors with the configuration as metadata, or .pt.

    Raises:
        BDHError: The export cannot be read, the ending is neither, or the file cannot be written.
    """
    if target.suffix not in (".safetensors", ".pt"):
        raise BDHError(f"{target} should end in .safetensors or .pt")
    model = load_model_only(export)
    if model.config.has_gates:
        raise BDHError(
            f"{export} has decay {model.config.decay} and write {model.config.write}, which the published format "
            "cannot say; use the export as it is, or train a model with model.decay none and model.write add"
        )
    if target.suffix == ".pt" and model.config.layer_norm_eps != BDHConfig().layer_norm_eps:
        raise BDHError(
            f"{export} has layer_norm_eps {model.config.layer_norm_eps}, which a .pt file cannot say; "
            "name a .safetensors file"
        )
    tensors = to_published(model)
    config = {name: getattr(model.config, name) for name in CONFIG_FIELDS}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replace_atomically(target) as partial:
            if target.suffix == ".safetensors":
                save_file(tensors, partial, metadata={"config": to_json(config)})
            else:
                with partial.open("wb") as file:  # by itself, torch says nothing of a full disk
                    torch.save(tensors, file)
    except (OSError, SafetensorError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):  # torch raises its own error in place of the disk's
            cause = cause.__context__
        raise BDHError(f"{target} cannot be written: {error_text(cause or error)}") from error


def read_published(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a published checkpoint under their plain names, and the configuration it records, if any."""
    if not path.is_file():
        raise BDHError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                found: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                recorded = json.loads((file.metadata() or {}).get("config", "{}"))
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            recorded = loaded.get("config", {}) if isinstance(loaded, dict) else {}
            found = loaded
            for key in ("model", "state_dict"):  # how training scripts often wrap a state dict
                if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
                    found = loaded[key]
    except Exception as error:  # what is unpickled, though safely, raises any kind
        raise BDHError(f"{path} cannot be read as a checkpoint: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise BDHError(f"{path} holds a {type(found).__name__}, not a state dict")
    tensors = {re.sub(r"^((module|_orig_mod)\.)+", "", str(name)): tensor for name, tensor in found.items()}
    if missing := [name for name in NAMES if not isinstance(tensors.get(name), Tensor)]:
        raise BDHError(f"{path} is not a published BDH checkpoint: it lacks {', '.join(missing)}")
    for name in NAMES:
        if tensors[name].layout != torch.strided or tensors[name].dtype not in FLOATS or tensors[name].is_meta:
            raise BDHError(f"{name} in {path} is no plain floating-point tensor of 16, 32 or 64 bits")
    check_finite(((name, tensors[name]) for name in NAMES), path)
    return tensors, recorded if isinstance(recorded, dict) else {}


def work_out_config(
    tensors: dict[str, Tensor], recorded: dict[str, Any], given: dict[str, Any]
) -> tuple[BDHConfig, list[str]]:
    """The configuration from flags, then the file's metadata, then the shapes; and what had to be assumed."""
    shapes = {name: tuple(tensors[name].shape) for name in NAMES}
    if len(shapes["encoder"]) != 3 or len(shapes["embed.weight"]) != 2:
        raise BDHError(f"encoder has shape {shapes['encoder']}; (heads, n_embd, neurons a head) is expected")
    h, D, N = shapes["encoder"]
    V = shapes["embed.weight"][0]
    expected = {
        "embed.weight": (V, D),
        "encoder": (h, D, N),
        "encoder_v": (h, D, N),
        "decoder": (h * N, D),
        "lm_head": (D, V),
    }
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise BDHError(f"{name} has shape {shapes[name]}; {shape} is expected from encoder and embed.weight")
    if 0 in (h, D, N, V):
        raise BDHError(
            f"encoder has shape {shapes['encoder']} and embed.weight {shapes['embed.weight']}; none may be empty"
        )
    if h * N % D:
        raise BDHError(f"{h * N} neurons are no whole multiple of n_embd {D}")
    found = {"n_embd": D, "n_head": h, "mlp_internal_dim_multiplier": h * N // D, "vocab_size": V}
    settings = {name: value for name, value in recorded.items() if name in CONFIG_FIELDS} | given
    for name, value in found.items():
        if settings.get(name, value) != value:
            raise BDHError(f"{name} is given as {settings[name]}, but the shapes say {value}")
    notes = []
    if "n_layer" not in settings:
        notes.append(f"the file does not say how many layers it was trained with; {DEFAULT_LAYERS} assumed (--n_layer)")
        settings["n_layer"] = DEFAULT_LAYERS
    if "rope_theta" not in settings and isinstance(tensors.get("attn.freqs"), Tensor):
        settings["rope_theta"] = theta_of(tensors["attn.freqs"])
    try:
        for name in ("dropout", "rope_theta", "layer_norm_eps"):
            if isinstance(settings.get(name), int):
                settings[name] = float(settings[name])
        return BDHConfig(**(settings | found)), notes
    except (ValueError, TypeError, OverflowError, StrictDataclassError) as error:
        raise BDHError(f"no such model: {one_line(error)}") from error


def theta_of(freqs: Tensor) -> float:
    """The RoPE base that made `attn.freqs`, from its smallest entry theta^(-(N-2)/N) / 2 pi; the default for N = 2."""
    default, N = BDHConfig().rope_theta, freqs.numel()
    if N <= 2 or freqs.is_meta or freqs.layout != torch.strided or freqs.dtype not in FLOATS:
        return default
    smallest = freqs.flatten()[-1].item()
    if not 1e-30 < smallest < 1:  # NaN is not
        return default
    theta = (2 * math.pi * smallest) ** (-N / (N - 2))
    return default if math.isclose(theta, default, rel_tol=1e-4) else float(round(theta, 3))


@torch.no_grad()
def load_published(model: BDHForCausalLM, tensors: dict[str, Tensor]) -> None:
    """Puts published tensors into a model of the same sizes."""
    layer = model.model.layer
    model.model.embed_tokens.weight.copy_(tensors["embed.weight"])  # (V, D)
    layer.encoder.weight.copy_(tensors["encoder"].mT.flatten(0, 1))  # (h, D, N) -> (h*N, D)
    for head, matrix in zip(layer.encoder_v, tensors["encoder_v"], strict=True):
        head.get_parameter("weight").copy_(matrix.T)  # (D, N) -> (N, D)
    layer.decoder.weight.copy_(tensors["decoder"].T)  # (h*N, D) -> (D, h*N)
    model.lm_head.weight.copy_(tensors["lm_head"].T)  # (D, V) -> (V, D)


def to_published(model: BDHForCausalLM) -> dict[str, Tensor]:
    """A model's tensors in the published layout, `attn.freqs` included, so that the reference code loads them."""
    config, layer = model.config, model.model.layer
    h, D, N = config.n_head, config.n_embd, config.neurons_per_head
    tensors = {
        "embed.weight": model.model.embed_tokens.weight,  # (V, D)
        "encoder": layer.encoder.weight.view(h, N, D).mT,  # (h, D, N)
        "encoder_v": torch.stack([head.get_parameter("weight").T for head in layer.encoder_v]),  # (h, D, N)
        "decoder": layer.decoder.weight.T,  # (h*N, D)
        "lm_head": model.lm_head.weight.T,  # (D, V)
    }
    pair_start = torch.arange(N, dtype=torch.float32).div(2).floor() * 2  # (N)  0 0 2 2 4 4 …
    tensors["attn.freqs"] = (1.0 / config.rope_theta ** (pair_start / N) / (2 * math.pi)).view(1, 1, 1, N)
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
