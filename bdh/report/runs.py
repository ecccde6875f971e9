"""Reads the folders of runs, also of runs in progress, with incomplete lines, or without some of the files."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bdh.errors import BDHError
from bdh.training.run_log import SAMPLE_HEADING

POINTS = 2000  # of one curve, at the most
NOT_FIGURES = {"step", "tokens", "seconds"}


@dataclass
class Run:
    """A run, as far as it is known.

    Attributes:
        name: For people; no two runs of a report share it.
        settings: `section.field` to value, as text.
        series: Figure to (steps, values), steps rising, at most about `POINTS` each.
        places: Steps, tokens and seconds of logged steps, to find one by the other.
        samples: Step to the texts written there.
        notes: What is missing or odd, a line each.
    """

    name: str
    settings: dict[str, str] = field(default_factory=dict)
    series: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    places: tuple[np.ndarray, np.ndarray, np.ndarray] = (np.empty(0), np.empty(0), np.empty(0))
    samples: dict[int, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs in these folders, in this order. Raises BDHError where there is none, or one is named twice."""
    whole = [folder.resolve() for folder in folders]
    for number, folder in enumerate(folders):
        if not folder.is_dir():
            what = "is a file" if folder.is_file() else "does not exist"
            raise BDHError(f"{folder} {what}; give the folder of a run, as runs/quickstart")
        if not any((folder / name).is_file() for name in ("metrics.jsonl", "config.yaml")):
            raise BDHError(f"{folder} holds no run: it has neither metrics.jsonl nor config.yaml")
        if whole[number] in whole[:number]:
            raise BDHError(f"{folder} is given twice; leave one out")
    return [read_run(folder, name) for folder, name in zip(whole, distinct_names(whole), strict=True)]


def distinct_names(folders: list[Path]) -> list[str]:
    """The shortest ends of the paths that differ from each other."""
    parts = max(len(folder.parts) for folder in folders)
    for length in range(1, parts + 1):
        names = [str(Path(*folder.parts[-length:])).encode("utf-8", "backslashreplace").decode() for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("paths that are not the same differ somewhere")


def read_run(folder: Path, name: str) -> Run:
    """One run. Raises BDHError if a file of it is there and cannot be opened."""
    run = Run(name)
    try:
        read_settings(run, folder / "config.yaml")
        read_figures(run, folder / "metrics.jsonl")
        read_samples(run, folder / "samples.md")
    except OSError as error:
        raise BDHError(f"{error.filename} cannot be read: {error.strerror}") from error
    return run


def read_settings(run: Run, path: Path) -> None:
    """Settings of config.yaml, `section.field`, each as YAML would show it on a line."""
    if not path.is_file():
        run.notes.append("it has no config.yaml, so its settings are not known")
        return
    try:
        found = yaml.safe_load(path.read_bytes().decode("utf-8", "replace"))
    except (yaml.YAMLError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        run.notes.append("its config.yaml is damaged, so its settings are not known")
        return
    for section, value in found.items():
        entries = {f"{section}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {section: value}
        run.settings |= {str(key): json.dumps(v, ensure_ascii=False, default=str) for key, v in entries.items()}


def read_figures(run: Run, path: Path) -> None:
    """Curves of metrics.jsonl. Lines that are no records are left out; more than a torn last one is noted."""
    found: dict[str, dict[int, float]] = {}
    tokens: dict[int, float] = {}
    seconds: dict[int, float] = {}
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    odd = 0
    for number, line in enumerate(lines):
        record = parse_record(line)
        if record is None:
            odd += bool(line.strip()) and number < len(lines) - 1
            continue
        step = record["step"]
        for name, value in record.items():
            if name not in NOT_FIGURES and (number_found := finite(value)) is not None:
                found.setdefault(name, {})[step] = number_found  # of a step that stands there twice, the later
        for kept, value in ((tokens, record.get("tokens")), (seconds, record.get("seconds"))):
            if (number_found := finite(value)) is not None:
                kept[step] = number_found
    if odd:
        run.notes.append(f"{odd} line{'s' if odd > 1 else ''} of its metrics.jsonl could not be read")
    if not found:
        run.notes.append("nothing is logged yet")
    run.series = {name: thin(*sorted_points(points)) for name, points in found.items()}
    steps = np.array(sorted(tokens.keys() | seconds.keys()), dtype=float)
    run.places = (steps, along(steps, tokens), along(steps, seconds))


def parse_record(line: bytes) -> dict[str, Any] | None:
    """A record of metrics.jsonl, None if it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int) or not 0 <= record["step"] < 2**53:
        return None
    return record


def finite(value: object) -> float | None:
    """A number that can be drawn, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def sorted_points(points: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    steps = sorted(points)
    return np.array(steps, dtype=float), np.array([points[step] for step in steps])


def along(steps: np.ndarray, known: dict[int, float]) -> np.ndarray:
    """Interpolates values that are known at some steps linearly to all of these steps; zeros if none is known."""
    if not known:
        return np.zeros_like(steps)
    return np.interp(steps, *sorted_points(known))


def thin(steps: np.ndarray, values: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """A curve of at most `points` that looks the same: of each stretch the first, the last, the lowest, the highest."""
    if len(steps) <= points:
        return steps, values
    kept: set[int] = set()
    for stretch in np.array_split(np.arange(len(steps)), points // 4):
        part = values[stretch]
        kept |= {int(stretch[0]), int(stretch[-1]), int(stretch[part.argmin()]), int(stretch[part.argmax()])}
    chosen = sorted(kept)
    return steps[chosen], values[chosen]


def read_samples(run: Run, path: Path) -> None:
    """The texts of samples.md: a heading a step, texts indented by four, with an empty line between two."""
    if not path.is_file():
        return
    text = path.read_bytes().decode("utf-8", "replace")
    headings = list(SAMPLE_HEADING.finditer(text))
    for number, heading in enumerate(headings):
        end = headings[number + 1].start() if number + 1 < len(headings) else len(text)
        body = text[heading.end() : end].strip("\n")
        texts = [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in re.split(r"\n\n(?=    )", body)]
        run.samples[int(heading[1])] = [block for block in texts if block.strip()]
