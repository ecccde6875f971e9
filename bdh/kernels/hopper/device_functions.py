"""Functions of all Hopper kernels: compatibility of Gluon's versions, barriers, dropout, launching.

Barriers are mbarriers in shared memory: a `full` one completes a phase when a slot has been filled, by TMA or by other
warps, an `empty` one when all readers have read the slot. A wait takes the parity of the phase; a new barrier counts as
if a phase of parity 1 had completed, so that waits for the empty slots of the first round pass.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from bdh.kernels.triton.launch import cdiv, launch

HAS_ASYNC_LOAD = hasattr(tma, "async_load")  # since Triton 3.8 or so
load_tile = tma.async_load if HAS_ASYNC_LOAD else tma.async_copy_global_to_shared
store_tile = tma.async_store if HAS_ASYNC_LOAD else tma.async_copy_shared_to_global
sync_warps = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # waits for the other warps of the partition
NAN = gl.constexpr(tl.PropagateNan.ALL)


@gluon.jit
def barriers(count: gl.constexpr, arrivals: gl.constexpr):
    """Allocate barriers, each of which completes a phase after so many arrivals."""
    result = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(result.index(i), count=arrivals)
    return result


@gluon.jit
def fetch(desc, coords, full, buffer):
    """Start to load the tile at some coordinates into a buffer; `full` completes when it is loaded."""
    mbarrier.expect(full, desc.block_type.nbytes)
    load_tile(desc, coords, full, buffer)


@gluon.jit
def arrive(barrier):
    """Arrive at a barrier for all warps of a partition."""
    sync_warps()
    mbarrier.arrive(barrier, count=1)


@gluon.jit
def tile_position(tile, G, C, TOKENS: gl.constexpr):
    """Return a tile's first row, and the position of that token in its chunk."""
    position = tile // G
    return (tile - position * G) * C + position * TOKENS, position * TOKENS


# ------------------------------------------------------------------------------------------------ dropout


@gluon.jit
def mix(h):
    """Hash as `mix` of `bdh.kernels.triton.device_functions`."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@gluon.jit
def hash_of_neurons(n, NEURONS: gl.constexpr, LAYOUT: gl.constexpr):
    """Return the hashes of the pairs of neurons from n, and the factors of the neurons: 2 x (NEURONS)."""
    j = n + gl.arange(0, NEURONS, layout=LAYOUT)
    pair = mix((j // 2).to(gl.uint32) + 0x9E3779B9)
    ODD: gl.constexpr = (0x9E3779B1 * 0x10001) & 0xFFFFFFFF
    even = gl.full([NEURONS], 0x9E3779B1, gl.uint32, layout=LAYOUT)
    return pair, gl.where(j % 2 == 0, even, gl.full([NEURONS], ODD, gl.uint32, layout=LAYOUT))


@gluon.jit
def hash_of_tokens(m, key, TOKENS: gl.constexpr, LAYOUT: gl.constexpr):
    """Return the hashes of tokens from m, (TOKENS)."""
    return mix((m + gl.arange(0, TOKENS, layout=LAYOUT)).to(gl.uint32) ^ key.to(gl.uint32))


# ------------------------------------------------------------------------------------------------ launching


@dataclass(frozen=True)
class TensorAddress:
    """Address of a tensor for a descriptor, without a reference to the tensor."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


def tile_descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Describe tiles (rows, columns) of a contiguous bfloat16 matrix, in the layout of the tensor cores."""
    return cached_descriptor(matrix.data_ptr(), *matrix.shape, rows, columns)


@lru_cache(maxsize=1 << 14)
def cached_descriptor(address: int, M: int, N: int, rows: int, columns: int) -> TensorDescriptor:
    """Describe tiles at an address; cached, because training steps reuse addresses and creation is slow."""
    swizzled = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(TensorAddress(torch.bfloat16, address), [M, N], [N, 1], [rows, columns], swizzled)


def run(kernel: Any, programs: int, arguments: tuple[object, ...], **constants: object) -> None:
    """Launch a kernel of two groups of four warps that compute, and four more warps that give them registers."""
    launch(kernel, (programs,), arguments, constants, num_warps=4, maxnreg=168)


@lru_cache
def num_splits(blocks: int, steps: int, start: int, device: torch.device) -> int:
    """Return the number of programs that share the steps of each block.

    It is the smallest one with the least time: rounds of programs, times the steps of a program plus `start` to begin.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    most = min(steps, processors)
    return min(range(1, most + 1), key=lambda parts: cdiv(blocks * parts, processors) * (cdiv(steps, parts) + start))


def to_int32(number: int) -> int:
    """Reinterpret 32 bits as a signed number."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


def all_bfloat16(*tensors: Tensor) -> bool:
    """Return whether `tile_descriptor` supports all of these tensors."""
    return all(t.dtype == torch.bfloat16 and t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors)
