"""From a checkpoint to an export."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerFast

from bdh.data.settings import DataConfig
from bdh.data.tokenizer import load_tokenizer
from bdh.errors import BDHError
from bdh.model import BDHConfig, BDHForCausalLM
from bdh.model.export import load_model_only, read_config, save_export
from bdh.model.model_card import Section, adapter_card, model_card, parameter_count
from bdh.training import checkpoint
from bdh.training.config import TrainConfig, from_dict

if TYPE_CHECKING:
    from peft import PeftModel

STATE_KEYS = ("step", "tokens", "seconds", "config", "evaluation", "hardware", "text", "data", "random")


def model_config(config: TrainConfig) -> BDHConfig:
    """The configuration of the model that a run trains; `model.vocab_size` is filled in."""
    return BDHConfig(**config.model.architecture(), training_block_size=config.data.block_size)


def checkpoint_settings(path: Path, state: dict[str, Any]) -> TrainConfig:
    """The settings recorded in a checkpoint's state. Raises BDHError."""
    with checkpoint.naming_damage(path):
        if missing := [name for name in STATE_KEYS if name not in state]:
            raise ValueError(f"state.json lacks {', '.join(missing)}")
        settings = from_dict(state["config"])
        model_config(settings)
    return settings


def checkpoint_config(path: Path, state: dict[str, Any]) -> BDHConfig:
    """The architecture recorded in a checkpoint's state. Raises BDHError."""
    config = model_config(checkpoint_settings(path, state))
    if not state["config"].get("lora", {}).get("rank"):  # else the weights are elsewhere
        checkpoint.check_size(path, parameter_count(config))
    return config


def load_model(path: Path, base: Path | None = None) -> tuple[BDHForCausalLM, dict[str, Any]]:
    """The model of a checkpoint, in eval mode on the CPU, and the checkpoint's state; adapters are merged.

    Args:
        path: The checkpoint.
        base: Where the model lies that adapters belong to; None where it lay when the run began.

    Raises:
        BDHError: It has adapters, and what they belong to is gone or another.
    """
    state = checkpoint.read_state(path)
    settings = checkpoint_settings(path, state)
    if settings.lora.rank:
        from bdh.training.lora import merged

        return merged(load_adapted(path, base)).eval(), state
    model = BDHForCausalLM(checkpoint_config(path, state))
    checkpoint.load_weights(path, model)
    return model.eval(), state


def load_adapted(path: Path, base: Path | None = None) -> "PeftModel":
    """The model of a checkpoint with its adapters apart, on the CPU; all as for `load_model`."""
    from bdh.training.lora import add_adapters, load_base

    state = checkpoint.read_state(path)
    settings = checkpoint_settings(path, state)
    model = BDHForCausalLM(checkpoint_config(path, state))
    load_base(model, base or Path(str(settings.init_from)), state["base"])
    adapted = add_adapters(model, settings.lora)
    checkpoint.load_weights(path, model)
    return adapted


def load_any(source: Path) -> tuple[BDHForCausalLM, PreTrainedTokenizerFast | None]:
    """The model of a checkpoint, a run or an export, and the tokenizer if one lies there."""
    if (source / "config.json").is_file():
        here = (source / "tokenizer.json").is_file()
        return load_model_only(source), load_tokenizer(str(source.resolve())) if here else None
    path = checkpoint.find_checkpoint(source)
    return load_model(path)[0], checkpoint.tokenizer_of(path)


def export_checkpoint(path: Path, directory: Path, base: Path | None = None) -> None:
    """Writes the export of a checkpoint, with a card that tells how it was trained; `base` as for `load_model`.

    Raises:
        BDHError: As `load_model` and `save_export`.
    """
    model, state = load_model(path, base)
    with checkpoint.naming_damage(path):
        card = model_card(_title(state), model.config, training_sections(state))
    save_export(model, checkpoint.tokenizer_of(path), directory, card)


def export_run(run: Path, best: str | None, base: Path | None, report: Callable[[str], None]) -> None:
    """Writes the export of a run's best checkpoint to its folder `model`.

    Args:
        run: Its folder.
        best: The name of the checkpoint with the least validation loss, where there is one.
        base: As for `load_model`.
        report: Told a line about what was done, and about each damaged checkpoint passed over.

    Raises:
        BDHError: The export cannot be written; the line says how to make it later.
    """
    path = checkpoint.find_checkpoint(run, prefer="best", report=report)
    try:
        export_checkpoint(path, run / "model", base)
    except BDHError as error:
        raise BDHError(f"{path} is saved, but {error}; make room, then: bdh export {path} {run / 'model'}") from error
    which = ", the best by validation loss" if path.name == best else ""
    report(f"done: {run / 'model'} is the export of {path.name}{which}")


def export_adapter(path: Path, directory: Path, base: Path | None = None) -> None:
    """Writes the adapters of a checkpoint alone, with such a card. Raises BDHError, also if it has none."""
    from bdh.training.lora import save_adapter

    state = checkpoint.read_state(path)
    settings = from_dict(state["config"])
    if not settings.lora.rank:
        raise BDHError(f"{path} has no adapters, its run trained all weights; leave --adapter out")
    save_adapter(
        load_adapted(path, base),
        directory,
        adapter_card(_title(state), start_name(str(settings.init_from)), training_sections(state)),
    )


def _title(state: dict[str, Any]) -> str:
    return f"{Path(state['config']['run_dir']).name} at step {state['step']}"


def training_sections(state: dict[str, Any]) -> list[Section]:
    """Sections of a model card about the data, the training and the validation of a checkpoint."""
    data, training = state["config"]["data"], state["config"]["training"]
    sections: list[Section] = [
        (
            "Data",
            {
                "text": text_name(from_dict(state["config"]).data),
                **tokens_row(state["text"], from_dict(state["config"]).data),
                "tokenizer": Path(data.get("tokenizer") or "bytes").name,
            },
        ),
        (
            "Training",
            {
                **start_rows(from_dict(state["config"])),
                "steps": f"{state['step']:,} of {training['max_steps']:,}",
                "tokens seen": f"{state['tokens']:,}",
                "batch": f"{training['batch_size']} sequences of {data['block_size']} tokens",
                "learning rate": f"{training['learning_rate']:g}, {training['schedule']}",
                "weight decay": f"{training['weight_decay']:g}",
                "time": f"{state['seconds']:,.0f} s on {state['hardware']}",
                "versions": ", ".join(f"{package} {version}" for package, version in state["versions"].items()),
            },
        ),
    ]
    evaluation = state.get("evaluation")
    if evaluation and state["evaluated_at"] == state["step"]:
        sections.append(
            (
                "Validation",
                {
                    "loss": f"{evaluation['loss']:.4f} nats a token",
                    "perplexity": f"{evaluation['perplexity']:.2f}",
                    "bits per byte": f"{evaluation['bits_per_byte']:.3f}",
                    "perplexity per byte": f"{2 ** evaluation['bits_per_byte']:.3f}",
                    "accuracy": f"{evaluation['accuracy']:.1%}",
                    "scored": f"{evaluation['tokens']:,} tokens in windows of {data['block_size']}",
                    **beyond_block_row(state.get("beyond_block")),
                },
            )
        )
    return sections


def beyond_block_row(beyond: dict[str, Any] | None) -> dict[str, str]:
    """The row of a card about positions beyond the training block; none where that was not measured."""
    if beyond is None:
        return {}
    scored = f"positions {beyond['after'] + 1:,} to {beyond['up_to']:,}, {beyond['tokens']:,} tokens"
    return {"bits per byte beyond the block": f"{beyond['bits_per_byte']:.3f} ({scored})"}


def start_rows(config: TrainConfig) -> dict[str, str]:
    """Rows of a model card about fine-tuning; none for a model trained from scratch."""
    if config.init_from is None:
        return {}
    rows, lora = {"fine-tuned from": start_name(config.init_from)}, config.lora
    if lora.rank:
        rows["adapters"] = f"LoRA of rank {lora.rank}, alpha {lora.alpha}, on {', '.join(lora.targets)}"
    return rows


def start_name(where: str) -> str:
    """The name of the model that a run starts from, without its path on the disk."""
    path = Path(where)
    if checkpoint.NAME.fullmatch(path.name):
        return f"{path.parent.parent.name} at step {checkpoint.step_of(path)}"
    return "/".join(path.parts[-2:]) if path.name == "model" else path.name


def text_name(data: DataConfig) -> str:
    """The name of a text, without its path on the disk."""
    names = [f"{_last_part(source.path)} {source.config or ''}".strip() for source in data.sources()]
    weights = [f" (weight {source.weight:g})" if data.mixture else "" for source in data.sources()]
    return ", ".join(map("".join, zip(names, weights, strict=True))) or data.corpus


def _last_part(path: str) -> str:
    return Path(path).name if Path(path).is_absolute() else path


def tokens_row(identity: dict[str, Any], data: DataConfig) -> dict[str, str]:
    """Row of a model card with the amount of training text."""
    parts = identity.get("mixture", [identity])
    if data.streaming:
        return {"tokens": "a stream"}
    share = "" if data.validation_split else f", the text's first {data.train_split:.0%}"
    return {"tokens": f"{sum(part['train_tokens'] for part in parts):,} to train on{share}"}


def describe(where: Path) -> tuple[BDHConfig, Path]:
    """The architecture of an export, a checkpoint or a run, and which folder it was read from. Raises BDHError."""
    run = (where / "checkpoints").is_dir() or where.name == "checkpoints" or (where / "state.json").is_file()
    if (where / "config.json").is_file() or not run:
        return read_config(where), where
    path = checkpoint.find_checkpoint(where, prefer="best")
    return checkpoint_config(path, checkpoint.read_state(path)), path
