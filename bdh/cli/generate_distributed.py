"""Several processes of one `bdh generate`, which torchrun starts: they share a model's heads, and the first one speaks.

What all of them find wrong is said by the first, which then ends, and torchrun ends the others. These wait a little
before they say anything, so that a mistake is told once, and what went wrong in one process alone is told all the same.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdh.cli.settings import notify, open_model
from bdh.errors import BDHError

if TYPE_CHECKING:
    from bdh.distributed.processes import Processes
    from bdh.inference.llm import LLM

FIRST_SPEAKS = 2.0  # seconds: torchrun ends the others within them
SILENCE = 3600.0  # seconds: whoever reads what is written may stop for a while, and all wait for the first process


@contextmanager
def first_speaks() -> Iterator[None]:
    """Keeps an error back for a while, unless this is the first process."""
    try:
        yield
    except BDHError:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(FIRST_SPEAKS)
        raise


@contextmanager
def together(args: Any) -> Iterator["Processes"]:
    """This process among those that share a model; nothing is shown but what the first one shows.

    Args:
        args: Has `add_model`'s flags.

    Raises:
        BDHError: The flags do not suit several processes, or the others cannot be found, or are lost.
    """
    from bdh.distributed.config import DistributedConfig
    from bdh.distributed.processes import Processes
    from bdh.inference.tensor_parallel import check_shared

    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        with first_speaks():
            check_shared(args.device, args.quantization)
    config = DistributedConfig(tensor_parallel=size, timeout_seconds=SILENCE)
    with Processes.open(config, args.device, ends_on=(signal.SIGTERM, signal.SIGINT)) as processes, first_speaks():
        if processes.is_main:
            yield processes
        else:
            with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
                yield processes


def open_shared(args: Any, processes: "Processes") -> "LLM":
    """The model that `add_model`'s flags and `--batch_size` name, or this process's part of it. Raises BDHError."""
    if processes.mesh is None:
        return open_model(args, args.batch_size)
    from bdh.inference.tensor_parallel import load_shared

    random.seed(processes.on_main(lambda: random.getrandbits(63)))  # requests without a seed draw one of these
    llm = load_shared(args.model, processes.mesh["heads"], processes.device, args.dtype, args.batch_size)
    llm.name = args.model
    llm.notify = notify if processes.is_main else lambda line: None
    return llm


def fingerprint(llm: "LLM", args: Any, processes: "Processes") -> str:
    """Which model it is, in how many processes it may be. Raises BDHError."""
    if processes.alone:
        return llm.fingerprint
    from bdh.inference.state_file import model_fingerprint
    from bdh.model.export import load_model_only

    return processes.on_main(lambda: model_fingerprint(load_model_only(Path(args.model))))
