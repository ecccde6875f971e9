"""Trackers of a run: opened by name, each behind a thread of its own, so that none can hold up or end the training.

`RUN/trackers.json` keeps by tracker the id of its run and the last step it was given; a run that goes on goes on in the
same run there, and what had been given before is not given again.
"""

import importlib.util
import io
import json
import queue
import secrets
import threading
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdh.errors import BDHError
from bdh.json_text import to_json
from bdh.training.config import LoggingConfig, TrainConfig, flatten
from bdh.training.norms import Histogram
from bdh.training.tracker_backends import Backend, MLflow, RunIdentity, Samples, TensorBoard, Trackio, WandB

IDS = "trackers.json"
OPEN_SECONDS = 60  # training waits no longer for a service that is out of reach
CLOSE_SECONDS = 60
WAITING = 1000  # calls that may wait for a slow service


@dataclass(frozen=True)
class Kind:
    """A tracker that can be chosen.

    Attributes:
        backend: Its class.
        packages: Modules it needs; `pip install 'bdh[NAME]'` brings them.
        gives_id: Whether the service makes up the id of a new run.
        forgets: Whether it drops what came after the checkpoint a run goes on from, and is to be given that again.
    """

    backend: type[Backend]
    packages: tuple[str, ...]
    gives_id: bool = False
    forgets: bool = False


KINDS = {
    "tensorboard": Kind(TensorBoard, ("tensorboard",), forgets=True),
    "wandb": Kind(WandB, ("wandb",)),
    "trackio": Kind(Trackio, ("trackio",)),
    "mlflow": Kind(MLflow, ("mlflow", "sqlalchemy", "alembic"), gives_id=True),
}


def check_trackers(logging: LoggingConfig) -> None:
    """Refuses trackers whose packages are not installed: BDHError."""
    for name in logging.trackers if logging.tracking_mode != "disabled" else []:
        if any(importlib.util.find_spec(package) is None for package in KINDS[name].packages):
            raise BDHError(f"logging.trackers has {name}, which is not installed: pip install 'bdh[{name}]'")


def want_histograms(logging: LoggingConfig) -> bool:
    """Whether a tracker takes histograms; by the settings, as all ranks gather them together and one has trackers."""
    return logging.tracking_mode != "disabled" and any(KINDS[n].backend.takes_histograms for n in logging.trackers)


class BackgroundTracker:
    """Calls one tracker backend in a background thread; after the first failure, further calls are dropped.

    Args:
        name: The tracker's.
        open_backend: Creates the backend, in the thread.
        after: Steps up to this one were logged before the run was resumed.
    """

    def __init__(self, name: str, open_backend: Callable[[], Backend], after: int):
        self.name = name
        self.after = after
        self.failure: str | None = None
        self.backend: Backend | None = None
        self.calls: queue.Queue[Callable[[Backend], None] | None] = queue.Queue(WAITING)
        self.opened = threading.Event()
        self.thread = threading.Thread(target=self._work, args=(open_backend,), name=f"tracker {name}", daemon=True)
        with redirect_stdout(io.StringIO()):  # libraries greet
            self.thread.start()
            if not self.opened.wait(OPEN_SECONDS):
                self.failure = f"no answer within {OPEN_SECONDS} s"

    def _work(self, open_backend: Callable[[], Backend]) -> None:
        try:
            backend = self.backend = open_backend()
            self.opened.set()
            while (call := self.calls.get()) is not None:
                if self.failure is None:
                    call(backend)
            backend.close()
        except Exception as error:
            self.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        finally:
            self.opened.set()

    def submit(self, step: int, call: Callable[[Backend], None]) -> None:
        """Has a call made for a step, unless there was failure or the step was given before."""
        if self.failure is not None or step <= self.after:
            return
        try:
            self.calls.put_nowait(call)
        except queue.Full:
            self.failure = f"{WAITING} calls wait for it"

    def close(self) -> None:
        """Waits for what is left, up to `CLOSE_SECONDS`."""
        if not self.thread.is_alive():
            return
        with redirect_stdout(io.StringIO()):
            try:
                self.calls.put(None, timeout=CLOSE_SECONDS)
                self.thread.join(CLOSE_SECONDS)
            except queue.Full:
                pass
        if self.thread.is_alive():
            self.failure = f"it is not done after {CLOSE_SECONDS} s"


class Trackers:
    """All trackers of a run, as one.

    Args:
        background_trackers: One a tracker.
        say: Told a line about each that is in failure, once.
    """

    def __init__(self, background_trackers: list[BackgroundTracker], say: Callable[[str], None]):
        self.background_trackers = background_trackers
        self.say = say

    def scalars(self, record: dict[str, Any]) -> None:
        """A record of metrics.jsonl."""
        step = record["step"]
        figures = {name: value for name, value in record.items() if name != "step" and value is not None}
        self._submit(step, lambda backend: backend.scalars(step, figures))

    def histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        self._submit(step, lambda backend: backend.histograms(step, histograms))

    def samples(self, step: int, texts: Samples) -> None:
        self._submit(step, lambda backend: backend.samples(step, texts))

    def close(self) -> None:
        for tracker in self.background_trackers:
            tracker.close()
        self._complain()

    def _submit(self, step: int, call: Callable[[Backend], None]) -> None:
        for tracker in self.background_trackers:
            tracker.submit(step, call)
        self._complain()

    def _complain(self) -> None:
        for tracker in [c for c in self.background_trackers if c.failure is not None]:
            self.say(f"warning: {tracker.name} fails ({tracker.failure}); training goes on without it")
            self.background_trackers.remove(tracker)


def open_trackers(
    config: TrainConfig, run_dir: Path, first_step: int, last_step: int, say: Callable[[str], None]
) -> Trackers:
    """Opens what `logging.trackers` names, in the same runs as before if this run goes on.

    Args:
        config: The run's.
        run_dir: Its folder.
        first_step: The step it goes on from, 0 to begin.
        last_step: The last step that was logged before.
        say: Told where figures go, and about failure.
    """
    logging = config.logging
    if logging.tracking_mode == "disabled" or not logging.trackers:
        return Trackers([], say)
    known = read_ids(run_dir) if first_step else {}
    background_trackers = []
    for name in dict.fromkeys(logging.trackers):
        kind, before = KINDS[name], known.get(name, {})
        after = 0 if kind.forgets else max(before.get("given", 0), last_step if before else 0)
        identity = RunIdentity(
            project=logging.project,
            name=Path(run_dir).resolve().name,
            id=before.get("id") or (None if kind.gives_id else secrets.token_hex(4)),
            resumed=bool(before),
            first_step=first_step,
            settings=flatten(config),
            folder=run_dir,
            offline=logging.tracking_mode == "offline",
        )
        tracker = BackgroundTracker(name, lambda kind=kind, identity=identity: kind.backend(identity), after)  # type: ignore[misc]
        background_trackers.append(tracker)
        if tracker.failure is None and tracker.backend is not None:
            known[name] = {"id": tracker.backend.id, "given": after}
            say(f"figures also go to {name}: {tracker.backend.place}")
    trackers = Trackers(background_trackers, say)
    trackers._complain()
    write_ids(run_dir, known, say)
    return trackers


def read_ids(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Reads trackers.json; empty if the file is missing or incomplete."""
    try:
        found = json.loads((run_dir / IDS).read_text(encoding="utf-8"))
        return {name: {"id": str(entry["id"]), "given": int(entry["given"])} for name, entry in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def write_ids(run_dir: Path, known: dict[str, dict[str, Any]], say: Callable[[str], None]) -> None:
    from bdh.training.run_log import write_atomically

    try:
        write_atomically(run_dir / IDS, to_json(known, indent=1) + "\n")
    except OSError as error:
        say(f"warning: {run_dir / IDS} cannot be written ({error.strerror}); trackers will begin new runs on resume")
