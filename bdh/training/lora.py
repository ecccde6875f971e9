"""LoRA, by peft: small matrices are trained beside frozen ones, and merged into them or kept apart at the end.

The adapters are put into a `BDHForCausalLM` where it stands, so that all that works on a model works on one with
adapters. A checkpoint holds them alone; what they were trained beside is read again from where the run began, and known
by its fingerprint.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from bdh.atomic_files import replace_atomically
from bdh.errors import BDHError, error_text
from bdh.inference.state_file import checksum
from bdh.model import BDHForCausalLM
from bdh.training.config import ARCHITECTURE, LoraConfig, TrainConfig
from bdh.training.export import describe
from bdh.training.init_from import find_start, load_start

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_FILES = frozenset({"adapter_config.json", "adapter_model.safetensors", "README.md"})


def check_peft() -> None:
    """Raises BDHError where peft is not installed."""
    try:
        with _quiet():
            import peft  # noqa: F401
    except ImportError as error:
        raise BDHError("lora.rank needs the package peft: pip install 'bdh[lora]'") from error


def add_adapters(model: BDHForCausalLM, settings: LoraConfig) -> "PeftModel":
    """Puts adapters into a model, and freezes the rest. What is returned wraps the same model.

    Raises:
        BDHError: peft is not installed.
    """
    check_peft()
    with _quiet():
        from peft import LoraConfig as PeftLoraConfig
        from peft import get_peft_model

        heads = [f"encoder_v.{i}" for i in range(model.config.n_head)]
        names = [name for target in settings.targets for name in (heads if target == "encoder_v" else [target])]
        config = PeftLoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=names,
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, config)


def begin_with(model: BDHForCausalLM, config: TrainConfig, saved: dict[str, Any] | None) -> str | None:
    """Fills the model that a run begins with, if there is one, and adds adapters; returns the base's fingerprint.

    A run that goes on has all weights in its checkpoint, but with adapters, which are all that is saved there.

    Args:
        model: Of the run's architecture, with random weights.
        config: The run's.
        saved: The state of the checkpoint it goes on from, None to begin.

    Raises:
        BDHError: There is no such model, or it is another than the adapters belong to.
    """
    if config.init_from is None or (saved is not None and not config.lora.rank):
        return None
    start = Path(config.init_from)
    if not config.lora.rank:
        load_start(model, start)
        return None
    base = load_base(model, start, None if saved is None else saved["base"])
    add_adapters(model, config.lora)
    return base


def load_base(model: BDHForCausalLM, start: Path, expected: str | None) -> str:
    """Puts the weights that adapters stand beside into a model; returns their fingerprint.

    Args:
        model: Of the same architecture.
        start: Where the run began.
        expected: The fingerprint that the base must have; None at the beginning of a run.

    Raises:
        BDHError: The base is gone, or is another.
    """
    if expected is not None and not start.exists():
        raise BDHError(
            f"the adapters of this run belong to {start}, which is gone; tell where it is now: --init_from DIR"
        )
    own = describe(find_start(start))[0]
    same = all(getattr(own, name) == getattr(model.config, name) for name in ARCHITECTURE)
    if same:
        load_start(model, start)
    found = checksum(model.state_dict(), {}) if same else ""
    if expected not in (None, found):
        raise BDHError(
            f"{start} is not the model that the adapters of this run were trained beside; bring that one back"
        )
    return found


def merged(adapted: "PeftModel") -> BDHForCausalLM:
    """The plain model that computes what the base and its adapters do together."""
    with _quiet():
        model: Any = adapted.merge_and_unload()
    assert isinstance(model, BDHForCausalLM)
    return model


def save_adapter(adapted: "PeftModel", directory: Path, card: str) -> None:
    """Writes the adapters to a folder that `peft.PeftModel.from_pretrained` reads, whole or not at all.

    Raises:
        BDHError: The folder holds something else, or cannot be written.
    """
    check_adapter_target(directory)
    directory = directory.absolute()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with replace_atomically(directory) as partial:
            with _quiet():
                adapted.save_pretrained(str(partial))
            config = json.loads((partial / "adapter_config.json").read_text(encoding="utf-8"))
            config["target_modules"].sort()  # a set, which peft writes in any order
            (partial / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
            (partial / "README.md").write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise BDHError(f"{directory} cannot be written: {error_text(error)}") from error


def check_adapter_target(directory: Path) -> None:
    """Refuses to put adapters where something else is. Raises BDHError."""
    if directory.is_file():
        raise BDHError(f"{directory} is a file; name a folder for the adapters")
    if directory.is_dir() and any(path.name not in ADAPTER_FILES for path in directory.iterdir()):
        raise BDHError(f"{directory} holds something that is no adapter; name another folder, or empty it")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what peft and the libraries it looks for say about themselves to themselves."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
