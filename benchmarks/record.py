"""What every benchmark writes beside its figures: command, hardware, versions, date."""

import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import bdh

RESULTS = Path(__file__).parent / "results"


def circumstances() -> dict[str, Any]:
    """Where and how a measurement was taken."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "versions": {
            "bdh": bdh.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def processor() -> str:
    """The processor's name, as the system tells it."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def save(name: str, figures: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes `NAME.json` into a folder, whole or not at all: the circumstances and the figures."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**circumstances(), **figures}, indent=1) + "\n")
    partial.replace(path)
    return path


def visible(gpu: int) -> str:
    """What CUDA_VISIBLE_DEVICES has to be, that a process sees one of the GPUs that this one may use, and no other."""
    here = os.environ.get("CUDA_VISIBLE_DEVICES")
    return here.split(",")[gpu] if here else str(gpu)
