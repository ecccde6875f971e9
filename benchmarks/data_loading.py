"""How fast text becomes batches, how much memory a stream takes, and what a cache saves.

    python -m benchmarks.data_loading [--megabytes 1000] [--only memory|speed]

memory  A gigabyte of generated JSON lines is streamed by two worker processes through a 32 k BPE beside a model:
        resident memory of all processes together (PSS: pages that processes share are counted once), sampled every
        second, above what the process held with the model alone before.
speed   The loader alone, packed and cached; tokenizing with a 32 k BPE; and a second start against the first.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from bdh.data.corpora import load_corpus
from bdh.data.loader import open_data
from bdh.data.settings import DataConfig
from bdh.data.tokenizer import load_tokenizer, save_tokenizer
from bdh.data.vocabulary import train_tokenizer
from benchmarks.record import save

VOCABULARY = 32768
WORDS_SEED = 7


def generate(file: Path, megabytes: int) -> None:
    """Documents of prose: the words of the Python manual and library in random order, 200 to 20,000 characters each."""
    words = sorted({word for name in ("pydoc", "stdlib") for text in load_corpus(name) for word in text.split()})
    draw = random.Random(WORDS_SEED)
    size = 0
    with file.open("w", encoding="utf-8") as stream:
        while size < megabytes * 1_000_000:
            text = " ".join(draw.choices(words, k=int(20 * 100 ** draw.random())))
            size += stream.write(json.dumps({"text": text, "id": size}) + "\n")


def resident() -> int:
    """Bytes of this process and its children; what they share is counted once."""
    mine = os.getpid()
    total = 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if int(entry.name) == mine or parent == mine:
                lines = (entry / "smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
        except (OSError, StopIteration):
            continue
    return total


def memory(file: Path, tokenizer_dir: Path) -> dict[str, Any]:
    """Streams a whole epoch, training forward and backward on a few of the batches."""
    import torch

    from bdh.model import BDHConfig, BDHForCausalLM

    tokenizer = load_tokenizer(str(tokenizer_dir))
    model = BDHForCausalLM(BDHConfig(n_layer=2, n_embd=64, mlp_internal_dim_multiplier=16, vocab_size=len(tokenizer)))
    tokens = torch.zeros(4, 128, dtype=torch.int64)
    model(tokens, labels=tokens).loss.backward()
    base = resident()
    samples: list[tuple[float, int]] = []
    done = threading.Event()
    started = time.monotonic()

    def watch() -> None:
        while not done.wait(1.0):
            samples.append((time.monotonic() - started, resident() - base))

    watcher = threading.Thread(target=watch)
    watcher.start()
    config = DataConfig(path=str(file), streaming=True, block_size=512, num_workers=2, tokenizer=str(tokenizer_dir))
    data = open_data(config, tokenizer, 32, seed=1)
    rows = 0
    source: Any = data.source
    while max(position["reader"]["epoch"] for position in source.positions) == 0:
        batch = data.next_batch()
        rows += len(batch.tokens)
        if rows % 3200 == 0:
            model(batch.tokens[:4, :128], labels=batch.tokens[:4, :128]).loss.backward()
            model.zero_grad(set_to_none=True)
    seconds = time.monotonic() - started
    done.set()
    watcher.join()
    data.close()
    warm = [size for _, size in samples[len(samples) // 10 :]]
    first, last = (sum(part) / max(len(part), 1) for part in (warm[: len(warm) // 2], warm[len(warm) // 2 :]))
    return {
        "megabytes": file.stat().st_size / 1e6,
        "seconds": seconds,
        "megabytes_per_second": file.stat().st_size / 1e6 / seconds,
        "tokens": rows * 512,
        "model_megabytes": base / 1e6,
        "peak_megabytes_above_model": max(size for _, size in samples) / 1e6,
        "mean_megabytes_first_half": first / 1e6,
        "mean_megabytes_second_half": last / 1e6,
        "samples": len(samples),
        "every_tenth_part_megabytes": [round(samples[i * (len(samples) - 1) // 10][1] / 1e6) for i in range(11)],
    }


START = """
import sys, time
started = time.perf_counter()
from bdh.data.loader import open_data
from bdh.data.settings import DataConfig
from bdh.data.tokenizer import load_tokenizer
tokenizer = load_tokenizer(sys.argv[2])
begun = time.perf_counter()
data = open_data(DataConfig(path=sys.argv[1], block_size=512), tokenizer, 32, seed=1)
prepared = time.perf_counter() - begun
for _ in range(20):
    data.next_batch()
begun = time.perf_counter()
steps = 2000
for _ in range(steps):
    data.next_batch()
print(prepared, steps * 32 * 512 / (time.perf_counter() - begun), data.train_tokens + len(data.validation))
"""


def speed(file: Path, tokenizer_dir: Path) -> dict[str, Any]:
    """Two starts of a fresh process on one corpus and one cache."""
    results = []
    with tempfile.TemporaryDirectory() as home:
        for _ in range(2):
            command = [sys.executable, "-c", START, str(file), str(tokenizer_dir)]
            done = subprocess.run(
                command, env={**os.environ, "HF_HOME": home}, capture_output=True, text=True, check=True
            )
            results.append([float(word) for word in done.stdout.split()])
    (first, loader, tokens), (second, cached_loader, _) = results
    tokenizer = load_tokenizer(str(tokenizer_dir))
    lines = file.read_text(encoding="utf-8").splitlines()[:4000]
    texts = [json.loads(line)["text"] for line in lines]
    from bdh.data.encoding import Encoder

    encoder, begun = Encoder(tokenizer), time.perf_counter()
    for i in range(0, len(texts), 200):
        encoder(texts[i : i + 200])
    encoding = time.perf_counter() - begun
    return {
        "megabytes": file.stat().st_size / 1e6,
        "tokens": tokens,
        "first_start_seconds": first,
        "second_start_seconds": second,
        "second_over_first": second / first,
        "prepared_megabytes_per_second": file.stat().st_size / 1e6 / first,
        "encoder_megabytes_per_second": sum(len(text.encode()) for text in texts) / 1e6 / encoding,
        "loader_tokens_per_second": loader,
        "loader_tokens_per_second_second_start": cached_loader,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="of generated text, for the stream")
    parser.add_argument("--only", choices=["memory", "speed"], default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        texts = [text for name in ("pydoc", "stdlib") for text in load_corpus(name)]
        save_tokenizer(train_tokenizer("bpe", texts, VOCABULARY), place / "tokenizer")
        if args.only != "speed":
            generate(place / "stream.jsonl", args.megabytes)
            result = memory(place / "stream.jsonl", place / "tokenizer")
            print(json.dumps(result, indent=1))
            save("data_memory", result)
        if args.only != "memory":
            generate(place / "corpus.jsonl", min(args.megabytes, 200))
            result = speed(place / "corpus.jsonl", place / "tokenizer")
            print(json.dumps(result, indent=1))
            save("data_speed", result)


if __name__ == "__main__":
    main()
