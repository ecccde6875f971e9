"""Memory of a CPU that operations use again."""

import ctypes
import sys
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


class Workspace:
    """Buffers by name and dtype, for results that are needed for a short time.

    The operating system hands new memory to a process on a CPU page by page, and clears it first, which takes longer
    than many operations do. On other devices a buffer is allocated anew each time: PyTorch caches their memory already.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype, keep: bool = False) -> Tensor:
        """An uninitialized tensor: to keep, or valid until the next of its name and dtype is taken."""
        size = prod(shape)
        if keep or self.device.type != "cpu":
            return torch.empty(*shape, dtype=dtype, device=self.device)
        buffer = self.buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # later calls may be outside of inference mode
                buffer = self.buffers[name, dtype] = torch.empty(size, dtype=dtype)
        return buffer[:size].view(*shape)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_MMAP_THRESHOLD = 32 << 20  # bytes; glibc accepts no more on 64 bits


def retain_freed_memory() -> None:
    """Lets the C library keep the memory that a training step frees, for the next step.

    glibc returns free memory at the end of its heap to the operating system, so that a step that frees some 30 MB gets
    thousands of new pages the next time. Once this is called, the process keeps the most memory that it has ever used.
    Other C libraries are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, ctypes.c_int(2**31 - 1))
        mallopt(M_MMAP_THRESHOLD, ctypes.c_int(LARGEST_MMAP_THRESHOLD))
