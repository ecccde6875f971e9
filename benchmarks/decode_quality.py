"""What fewer bits cost in quality: the validation loss of a model as the engine's runner decodes it.

    python -m benchmarks.decode_quality --model runs/quickstart/model [--text FILE] [--tokens 512]

Every token is read by `Runner.decode`, as in writing, and the next one of the text is scored: eight stretches of its
last tenth (of pydoc: `bdh quickstart` does not train on it) at once. The plain model's loss on the same tokens, in
float32, stands beside. Writes results/decode_quality.json.
"""

import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bdh.data.corpora import pydoc
from bdh.inference.runner import make_runner
from bdh.model import BDHForCausalLM
from bdh.model.export import load_export
from benchmarks.decode_speed import SETTINGS
from benchmarks.record import save

ROWS = 8


@torch.inference_mode()
def decoded(model: BDHForCausalLM, tokens: Tensor, dtype: str, quantization: str | None) -> Tensor:
    """The logits (ROWS, T, V) after each of some tokens (ROWS, T), token by token."""
    runner = make_runner(copy.deepcopy(model), ROWS, dtype, quantization)
    return torch.stack([runner.decode(range(ROWS), column.tolist()) for column in tokens.T], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="an export, of `bdh quickstart` or of any text")
    parser.add_argument("--text", type=Path, help="a text whose last tenth the model has not seen; default: pydoc")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of each of the eight stretches")
    args = parser.parse_args()
    model, tokenizer = load_export(args.model)
    text = args.text.read_text(encoding="utf-8") if args.text else "\n\n".join(pydoc())
    held_out = torch.tensor(tokenizer(text[int(0.9 * len(text)) :], add_special_tokens=False).input_ids)
    stretches = held_out[: len(held_out) // ROWS * ROWS].view(ROWS, -1)[:, : args.tokens + 1]  # (ROWS, T + 1)
    tokens, targets = stretches[:, :-1], stretches[:, 1:].flatten()
    with torch.inference_mode():
        plain = model(tokens).logits  # (ROWS, T, V)
    expected = float(F.cross_entropy(plain.flatten(0, 1), targets))
    figures = {
        "model": f"{model.num_parameters()} parameters",
        "tokens": tokens.numel(),
        "plain_float32_loss": expected,
    }
    print(f"the plain model, float32: loss {expected:.4f} nats")
    for name, (dtype, quantization) in SETTINGS.items():
        logits = decoded(model, tokens, dtype, quantization)
        loss = float(F.cross_entropy(logits.flatten(0, 1), targets))
        same = float((logits.argmax(-1) == plain.argmax(-1)).float().mean())
        figures[name] = {"loss": loss, "over_plain": loss / expected, "same_likeliest_token": same}
        print(f"{name}: loss {loss:.4f}, {loss / expected:.5f} of it, the same likeliest token {same:.2%}", flush=True)
    print(save("decode_quality", figures))


if __name__ == "__main__":
    main()
