"""Faster implementations of the model's functions, for training and inference; `dispatch` chooses them."""

from typing import Literal

# Earlier values of `model.kernels`, which saved runs, YAML files and flags may still have; help texts omit them.
KERNEL_ALIASES: dict[str, Literal["torch"]] = {"chunked": "torch"}
