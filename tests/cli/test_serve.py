"""`bdh serve`: which settings a command line, files and the environment give."""

from pathlib import Path

import pytest

from bdh.cli.serve import parsed_config


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("serve: {host: 0.0.0.0, port: 8001, models: [{path: of-a-file}]}\n")
    Path("b.yaml").write_text("serve: {port: 8002, queue_size: 9}\n")


@pytest.mark.parametrize(
    "line",
    [
        "--config a.yaml --config b.yaml --port 1234 --model tiny=DIR",
        "--port 1234 --config a.yaml --model tiny=DIR --config b.yaml",
        "--port=1234 --model=tiny=DIR --config=a.yaml --config=b.yaml",
        "--serve.port 1234 --config=a.yaml --model tiny=DIR --config b.yaml",
    ],
)
def test_flags_win_over_files_wherever_they_stand(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDH_SERVE__PORT", "8003")
    monkeypatch.setenv("BDH_SERVE__DRAIN_SECONDS", "7")
    config = parsed_config(line.split())
    assert (config.port, config.host, config.queue_size, config.drain_seconds) == (1234, "0.0.0.0", 9, 7.0)
    assert [(model.name, model.path) for model in config.models] == [("tiny", "DIR")]
