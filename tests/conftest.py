"""What tests share: small models, a way to run `bdh` as a user would, and one small finished run."""

import atexit
import http.server
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="bdh-tests-")  # the caches of this process and those it starts
os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side on two cores
if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"  # kernels for GPUs run here too, slowly

import torch
from hypothesis import settings

atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
torch.set_num_threads(1)
settings.register_profile("suite", derandomize=True, deadline=None, database=None)
settings.load_profile("suite")

GOLDEN = Path(__file__).parent / "golden"

TINY = [
    *("--model.n_layer", "2", "--model.n_embd", "16", "--model.n_head", "2"),
    *("--model.mlp_internal_dim_multiplier", "8", "--data.block_size", "16"),
    *("--training.batch_size", "4", "--training.warmup_steps", "5", "--training.max_steps", "40"),
    *("--training.eval_interval", "20", "--training.eval_windows", "8", "--checkpoint.interval", "10"),
    *("--logging.interval", "5", "--logging.sample_interval", "20", "--logging.sample_tokens", "8"),
    *("--training.min_learning_rate", "1e-4", "--training.learning_rate", "3e-3"),
]

TEXT = "".join(f"The {n} small dragons hatch, and {n * n} large ones watch over line {n}.\n" for n in range(400))

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def environment(**changes: str) -> dict[str, str]:
    """A plain environment without the caller's BDH_ settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BDH_")}
    return {**kept, "COLUMNS": "200", **changes}


def run_bdh(
    *argv: object, cwd: Path, env: dict[str, str] | None = None, **options: object
) -> "subprocess.CompletedProcess[str]":
    """Runs `bdh` in a process of its own."""
    command = [sys.executable, "-m", "bdh", *map(str, argv)]
    given = {"text": True, **options}
    return subprocess.run(  # type: ignore[call-overload]
        command, cwd=cwd, env=env or environment(), capture_output=True, timeout=300, **given
    )


@pytest.fixture
def bdh(tmp_path: Path) -> Run:
    """Runs `bdh ARGS…` in the test's folder; returns the finished process."""

    def run(*argv: object, **options: object) -> "subprocess.CompletedProcess[str]":
        return run_bdh(*argv, **{"cwd": tmp_path, **options})  # type: ignore[arg-type]

    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny model to its end, made once by the real command. Do not change it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text(TEXT)
    done = run_bdh("train", "--data.path", "text.txt", "--run_dir", "run", *TINY, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A real HTTP server on the loopback over a folder; yields the folder and its address."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, directory=str(folder), **kwargs)  # type: ignore[arg-type]

        def log_message(self, format: str, *args: object) -> None:
            return None

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()
