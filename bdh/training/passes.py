"""Forward and backward passes: from the rows of a batch that this process has to the gradient of a step."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from bdh.data.blocks import document_ids, inputs_and_targets
from bdh.data.loader import Batch
from bdh.errors import BDHError, one_line
from bdh.model import state_of
from bdh.training.config import TrainConfig
from bdh.training.meter import Meter
from bdh.training.processes import Processes
from bdh.training.spread import Spread
from bdh.training.state import CarriedState


class Passes:
    """Makes the gradient of batches, in pieces of as many rows as a forward pass takes.

    Args:
        config: The run's.
        spread: The model.
        processes: Who shares a batch.
        rows: How many of a batch are this process's.
        end_of_text: The token that ends documents, which are then kept apart; None reads across them.
        precision: Makes the context of a forward pass.
        meter: Is told what takes the time.

    Attributes:
        size: Rows of one forward pass of this process.
        memory: What rows go on from, if the run carries a state.
    """

    def __init__(
        self,
        config: TrainConfig,
        spread: Spread,
        processes: Processes,
        rows: int,
        end_of_text: int | None,
        precision: Callable[[], AbstractContextManager[object]],
        meter: Meter,
    ):
        self.config = config
        self.spread = spread
        self.processes = processes
        self.device = processes.device
        self.end_of_text = end_of_text
        self.precision = precision
        self.meter = meter
        self.size = config.training.micro_batch_size or rows
        self.memory: CarriedState | None = None
        if config.training.carry_state:
            self.memory = CarriedState.empty(spread.model.config, self.size, rows // self.size, self.device)

    def accumulate(self, batch: Batch, predicted: int | None = None) -> float:
        """Forward and backward over this process's rows of a batch (B, T + 1), in pieces.

        Leaves the gradient of the mean loss, and returns that. The mean is over the tokens to predict of all rows of
        all processes, `predicted`, however they fall into pieces: each piece gives its sum, divided by their number.
        Copies of a model take the mean of their gradients, so each counts as many times as there are copies.
        """
        predicted = self.predicted(batch) if predicted is None else predicted
        number_of_all = torch.tensor(max(predicted, 1), device=self.device)
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
            with self.spread.piece(is_last=number == len(pieces) - 1):
                with self.meter.clock("forward"), self.precision():
                    outputs = self.spread.forward(inputs, labels=targets, shift_labels=targets, **given)
                if self.memory is not None:
                    state = state_of(outputs)
                    assert state is not None
                    self.memory.after(number, state)
                with self.meter.clock("backward"):
                    (outputs.loss * copies if copies > 1 else outputs.loss).backward()
            total += outputs.loss.item()
        return self.processes.sum(total).item()

    def predicted(self, batch: Batch) -> int:
        """How many tokens the rows of all processes have to predict."""
        if self.processes.alone or not self.config.data.has_chats():
            return batch.predicted * self.processes.share.world
        return round(self.processes.sum(torch.tensor(batch.predicted, dtype=torch.float64)).item())

    def rehearse(self) -> None:
        """Goes once through rows of the real shape, which compiles the model. Raises BDHError where that fails."""
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
