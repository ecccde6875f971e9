"""`bdh quickstart` at full length: how long it trains and how well it ends.

    python -m benchmarks.quickstart

Runs the command in a new folder, as a user would, and writes results/quickstart.json with the seconds from the first
step to the last validation, the validation figures along the way, and the samples.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from bdh.training.run_log import read_metrics
from benchmarks.record import save


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bdh", "quickstart", *sys.argv[1:]]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
        print(done.stdout)
        records = read_metrics(Path(folder) / "runs" / "quickstart" / "metrics.jsonl")
    curve = [record for record in records if "validation_loss" in record]
    stepping = next(record["seconds"] for record in reversed(records) if "loss" in record)
    figures = {
        "training_seconds": stepping + sum(record["evaluation_seconds"] for record in curve),
        "tokens_per_second": records[-2]["tokens"] / stepping,
        "validation": curve,
        "samples": done.stdout.split("Three samples:\n")[1].split("Try next:")[0].splitlines(),
    }
    print(save("quickstart", figures))


if __name__ == "__main__":
    main()
