"""Variants of the synapses' decay and writing, and a model of one of them that trains by the default recipe."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdh.kernels.dispatch import use_kernels
from bdh.model import BDHConfig, BDHForCausalLM, BDHState
from bdh.model.modeling_bdh import state_of
from bdh.training.config import TrainingConfig
from bdh.training.device_setup import autocast, seed_everything
from bdh.training.optimizer import build_optimizer, learning_rate_at


class Variant(NamedTuple):
    """A way to keep synapses.

    Attributes:
        config: Fields of BDHConfig.
        carry: Whether each row's state is carried from one training step to the next.
    """

    config: dict[str, Any]
    carry: bool = False


def half_lives(shortest: float, longest: float, heads: int = 4) -> list[float]:
    """Half-lives evenly spaced in the logarithm, one per head."""
    return [round(shortest * (longest / shortest) ** (k / (heads - 1)), 3) for k in range(heads)]


FIXED: dict[str, Any] = {"decay": "fixed"}  # the default half-lives are 16 to 1024 tokens
GATED: dict[str, Any] = {"decay": "gated"}
GATED_DELTA: dict[str, Any] = {"decay": "gated", "write": "delta"}
SHORT: dict[str, Any] = {"decay_half_lives": half_lives(16, 512)}
WIDE: dict[str, Any] = {"decay_half_lives": half_lives(8, 4096)}
ONE_NEVER: dict[str, Any] = {"decay_half_lives": [16, 128, 1024, None]}

VARIANTS: dict[str, Variant] = {
    "none": Variant({}),
    "gated-delta": Variant(GATED_DELTA),
    "fixed": Variant(FIXED),
    "gated": Variant(GATED),
    "gated-delta-carried": Variant(GATED_DELTA, carry=True),
    "none-carried": Variant({}, carry=True),
    "delta": Variant({"write": "delta"}),
    "fixed-carried": Variant(FIXED, carry=True),
    "fixed-8-4096": Variant({**FIXED, **WIDE}),
    "fixed-one-never": Variant({**FIXED, **ONE_NEVER}),
    "gated-delta-16-512": Variant({**GATED_DELTA, **SHORT}),
    "gated-delta-8-4096": Variant({**GATED_DELTA, **WIDE}),
    "gated-delta-one-never": Variant({**GATED_DELTA, **ONE_NEVER}),
}


class OutOfTimeError(Exception):
    """A run would not end in the minutes that are left."""


class TimeLimit:
    """The wall time that a whole benchmark may take."""

    def __init__(self, minutes: float | None):
        self.began = time.perf_counter()
        self.seconds = float("inf") if minutes is None else 60 * minutes

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.began)

    def require(self, seconds: float) -> None:
        """Raises OutOfTimeError unless that many seconds are left."""
        if seconds > self.left:
            raise OutOfTimeError(f"needs {seconds:.0f} s more, and {max(0.0, self.left):.0f} s are left")


class Trainer:
    """A model of one variant and its optimizer: by default a warm-up, then a cosine from learning rate 1e-3 to 1e-4.

    Args:
        sizes: Fields of BDHConfig that all variants share.
        variant: The variant.
        device: Where it trains.
        steps: Optimizer steps of the whole run.
        limit: Wall time; a run that would pass it raises OutOfTimeError after its first steps.
        recipe: Fields of TrainingConfig that differ from the default recipe.
    """

    MEASURED = range(5, 25)  # steps whose time the rest of the run is estimated from

    def __init__(
        self,
        sizes: dict[str, Any],
        variant: Variant,
        device: torch.device,
        steps: int,
        limit: TimeLimit,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        seed_everything(0)
        self.variant, self.device, self.limit = variant, device, limit
        self.model = BDHForCausalLM(BDHConfig(**sizes, **variant.config)).to(device)
        self.recipe = TrainingConfig(**{"max_steps": steps, "warmup_steps": min(100, steps // 10), **(recipe or {})})
        self.kernels = use_checked_kernels(self.model, device, self.autocast)
        self.optimizer = build_optimizer(self.model, self.recipe)
        self.model.train()
        self.step, self.began, self.measured = 0, time.perf_counter(), 0.0

    def autocast(self) -> AbstractContextManager[object]:
        return autocast(TrainingConfig(), self.device)

    def update(self, loss: Tensor) -> None:
        """One optimizer step down the gradient of a loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, self.recipe)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.step in (self.MEASURED.start, self.MEASURED.stop):
            synchronize(self.device)
            now = time.perf_counter()
            if self.step == self.MEASURED.stop:
                each = (now - self.measured) / len(self.MEASURED)
                self.limit.require(each * (self.recipe.max_steps - self.step))
            self.measured = now

    def figures(self, tokens: int) -> dict[str, Any]:
        """What is recorded of the training that has ended.

        Args:
            tokens: Tokens of one step.

        Returns:
            Seconds, checks of the kernels, tokens/s of the steps after those of MEASURED, and of a gated variant the
            half-lives that its heads have for a token whose vector is 0.
        """
        synchronize(self.device)
        now = time.perf_counter()
        found: dict[str, Any] = {"training_seconds": round(now - self.began, 1), "kernels": self.kernels}
        if self.step > self.MEASURED.stop:
            found["tokens_per_second"] = round(tokens * (self.step - self.MEASURED.stop) / (now - self.measured))
        gates = self.model.model.layer.gates
        if gates is not None and gates.config.decay == "gated":
            rates = gates.decay_rate.detach().exp() * torch.sigmoid(gates.decay_bias.detach())  # (h)
            found["half_lives"] = [
                None if life is None else round(math.log(2) / rate, 1)
                for life, rate in zip(gates.config.decay_half_lives or [], rates.tolist(), strict=True)
            ]
        return found


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def use_checked_kernels(
    model: BDHForCausalLM, device: torch.device, precision: Callable[[], AbstractContextManager[object]]
) -> dict[str, Any]:
    """Lets the model take the fastest form of its work, if that computes what the plain form computes.

    Returns:
        "form", which is "reference" where there is no other or the other computes something else, and how far they
        differ: root mean square of the vectors' difference, read in two pieces with carried state, and the relative
        difference of the gradients, of all weights and of the gates.
    """
    layer = model.model.layer
    use_kernels(layer, "auto", device)
    if layer.kernels is None:
        return {"form": "reference"}
    kernels = layer.kernels
    rows = 2 + (1 << 24) // (256 * layer.config.neurons_per_head) if device.type == "cuda" else 8
    tokens = torch.randint(0, 256, (rows, 513), generator=torch.Generator().manual_seed(0)).to(device)  # (rows, 513)
    vectors: list[Tensor] = []
    gradients: list[dict[str, Tensor]] = []
    model.eval()
    for layer.kernels in (None, kernels):
        state: BDHState | None = None
        parts = []
        with torch.no_grad(), precision():
            for piece in tokens[:, :-1].split(256, dim=1):
                outputs = model.model(piece, past_key_values=state, use_cache=True)
                state = state_of(outputs)
                parts.append(outputs.last_hidden_state.float())  # (rows, 256, D)
        vectors.append(torch.cat(parts, dim=1))  # (rows, 512, D)
        with precision():
            logits = model(tokens[:, :-1], use_cache=False).logits  # (rows, 512, V)
        F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)

    def difference(names: list[str]) -> float:
        plain, other = (torch.cat([found[name].flatten() for name in names]) for found in gradients)
        return round(((other - plain).norm() / plain.norm()).item(), 4)

    found = {"vectors": round((vectors[1] - vectors[0]).square().mean().sqrt().item(), 4)}  # layer norms: scale 1
    found["gradients"] = difference(list(gradients[0])) if gradients[0].keys() == gradients[1].keys() else math.inf
    gates = [name for name in gradients[0] if ".gates." in name]
    if gates and found["gradients"] < math.inf:
        found["gate_gradients"] = difference(gates)
    trusted = all(value < most for value, most in zip(found.values(), (0.1, 0.2, 0.3), strict=False))
    if not trusted:
        layer.kernels = None
        print(f"the kernels are not used, because they compute something else: {found}", flush=True)
    return {"form": "auto" if trusted else "reference", "differences": found}
