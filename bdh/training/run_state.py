"""State of a run that changes during training, and the outcome of a run."""

import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from bdh.evaluation.by_position import PositionBin
from bdh.model import BDHConfig, BDHState
from bdh.training.validation import Evaluation


@dataclass
class Outcome:
    """The result of a call of `train`.

    Attributes:
        run_dir: The run's folder.
        step: Steps done.
        signal: The signal that stopped it, or None if it reached the end.
        evaluation: The last validation, if there was one.
        seconds: Time spent training, earlier parts of the run included.
    """

    run_dir: Path
    step: int
    signal: signal.Signals | None
    evaluation: Evaluation | None
    seconds: float


@dataclass
class RunState:
    """Everything that changes during training besides weights, optimizer and random states; checkpoints contain all of
    it.

    `beyond_block` is the loss at positions beyond the training block, from the same validation as `evaluation`; None
    where that was not measured.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluation: Evaluation | None = None
    beyond_block: PositionBin | None = None
    evaluated_at: int = -1
    best_validation_loss: float | None = None
    best_checkpoint: str | None = None
    saved_at: int = -1


class CarriedState:
    """The synapses that each row of the batch goes on from (truncated back-propagation through time).

    Args:
        pieces: An empty state for each forward pass of a step.
    """

    def __init__(self, pieces: Iterable[BDHState]):
        self.pieces = list(pieces)

    @classmethod
    def empty(cls, config: BDHConfig, size: int, count: int, device: torch.device) -> "CarriedState":
        """The carried state before the first step: no past, for `count` forward passes of `size` rows."""
        return cls(BDHState.zeros(config, size, device) for _ in range(count))

    def before(self, piece: int, fresh: Tensor) -> BDHState:
        """The state a forward pass begins with; rows marked in `fresh`, (b,) bool, begin anew."""
        state = self.pieces[piece]
        return state.forget(fresh) if bool(fresh.any()) else state

    def after(self, piece: int, state: BDHState) -> None:
        """Keeps what a forward pass left, cut off from its graph."""
        self.pieces[piece] = state.detach()

    def tensors(self, mesh: DeviceMesh | None = None) -> dict[str, Tensor]:
        """The tensors for a checkpoint: synapses.LAYER (B, h, N, D) and position (B,), concatenated over forward
        passes.

        With a mesh (replicas, shards, heads), of the whole batch and all heads, of which this process has its part.
        """
        layers = range(len(self.pieces[0].synapses))
        kept = {f"synapses.{i}": torch.cat([state.synapses[i] for state in self.pieces]) for i in layers}
        position = torch.cat([state.position for state in self.pieces])
        if mesh is None:
            return {**kept, "position": position}
        rows = [Shard(0), Shard(0)]
        spread = {name: DTensor.from_local(S, mesh, [*rows, Shard(1)], run_check=False) for name, S in kept.items()}
        return {**spread, "position": DTensor.from_local(position, mesh, [*rows, Replicate()], run_check=False)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what `tensors` returned."""
        tensors = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in tensors.items()}
        size = self.pieces[0].batch_size
        for number, piece in enumerate(self.pieces):
            rows = slice(number * size, (number + 1) * size)
            synapses = [tensors[f"synapses.{i}"][rows].clone() for i in range(len(piece.synapses))]
            self.pieces[number] = BDHState(synapses, tensors["position"][rows].clone(), 0)
