"""The processes of one run: who this is, what they agree on, and how they end together.

`torchrun` starts them and tells each its place by environment variables. A run of one process is the same thing with
nobody to talk to: then every function here returns at once.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bdh.data.blocks import Share
from bdh.errors import BDHError, ToldElsewhere, one_line
from bdh.model.device import choose_device
from bdh.training.config import DistributedConfig

T = TypeVar("T")

PATIENCE = timedelta(days=7)  # for what only one process does, as to tokenize a text
FIRST_WORD = timedelta(minutes=1)  # to reach torchrun, which is there already
OTHERS_FIRST = 2.0  # seconds: whoever failed by itself says so before those that it takes with it
LAST_SECONDS = 5.0  # after such a signal, for a process that waits for others and does not come back


class Processes:
    """This process among those of a run. `open` makes it, and ends it.

    Attributes:
        rank, size: Which of how many this is.
        device: Where it computes.
        mesh: All of them, (replicas, shards, heads); None if there is only one.
        share: Which rows of a batch are this one's. Processes that share heads have the same rows.
        saving: The group that checkpoints are written in, beside the training; None if there is only one.
    """

    def __init__(self, config: DistributedConfig, device: torch.device):
        self.config = config
        self.device = device
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.mesh: DeviceMesh | None = None
        self.share = Share()
        self.saving: Any = None
        self._patient: Any = None  # a group that waits for what takes long
        self._noticed = threading.Event()  # a signal that asks for the end, by all processes

    @classmethod
    @contextmanager
    def open(
        cls, config: DistributedConfig, device: str, ends_on: Sequence[signal.Signals] = (signal.SIGTERM,)
    ) -> Iterator["Processes"]:
        """Finds the others. Raises BDHError if the settings do not fit their number, or they cannot be found.

        Args:
            config: How they share the work.
            device: Where this one computes, as for `choose_device`.
            ends_on: Signals after which this one ends within seconds, whatever it waits for, unless it has noticed.
        """
        self = cls(config, choose_device(device))
        if self.size == 1:
            yield self
            return
        shape = mesh_shape(config, self.size)
        if self.device.type == "cuda":
            check_devices(self.local_rank)
            self.device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(self.device)
        timeout = timedelta(seconds=config.timeout_seconds)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timeout, **meeting_place(timeout))
        except (RuntimeError, ValueError) as error:
            words = f"the {self.size} processes of this run do not find each other"
            raise BDHError(f"{words}: {one_line(error)}") from error
        with ending_together(self._noticed, ends_on), self._explained():
            try:
                self.mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("replicas", "shards", "heads"))
                self._patient = dist.new_group(backend="gloo", timeout=PATIENCE)
                self.saving = dist.new_group(backend="gloo", timeout=PATIENCE)
                copies = shape[0] * shape[1]
                self.share = Share(self.rank // shape[2], copies)
                yield self
            finally:
                with suppress(Exception):  # the others may be gone
                    dist.destroy_process_group()

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one that logs, and writes what is written once."""
        return self.rank == 0

    def on_main(self, function: Callable[[], T]) -> T:
        """What a function returns, which is called in the main process only. Raises, everywhere, as it does."""
        if self.alone:
            return function()
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = function()
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=self._patient)
        if box[1] is not None:
            raise box[1] if self.is_main else ToldElsewhere(str(box[1]))
        return box[0]

    def one_after_the_other(self, function: Callable[[], T]) -> T:
        """What a function returns that fills a cache: the first process of each machine calls it before the others."""
        if self.alone:
            return function()
        error: Exception | None = None
        if self.local_rank == 0:
            try:
                result = function()
            except Exception as caught:
                error = caught
        failed = self.gather(None if error is None else str(error))
        if error is not None:
            raise error
        if words := next((one for one in failed if one is not None), None):
            raise ToldElsewhere(words)
        return result if self.local_rank == 0 else function()

    def gather(self, value: T) -> list[T]:
        """What each process has, by rank; in all of them."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._patient)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the rows of all processes, of what was counted over the rows of each: any shape, in float64."""
        if self.alone:
            return values
        assert self.mesh is not None
        total = values.to(self.device, torch.float64) / self.mesh["heads"].size()  # several have the same rows
        dist.all_reduce(total)
        return total.to(values.device)

    def any(self, number: int) -> int:
        """The largest of the numbers that the processes have: whether one of them wants something."""
        if self.alone:
            return number
        largest = torch.tensor(number, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def notice(self) -> None:
        """All processes know that they are to end, and may take their time to."""
        self._noticed.set()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Says in words that another process is gone, after whatever that one has to say itself."""
        try:
            yield
        except BDHError:
            raise
        except RuntimeError as error:
            if not is_about_others(error):
                raise
            time.sleep(OTHERS_FIRST)
            raise BDHError(
                f"the other {self.size - 1} processes are lost: one has ended, or did not answer for "
                f"{self.config.timeout_seconds:g} seconds (in training distributed.timeout_seconds); what it said "
                f"itself is the cause ({one_line(error)})"
            ) from error


def meeting_place(timeout: timedelta) -> dict[str, Any]:
    """Where processes of one machine find each other: not where those have been that torchrun has begun anew.

    On several machines the attempts may be numbered differently; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 does the
    same.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        return {}
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": dist.PrefixStore(f"attempt-{attempt}", store), "rank": rank, "world_size": size}


def first_finds(what: str, search: Callable[[], Path | None]) -> Path | None:
    """What a search finds that takes long, before the processes have found each other. Raises as the search does.

    Of the processes that torchrun has started on one machine the first one searches, and its word reaches the others
    by torchrun's own store, under the name `what`; if it fails, torchrun ends them. On several machines, and
    elsewhere, each searches.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("WORLD_SIZE", "1") == "1":
        return search()
    store = meeting_place(FIRST_WORD).get("store")
    if store is None:
        return search()
    if os.environ["RANK"] == "0":
        found = search()
        store.set(what, "" if found is None else str(found))
        return found
    while not store.check([what]):  # which a signal can end, as it cannot a wait
        time.sleep(0.1)
    said = store.get(what).decode()
    return Path(said) if said else None


def mesh_shape(config: DistributedConfig, size: int) -> tuple[int, int, int]:
    """How many copies of the model there are, over how many processes each is sharded, and how many share its heads.

    Raises:
        BDHError: The number of processes does not allow it.
    """
    heads = config.tensor_parallel
    if size % heads:
        raise BDHError(f"distributed.tensor_parallel is {heads}; it must divide the {size} processes")
    copies = size // heads
    if config.strategy == "ddp":
        if heads > 1 and copies > 1:
            raise BDHError(
                f"distributed.tensor_parallel {heads} of {size} processes leaves {copies} copies, which "
                "distributed.strategy ddp cannot keep equal; choose fsdp"
            )
        return copies, 1, heads
    shards = copies if config.shards is None else config.shards
    if copies % shards:
        raise BDHError(f"distributed.shards is {shards}; it must divide the {copies} processes that share the rows")
    return copies // shards, shards, heads


def check_devices(local_rank: int) -> None:
    if local_rank >= torch.cuda.device_count():
        raise BDHError(
            f"there are {torch.cuda.device_count()} GPUs here, and process {local_rank} of this machine has none; "
            "start torchrun with as many processes as there are GPUs: --nproc-per-node gpu"
        )


def is_about_others(error: RuntimeError) -> bool:
    """Whether an exception says that another process is gone, or silent."""
    words = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in words for sign in ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL", "Timed out")
    )


@contextmanager
def ending_together(noticed: threading.Event, ends_on: Sequence[signal.Signals]) -> Iterator[None]:
    """Ends this process some seconds after a signal, unless it has noticed by then.

    torchrun sends SIGTERM to all processes when one has failed. One that waits for that one, in a library, never comes
    to what Python does about signals; but the signal's number comes through a pipe all the same.
    """
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handler: Any = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if handler == signal.SIG_DFL:  # else it would end before anything could be said
        signal.signal(signal.SIGTERM, note)

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] in ends_on and not noticed.wait(LAST_SECONDS):
                os._exit(128 + number[0])

    threading.Thread(target=watch, name="bdh-ending", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        if handler == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, handler)
        os.close(writer)
