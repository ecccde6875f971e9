"""From a checkpoint to an export."""

from pathlib import Path
from typing import Any

from bdh.data.settings import DataConfig
from bdh.model import BDHConfig, BDHForCausalLM
from bdh.model.card import Section, model_card
from bdh.model.export import read_config, save_export
from bdh.training import checkpoint
from bdh.training.config import from_dict


def checkpoint_config(state: dict[str, Any]) -> BDHConfig:
    """The architecture recorded in a checkpoint's state."""
    return BDHConfig(**state["config"]["model"])


def load_model(path: Path) -> tuple[BDHForCausalLM, dict[str, Any]]:
    """The model of a checkpoint, in eval mode on the CPU, and the checkpoint's state."""
    state = checkpoint.read_state(path)
    model = BDHForCausalLM(checkpoint_config(state))
    checkpoint.load_weights(path, model)
    return model.eval(), state


def export_checkpoint(path: Path, directory: Path) -> None:
    """Writes the export of a checkpoint, with a card that tells how it was trained. Raises BDHError."""
    model, state = load_model(path)
    name = f"{Path(state['config']['run_dir']).name} at step {state['step']}"
    save_export(
        model, checkpoint.tokenizer_of(path), directory, model_card(name, model.config, training_sections(state))
    )


def training_sections(state: dict[str, Any]) -> list[Section]:
    """What the card of a checkpoint tells of its data, training and validation."""
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
                },
            )
        )
    return sections


def text_name(data: DataConfig) -> str:
    """What a text is called, without where it lay on the disk."""
    names = [f"{_last_part(source.path)} {source.config or ''}".strip() for source in data.sources()]
    weights = [f" (weight {source.weight:g})" if data.mixture else "" for source in data.sources()]
    return ", ".join(map("".join, zip(names, weights, strict=True))) or data.corpus


def _last_part(path: str) -> str:
    return Path(path).name if Path(path).is_absolute() else path


def tokens_row(identity: dict[str, Any], data: DataConfig) -> dict[str, str]:
    """How much of a text there was to train on."""
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
    return checkpoint_config(checkpoint.read_state(path)), path
