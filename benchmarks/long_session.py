"""A session of many tokens: whether it is the same when it is saved and resumed, and whether quality holds to its end.

    python -m benchmarks.long_session --model runs/quickstart/model --corpus pydoc --tokens 10000

1. A session writes `tokens` tokens; another writes half of them, is saved, loaded into a new engine, and goes on.
2. Held-out text of the same length is read with carried state: the loss of the last 1000 tokens, and of the first 1000
   past the training block, the mean over windows that follow each other.

Writes results/long_session.json.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from bdh.data.corpora import load_corpus
from bdh.evaluation.by_position import read_in_pieces
from bdh.inference.llm import LLM
from bdh.inference.sampling_params import SamplingParams
from bdh.inference.session import Session
from bdh.model.export import load_export
from benchmarks.record import save

TURN = 500  # tokens that a session writes at a time
SPAN = 1000  # tokens whose losses are compared
HELD_OUT = 0.1  # share of the text, at its end, as in training


def write(session: Session, turns: range) -> str:
    """What a session writes in some turns, each with a seed of its own."""
    texts = []
    for turn in turns:
        params = SamplingParams(max_new_tokens=TURN, temperature=0.7, seed=turn, ignore_eos=True)
        texts.append("".join(delta.text for delta in session.write(params)))
        print(f"{session.position:,} tokens", flush=True)
    return "".join(texts)


def sessions(model: Path, tokens: int) -> dict[str, Any]:
    """An unbroken session, and one that is saved and resumed in another engine halfway."""
    turns = tokens // TURN
    llm = LLM(model)
    whole = llm.session()
    whole.read("The ")
    text = write(whole, range(turns))
    first = llm.session()
    first.read("The ")
    halves = write(first, range(turns // 2))
    with tempfile.TemporaryDirectory() as folder:
        first.save(Path(folder) / "session.safetensors")
        other = LLM(model)
        halves += write(other.load_session(Path(folder) / "session.safetensors"), range(turns // 2, turns))
    return {"tokens": turns * TURN, "same_text": text == halves, "characters": len(text), "end": text[-400:]}


def losses(model_path: Path, length: int, corpus: str) -> dict[str, Any]:
    """Nats per byte of the first tokens past the block and of the last ones, over windows of held-out text."""
    model, _ = load_export(model_path)
    block = model.config.training_block_size
    assert block is not None
    text = "".join(load_corpus(corpus)).encode()
    text = text[int(len(text) * (1 - HELD_OUT)) :]
    count = (len(text) - 1) // length
    ids = torch.tensor([list(text[i * length : (i + 1) * length + 1]) for i in range(count)])  # (B, length + 1)
    nats = torch.cat([piece.nats for piece in read_in_pieces(model.eval(), ids)], dim=1)  # (B, length)
    first, last = float(nats[:, block : block + SPAN].mean()), float(nats[:, -SPAN:].mean())
    return {"windows": count, "first_past_block": first, "last": last, "ratio": last / first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="an export with a vocabulary of bytes")
    parser.add_argument("--corpus", default="pydoc")
    parser.add_argument("--tokens", type=int, default=10_000)
    args = parser.parse_args()
    figures: dict[str, Any] = {"losses": losses(args.model, args.tokens, args.corpus)}
    print(figures, flush=True)
    figures["sessions"] = sessions(args.model, args.tokens)
    print(save("long_session", figures))


if __name__ == "__main__":
    main()
