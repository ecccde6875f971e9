"""Process groups of a run: initialization, collective operations, and termination.

`torchrun` starts the processes and gives each its rank in environment variables. In a run of a single process, all
functions of this module return at once.
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
from bdh.distributed.config import DistributedConfig
from bdh.errors import BDHError, ReportedByOtherRank, one_line
from bdh.model.device import choose_device

T = TypeVar("T")

LONG_TIMEOUT = timedelta(days=7)  # of collectives that wait for work of one process, such as tokenizing
STORE_TIMEOUT = timedelta(minutes=1)  # to connect to torchrun's store, which already runs
PEER_REPORT_SECONDS = (
    2.0  # seconds before a rank reports that others are lost: the rank that failed reports its own error first
)
EXIT_SECONDS = 5.0  # seconds after a signal until a process that is blocked in a collective exits


class Processes:
    """The process group of a run, as seen by this process. `open` initializes and destroys it.

    Attributes:
        rank, size: Rank of this process and number of processes.
        device: Device of this process.
        mesh: Device mesh (replicas, shards, heads); None for a single process.
        share: The rows of a batch that this process reads. Tensor-parallel ranks read the same rows.
        checkpoint_group: Process group for writing checkpoints in the background; None for a single process.
    """

    def __init__(self, config: DistributedConfig, device: torch.device):
        self.config = config
        self.device = device
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.mesh: DeviceMesh | None = None
        self.share = Share()
        self.checkpoint_group: Any = None
        self._long_timeout_group: Any = None  # for collectives that wait for slow work
        self._noticed = threading.Event()  # set once all ranks know that the run is to end

    @classmethod
    @contextmanager
    def open(
        cls, config: DistributedConfig, device: str, ends_on: Sequence[signal.Signals] = (signal.SIGTERM,)
    ) -> Iterator["Processes"]:
        """Initialize the process group, and destroy it at the end.

        Args:
            config: Parallelism of the run.
            device: Device of this process, as for `choose_device`.
            ends_on: Signals after which this process exits within seconds even if it is blocked in a collective, unless
                `notice` was called.

        Raises:
            BDHError: The settings do not fit the number of processes, or the processes cannot connect.
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
            dist.init_process_group(backend, timeout=timeout, **rendezvous_store(timeout))
        except (RuntimeError, ValueError) as error:
            words = f"the {self.size} processes of this run do not find each other"
            raise BDHError(f"{words}: {one_line(error)}") from error
        with exiting_on_signals(self._noticed, ends_on), self._explained():
            try:
                self.mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("replicas", "shards", "heads"))
                self._long_timeout_group = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)
                self.checkpoint_group = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)
                copies = shape[0] * shape[1]
                self.share = Share(self.rank // shape[2], copies)
                yield self
            finally:
                with suppress(Exception):  # other ranks may have exited
                    dist.destroy_process_group()

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which logs and writes files."""
        return self.rank == 0

    def on_main(self, function: Callable[[], T]) -> T:
        """Call a function in rank 0 and broadcast its result or its exception to all ranks."""
        if self.alone:
            return function()
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = function()
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=self._long_timeout_group)
        if box[1] is not None:
            raise box[1] if self.is_main else ReportedByOtherRank(str(box[1]))
        return box[0]

    def main_process_first(self, function: Callable[[], T]) -> T:
        """Call a function that fills a cache, in the first rank of each machine before the others."""
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
            raise ReportedByOtherRank(words)
        return result if self.local_rank == 0 else function()

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in every rank."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._long_timeout_group)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Sum values that each rank computed over its own rows: any shape, in float64."""
        if self.alone:
            return values
        assert self.mesh is not None
        total = (
            values.to(self.device, torch.float64) / self.mesh["heads"].size()
        )  # tensor-parallel ranks have the same rows
        dist.all_reduce(total)
        return total.to(values.device)

    def any(self, number: int) -> int:
        """Return the maximum over all ranks, for flags that any rank may raise."""
        if self.alone:
            return number
        largest = torch.tensor(number, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def notice(self) -> None:
        """Record that all ranks know that the run is to end; they are then not killed after `EXIT_SECONDS`."""
        self._noticed.set()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Translate errors of collectives into a message that another rank was lost, after that rank's own message."""
        try:
            yield
        except BDHError:
            raise
        except RuntimeError as error:
            if not is_about_others(error):
                raise
            time.sleep(PEER_REPORT_SECONDS)
            raise BDHError(
                f"the other {self.size - 1} processes are lost: one has ended, or did not answer for "
                f"{self.config.timeout_seconds:g} seconds (in training distributed.timeout_seconds); what it said "
                f"itself is the cause ({one_line(error)})"
            ) from error


def rendezvous_store(timeout: timedelta) -> dict[str, Any]:
    """Return arguments for `init_process_group`, with a store that is not reused after a restart by torchrun.

    Only for runs on a single machine: on several, attempts may be numbered differently, and
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 has the same effect.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        return {}
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": dist.PrefixStore(f"attempt-{attempt}", store), "rank": rank, "world_size": size}


def broadcast_from_main(what: str, search: Callable[[], Path | None]) -> Path | None:
    """Run a slow search in rank 0 only and broadcast its result, before the process group is initialized.

    The result is passed through torchrun's store under the key `what`; if the search fails, torchrun ends the other
    ranks. On several machines, or without torchrun's store, every rank searches.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("WORLD_SIZE", "1") == "1":
        return search()
    store = rendezvous_store(STORE_TIMEOUT).get("store")
    if store is None:
        return search()
    if os.environ["RANK"] == "0":
        found = search()
        store.set(what, "" if found is None else str(found))
        return found
    while not store.check([what]):  # unlike `store.wait`, this can be interrupted by a signal
        time.sleep(0.1)
    said = store.get(what).decode()
    return Path(said) if said else None


def mesh_shape(config: DistributedConfig, size: int) -> tuple[int, int, int]:
    """Return the shape of the device mesh: replicas, shards of each replica, and tensor-parallel ranks.

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
    """Raise BDHError if this machine has no GPU for a rank."""
    if local_rank >= torch.cuda.device_count():
        raise BDHError(
            f"there are {torch.cuda.device_count()} GPUs here, and process {local_rank} of this machine has none; "
            "start torchrun with as many processes as there are GPUs: --nproc-per-node gpu"
        )


def is_about_others(error: RuntimeError) -> bool:
    """Return whether an exception of a collective means that another rank exited or does not respond."""
    words = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in words for sign in ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL", "Timed out")
    )


@contextmanager
def exiting_on_signals(noticed: threading.Event, ends_on: Sequence[signal.Signals]) -> Iterator[None]:
    """Exit some seconds after a signal, unless `noticed` is set by then.

    torchrun sends SIGTERM to all processes when one has failed. A process that is blocked in a library call never runs
    Python's signal handlers, but the signal's number is still written to the wakeup pipe, which a thread reads.
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

    if handler == signal.SIG_DFL:  # the default action would exit without an error message
        signal.signal(signal.SIGTERM, note)

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] in ends_on and not noticed.wait(EXIT_SECONDS):
                os._exit(128 + number[0])

    threading.Thread(target=watch, name="bdh-ending", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        if handler == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, handler)
        os.close(writer)
