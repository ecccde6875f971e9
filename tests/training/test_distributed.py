"""One run in one, two and four processes, however they share it: the same losses, and checkpoints that fit anywhere."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bdh.distributed.config import DistributedConfig
from bdh.distributed.processes import mesh_shape
from bdh.errors import BDHError
from bdh.model.export import load_model_only
from bdh.training.run_log import read_metrics
from tests.conftest import TEXT, run_bdh
from tests.training.launching import SMALL, figures, surroundings, torchrun, train_all, validations

FSDP = ("--distributed.strategy", "fsdp")
HEADS = ("--distributed.tensor_parallel", "2")
LAYOUTS = {
    "ddp2": (2, ()),
    "ddp4": (4, ("--training.micro_batch_size", "1")),
    "fsdp2": (2, FSDP),
    "heads2": (2, HEADS),
}
MORE_LAYOUTS = {
    "fsdp4": (4, (*FSDP, "--training.micro_batch_size", "1")),
    "hsdp": (4, (*FSDP, "--distributed.shards", "2")),
    "offload": (2, (*FSDP, "--distributed.cpu_offload", "true")),
    "heads4": (4, ("--distributed.tensor_parallel", "4")),
    "both": (4, (*FSDP, *HEADS)),
}
# The same of a model whose synapses decay and are written by the delta rule; of two heads, fewer than some processes.
GATED = (
    *("--model.decay", "gated", "--model.write", "delta", "--model.n_head", "2", "--training.max_steps", "20"),
    *("--training.seed", "2"),  # with others, a neuron at its threshold makes one process differ from two
)
GATED_LAYOUTS = {"gated ddp2": (2, ()), "gated fsdp2": (2, FSDP), "gated heads2": (2, HEADS)}
MORE_GATED_LAYOUTS = {"gated fsdp4": (4, FSDP), "gated both": (4, (*FSDP, *HEADS))}
ONE = ("--distributed.strategy", "ddp", "--distributed.tensor_parallel", "1")
GATED_GONE_ON = {"gated two": ("gated heads2", 2, (*ONE, *FSDP)), "gated one": ("gated fsdp2", 1, ONE)}
MORE_GATED_GONE_ON = {"gated 4": ("gated alone", 4, FSDP), "gated apart": ("gated both", 2, (*ONE, *HEADS))}
Continued = dict[str, tuple[str, int, int, tuple[str, ...]]]  # from which run's step, in how many processes
GONE_ON: Continued = {
    "one": ("ddp4", 20, 1, ()),
    "two": ("one", 40, 2, FSDP),
    "copies": ("heads2", 20, 2, ("--distributed.tensor_parallel", "1")),
}
MORE_GONE_ON: Continued = {
    "alone2": ("fsdp4", 20, 1, ("--distributed.strategy", "ddp")),
    "heads": ("hsdp", 20, 2, ("--distributed.strategy", "ddp", "--distributed.shards", "null", *HEADS)),
    "fewer": ("both", 40, 1, ("--distributed.strategy", "ddp", "--distributed.tensor_parallel", "1")),
}
CHATS = ("chat", "chats")

# In these a sum comes out otherwise by a last digit just where a neuron begins to fire.
LOOSE = {"heads4": 3e-5, "both": 3e-5, "fewer": 3e-5}


def train_in(
    folder: Path, layouts: dict[str, tuple[int, tuple[str, ...]]], gone_on: Continued, more: list[tuple[int, list[str]]]
) -> None:
    """Makes runs of their names, beside one that a single process has made."""
    (folder / "text.txt").write_text(TEXT)
    begin = ["--data.path", "text.txt", *SMALL]
    jobs: list[tuple[int, list[str]]] = [(1, [*begin, "--run_dir", "alone"])]
    for name, (processes, settings) in layouts.items():
        jobs.append((processes, [*begin, "--run_dir", name, *settings]))
    for name, (whence, step, processes, settings) in gone_on.items():
        place = f"{whence}/checkpoints/checkpoint-{step:07d}"
        jobs.append((processes, ["--resume", place, "--run_dir", name, *settings]))
    (folder / "log").write_text(train_all([*jobs, *more], folder))


def gated_jobs(layouts: dict[str, Any], gone_on: dict[str, Any]) -> list[tuple[int, list[str]]]:
    """Runs of a model with gates, the one of a single process first, and those that went on from their step 10."""
    begin = ["--data.path", "text.txt", *SMALL, *GATED, "--checkpoint.interval", "10"]
    jobs = [(1, [*begin, "--run_dir", "gated alone"])]
    jobs += [(processes, [*begin, "--run_dir", name, *settings]) for name, (processes, settings) in layouts.items()]
    for name, (whence, processes, settings) in gone_on.items():
        place = f"{whence}/checkpoints/checkpoint-0000010"
        jobs.append((processes, ["--resume", place, "--run_dir", name, *settings]))
    return jobs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of the usual layouts, whole ones and those that went on from them."""
    folder = tmp_path_factory.mktemp("runs")
    done = run_bdh("tokenizer", "train", "--kind", "bytes", "--output", "vocabulary", cwd=folder)
    assert done.returncode == 0, done.stderr
    said = [(f"What is {n} and {n}?", f"{2 * n}" + ", of course" * (n % 3)) for n in range(200)]
    turns = [[{"role": "user", "content": one}, {"role": "assistant", "content": other}] for one, other in said]
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    chat = ["--data.path", "chat.jsonl", "--data.chat", "true", "--data.tokenizer", "vocabulary", *SMALL]
    chat += ["--data.block_size", "64", "--training.max_steps", "20"]
    adapters = ["--data.path", "text.txt", *SMALL, "--init_from", "alone/model", "--lora.rank", "4"]
    adapters += ["--training.max_steps", "20", "--logging.sample_interval", "0"]
    muon = ["--data.path", "text.txt", *SMALL, "--training.optimizer", "muon", "--training.max_steps", "20"]
    jobs = [
        (1, [*chat, "--run_dir", "chat"]),
        (2, [*chat, "--run_dir", "chats", "--training.micro_batch_size", "2"]),
        (1, [*adapters, "--run_dir", "adapters"]),
        (2, [*adapters, "--run_dir", "spread adapters", *FSDP]),
        (1, [*muon, "--run_dir", "muon"]),
        (2, [*muon, "--run_dir", "muons", "--training.micro_batch_size", "2"]),
    ]
    train_in(folder, LAYOUTS, GONE_ON, [*jobs, *gated_jobs(GATED_LAYOUTS, GATED_GONE_ON)])
    return folder


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The others, and runs that carry a state."""
    folder = tmp_path_factory.mktemp("more")
    done = run_bdh("tokenizer", "train", "--kind", "bytes", "--output", "vocabulary", cwd=folder)
    assert done.returncode == 0, done.stderr
    carried = ["--data.path", "text.txt", *SMALL, "--training.carry_state", "true", "--data.tokenizer", "vocabulary"]
    carried += ["--checkpoint.interval", "10", "--training.max_steps", "20"]
    jobs = [
        (1, [*carried, "--run_dir", "memory"]),
        (2, [*carried, "--run_dir", "memories", *HEADS]),
        (2, ["--resume", "memories/checkpoints/checkpoint-0000010", "--run_dir", "memory2", HEADS[0], "1"]),
    ]
    train_in(folder, MORE_LAYOUTS, MORE_GONE_ON, [*jobs, *gated_jobs(MORE_GATED_LAYOUTS, MORE_GATED_GONE_ON)])
    return folder


def close(run: Path, other: Path, bound: float = 1e-5) -> int:
    """Asserts that two runs have the same figures, at the steps that the first one has; how many these are."""
    ours, theirs = figures(run), figures(other)
    assert ours and all(abs(loss - theirs[step][0]) < bound for step, (loss, _) in ours.items())
    assert all(abs(norm - theirs[step][1]) < 1e-2 for step, (_, norm) in ours.items())
    valid, others = validations(run), validations(other)
    both = valid.keys() & others.keys()
    assert both and all(abs(valid[step] - others[step]) < 3 * bound for step in both)
    return len(ours)


@pytest.mark.parametrize("name", LAYOUTS)
def test_how_many_share_a_run_does_not_show_in_its_losses(runs: Path, name: str) -> None:
    assert close(runs / name, runs / "alone") == 50


@pytest.mark.parametrize("name", GONE_ON)
def test_a_checkpoint_goes_on_in_any_other_layout(runs: Path, name: str) -> None:
    assert close(runs / name, runs / "alone") == 50 - GONE_ON[name][1]


@pytest.mark.parametrize("name", [*GATED_LAYOUTS, *GATED_GONE_ON])
def test_gates_are_shared_in_any_layout(runs: Path, name: str) -> None:
    assert close(runs / name, runs / "gated alone") == (20 if name in GATED_LAYOUTS else 10)
    gates = [
        {key: p for key, p in load_model_only(runs / run / "model").state_dict().items() if ".gates." in key}
        for run in (name, "gated alone")
    ]
    assert len(gates[1]) == 5 and all(torch.allclose(gates[0][key], p, atol=1e-5) for key, p in gates[1].items())


def test_large_matrices_are_sharded_head_by_head_and_files_do_not_show_it(runs: Path, tmp_path: Path) -> None:
    shard_all = "import bdh.distributed.parallel\nbdh.distributed.parallel.LARGE = 0\n"
    begin = ["--data.path", str(runs / "text.txt"), *SMALL]
    figured = ["--logging.parameter_interval", "10", "--run_dir"]
    train_all([(2, [*begin, *FSDP, *figured, "pieces"])], tmp_path, shard_all)
    alone = ["--resume", "pieces/checkpoints/checkpoint-0000040", "--distributed.strategy", "ddp"]
    train_all([(1, [*alone, *figured, "put together"])], tmp_path)
    # Sums over heads come out otherwise by a last digit, as where processes share them.
    assert close(tmp_path / "pieces", runs / "alone", 3e-5) == 50
    assert close(tmp_path / "put together", tmp_path / "pieces", 3e-5) == 10
    norms = [read_norms(tmp_path / name) for name in ("pieces", "put together")]
    assert norms[0].keys() == norms[1].keys() and "parameter_norm/model.layer.encoder.weight" in norms[0]
    assert all(abs(norms[1][name] - norm) < 1e-4 * max(1.0, norm) for name, norm in norms[0].items())
    files = [run / "checkpoints/checkpoint-0000040" for run in (tmp_path / "pieces", runs / "alone")]
    names = [{name for file in path.glob("*.safetensors") for name in load_file(file)} for path in files]
    assert names[0] == names[1]


def read_norms(run: Path) -> dict[str, float]:
    """Norms by parameter at the 50th step."""
    record = next(one for one in read_metrics(run / "metrics.jsonl") if one["step"] == 50 and "parameter_norm" in one)
    return {name: value for name, value in record.items() if name.startswith(("parameter_norm", "gradient_norm/"))}


def test_answers_of_chats_count_the_same_however_they_are_shared(runs: Path) -> None:
    assert close(runs / "chats", runs / "chat") == 20
    answers = [[one.get("answer_tokens") for one in read_metrics(runs / name / "metrics.jsonl")] for name in CHATS]
    assert answers[0] == answers[1] and len({*answers[0]}) > 5


def test_adapters_are_shared_too(runs: Path) -> None:
    assert close(runs / "spread adapters", runs / "adapters") == 20


def test_copies_that_follow_muon_are_one_run(runs: Path) -> None:
    # Muon multiplies in bfloat16, where a gradient's last digit of float32 can become one of bfloat16.
    assert close(runs / "muons", runs / "muon", 2e-4) == 20


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_LAYOUTS)
def test_nor_does_it_in_other_layouts(more_runs: Path, name: str) -> None:
    assert close(more_runs / name, more_runs / "alone", LOOSE.get(name, 1e-5)) == 50


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MORE_GATED_LAYOUTS, *MORE_GATED_GONE_ON])
def test_gates_are_shared_in_other_layouts(more_runs: Path, name: str) -> None:
    assert close(more_runs / name, more_runs / "gated alone") == (20 if name in MORE_GATED_LAYOUTS else 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_GONE_ON)
def test_nor_in_checkpoints_of_these(more_runs: Path, name: str) -> None:
    assert close(more_runs / name, more_runs / "alone", LOOSE.get(name, 1e-5)) == 50 - MORE_GONE_ON[name][1]


@pytest.mark.slow
def test_a_carried_state_is_shared_and_goes_on_too(more_runs: Path) -> None:
    assert close(more_runs / "memories", more_runs / "memory") == 20
    assert close(more_runs / "memory2", more_runs / "memory") == 10


def test_all_processes_write_checkpoints_and_one_of_them_all_else(runs: Path) -> None:
    for name, count in (("fsdp2", 2), ("ddp4", 4)):
        shards = sorted((runs / name / "checkpoints" / "latest").glob("*.safetensors"))
        assert len(shards) == count and all(load_file(shard) for shard in shards)
    for name in LAYOUTS:
        log = (runs / "log").read_text()
        assert log.count(f", into {name}\n") == 1  # said once, and not by each
        samples = (runs / name / "samples.md").read_text()
        assert samples == (runs / "alone" / "samples.md").read_text() and samples.count("## Step") == 2
        exported, alone = (load_model_only(runs / run / "model").state_dict() for run in (name, "alone"))
        assert exported.keys() == alone.keys()
        assert all(torch.allclose(exported[key], alone[key], atol=2e-3) for key in alone)


@pytest.mark.parametrize(
    ("settings", "size", "shape"),
    [
        ({}, 6, (6, 1, 1)),
        ({"strategy": "fsdp"}, 6, (1, 6, 1)),
        ({"strategy": "fsdp", "shards": 2}, 6, (3, 2, 1)),
        ({"tensor_parallel": 3}, 3, (1, 1, 3)),
        ({"strategy": "fsdp", "tensor_parallel": 2, "shards": 2}, 8, (2, 2, 2)),
        ({"tensor_parallel": 4}, 6, "tensor_parallel is 4; it must divide the 6 processes"),
        ({"tensor_parallel": 2}, 4, "leaves 2 copies, which distributed.strategy ddp cannot keep equal; choose fsdp"),
        ({"strategy": "fsdp", "shards": 4}, 6, "shards is 4; it must divide the 6 processes that share the rows"),
    ],
)
def test_how_processes_are_arranged(settings: dict[str, object], size: int, shape: object) -> None:
    config = DistributedConfig(**settings)  # type: ignore[arg-type]
    if isinstance(shape, str):
        with pytest.raises(BDHError, match=re.escape(shape)):
            mesh_shape(config, size)
    else:
        assert mesh_shape(config, size) == shape


def workers(launcher: int) -> list[int]:
    """The processes that torchrun has started and that train."""
    found = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(pid) for pid in found if b"bdh" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_worker_that_is_killed_is_begun_again_and_the_run_ends_as_if_nothing_had_happened(
    runs: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    argv = ["--data.path", "text.txt", *SMALL, "--run_dir", "run", "--checkpoint.interval", "5"]
    log = tmp_path / "log"
    with log.open("w") as file:
        command = torchrun(2, *argv, options=["--max-restarts=2"])
        process = subprocess.Popen(command, cwd=tmp_path, env=surroundings(), stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 90
        while not (tmp_path / "run" / "checkpoints" / "latest").exists():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.005)
        os.kill(workers(process.pid)[1], signal.SIGKILL)
        assert process.wait(90) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert "going on from step" in log.read_text()
    assert close(tmp_path / "run", runs / "alone") == 50


def test_who_fails_says_so_first_and_takes_the_others_along(tmp_path: Path) -> None:
    """One of two processes finds its text gone when it is to read it."""
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "fail.py").write_text(
        "import os, sys, time\n"
        "from bdh.cli.main import main\n"
        "from bdh.errors import BDHError\n"
        "import bdh.training.loop as loop\n"
        "step = loop.Trainer.step\n"
        "def failing(self):\n"
        "    if self.state.step == 5 and os.environ['RANK'] == '1':\n"
        "        raise BDHError('the disk of this machine is gone')\n"
        "    step(self)\n"
        "loop.Trainer.step = failing\n"
        "sys.exit(main(['train', *sys.argv[1:]]))\n"
    )
    command = torchrun(2, "--data.path", "text.txt", *SMALL, "--run_dir", "run")
    at = command.index("-m", 3)
    command[at : at + 3] = ["fail.py"]
    began = time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, env=surroundings(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and time.monotonic() - began < 60
    said = [line for line in done.stderr.splitlines() if line.startswith("bdh train: error:")]
    assert said[0] == "bdh train: error: process 1: the disk of this machine is gone"
    assert all("the other 1 processes are lost" in line for line in said[1:])
    assert "[rank" not in done.stderr  # no tracebacks of workers
