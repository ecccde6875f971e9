"""The example with transformers' `Trainer`, as it stands in the repository."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bdh.cli.main import main
from tests.conftest import TEXT, environment

EXAMPLE = Path(__file__).parents[2] / "examples" / "trainer.py"


def test_the_loss_falls_and_bdh_takes_the_export(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    options = ["--data", "text.txt", "--output", "out", "--steps", "30", "--block_size", "64"]
    command = [sys.executable, str(EXAMPLE), *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", done.stdout)]
    assert len(losses) == 10 and losses[-1] < losses[0] - 1.5
    assert "out is an export; try: bdh generate --model out" in done.stdout
    assert main(["generate", "--model", str(tmp_path / "out"), "--prompt", "The ", "--max_new_tokens", "5"]) == 0
    assert capfd.readouterr().out.strip()
