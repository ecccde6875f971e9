"""Memory of a CPU that operations reuse."""

import ctypes
import sys
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


class Workspace:
    """Buffers by name and dtype, for short-lived results.

    On a CPU the operating system allocates and clears new memory page by page, which takes longer than many operations.
    On other devices each buffer is allocated anew, because PyTorch caches their memory.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype, save: bool = False) -> Tensor:
        """Return an uninitialized tensor, new if `save`, else valid until the next one of its name and dtype."""
        size = prod(shape)
        if save or self.device.type != "cpu":
            return torch.empty(*shape, dtype=dtype, device=self.device)
        buffer = self.buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # later calls may be outside of inference mode
                buffer = self.buffers[name, dtype] = torch.empty(size, dtype=dtype)
        return buffer[:size].view(*shape)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_MMAP_THRESHOLD = 32 << 20  # bytes; glibc accepts no more on 64 bits


def retain_freed_memory() -> None:
    """Make the C library retain the memory that a training step frees, for the next step.

    glibc returns free memory at the end of its heap to the operating system, so that a step that frees some 30 MB gets
    thousands of new pages the next time. Afterwards the process keeps the most memory that it has ever used.
    Other C libraries are not changed.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, ctypes.c_int(2**31 - 1))
        mallopt(M_MMAP_THRESHOLD, ctypes.c_int(LARGEST_MMAP_THRESHOLD))
