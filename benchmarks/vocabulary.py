"""Bytes against a BPE of 4096 tokens on the source of Python's library: the same model, the same time of training.

    python -m benchmarks.vocabulary [--seconds 120] [--config CONFIG]

Both are trained for as many steps as fit into the time, validation not counted; the measure is bits per byte of the
held-out part, which does not depend on the vocabulary.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from bdh.data.loader import read_text, training_texts
from bdh.data.settings import DataConfig
from bdh.data.tokenizer import load_tokenizer, save_tokenizer
from bdh.data.vocabulary import train_tokenizer
from bdh.training.config import CheckpointConfig, LoggingConfig, ModelConfig, TrainConfig, TrainingConfig
from bdh.training.loop import train
from bdh.training.run_log import read_metrics
from benchmarks.record import save

CORPUS = DataConfig(corpus="stdlib", block_size=512)
MODELS = {
    "default": (ModelConfig(), 32, True),
    "small": (ModelConfig(n_layer=3, n_embd=256, mlp_internal_dim_multiplier=16, dropout=0.0), 4, False),
}


def run(folder: Path, name: str, tokenizer: str | None, size: str, steps: int) -> tuple[Any, float, dict[str, Any]]:
    """A run of `steps` steps: how it ended, seconds of a step at its end, and its last line of figures."""
    model, batch, compiled = MODELS[size]
    config = TrainConfig(
        run_dir=str(folder / f"{name}-{steps}"),
        model=dataclasses.replace(model),
        data=dataclasses.replace(CORPUS, tokenizer=tokenizer, block_size=512 if size == "default" else 128),
        training=TrainingConfig(
            max_steps=steps, batch_size=batch, compile=compiled, warmup_steps=min(50, steps // 2), eval_interval=10**9,
            learning_rate=1e-3 if size == "default" else 2e-3, eval_windows=512,
        ),
        checkpoint=CheckpointConfig(interval=10**9),
        logging=LoggingConfig(interval=10, sample_interval=0),
    )  # fmt: skip
    outcome = train(config)
    records = [r for r in read_metrics(outcome.run_dir / "metrics.jsonl") if "loss" in r and "tokens_per_second" in r]
    return outcome, records[-1]["seconds_per_step"], records[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="of training for each vocabulary")
    parser.add_argument("--config", choices=list(MODELS), default="small", help="default is for a GPU")
    args = parser.parse_args()
    results: dict[str, Any] = {"seconds": args.seconds, "model": args.config}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_tokenizer(train_tokenizer("bpe", training_texts(CORPUS), 4096), folder / "bpe")
        for name, tokenizer in (("bytes", None), ("bpe 4096", str(folder / "bpe"))):
            _, tokens, size = read_text(CORPUS, load_tokenizer(tokenizer))
            _, step_seconds, _ = run(folder, f"try-{len(tokens)}", tokenizer, args.config, 40)
            outcome, _, last = run(
                folder, name.replace(" ", "-"), tokenizer, args.config, int(args.seconds / step_seconds)
            )
            assert outcome.evaluation is not None
            results[name] = {
                "held_out_bytes_per_token": size / len(tokens),
                "steps": outcome.step,
                "training_seconds": outcome.seconds,
                "tokens_per_second": last["tokens_per_second"],
                "validation_nats_per_token": outcome.evaluation.loss,
                "bits_per_byte": outcome.evaluation.bits_per_byte,
                "perplexity_per_byte": outcome.evaluation.perplexity_per_byte,
            }
    print(json.dumps(results, indent=1))
    save(f"vocabulary_{args.config}", results)


if __name__ == "__main__":
    main()
