"""Launching Triton's kernels without much work for the CPU, which a step of a thousand launches would wait for.

What Triton does at each launch to find out which compiled form of a kernel its arguments need, takes longer than many a
kernel. Here that is asked once for each kind of arguments; after that the compiled form is launched itself.
"""

from typing import Any

import torch
import triton
from torch import Tensor

COMPILED: dict[tuple[object, ...], Any] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[object, ...], constants: dict[str, object], **options: object
) -> None:
    """Launches a kernel.

    Args:
        kernel: A function of Triton's or Gluon's language, whose constants come after its other parameters.
        grid: How many programs.
        arguments: Tensors, contiguous, of all kinds that the kernel takes, in order.
        constants: By name, in order.
        options: For the compiler.
    """
    if triton.knobs.runtime.interpret:
        kernel[grid](*arguments, **constants, **options)
        return
    device = torch.cuda.current_device()
    key = (kernel, device, *constants.values(), *options.values(), *map(kind, arguments))
    compiled = COMPILED.get(key)
    if compiled is None:
        COMPILED[key] = kernel[grid](*arguments, **constants, **options)
    else:
        compiled[(*grid, 1, 1)](*arguments, *constants.values())


def kind(argument: object) -> object:
    """What of an argument makes a difference to the compiler."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(1 << 31) <= argument < 1 << 31
    return argument is None


def cdiv(size: int, block: int) -> int:
    """How many blocks hold so many."""
    return -(-size // block)
