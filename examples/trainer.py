"""Training with transformers' `Trainer`, for those who prefer it to `bdh train`.

A BDH model is a native transformers model, so nothing here is special to it; `bdh.data` only brings the text. Without
options a small model learns from Python's manual, which is on every machine, in less than a minute on two cores:

    pip install bdh accelerate
    python examples/trainer.py --output my-model
    bdh generate --model my-model --prompt "The "

Fine-tuning an export on conversations, with the loss on the answers:

    python examples/trainer.py --model my-base --data chat.jsonl --chat --output my-assistant
    bdh chat --model my-assistant
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from bdh import BDHConfig, BDHForCausalLM, load_export
from bdh.data.blocks import ValidationWindows
from bdh.data.loader import TrainingData, open_data
from bdh.data.settings import DataConfig
from bdh.data.tokenizer import load_tokenizer
from bdh.model.export import save_export
from bdh.model.model_card import model_card


def example(row: Tensor) -> dict[str, Tensor]:
    """A row of token ids as `forward` takes it, which shifts the labels itself; ~id is read and not predicted."""
    return {"input_ids": torch.where(row < 0, ~row, row), "labels": torch.where(row < 0, -100, row)}


class Rows(IterableDataset):
    """The rows of a text without an end, in a new order every epoch."""

    def __init__(self, data: TrainingData):
        self.data = data

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from map(example, self.data.next_batch().tokens)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a BDH model with transformers' Trainer.")
    parser.add_argument("--model", metavar="DIR", type=Path, help="an export to fine-tune; without it a new model")
    parser.add_argument("--data", metavar="PATH", help="any text that bdh train reads; without it Python's manual")
    parser.add_argument("--chat", action="store_true", help="the text is conversations; learn the answers")
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path("runs/trainer"), help="the export to write")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--block_size", type=int, default=128)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    if args.model is None:
        tokenizer = load_tokenizer("bytes")
        model = BDHForCausalLM(BDHConfig(n_layer=3, n_embd=128, mlp_internal_dim_multiplier=16, dropout=0.0))
    else:
        model, tokenizer = load_export(args.model)

    text = DataConfig(path=args.data, chat=args.chat, block_size=args.block_size)
    data = open_data(text, tokenizer, batch_size=8, seed=0, say=print)
    held_out = ValidationWindows(data.validation, args.block_size, limit=32)

    model.config.use_cache = False  # the state is for writing, and takes memory
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output.with_name(f"{args.output.name}-trainer")),
            max_steps=args.steps,
            per_device_train_batch_size=8,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 10,
            weight_decay=0.1,
            adam_beta2=0.95,
            logging_steps=max(args.steps // 10, 1),
            eval_steps=max(args.steps // 2, 1),
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
            eval_strategy="steps",
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Rows(data),
        eval_dataset=[example(row) for batch in held_out.batches(8) for row in batch],
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]

    model.config.use_cache = True
    card = model_card(args.output.name, model.config, [("Validation", {"loss": f"{loss:.4f} nats a token"})])
    save_export(model.cpu().eval(), tokenizer, args.output, card)
    print(f"{args.output} is an export; try: bdh generate --model {args.output} --prompt 'The '")


if __name__ == "__main__":
    main()
