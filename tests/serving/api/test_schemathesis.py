"""Whatever is sent to a server, it answers as its own /openapi.json says: found out by schemathesis."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import environment
from tests.serving.running import Running, running

ROOT = Path(__file__).parents[3]
SECRET = "a-secret-for-tests-only"
AUTHORIZATION = {"Authorization": f"Bearer {SECRET}"}
SETTINGS = {
    "--serve.requests.max_tokens": 32,
    "--serve.requests.default_max_tokens": 8,
    "--serve.requests.max_prompts": 4,
    "--serve.requests.max_choices": 8,
    "--serve.sessions.max_sessions": 10**6,
    "--serve.sessions.memory_bytes": 10**6,  # of about 60 sessions: others are put away, and brought back
    "--serve.brain.max_traces": 2000,
}
# All checks are made, but for one: that what a schema allows is accepted is not asked of POST, where fields have to go
# together in ways that a schema cannot say. Parameters name sessions, traces and tokens that there are: without them
# nearly every path would be a 404.
CONFIG = """
warnings = false
phases.examples.fill-missing = true

[dictionaries]
sessions = {{ values = {sessions} }}
traces = {{ values = {traces} }}
numbers = {{ values = [0, 1, 2, 3, 4, 5, 6, 7] }}

[parameters]
"path.trace" = {{ dictionary = "traces", probability = 0.8 }}
"path.index" = {{ dictionary = "numbers", probability = 0.8 }}
"path.layer" = {{ dictionary = "numbers", probability = 0.8 }}
"path.neuron" = {{ dictionary = "numbers", probability = 0.8 }}

[[operations]]
include-tag = "sessions"
parameters = {{ "path.id" = {{ dictionary = "sessions", probability = 0.9 }} }}

[[operations]]
include-method = "POST"
checks = {{ positive_data_acceptance = {{ enabled = false }} }}
"""


@pytest.fixture(scope="module")
def guarded(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with a key, which writes little."""
    folder = tmp_path_factory.mktemp("guarded")
    flags = [word for setting in SETTINGS.items() for word in setting]
    more = ("--serve.sessions.folder", folder / "sessions")
    with running(folder, "--model", f"tiny={export}", *flags, *more, BDH_API_KEYS=SECRET) as server:
        yield server


def fuzzed(server: Running, folder: Path, phases: str, examples: int) -> dict[str, Any]:
    """The report of a run of schemathesis, in which nothing was found."""
    with httpx.Client(base_url=server.url, headers=AUTHORIZATION) as client:
        watched = {"model": "tiny", "prompt": "Hatch", "max_tokens": 4, "brain": True}
        traces = [client.post("/v1/completions", json=watched).json()["brain"]["trace"] for _ in range(20)]
        sessions = [client.post("/v1/sessions", json={"model": "tiny"}).json()["id"] for _ in range(100)]
    (folder / "schemathesis.toml").write_text(CONFIG.format(sessions=json.dumps(sessions), traces=json.dumps(traces)))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", "schemathesis.toml"),
            *("run", f"{server.url}/openapi.json", "--header", f"Authorization: Bearer {SECRET}"),
            *("--phases", phases, "--max-examples", str(examples), "--seed", "1", "--generation-database", "none"),
            *("--continue-on-failure", "--request-timeout", "20", "--no-color", "--output-sanitize", "false"),
            *("--report", "json", "--report-json-path", "report.json"),
        ],
        cwd=folder,
        env=environment(SCHEMATHESIS_HOOKS="tests.serving.fuzz_hooks", PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    print(f"schemathesis, {phases}: {report['test_cases']} in {report['running_time']:.0f} s")
    assert report["complete"] and report["failures"] == report["errors"] == []
    assert report["operations"]["tested"] == report["operations"]["total"] >= 22
    server.wait_until_idle()
    assert not [line for line in server.lines() if line["level"] not in ("info", "warning")]
    return report


def accepted(report: dict[str, Any], operation: str) -> int:
    """How many valid requests were not refused."""
    return sum(phase["accepted"] for phase in report["valid_rates"][operation].values())


def test_a_few_hundred_requests(guarded: Running, tmp_path: Path) -> None:
    report = fuzzed(guarded, tmp_path, "examples,fuzzing,stateful", 5)
    assert report["test_cases"]["generated"] > 200


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_thousands_of_requests(guarded: Running, tmp_path: Path) -> None:
    report = fuzzed(guarded, tmp_path, "examples,coverage,fuzzing,stateful", 500)
    assert report["test_cases"]["generated"] >= 5000
    for operation in report["valid_rates"]:
        assert accepted(report, operation), f"no request to {operation} reached what it is for"


def test_the_description_of_the_api(guarded: Running) -> None:
    """What clients are made of says what is so: errors are in OpenAI's form, 422 is never answered, keys are needed."""
    told = httpx.get(f"{guarded.url}/openapi.json").json()
    names = []
    for path, operations in told["paths"].items():
        for operation in operations.values():
            names.append(operation["operationId"])
            assert "422" not in operation["responses"]
            assert (operation.get("security") == [{"key": []}]) == path.startswith("/v1/")
    assert len(names) == len(set(names)) and "chat_completions" in names
    assert not {"HTTPValidationError", "ValidationError"} & set(told["components"]["schemas"])
    stream = told["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]["text/event-stream"]
    assert "#/components/schemas/ChatChunk" in json.dumps(stream)
