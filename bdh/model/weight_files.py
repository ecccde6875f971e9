"""Checks the weights of an export, before and after they are loaded: shapes and types from the files' headers, numbers.

A configuration is a few lines that anybody can edit. What it asks for is compared with what the files hold before any
memory is taken for it.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bdh.errors import BDHError, one_line
from bdh.model import BDHConfig, BDHForCausalLM

DTYPES = frozenset({"F64", "F32", "F16", "BF16"})  # as safetensors names them
FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
PREFIX = "model."  # of all weights but those of the head


def check_weight_files(folder: Path, config: BDHConfig) -> None:
    """Raises BDHError unless the weights in a folder are those of a model of this configuration."""
    found = read_headers(folder)
    wrong = f"the weights in {folder} do not fit its config.json"
    for name, (dtype, _) in found.items():
        if dtype not in DTYPES:
            raise BDHError(
                f"the weights in {folder} are quantized or of an unknown type: {name} is {dtype}; give an export in "
                "float32, float16 or bfloat16 (bdh serve and bdh generate quantize it with --quantization)"
            )
    for name, shape in cheap_shapes(config).items():  # which bounds what the model below takes
        if name in found and found[name][1] != shape:
            raise BDHError(f"{wrong}: {name} has shape {found[name][1]}, config.json asks for {shape}")
    heads = sum(name.startswith(f"{PREFIX}layer.encoder_v.") for name in found)
    if heads not in (0, config.n_head):
        raise BDHError(f"{wrong}: they have {heads} heads, n_head in config.json is {config.n_head}")
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in BDHForCausalLM(config).state_dict().items()}
    different = [name for name, (_, shape) in found.items() if name in expected and expected[name] != shape]
    if different:
        name = different[0]
        more = f", and {len(different) - 1} more differ" if len(different) > 1 else ""
        raise BDHError(f"{wrong}: {name} has shape {found[name][1]}, config.json asks for {expected[name]}{more}")
    if missing := [name for name in expected if name not in found]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise BDHError(f"the weights in {folder} are incomplete: {', '.join(missing[:3])}{more} missing")


def read_headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each weight in a folder's safetensors files, by name. Raises BDHError."""
    headers: dict[str, tuple[str, tuple[int, ...]]] = {}
    whole = folder / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise BDHError(f"{folder} has no weights (model.safetensors)")
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    part = file.get_slice(name)
                    headers[name] = (part.get_dtype(), tuple(part.get_shape()))
        except (OSError, SafetensorError) as error:
            raise BDHError(f"the weights in {folder} cannot be loaded: {path.name}: {one_line(error)}") from error
    return headers


def cheap_shapes(config: BDHConfig) -> Mapping[str, tuple[int, ...]]:
    """Shapes of the weights that hold all sizes but the number of heads."""
    D, n, V = config.n_embd, config.n_neurons, config.vocab_size
    return {
        f"{PREFIX}embed_tokens.weight": (V, D),
        f"{PREFIX}layer.encoder.weight": (n, D),
        f"{PREFIX}layer.decoder.weight": (D, n),
        "lm_head.weight": (V, D),
    }


def check_finite(weights: Iterable[tuple[str, Tensor]], where: Path) -> None:
    """Raises BDHError for the first weight that holds NaN or an infinite number."""
    for name, weight in weights:
        if weight.numel() and not all(bound.isfinite() for bound in torch.aminmax(weight.detach())):
            raise BDHError(
                f"{name} in {where} holds numbers that are not finite (NaN or infinity): the file is damaged, or the "
                "training diverged; take an earlier checkpoint"
            )
