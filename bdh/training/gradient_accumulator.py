"""Forward and backward passes over the micro-batches of a step."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from bdh.data.blocks import document_ids, inputs_and_targets
from bdh.data.loader import Batch
from bdh.distributed.parallel import ParallelModel
from bdh.distributed.processes import Processes
from bdh.errors import BDHError, one_line
from bdh.model import state_of
from bdh.training.config import TrainConfig
from bdh.training.run_state import CarriedState
from bdh.training.step_metrics import Meter


class GradientAccumulator:
    """Accumulates the gradient of a batch over micro-batches.

    Args:
        config: The configuration of the run.
        parallel_model: The model.
        processes: The processes that share a batch.
        rows: Number of rows of a batch that this process reads.
        end_of_text: The token that ends documents, which are then separated; None reads across documents.
        precision: Returns the context of a forward pass.
        meter: Measures the time of forward and backward passes.

    Attributes:
        size: Number of rows of a micro-batch.
        memory: The states that rows continue from, if the run carries a state.
    """

    def __init__(
        self,
        config: TrainConfig,
        parallel_model: ParallelModel,
        processes: Processes,
        rows: int,
        end_of_text: int | None,
        precision: Callable[[], AbstractContextManager[object]],
        meter: Meter,
    ):
        self.config = config
        self.parallel_model = parallel_model
        self.processes = processes
        self.device = processes.device
        self.end_of_text = end_of_text
        self.precision = precision
        self.meter = meter
        self.size = config.training.micro_batch_size or rows
        self.memory: CarriedState | None = None
        if config.training.carry_state:
            self.memory = CarriedState.empty(parallel_model.model.config, self.size, rows // self.size, self.device)

    def accumulate(self, batch: Batch, num_target_tokens: int | None = None) -> float:
        """Run forward and backward passes over this process's rows of a batch (B, T + 1).

        The gradient is that of the mean loss over the target tokens of all rows of all processes, `num_target_tokens`,
        whatever the micro-batches: each adds the sum of its losses divided by that number. Data-parallel replicas
        average their gradients, so each loss is multiplied by the number of replicas.

        Returns:
            The mean loss.
        """
        if num_target_tokens is None:
            num_target_tokens = self.num_target_tokens(batch)
        number_of_all = torch.tensor(max(num_target_tokens, 1), device=self.device)
        copies = self.processes.share.world
        total = torch.zeros((), dtype=torch.float64)
        pieces = batch.tokens.split(self.size)
        for number, part in enumerate(pieces):
            part = part.to(self.device, non_blocking=True)  # (b, T + 1)
            inputs, targets = inputs_and_targets(part)  # (b, T) each
            given: dict[str, Any] = {"use_cache": False, "num_items_in_batch": number_of_all}
            if self.end_of_text is not None:
                given["document_ids"] = document_ids(inputs, self.end_of_text)  # (b, T)
            if self.memory is not None:
                fresh = batch.fresh[number * self.size : (number + 1) * self.size].to(self.device)  # (b,)
                given |= {"use_cache": True, "past_key_values": self.memory.before(number, fresh)}
            with self.parallel_model.sync_gradients(is_last=number == len(pieces) - 1):
                with self.meter.clock("forward"), self.precision():
                    outputs = self.parallel_model.forward(inputs, labels=targets, shift_labels=targets, **given)
                if self.memory is not None:
                    state = state_of(outputs)
                    assert state is not None
                    self.memory.after(number, state)
                with self.meter.clock("backward"):
                    (outputs.loss * copies if copies > 1 else outputs.loss).backward()
            total += outputs.loss.item()
        return self.processes.sum(total).item()

    def num_target_tokens(self, batch: Batch) -> int:
        """Return the number of target tokens in the rows of all processes."""
        if self.processes.alone or not self.config.data.has_chats():
            return batch.num_target_tokens * self.processes.share.world
        return round(self.processes.sum(torch.tensor(batch.num_target_tokens, dtype=torch.float64)).item())

    def warmup_compile(self) -> None:
        """Compile the model by one pass over rows of the real shape. Raises BDHError if that fails."""
        length = self.config.data.block_size + 1
        try:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                tokens = torch.zeros(self.size, length, dtype=torch.int64)
                self.accumulate(Batch(tokens, torch.ones(self.size, dtype=torch.bool)))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            words = "training.compile is true, but torch.compile does not work here"
            raise BDHError(f"{words}: {one_line(error)}") from error
