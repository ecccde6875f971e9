"""The steps of the CPU image, done in a folder: that they make a bdh that serves needs no container engine to know."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment
from tests.deploy.dockerfile import ROOT, Stage, command, environment_of, whole
from tests.deploy.nginx import free_ports
from tests.serving.running import Running

BUILD_ARGUMENTS = {"TORCH_INDEX": ""}  # as with --build-arg: torch comes from where pip looks on this machine
PLACES = ("/opt/venv", "/src", "/models", "/data")


class Container:
    """A folder that stands for a container's root, and what is done in it."""

    def __init__(self, root: Path):
        self.root = root
        self.folder = root
        python = Path(sys._base_executable).resolve().parent  # type: ignore[attr-defined]
        self.variables = {"PATH": f"{python}:/usr/bin:/bin"}

    def here(self, text: str) -> str:
        """A text of the Dockerfile with this machine's paths."""
        for place in PLACES:
            text = text.replace(place, f"{self.root}{place}")
        return text

    def perform(self, stage: Stage) -> None:
        for step in stage.steps:
            match step.instruction:
                case "ENV":
                    self.variables |= dict(pair.split("=", 1) for pair in step.value.split())
                case "ARG":
                    self.variables[step.value.partition("=")[0]] = BUILD_ARGUMENTS[step.value.partition("=")[0]]
                case "WORKDIR":
                    self.folder = Path(self.here(step.value))
                    self.folder.mkdir(parents=True, exist_ok=True)
                case "COPY":
                    *sources, target = step.value.split()
                    for source in sources:
                        self.copy(ROOT / source, self.folder / target)
                case "RUN":
                    self.run(step.value)
                case other:
                    raise AssertionError(f"{other} is no step that makes packages")

    def copy(self, source: Path, target: Path) -> None:
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)

    def run(self, line: str) -> None:
        done = subprocess.run(
            ["sh", "-c", self.here(line)], cwd=self.folder, env=self.environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"

    def environment(self) -> dict[str, str]:
        known = {name: value for name, value in environment().items() if not name.startswith(("VIRTUAL", "PYTHON"))}
        return {**known, **self.variables}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_images_steps_make_a_bdh_that_serves(tmp_path: Path, export: Path) -> None:
    container, image = Container(tmp_path / "root"), whole("cpu")
    container.perform(whole("packages-cpu"))
    shutil.rmtree(container.root / "src")  # the image has only /opt/venv of it
    shutil.copytree(export, container.root / "models" / "bdh")

    container.variables |= {
        **{name: container.here(value) for name, value in environment_of(image).items()},
        "PATH": f"{container.root}/opt/venv/bin:/usr/bin:/bin",
        "BDH_SERVE__HOST": "127.0.0.1",
        "BDH_SERVE__PORT": str(free_ports(1)[0]),
    }
    given = {"cwd": tmp_path, "env": container.environment()}
    version = subprocess.run(["bdh", "--version"], **given, capture_output=True, text=True, timeout=60)  # type: ignore[call-overload]
    assert version.stdout.startswith("bdh "), version.stderr
    torch = ["python", "-c", "import torch, sys; sys.exit(torch.version.cuda is not None)"]
    assert subprocess.run(torch, **given, timeout=60).returncode == 0  # type: ignore[call-overload]

    health = command(image.last("HEALTHCHECK").partition(" CMD ")[2])

    def healthy() -> bool:
        done = subprocess.run(health, **given, capture_output=True, timeout=20)  # type: ignore[call-overload]
        return bool(done.returncode == 0)

    assert not healthy()
    log = tmp_path / "log"
    serve = [container.here(word) for step in ("ENTRYPOINT", "CMD") for word in command(image.last(step))]
    with log.open("wb") as stderr:
        process = subprocess.Popen(serve, **given, stderr=stderr)  # type: ignore[call-overload]
    try:
        server = Running(process, log)
        server.wait_until_ready()
        assert healthy()
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
    assert not healthy()
