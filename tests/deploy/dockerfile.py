"""deploy/Dockerfile, read: its stages, and the steps that lead to one."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"


@dataclass(frozen=True)
class Step:
    instruction: str
    value: str


@dataclass(frozen=True)
class Stage:
    name: str
    base: str  # another stage, or an image
    steps: list[Step]

    def last(self, instruction: str) -> str:
        return [step.value for step in self.steps if step.instruction == instruction][-1]


def stages() -> dict[str, Stage]:
    """All stages by their names."""
    found: dict[str, Stage] = {}
    with DOCKERFILE.open("rb") as file:
        structure = DockerfileParser(fileobj=file).structure
    for part in structure:
        instruction, value = part["instruction"], part["value"]
        if instruction == "FROM":
            base, name = re.split(r"\s+AS\s+", value)
            found[name] = Stage(name, base, [])
        elif instruction != "COMMENT":
            found[next(reversed(found))].steps.append(Step(instruction, value))
    return found


def whole(name: str) -> Stage:
    """A stage with the steps of those it stands on before its own."""
    known = stages()
    stage = known[name]
    steps = stage.steps
    while stage.base in known:
        stage = known[stage.base]
        steps = stage.steps + steps
    return Stage(name, stage.base, steps)


def environment_of(stage: Stage) -> dict[str, str]:
    """What its ENV steps set."""
    pairs = [pair for step in stage.steps if step.instruction == "ENV" for pair in step.value.split()]
    return dict(pair.split("=", 1) for pair in pairs)


def command(value: str) -> list[str]:
    """A command in exec form, as it must be for signals to reach it."""
    words = json.loads(value)
    assert isinstance(words, list)
    return words
