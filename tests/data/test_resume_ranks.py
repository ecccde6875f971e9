"""Processes that share a text are killed and go on: every one sees exactly the tokens it would have seen.

A launcher forks one process a rank; they form a gloo group, take batches, and save their positions together every few
steps. The launcher and all it started are killed at a random moment; another takes the positions up.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bdh.data.blocks import Share
from bdh.data.loader import open_data
from bdh.data.settings import DataConfig
from bdh.data.tokenizer import byte_tokenizer

STEPS = 60
KINDS = {"still": False, "streaming": True}

LAUNCHER = """
import json, multiprocessing, os, sys, time
import torch.distributed as dist
from bdh.data.blocks import Share
from bdh.data.loader import open_data
from bdh.data.settings import DataConfig
from bdh.data.tokenizer import byte_tokenizer

folder, world, steps, port = sys.argv[1], *map(int, sys.argv[2:5])

def work(rank):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo")
    share, tokenizer = Share(rank, world), byte_tokenizer()
    data = {}
    for kind, streaming in (("still", False), ("streaming", True)):
        config = DataConfig(
            path=f"{folder}/a.jsonl", streaming=streaming, block_size=16, num_workers=2, shuffle_blocks=8
        )
        data[kind] = open_data(config, tokenizer, 2 * world, seed=4, share=share)
    step = 0
    if os.path.exists(f"{folder}/saved.json"):
        saved = json.load(open(f"{folder}/saved.json"))
        step = saved["step"]
        for kind in data:
            data[kind].source.load_state_dict(saved["positions"][rank][kind])
    with open(f"{folder}/seen-{rank}.jsonl", "a") as seen:
        print(file=seen)  # ends a line that a kill tore
        while step < steps:
            rows = {kind: source.next_batch().tokens.tolist() for kind, source in data.items()}
            step += 1
            print(json.dumps([step, rows]), file=seen, flush=True)
            if step % 3 == 0:
                positions = [None] * world
                dist.all_gather_object(positions, {kind: source.source.state_dict() for kind, source in data.items()})
                if rank == 0:
                    with open(f"{folder}/saved.tmp", "w") as file:
                        json.dump({"step": step, "positions": positions}, file)
                    os.replace(f"{folder}/saved.tmp", f"{folder}/saved.json")
                dist.barrier()
            time.sleep(0.02)
    for source in data.values():
        source.close()
    dist.destroy_process_group()

if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=work, args=(rank,)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode) for process in ranks))
"""


def launch(folder: Path, world: int) -> "subprocess.Popen[str]":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", LAUNCHER, str(folder), str(world), str(STEPS), str(port)]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("world", [1, 4])
def test_every_rank_goes_on_exactly_after_a_kill(tmp_path: Path, world: int) -> None:
    texts = [f"Document {n}: " + " ".join(f"w{n * k % 89}" for k in range(n % 40)) for n in range(900)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    process = launch(tmp_path, world)
    chosen = random.Random(world).randrange(10, 40)
    log = tmp_path / "seen-0.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() or len(log.read_text().splitlines()) < chosen:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr and process.stderr.read()
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    saved = json.loads((tmp_path / "saved.json").read_text())["step"]
    assert 0 < saved < STEPS
    process = launch(tmp_path, world)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors

    for rank in range(world):
        lines = []
        for line in (tmp_path / f"seen-{rank}.jsonl").read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:  # empty, or torn by the kill
                continue
        steps = [step for step, _ in lines]
        assert steps[-1] == STEPS and saved + 1 in steps[: len(steps) - (STEPS - saved) + 1]
        for kind, streaming in KINDS.items():
            config = DataConfig(
                path=str(tmp_path / "a.jsonl"), streaming=streaming, block_size=16, num_workers=2, shuffle_blocks=8
            )
            data = open_data(config, byte_tokenizer(), 2 * world, seed=4, share=Share(rank, world))
            expected = [data.next_batch().tokens.tolist() for _ in range(STEPS)]
            data.close()
            assert all(rows[kind] == expected[step - 1] for step, rows in lines)
