"""Selection of the device of a model."""

import torch

from bdh.errors import BDHError


def choose_device(name: str) -> torch.device:
    """The device called `name`; auto takes CUDA, then the CPU. Raises BDHError if the machine lacks it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(name):
        here = ", ".join(kind for kind, there in present.items() if there)
        raise BDHError(f"the device is to be {name}, which this machine lacks; it has {here}")
    return torch.device(name)
