"""Launches compiled Triton kernels with little work on the CPU.

Triton's own launch looks up the specialization for the arguments, which takes longer than many kernels; a training step
has a thousand launches. Here specializations are cached by the properties of the arguments that they depend on.
"""

from typing import Any

import torch
import triton
from torch import Tensor

COMPILED: dict[tuple[object, ...], Any] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[object, ...], constants: dict[str, object], **options: object
) -> None:
    """Launch a kernel.

    Args:
        kernel: Triton or Gluon kernel, whose constants follow its other parameters.
        grid: Number of programs in each dimension.
        arguments: Arguments in order; tensors are contiguous.
        constants: Compile-time constants by name, in order.
        options: Options of the compiler.
    """
    if triton.knobs.runtime.interpret:
        kernel[grid](*arguments, **constants, **options)
        return
    device = torch.cuda.current_device()
    key = (kernel, device, *constants.values(), *options.values(), *map(specialization, arguments))
    compiled = COMPILED.get(key)
    if compiled is None:
        COMPILED[key] = kernel[grid](*arguments, **constants, **options)
    else:
        compiled[(*grid, 1, 1)](*arguments, *constants.values())


def specialization(argument: object) -> object:
    """Return the properties of an argument that compiled code depends on."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(1 << 31) <= argument < 1 << 31
    return argument is None


def cdiv(size: int, block: int) -> int:
    """Return size / block, rounded up."""
    return -(-size // block)
