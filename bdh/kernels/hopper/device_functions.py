"""What the Hopper kernels have in common: the names of two versions of Gluon, barriers, dropout, launching.

Barriers are of shared memory (mbarrier): `full` ones say that a slot was filled, by the engine that copies tiles or by
other warps, `empty` ones that those who read it have done so. A wait names the parity of the turn that it waits for;
a barrier that nothing came through yet answers as if an odd turn had, so that a wait for an empty slot of the first
turn, parity 1, goes through.
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

NEW = hasattr(tma, "async_load")  # since Triton 3.8 or so
load_tile = tma.async_load if NEW else tma.async_copy_global_to_shared
store_tile = tma.async_store if NEW else tma.async_copy_shared_to_global
together = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # waits for the other warps of the part
NAN = gl.constexpr(tl.PropagateNan.ALL)


@gluon.jit
def barriers(count: gl.constexpr, arrivals: gl.constexpr):
    """So many barriers, each of which is passed when so many have arrived."""
    result = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(result.index(i), count=arrivals)
    return result


@gluon.jit
def fetch(desc, place, full, buffer):
    """Starts to load the tile at a place into a buffer; `full` is passed when it is there."""
    mbarrier.expect(full, desc.block_type.nbytes)
    load_tile(desc, place, full, buffer)


@gluon.jit
def arrive(barrier):
    """Says for all warps of a part that they have come here."""
    together()
    mbarrier.arrive(barrier, count=1)


@gluon.jit
def place_of(tile, G, C, TOKENS: gl.constexpr):
    """A tile's first row, and which position in its chunk that is."""
    position = tile // G
    return (tile - position * G) * C + position * TOKENS, position * TOKENS


# ------------------------------------------------------------------------------------------------ dropout


@gluon.jit
def mix(h):
    """As in `bdh.kernels.triton.device_functions`."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@gluon.jit
def hash_of_neurons(n, NEURONS: gl.constexpr, LAYOUT: gl.constexpr):
    """What dropout takes of neurons n and on, 2 x (NEURONS): their pair, mixed, and what to multiply by."""
    j = n + gl.arange(0, NEURONS, layout=LAYOUT)
    pair = mix((j // 2).to(gl.uint32) + 0x9E3779B9)
    ODD: gl.constexpr = (0x9E3779B1 * 0x10001) & 0xFFFFFFFF
    even = gl.full([NEURONS], 0x9E3779B1, gl.uint32, layout=LAYOUT)
    return pair, gl.where(j % 2 == 0, even, gl.full([NEURONS], ODD, gl.uint32, layout=LAYOUT))


@gluon.jit
def hash_of_tokens(m, key, TOKENS: gl.constexpr, LAYOUT: gl.constexpr):
    """What dropout takes of tokens m and on, (TOKENS)."""
    return mix((m + gl.arange(0, TOKENS, layout=LAYOUT)).to(gl.uint32) ^ key.to(gl.uint32))


# ------------------------------------------------------------------------------------------------ launching


@dataclass(frozen=True)
class Place:
    """Where a tensor lies, without keeping it there: what a descriptor asks of one."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


def tiles_of(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Tiles (rows, columns) of a contiguous matrix of bfloat16, as the matrix units take them from shared memory."""
    return described(matrix.data_ptr(), *matrix.shape, rows, columns)


@lru_cache(maxsize=1 << 14)
def described(address: int, M: int, N: int, rows: int, columns: int) -> TensorDescriptor:
    """The same for an address; a training step comes back to the same ones, and making one takes the CPU a while."""
    swizzled = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(Place(torch.bfloat16, address), [M, N], [N, 1], [rows, columns], swizzled)


def run(kernel: Any, programs: int, arguments: tuple[object, ...], **constants: object) -> None:
    """Launches a kernel of two groups of four warps that work and four more warps, whose registers go to these."""
    launch(kernel, (programs,), arguments, constants, num_warps=4, maxnreg=168)


@lru_cache
def cuts(blocks: int, steps: int, start: int, device: torch.device) -> int:
    """In how many parts to cut the steps that each of so many blocks takes, every part a program of its own.

    The fewest of those that take the least time: rounds of programs, times a part's steps and `start` more to begin.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    most = min(steps, processors)
    return min(range(1, most + 1), key=lambda parts: cdiv(blocks * parts, processors) * (cdiv(steps, parts) + start))


def signed(number: int) -> int:
    """32 bits as a signed number."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


def of_bfloat16(*tensors: Tensor) -> bool:
    """Whether tiles can be taken of all of them."""
    return all(t.dtype == torch.bfloat16 and t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors)
