"""Tracker services that receive a run's metrics: one class for each, with the interface `Backend`.

Each takes what its library offers and no more; queues, deadlines and trouble are the business of
`bdh.training.trackers`. A library is imported when its backend is opened.
"""

import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bdh.training.norms import Histogram

Samples = list[tuple[str, str]]


@dataclass(frozen=True)
class RunIdentity:
    """Which run figures are of.

    Attributes:
        project: What runs are grouped by.
        name: For people.
        id: The service's own id of the run, or ours for it; None where it has to give one.
        resumed: Whether the service has seen the run before.
        first_step: The step that the run goes on from.
        settings: The configuration, `section.field: value`.
        folder: Of the run; what stays on this machine is written into it.
        offline: Whether nothing may leave this machine.
    """

    project: str
    name: str
    id: str | None
    resumed: bool
    first_step: int
    settings: dict[str, Any]
    folder: Path
    offline: bool


class Backend(Protocol):
    """A service that keeps runs. Its methods may raise whatever its library raises.

    Attributes:
        id: The run's id, to go on with it later.
        place: Where the figures go, for people.
        takes_histograms: Whether `histograms` is worth calling.
    """

    id: str
    place: str
    takes_histograms: bool

    def __init__(self, run: RunIdentity) -> None: ...

    def scalars(self, step: int, figures: dict[str, float]) -> None:
        """Figures of a step; may be called several times for one."""

    def histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        """Histograms of a step."""

    def samples(self, step: int, texts: Samples) -> None:
        """Sends the samples of a step: pairs of prompt and continuation."""

    def close(self) -> None:
        """Writes what is still to be written."""


class TensorBoard:
    """Event files in `RUN/tensorboard`; always offline."""

    takes_histograms = True

    def __init__(self, run: RunIdentity) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / "tensorboard"
        if not run.resumed:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that never reached a checkpoint
        self.id, self.place = run.name, str(folder)
        # What was written after the checkpoint is void: where a session starts, readers drop the steps from there on
        # that earlier sessions wrote; of the first they must know that it was one.
        self.writer = SummaryWriter(str(folder), purge_step=run.first_step + 1 if run.resumed else 0, flush_secs=10)
        if not run.resumed:
            rows = "".join(f"    {name}: {value}\n" for name, value in run.settings.items())
            self.writer.add_text("configuration", rows, 0)

    def scalars(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        for name, found in histograms.items():
            self.writer.add_histogram_raw(
                name,
                min=found.edges[0],
                max=found.edges[-1],
                num=sum(found.counts),
                sum=found.total,
                sum_squares=found.squares,
                bucket_limits=found.edges[1:],
                bucket_counts=found.counts,
                global_step=step,
            )

    def samples(self, step: int, texts: Samples) -> None:
        for number, (prompt, continuation) in enumerate(texts):
            lines = "\n".join(f"    {line}" for line in (prompt + continuation).splitlines())
            self.writer.add_text(f"samples/{number}", lines, step)  # indented: Markdown's code, which is shown as it is

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Weights & Biases; offline into `RUN/wandb`, for `wandb sync` some other day."""

    takes_histograms = True

    def __init__(self, run: RunIdentity) -> None:
        import wandb

        self.wandb = wandb
        assert run.id is not None
        self.run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id,
            dir=str(run.folder),
            mode="offline" if run.offline else "online",
            resume=None if run.offline else "allow",
            config=run.settings,
            allow_val_change=True,
            settings=wandb.Settings(console="off", silent=True, save_code=False, disable_git=True),
        )
        self.id = self.run.id
        self.place = str(run.folder / "wandb") if run.offline else str(self.run.url)

    def scalars(self, step: int, figures: dict[str, float]) -> None:
        self.run.log(figures, step=step)

    def histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        made = {name: self.wandb.Histogram(np_histogram=h.arrays()) for name, h in histograms.items()}
        self.run.log(made, step=step)

    def samples(self, step: int, texts: Samples) -> None:
        table = self.wandb.Table(columns=["prompt", "continuation"], data=[list(pair) for pair in texts])
        self.run.log({"samples": table}, step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """trackio; offline into `RUN/trackio`, else where TRACKIO_SPACE_ID, TRACKIO_SERVER_URL or TRACKIO_DIR say."""

    takes_histograms = True

    def __init__(self, run: RunIdentity) -> None:
        if run.offline:  # read when the library is imported
            os.environ["TRACKIO_DIR"] = str((run.folder / "trackio").absolute())
            os.environ.pop("TRACKIO_SPACE_ID", None)
            os.environ.pop("TRACKIO_SERVER_URL", None)
        import trackio

        self.trackio = trackio
        assert run.id is not None
        self.id = run.id
        self.run = trackio.init(
            project=run.project,
            name=f"{run.name}-{run.id}",  # its runs are found again by their names
            config=run.settings,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        remote = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL", "").split("?")[0]
        self.place = remote or str(trackio.TRACKIO_DIR)

    def scalars(self, step: int, figures: dict[str, float]) -> None:
        self.run.log(dict(figures), step=step)

    def histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        made = {name: self.trackio.Histogram(np_histogram=h.arrays()) for name, h in histograms.items()}
        self.run.log(made, step=step)

    def samples(self, step: int, texts: Samples) -> None:
        rows = [[prompt, continuation] for prompt, continuation in texts]
        self.run.log({"samples": self.trackio.Table(columns=["prompt", "continuation"], data=rows)}, step=step)

    def close(self) -> None:
        self.trackio.finish()


class MLflow:
    """MLflow; offline into the database `RUN/mlflow/mlflow.db`, else where MLFLOW_TRACKING_URI says.

    It has no histograms. Samples are files of the run, one a step.
    """

    takes_histograms = False
    PARAMETERS = 100  # of one call

    def __init__(self, run: RunIdentity) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        import mlflow

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self.entities = mlflow.entities
        place = None
        if run.offline:
            home = (run.folder / "mlflow").absolute()
            home.mkdir(parents=True, exist_ok=True)
            place = f"sqlite:///{home / 'mlflow.db'}"
        self.client = mlflow.MlflowClient(place)
        self.place = place or mlflow.get_tracking_uri()
        known = self.client.get_experiment_by_name(run.project)
        where = (run.folder / "mlflow" / "artifacts").absolute().as_uri() if run.offline else None
        experiment = known.experiment_id if known else self.client.create_experiment(run.project, where)
        if run.id is not None:
            self.id = run.id
            self.client.update_run(run.id, status="RUNNING")
            return
        self.id = self.client.create_run(experiment, run_name=run.name).info.run_id
        settings = [mlflow.entities.Param(name, str(value)[:6000]) for name, value in run.settings.items()]
        for start in range(0, len(settings), self.PARAMETERS):
            self.client.log_batch(self.id, params=settings[start : start + self.PARAMETERS])

    def scalars(self, step: int, figures: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self.entities.Metric(name, value, now, step) for name, value in figures.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        return None

    def samples(self, step: int, texts: Samples) -> None:
        body = "\n\n----\n\n".join(prompt + continuation for prompt, continuation in texts)
        self.client.log_text(self.id, body, f"samples/step-{step:07d}.txt")

    def close(self) -> None:
        self.client.set_terminated(self.id)
