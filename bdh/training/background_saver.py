"""Checkpoints written beside the training: it waits for a copy in memory, and not for the disk."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bdh.distributed.head_sharding import local_shard
from bdh.distributed.processes import Processes
from bdh.training.checkpoint import CheckpointStore


class Copies:
    """Copies of tensors in the memory of the CPU, made once and then overwritten; page-locked beside a GPU."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are now. What is returned changes with the next call."""
        on_gpu = False
        for name, tensor in tensors.items():
            if (kept := self._kept.get(name)) is None:
                self._kept[name] = tensor.to("cpu") if tensor.is_cuda else tensor.clone()
                if tensor.is_cuda:
                    lock_pages(local_shard(self._kept[name]))
            else:
                local_shard(kept).copy_(local_shard(tensor), non_blocking=True)
                on_gpu |= tensor.is_cuda
        if on_gpu:
            torch.cuda.synchronize()
        return {name: self._kept[name] for name in tensors}


def lock_pages(tensor: Tensor) -> None:
    """Keeps a tensor's memory where it is, so that a GPU copies into it at full speed. What fails only costs time."""
    if tensor.numel():
        torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)


class Saver:
    """Writes one checkpoint at a time, in a thread; in all processes of a run together.

    The copies it makes stay, to be used again: beside the model and its optimizer there is room for as much in the
    memory of the CPU.

    Args:
        store: Where to.
        tokenizer: Is part of each.
        processes: Who writes.

    Attributes:
        pause_seconds, write_seconds: How long the last one has held up the training, and how long it took to write.
    """

    def __init__(self, store: CheckpointStore, tokenizer: PreTrainedTokenizerFast, processes: Processes):
        self.store = store
        self.tokenizer = tokenizer
        self.processes = processes
        self.pause_seconds = self.write_seconds = 0.0
        self._thread = ThreadPoolExecutor(1, "bdh-checkpoint")
        self._writing: Future[Path] | None = None
        self._copies = Copies()
        self._failed: Callable[[OSError], None] = lambda error: None

    def save(
        self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], failed: Callable[[OSError], None]
    ) -> None:
        """Begins to write a checkpoint, once the one before is written; returns when all of it has been copied.

        Args:
            step: Optimizer steps done.
            tensors: What `checkpoint.collect` returned.
            state: All else, as JSON.
            failed: Is called by the next `save` or `wait` with what went wrong.
        """
        self.wait()
        started = time.perf_counter()
        copies = self._copies.take(tensors)
        self.pause_seconds = time.perf_counter() - started
        self._failed = failed
        self._writing = self._thread.submit(self._write, step, copies, state)

    def wait(self) -> bool:
        """Waits until nothing is being written; whether the last one is on the disk."""
        writing, self._writing = self._writing, None
        if writing is None:
            return True
        try:
            writing.result()
        except OSError as error:
            self._failed(error)
            return False
        return True

    def close(self) -> None:
        """Waits for the thread, whatever becomes of what it writes."""
        self._thread.shutdown()

    def _write(self, step: int, tensors: dict[str, Any], state: dict[str, Any]) -> Path:
        started = time.perf_counter()
        try:
            return self.store.save(step, tensors, state, self.tokenizer, self.processes.checkpoint_group)
        finally:
            self.write_seconds = time.perf_counter() - started
