"""Kills, signals, damage: a run goes on as if nothing had happened."""

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bdh.cli.main import main
from bdh.data.tokenizer import save_tokenizer
from bdh.data.vocabulary import train_tokenizer
from bdh.training.checkpoint import CheckpointStore, find_checkpoint
from bdh.training.config import TrainConfig
from bdh.training.loop import Trainer
from bdh.training.run_folder import RunFolder, is_run
from bdh.training.run_log import read_metrics
from tests.conftest import TEXT, TINY, Run, environment, run_bdh
from tests.training.test_loop import assert_same_end, weights

STEPS = 400
SETTINGS = [
    *TINY,
    *("--training.max_steps", str(STEPS), "--checkpoint.interval", "7", "--training.eval_interval", "30"),
    *("--training.micro_batch_size", "2", "--logging.sample_interval", "50", "--model.dropout", "0.2"),
    *("--logging.interval", "3"),
]


def start(folder: Path, *argv: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "bdh", "train", *map(str, argv)]
    return subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "text.txt").write_text(TEXT)
    process = start(folder, "--data.path", "text.txt", "--run_dir", "run", *SETTINGS)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return folder / "run"


def wait_until(process: "subprocess.Popen[str]", run: Path, step: int) -> bool:
    """Waits until a run has logged `step`; False if it ended before."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        records = read_metrics(run / "metrics.jsonl")
        if records and records[-1]["step"] >= step:
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    raise AssertionError(f"step {step} did not come")


def test_ten_kills_at_random_moments_change_no_bit(tmp_path: Path, undisturbed: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    run, kills, moments = tmp_path / "run", 0, random.Random(20261122)
    arguments: list[object] = ["--data.path", "text.txt", "--run_dir", "run", *SETTINGS]
    while kills < 10:
        process = start(tmp_path, *arguments)
        target = moments.randint(STEPS * kills // 11 + 1, STEPS * (kills + 1) // 11)
        assert wait_until(process, run, target), process.communicate()[0]
        time.sleep(moments.uniform(0, 0.05))  # anywhere: in a step, in an evaluation, in the middle of a checkpoint
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL, "it ended before the kill"
        kills += 1
        if (run / "checkpoints").is_dir() and any((run / "checkpoints").glob("checkpoint-*/manifest.json")):
            arguments = ["--resume", "run"]
    process = start(tmp_path, *arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert re.search(r"going on from step \d+ of 400", output)
    assert_same_end(undisturbed, run)


def test_a_kill_while_streaming_changes_no_bit(tmp_path: Path) -> None:
    """With processes that read, dropout, and a state that is carried: all of it goes on as if nothing had happened."""
    save_tokenizer(train_tokenizer("bytes", (), 0), tmp_path / "tokenizer")
    lines = [json.dumps({"text": line * (1 + n % 7)}) for n, line in enumerate(TEXT.splitlines())]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    settings = [*SETTINGS, "--training.max_steps", "120", "--data.tokenizer", "tokenizer", "--data.path", "a.jsonl"]
    settings += ["--data.streaming", "true", "--data.shuffle_blocks", "8"]
    for carry in ("false", "true"):
        given = [*settings, "--training.carry_state", carry]
        process = start(tmp_path, *given, "--run_dir", f"whole-{carry}")
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        run = tmp_path / f"killed-{carry}"
        process = start(tmp_path, *given, "--run_dir", run.name)
        assert wait_until(process, run, 60)
        process.kill()
        process.wait()
        process = start(tmp_path, "--resume", run.name)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0 and "going on from step" in output, output
        assert "from its beginning" not in output
        assert_same_end(tmp_path / f"whole-{carry}", run)


def test_muon_goes_on_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while it is warming up and taken up again, with dropout, accumulation and clipping."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    given = ["train", "--data.path", "text.txt", *TINY, "--training.optimizer", "muon", "--model.dropout", "0.2"]
    given += ["--training.micro_batch_size", "2", "--training.gradient_clip", "0.1"]
    assert main([*given, "--run_dir", "whole"]) == 0
    step = Trainer.step

    def stopping(run: Trainer) -> None:
        step(run)
        if run.state.step == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopping)
        assert main([*given, "--run_dir", "stopped"]) == 128 + signal.SIGINT
    assert find_checkpoint(tmp_path / "stopped").name == "checkpoint-0000003"
    assert main(["train", "--resume", "stopped"]) == 0
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")
    kept = weights(find_checkpoint(tmp_path / "whole"))
    of_layer = [name for name in kept if name.startswith("optimizer.state.model.layer.")]
    of_gates = {name for name in of_layer if ".gates." in name}
    assert {name.split(".")[-1] for name in set(of_layer) - of_gates} == {"momentum_buffer"}
    assert {name.split(".")[-1] for name in of_gates} == {"exp_avg", "exp_avg_sq", "step"}  # which AdamW steps
    assert "optimizer.state.lm_head.weight.exp_avg" in kept


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_finish_the_step_save_and_say_how_to_go_on(
    tmp_path: Path, undisturbed: Path, number: signal.Signals
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    run = tmp_path / "run"
    process = start(tmp_path, "--data.path", "text.txt", "--run_dir", "run", *SETTINGS)
    assert wait_until(process, run, 100)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in output
    match = re.search(
        rf"stopped by {number.name}, saved at step (\d+) of 400; go on with: bdh train --resume run", output
    )
    assert match and find_checkpoint(run).name == f"checkpoint-{int(match[1]):07d}"
    assert (run / "loss.png").exists()

    process = start(tmp_path, "--resume", "run")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and f"going on from step {match[1]} of 400" in output
    assert_same_end(undisturbed, run)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path: Path, finished_run: Path, bdh: Run) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run, symlinks=True)
    (tmp_path / "text.txt").write_text(TEXT)
    newest = find_checkpoint(run)
    shard = next(newest.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size // 2)
    done = bdh("train", "--resume", "run")
    assert done.returncode == 0, done.stderr
    assert "notice: run/checkpoints/checkpoint-0000040 is damaged: " in done.stdout
    assert "going on from step 30 of 40" in done.stdout
    assert_same_end(finished_run, run)


def test_an_older_checkpoint_can_be_taken_up_and_later_ones_are_set_aside(
    tmp_path: Path, finished_run: Path, bdh: Run
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run, symlinks=True)
    (tmp_path / "text.txt").write_text(TEXT)
    done = bdh("train", "--resume", "run/checkpoints/checkpoint-0000030")
    assert done.returncode == 0, done.stderr
    assert "the later checkpoint is now" in done.stdout
    assert (run / "checkpoints" / "superseded-0-checkpoint-0000040").is_dir()
    assert_same_end(finished_run, run)


def test_a_run_can_be_lengthened_and_says_what_changed(tmp_path: Path, finished_run: Path, bdh: Run) -> None:
    done = bdh(
        *("train", "--resume", finished_run / "checkpoints" / "latest", "--run_dir", tmp_path / "longer"),
        *("--training.max_steps", 50, "--training.learning_rate", 1e-3),
        cwd=finished_run.parent,
    )
    assert done.returncode == 0, done.stderr
    assert "notice: training.max_steps was 40 and is now 50" in done.stdout
    assert "notice: training.learning_rate was 0.003 and is now 0.001" in done.stdout
    assert "going on from step 40 of 50" in done.stdout
    assert find_checkpoint(tmp_path / "longer").name == "checkpoint-0000050"
    assert find_checkpoint(finished_run).name == "checkpoint-0000040"


def test_another_text_is_noticed(tmp_path: Path, finished_run: Path, bdh: Run) -> None:
    (tmp_path / "other.txt").write_text(TEXT.upper())
    done = bdh(
        *("train", "--resume", finished_run, "--run_dir", tmp_path / "other", "--training.max_steps", 45),
        *("--data.path", tmp_path / "other.txt"),
        cwd=finished_run.parent,
    )
    assert done.returncode == 0, done.stderr
    assert "notice: the text is not the one the checkpoint was trained on" in done.stdout


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, finished_run: Path, bdh: Run) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run, symlinks=True)
    (tmp_path / "text.txt").write_text(TEXT)
    done = bdh("train", "--run_dir", "run", "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_end(finished_run, run)


def copy_of(finished_run: Path, folder: Path) -> Path:
    """A run of one's own to spoil, with the text it was trained on beside it."""
    (folder / "text.txt").write_text(TEXT)
    return Path(shutil.copytree(finished_run, folder / "run", symlinks=True))


def test_auto_begins_and_goes_on_and_reads_a_checkpoint_once_to_check_it(
    tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    checked: list[str] = []
    digest = hashlib.file_digest

    def counted(file: Any, kind: str) -> Any:
        checked.append("/".join(Path(file.name).parts[-2:]))
        return digest(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    copy_of(finished_run, tmp_path)
    assert main(["train", "--resume", "auto", "--run_dir", "run", "--training.max_steps", "41"]) == 0
    assert "going on from step 40 of 41" in capfd.readouterr().out
    before = list(itertools.takewhile(lambda name: not name.startswith(".partial"), checked))
    assert len(before) == len({*before}) > 2 and all(name.startswith("checkpoint-0000040/") for name in before)
    shard = next((tmp_path / "run" / "checkpoints" / "checkpoint-0000041").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert main(["train", "--resume", "auto", "--run_dir", "run", "--training.max_steps", "42"]) == 0
    told = capfd.readouterr().out
    assert "notice: run/checkpoints/checkpoint-0000041 is damaged: " in told and "going on from step 40 of 42" in told
    begin = ["--data.path", "text.txt", *TINY, "--training.max_steps", "5", "--training.eval_interval", "5"]
    assert main(["train", "--resume", "auto", "--run_dir", "new", *begin]) == 0
    assert (tmp_path / "new" / "model" / "config.json").is_file()


def test_a_moved_run_goes_on_where_it_lies_and_from_any_folder(tmp_path: Path, finished_run: Path, bdh: Run) -> None:
    copy_of(finished_run, tmp_path)
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to("../moved")
    longer = ["--training.max_steps", 45]
    assert bdh("train", "--resume", "../moved", *longer, cwd=tmp_path / "elsewhere").returncode == 0
    assert find_checkpoint(tmp_path / "moved").name == "checkpoint-0000045"
    inside = bdh(
        "train", "--resume", "checkpoint-0000045", "--training.max_steps", 47, cwd=tmp_path / "moved" / "checkpoints"
    )
    assert inside.returncode == 0, inside.stderr
    assert find_checkpoint(tmp_path / "elsewhere" / "link").name == "checkpoint-0000047"
    done = bdh("export", "link", "exported", cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    shown = bdh("train", "--resume", "moved", "--print_config")
    assert "n_embd: 16" in shown.stdout and "max_steps: 47" in shown.stdout


def test_a_checkpoint_outside_of_a_run_needs_a_folder_for_the_new_one(
    tmp_path: Path, finished_run: Path, bdh: Run
) -> None:
    shutil.copytree(find_checkpoint(finished_run), tmp_path / "o" / "out" / "checkpoint-0000040")
    done = bdh("train", "--resume", "o/out/checkpoint-0000040")
    assert done.returncode == 2 and "lies in no run; name a folder" in done.stderr
    done = bdh("train", "--resume", "o/out/checkpoint-0000040", "--run_dir", "new", "--training.max_steps", 42)
    assert done.returncode == 0 and find_checkpoint(tmp_path / "new").name == "checkpoint-0000042"


def test_two_runs_never_mix(tmp_path: Path, finished_run: Path, bdh: Run) -> None:
    run = copy_of(finished_run, tmp_path)
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    done = bdh("train", "--resume", finished_run, "--run_dir", "run", "--training.max_steps", 50)
    assert done.returncode == 2 and "run_dir run already holds a run" in done.stderr
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before
    assert (run / "metrics.jsonl").read_text() == (finished_run / "metrics.jsonl").read_text()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    first = start(tmp_path, "--data.path", "text.txt", "--run_dir", "run", *SETTINGS, "--training.max_steps", "100000")
    try:
        assert wait_until(first, tmp_path / "run", 20)
        second = start(tmp_path, "--resume", "run")
        output, _ = second.communicate(timeout=60)
        assert second.returncode == 2 and "run_dir run is in use by another process" in output
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()


def test_a_best_checkpoint_that_is_gone_is_not_claimed(tmp_path: Path, finished_run: Path, bdh: Run) -> None:
    run = copy_of(finished_run, tmp_path)
    shutil.rmtree(run / "checkpoints" / "checkpoint-0000040")  # it was the best
    assert bdh("train", "--resume", "run").returncode == 0
    assert (run / "checkpoints" / "best").resolve().is_dir()
    assert_same_end(finished_run, run)


def test_checkpoints_set_aside_can_be_exported(tmp_path: Path, finished_run: Path, bdh: Run) -> None:
    run = copy_of(finished_run, tmp_path)
    assert bdh("train", "--resume", "run/checkpoints/checkpoint-0000030").returncode == 0
    done = bdh("export", "run/checkpoints/superseded-0-checkpoint-0000040", "kept")
    assert done.returncode == 0 and (tmp_path / "kept" / "model.safetensors").exists()
    assert find_checkpoint(run).name == "checkpoint-0000040"


def call_after_step_12(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Has training in this process call a function between its steps 12 and 13."""
    learn = Trainer.learn

    def call_and_learn(self: Trainer) -> Any:
        if self.state.step == 12:
            action()
        return learn(self)

    monkeypatch.setattr(Trainer, "learn", call_and_learn)


def test_a_run_whose_folder_is_renamed_stops_there_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No second folder begins under the old name, and no record is missing or stands twice."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    with monkeypatch.context() as patch:
        call_after_step_12(patch, lambda: Path("run").rename("other"))
        assert main(["train", "--data.path", "text.txt", "--run_dir", "run", *TINY]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "run_dir run was renamed to" in line and f"bdh train --resume {tmp_path / 'other'}" in line
    assert not Path("run").exists() and find_checkpoint(tmp_path / "other").name == "checkpoint-0000015"
    assert main(["train", "--resume", "other"]) == 0
    assert not Path("run").exists()
    steps = [record["step"] for record in read_metrics(Path("other/metrics.jsonl")) if "loss" in record]
    assert steps == sorted(set(steps)) == [1, *range(5, 41, 5)]


RARELY = [f"--{name}=1000" for name in ("logging.interval", "checkpoint.interval", "training.eval_interval")]
RARELY += ["--logging.sample_interval=0", "--logging.parameter_interval=0"]


@pytest.mark.parametrize(("due", "step"), [("training.eval_interval", 14), ("logging.sample_interval", 15)])
def test_a_renamed_folder_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], due: str, step: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    call_after_step_12(monkeypatch, lambda: Path("run").rename("other"))
    argv = ["--data.path", "text.txt", "--run_dir", "run", *TINY, *RARELY, f"--{due}", str(step)]
    assert main(["train", *argv]) == 2
    shown = capsys.readouterr()
    assert f"bdh train --resume {tmp_path / 'other'}" in shown.err and "warning" not in shown.out
    assert not Path("run").exists() and find_checkpoint(tmp_path / "other").name == f"checkpoint-{step:07d}"
    assert read_metrics(Path("other/metrics.jsonl"))[-1]["step"] == step


def test_a_signal_after_the_folder_was_renamed_saves_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)

    def rename_and_stop() -> None:
        Path("run").rename("other")
        os.kill(os.getpid(), signal.SIGTERM)

    call_after_step_12(monkeypatch, rename_and_stop)
    assert main(["train", "--data.path", "text.txt", "--run_dir", "run", *TINY, *RARELY]) == 128 + signal.SIGTERM
    assert f"saved at step 13 of 40; go on with: bdh train --resume {tmp_path / 'other'}" in capsys.readouterr().out
    assert not Path("run").exists() and find_checkpoint(tmp_path / "other").name == "checkpoint-0000013"


def test_a_run_whose_folder_is_removed_saves_and_stops(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    settings = [*SETTINGS, "--training.max_steps", "100000"]
    process = start(tmp_path, "--data.path", "text.txt", "--run_dir", "run", *settings)
    try:
        assert wait_until(process, tmp_path / "run", 20)
        process.send_signal(signal.SIGSTOP)
        shutil.rmtree(tmp_path / "run")
        process.send_signal(signal.SIGCONT)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    [line] = [line for line in output.splitlines() if "error" in line]
    assert process.returncode == 2 and "Traceback" not in output
    checkpoint = find_checkpoint(tmp_path / "run")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert line == (
        "bdh train: error: run_dir run was removed during the run, so training stops; a checkpoint of step "
        f"{step} is saved in run; go on with: bdh train --resume run"
    )
    argv = ["train", "--resume", "run", "--training.max_steps", str(step + 1)]
    done = run_bdh(*argv, cwd=tmp_path)
    assert done.returncode == 0 and f"going on from step {step}" in done.stdout, done.stderr


def test_a_removed_folder_whose_name_is_taken_gets_another(tmp_path: Path, finished_run: Path) -> None:
    folder = RunFolder(tmp_path / "run", CheckpointStore(tmp_path / "run" / "checkpoints", 2), None)
    folder.claim(TrainConfig())
    shutil.rmtree(tmp_path / "run")
    assert folder.location() is None
    copy_of(finished_run, tmp_path)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    path = folder.recreate(TrainConfig())
    folder.move(path)
    assert path == tmp_path / "run-1" == folder.location() and is_run(path)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    folder.release()
