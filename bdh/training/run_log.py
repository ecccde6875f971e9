"""Local output of a run: metrics.jsonl, the progress bar or plain lines, samples.md, loss.png."""

import json
import os
import re
import sys
import time
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bdh.json_text import to_json

if TYPE_CHECKING:
    from bdh.training.norms import Histogram
    from bdh.training.trackers import Trackers

SAMPLE_HEADING = re.compile(r"^## Step (\d+)$", re.MULTILINE)


def write_atomically(path: Path, text: str) -> None:
    """Writes a whole file under a temporary name, then renames it, so that nobody ever sees half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line torn by a kill is left out. A missing file has none."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def _write_all(file: FileIO, data: bytes) -> None:
    """Writes all of the data; a single write may accept a part of it. Raises OSError."""
    while data:
        data = data[file.write(data) or 0 :]


class PatientConsole(Console):
    """A console whose reader may go away, or whose disk may fill, without ending the work it tells of."""

    def on_broken_pipe(self) -> None:
        self.mute()

    def mute(self) -> None:
        """Says nothing more; what is still buffered goes nowhere."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Tracker:
    """Writes a run's figures to its folder and shows them to whoever watches.

    A terminal gets a progress bar; anything else gets plain lines. Trouble with the disk is said once and does not end
    the run. Of several processes only the main one writes and says anything.

    Attributes:
        last_step: The last step that had been logged in this folder, 0 if none; it may lie beyond `first_step`.
        others: The trackers that get the same figures.
    """

    def __init__(self, run_dir: Path, max_steps: int, first_step: int, is_main: bool = True):
        self.is_main = is_main
        self.write_into(run_dir)
        self.max_steps = max_steps
        self.console = PatientConsole(highlight=False, soft_wrap=True)
        self.unwritable: set[Path] = set()  # files that were warned of
        self.last_step = max((record["step"] for record in read_metrics(self.metrics_path)), default=0)
        self.others: Trackers | None = None
        self.progress: Progress | None = None
        if not is_main:
            return
        self._forget_after(first_step)
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.progress.add_task("training", total=max_steps, completed=first_step, figures="")

    def __enter__(self) -> "Tracker":
        if self.progress:
            self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.progress:
            self.progress.stop()
        if self.others:
            self.others.close()

    def say(self, line: str) -> None:
        """A line for people."""
        if not self.is_main:
            return
        try:
            self.console.print(line, markup=False)
            self.console.file.flush()
        except OSError:
            self.console.mute()

    def step(self, record: dict[str, Any]) -> None:
        """The figures of a training step that is logged."""
        self._record(record)
        scored = " of answers" if "answer_tokens" in record else ""
        loss = f"loss{scored} {record['loss']:.4f}" if "loss" in record else "no answer tokens"
        figures = f"{loss}  {record['tokens_per_second']:,.0f} tokens/s"
        if self.progress:
            self.progress.update(self.task, completed=record["step"], figures=figures)
        else:
            left = (self.max_steps - record["step"]) * record["seconds_per_step"]
            self.say(
                f"step {record['step']}/{self.max_steps}  {figures}  lr {record['learning_rate']:.2e}"
                + (f"  left {duration(left)}" if record["step"] > 1 else "")  # the first step also warms up
            )

    def evaluation(self, record: dict[str, Any]) -> None:
        """The figures of a validation."""
        self._record(record)
        scored = " of answers" if "validation_answer_tokens" in record else ""
        self.say(
            f"step {record['step']}  validation: loss{scored} {record['validation_loss']:.4f}, perplexity "
            f"{record['perplexity']:.2f}, {record['bits_per_byte']:.3f} bits per byte, "
            f"accuracy {record['accuracy']:.1%}" + beyond_block_words(record)
        )

    def samples(self, step: int, texts: list[tuple[str, str]]) -> None:
        """Writes the samples of a step: pairs of prompt and continuation."""
        blocks = [f"## Step {step}\n"]
        for prompt, continuation in texts:
            body = "\n".join(f"    {line}" for line in (prompt + continuation).splitlines())
            blocks.append(f"\n{body}\n")
        self._append(self.samples_path, "".join(blocks) + "\n")
        if self.others and texts:
            self.others.samples(step, texts)
        if texts:
            prompt, continuation = texts[0]
            self.say(f"step {step}  it writes: {' '.join((prompt + continuation).split())[:160]}")

    def histograms(self, step: int, histograms: "dict[str, Histogram]") -> None:
        """Histograms of a step, for trackers that have them."""
        if self.others:
            self.others.histograms(step, histograms)

    def write_into(self, run_dir: Path) -> None:
        """Writes into this folder from now on."""
        self.metrics_path = run_dir / "metrics.jsonl"
        self.samples_path = run_dir / "samples.md"

    def draw(self) -> None:
        """The curves of all that was logged, in loss.png. For the main process."""
        picture = self.metrics_path.with_name("loss.png")
        try:
            draw_curves(self.metrics_path, picture)
        except OSError as error:
            self.say(f"warning: {picture} could not be drawn ({error.strerror or error})")

    def _record(self, record: dict[str, Any]) -> None:
        self._append(self.metrics_path, to_json(record) + "\n")
        if self.others:
            self.others.scalars(record)

    def _append(self, path: Path, text: str) -> None:
        """Adds a record to a file, whole or not at all. A file that cannot be written is warned of once."""
        if not self.is_main:
            return
        try:
            with path.open("ab", buffering=0) as file:
                size = file.tell()
                try:
                    _write_all(file, text.encode("utf-8"))
                except OSError:
                    with suppress(OSError):
                        file.truncate(size)  # no half a record for the next one to run into
                    raise
        except OSError as error:
            if path not in self.unwritable:
                self.say(f"warning: {path} cannot be written ({error.strerror or error}); training goes on without it")
            self.unwritable.add(path)
        else:
            self.unwritable.discard(path)

    def _forget_after(self, step: int) -> None:
        """Drops what was written after the checkpoint a run goes on from, so that nothing stands there twice."""
        if self.metrics_path.exists():
            kept = [record for record in read_metrics(self.metrics_path) if record["step"] <= step]
            write_atomically(self.metrics_path, "".join(to_json(record) + "\n" for record in kept))
        if self.samples_path.exists():
            text = self.samples_path.read_text(encoding="utf-8")
            later = next((m.start() for m in SAMPLE_HEADING.finditer(text) if int(m[1]) > step), None)
            if later is not None:
                write_atomically(self.samples_path, text[:later])


def beyond_block_words(record: dict[str, Any]) -> str:
    """The end of a line about a validation that measured the positions beyond the training block; else nothing."""
    if "validation_long_bits_per_byte" not in record:
        return ""
    return (
        f"; beyond the block, to {record['validation_long_length']:,} tokens: "
        f"{record['validation_long_bits_per_byte']:.3f} bits per byte"
    )


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, or days where there are many."""
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < 86400 else f"{seconds / 86400:.1f} days"


def draw_curves(metrics_path: Path, picture: Path) -> None:
    """Draws the training and validation loss of a run, in nats a token, over its steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_metrics(metrics_path)
    training = [(r["step"], r["loss"]) for r in records if "loss" in r]
    validation = [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    if training:
        axes.plot(*zip(*training, strict=True), color="#9ab8d8", linewidth=1, label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="#c2410c", marker="o", markersize=4, label="validation")
        step, loss = validation[-1]
        axes.annotate(f"{loss:.3f}", (step, loss), textcoords="offset points", xytext=(0, 8), ha="right")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    if training or validation:
        axes.legend()
    figure.tight_layout()
    temporary = picture.with_name(f".{picture.name}.tmp")
    figure.savefig(temporary, format="png")
    pyplot.close(figure)
    temporary.replace(picture)
