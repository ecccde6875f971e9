"""Trackers: what they keep is read back with their own readers."""

import dataclasses
import json
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bdh.errors import BDHError
from bdh.training import trackers
from bdh.training.config import LoggingConfig, TrainConfig, from_dict
from bdh.training.loop import train
from bdh.training.norms import Histogram
from bdh.training.run_log import read_metrics
from bdh.training.trackers import BackgroundTracker, check_trackers
from tests.conftest import TEXT

VALIDATED = [10, 20, 30]


def wandb_records(folder: Path) -> Iterator[Any]:
    """What is in wandb's offline files, oldest first: LevelDB's log of blocks, in them its own protocol's messages."""
    from wandb.proto import wandb_internal_pb2

    for path in sorted(folder.glob("offline-run-*/*.wandb")):
        raw, message = path.read_bytes(), b""
        assert raw[:4] == b":W&B"
        at = 7
        while at + 7 <= len(raw):
            left = 32768 - at % 32768
            if left < 7:
                at += left
                continue
            length, kind = struct.unpack_from("<HB", raw, at + 4)
            message += raw[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or the last part
                record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
                record.ParseFromString(message)
                yield record
                message = b""


def wandb_history(folder: Path, name: str) -> dict[int, Any]:
    """A figure by step, or the fields of what is more than a figure; no step may stand there twice."""
    found: dict[int, Any] = {}
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") == "history":
            items = {tuple(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            fields = {key[1:]: value for key, value in items.items() if key[0] == name}
            if fields:
                assert record.history.step.num not in found
                found[record.history.step.num] = fields.get((), {key[0]: value for key, value in fields.items() if key})
    return found


def small(folder: Path, steps: int, **logging: Any) -> TrainConfig:
    """A tiny run in `folder`."""
    (folder / "text.txt").write_text(TEXT)
    return from_dict(
        {
            "run_dir": str(folder / "run"),
            "model": {"n_layer": 2, "n_embd": 16, "n_head": 2, "mlp_internal_dim_multiplier": 8, "dropout": 0.0},
            "data": {"path": str(folder / "text.txt"), "block_size": 16},
            "training": {
                "max_steps": steps,
                "batch_size": 4,
                "warmup_steps": 0,
                "eval_windows": 4,
                "eval_interval": 10,
            },
            "checkpoint": {"interval": 10, "keep": 5},
            "logging": {"interval": 5, "sample_interval": 10, "sample_tokens": 4, "parameter_interval": 10, **logging},
        }
    )


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with all trackers, offline, that had come to step 22 and was taken up again at step 10."""
    folder = tmp_path_factory.mktemp("tracked")
    every = ["tensorboard", "wandb", "trackio", "mlflow"]
    config = small(folder, 22, peak_tflops=0.1, trackers=every, tracking_mode="offline", project="eggs")
    with pytest.MonkeyPatch.context() as patch:  # trackers set variables of the process
        for name in ("TRACKIO_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "MLFLOW_DISABLE_TELEMETRY"):
            patch.setenv(name, "")
        train(config)
        longer = dataclasses.replace(config, training=dataclasses.replace(config.training, max_steps=30))
        train(longer, folder / "run" / "checkpoints" / "checkpoint-0000010")
        yield folder / "run"


def logged(run: Path, name: str) -> dict[int, float]:
    return {record["step"]: record[name] for record in read_metrics(run / "metrics.jsonl") if name in record}


def test_tensorboard_reads_every_step_once(tracked: Path) -> None:
    from tensorboard.backend.event_processing import plugin_event_accumulator
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tracked / "tensorboard"), size_guidance={"histograms": 0})
    found.Reload()
    for name in ("loss", "validation_loss", "active_z/layer_1", "parameter_norm/lm_head.weight", "mfu"):
        expected = logged(tracked, name)
        events = found.Scalars(name)
        assert [event.step for event in events] == list(expected) and expected
        assert [event.value for event in events] == pytest.approx(list(expected.values()), rel=1e-6)
    histogram = found.Histograms("weights/lm_head.weight")
    assert [event.step for event in histogram] == VALIDATED
    assert histogram[-1].histogram_value.num == 256 * 16
    assert found.Histograms("activity_y/layer_0")[-1].histogram_value.min >= 0
    shown = plugin_event_accumulator.EventAccumulator(str(tracked / "tensorboard"), tensor_size_guidance={"text": 0})
    shown.Reload()
    texts = shown.Tensors("samples/0/text_summary")
    assert [event.step for event in texts] == VALIDATED
    assert texts[-1].tensor_proto.string_val[0].decode().startswith("    The ")
    assert (
        "training.max_steps: 22" in found.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    )


def test_wandb_keeps_one_run_without_a_step_twice(tracked: Path) -> None:
    losses = wandb_history(tracked / "wandb", "loss")
    assert sorted(losses) == [1, 5, 10, 15, 20, 22, 25, 30]  # 22 had been there before the run was taken up again
    assert {step: losses[step] for step in (5, 25, 30)} == {step: logged(tracked, "loss")[step] for step in (5, 25, 30)}
    assert list(wandb_history(tracked / "wandb", "active_x/layer_0")) == [10, 20, 22, 30]
    histogram = wandb_history(tracked / "wandb", "weights/lm_head.weight")[30]
    assert histogram["_type"] == "histogram" and sum(histogram["values"]) == 256 * 16
    table = wandb_history(tracked / "wandb", "samples")[30]
    assert table["_type"] == "table-file" and table["nrows"] == 2
    runs = [record.run for record in wandb_records(tracked / "wandb") if record.WhichOneof("record_type") == "run"]
    known = json.loads((tracked / "trackers.json").read_text())
    assert {run.run_id for run in runs} == {known["wandb"]["id"]} and runs[0].project == "eggs"


def test_trackio_keeps_one_run_without_a_step_twice(tracked: Path) -> None:
    from trackio.sqlite_storage import SQLiteStorage
    from trackio.utils import TRACKIO_DIR

    assert Path(TRACKIO_DIR) == tracked / "trackio"
    (name,) = SQLiteStorage.get_runs("eggs")
    assert name == f"run-{json.loads((tracked / 'trackers.json').read_text())['trackio']['id']}"
    rows = SQLiteStorage.get_logs("eggs", name)
    assert [row["step"] for row in rows if "loss" in row] == [1, 5, 10, 15, 20, 22, 25, 30]
    assert [row["step"] for row in rows if "validation_loss" in row] == [10, 20, 22, 30]
    assert next(row for row in rows if "weights/lm_head.weight" in row)["weights/lm_head.weight"]["_type"]
    assert len([row for row in rows if "samples" in row]) == 4
    settings = SQLiteStorage.get_run_config("eggs", name)
    assert settings is not None and settings["model.n_embd"] == 16


def test_mlflow_keeps_one_run_without_a_step_twice(tracked: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tracked / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("eggs")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == json.loads((tracked / "trackers.json").read_text())["mlflow"]["id"]
    assert run.info.status == "FINISHED" and run.data.params["model.n_embd"] == "16"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted(metric.step for metric in history) == [1, 5, 10, 15, 20, 22, 25, 30]
    state = client.get_metric_history(run.info.run_id, "state_norm/layer_1")
    assert [metric.step for metric in state] == [10, 20, 22, 30] and state[-1].value > 0
    sample = next((tracked / "mlflow" / "artifacts").rglob("step-0000030.txt"))
    assert sample.read_text().startswith("The ")


def test_a_missing_package_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(BDHError, match=r"has wandb, which is not installed: pip install 'bdh\[wandb\]'"):
        check_trackers(LoggingConfig(trackers=["wandb"]))
    check_trackers(LoggingConfig(trackers=["wandb"], tracking_mode="disabled"))
    check_trackers(LoggingConfig(trackers=["tensorboard"]))


def test_trackers_in_trouble_are_said_once_and_the_run_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """W&B without a key, and TensorBoard where a file is in the way."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where keys are kept
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    assert train(small(tmp_path, 10, trackers=["wandb", "tensorboard"])).step == 10
    said = capsys.readouterr().out
    assert said.count("warning: wandb fails (") == 1 and said.count("warning: tensorboard fails (FileExists") == 1
    assert said.count("training goes on without it") == 2 and (tmp_path / "run" / "model" / "config.json").exists()
    assert json.loads((tmp_path / "run" / "trackers.json").read_text()) == {}


class Fragile:
    """A service as services can be: slow, stuck, or broken at some call."""

    id, place, takes_histograms = "1", "nowhere", False

    def __init__(self, fails_at: int | None = None, stuck: threading.Event | None = None):
        self.fails_at = fails_at
        self.stuck = stuck
        self.got: list[int] = []

    def scalars(self, step: int, figures: dict[str, float]) -> None:
        if self.stuck:
            self.stuck.wait()
        if step == self.fails_at:
            raise ConnectionError("the service\nis gone")
        self.got.append(step)

    def histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        return None

    def samples(self, step: int, texts: list[tuple[str, str]]) -> None:
        return None

    def close(self) -> None:
        self.got.append(-1)


def give(service: Fragile, steps: range, after: int = 0) -> tuple[trackers.Trackers, list[str]]:
    said: list[str] = []
    together = trackers.Trackers([BackgroundTracker("fragile", lambda: service, after)], said.append)  # type: ignore[arg-type]
    for step in steps:
        together.scalars({"step": step, "loss": 1.0})
    return together, said


def test_calls_come_in_order_and_all_of_them() -> None:
    service = Fragile()
    together, said = give(service, range(1, 200), after=50)
    together.close()
    assert service.got == [*range(51, 200), -1] and said == []


def test_an_exception_of_a_library_is_said_once() -> None:
    service = Fragile(fails_at=3)
    together, said = give(service, range(1, 6))
    together.close()
    assert service.got == [1, 2]
    assert said == ["warning: fragile fails (ConnectionError: the service is gone); training goes on without it"]


def test_a_service_that_is_stuck_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.2)
    stuck = threading.Event()
    started = time.monotonic()
    together, said = give(Fragile(stuck=stuck), range(trackers.WAITING + 10))
    together.close()
    assert time.monotonic() - started < 5
    assert len(said) == 1 and f"{trackers.WAITING} calls wait for it" in said[0]
    stuck.set()
