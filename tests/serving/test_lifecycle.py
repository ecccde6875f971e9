"""How a server begins and ends: soon, whole, and with one line where it cannot."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bdh.cli.serve import parsed_config
from bdh.errors import BDHError
from bdh.serving.config import validate
from tests.conftest import environment, run_bdh
from tests.serving.running import Running, running
from tests.serving.wire import Answer, Wire

STARTED = 15.0  # seconds of a core until a model is served; it takes about 5, most of them for torch and transformers
LONG = {"model": "tiny", "prompt": "abc", "max_tokens": 60_000, "ignore_eos": True}


def begun(url: str, **body: Any) -> Wire:
    """A request that is sent, its answer not awaited."""
    content = json.dumps({**LONG, **body}).encode()
    connection = Wire(url)
    connection.send(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
    connection.send(f"Content-Length: {len(content)}\r\n\r\n".encode(), content)
    return connection


def until_at_work(server: Running, count: int) -> None:
    deadline = time.monotonic() + 20
    while server.metric("bdh_engine_running") + server.metric("bdh_engine_waiting") < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ended(server: Running, seconds: float) -> float:
    """Waits until a server has ended well; how long that took."""
    begin = time.monotonic()
    assert server.process.wait(seconds + 10) == 0
    took = time.monotonic() - begin
    log = server.log.read_text()
    assert "Traceback" not in log and '"level": "error"' not in log, log
    assert took < seconds
    return took


# -------------------------------------------------------------------------------------------------------- the beginning


@pytest.fixture(scope="module")
def several(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, list[Any], float]]:
    """A server of several models, from a file, flags and the environment; what it said first; what it took to start."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "serve.yaml").write_text(
        f"""serve:
  models:
    - path: {export}
    - path: {export}
      name: small
      quantization: int8
    - path: {export}
      name: half
      dtype: bfloat16
      max_batch_size: 3
  port: 1  # not free for us, but a flag has another
  max_batch_size: 5
  queue_size: 7
  requests:
    max_choices: 50
    max_prompts: 2
"""
    )
    (folder / "more.yaml").write_text("serve:\n  requests:\n    max_choices: 40\n")
    flags = ["--config", "serve.yaml", "--config", "more.yaml", "--port", 0, "--serve.queue_size=9"]
    with running(
        folder,
        *flags,
        ready=False,
        BDH_SERVE__REQUESTS__MAX_PROMPTS="3",
        BDH_SERVE__REQUESTS__MAX_PROMPT_TOKENS="33",
    ) as it:
        first = [
            httpx.get(f"{it.url}/health/live"),
            httpx.get(f"{it.url}/health/ready"),
            httpx.get(f"{it.url}/v1/models"),
            httpx.post(f"{it.url}/v1/completions", json={"model": "half", "prompt": "a"}),
            httpx.get(f"{it.url}/v1/models/half"),
            httpx.get(f"{it.url}/v1/models/none"),
        ]
        while httpx.get(f"{it.url}/v1/models").status_code != 200:
            time.sleep(0.05)
        took = cpu_seconds(it.process.pid)
        it.wait_until_ready()
        yield it, first, took


def cpu_seconds(process: int) -> float:
    """What a process has had of the cores, however many others there are."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


Several = tuple[Running, list[Any], float]


def test_it_serves_soon(several: Several) -> None:
    assert several[2] < STARTED, several[2]


def test_while_it_loads_it_says_so(several: Several) -> None:
    live, *loading, none = several[1]
    assert live.status_code == 200 and live.json() == {"status": "alive"}
    for answer in loading:
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "loading" and answer.json()["error"]["type"] == "server_error"
    assert none.status_code == 404


def test_when_it_is_ready_it_says_so(several: Several) -> None:
    for path, status in (("live", "alive"), ("ready", "ready")):
        answer = httpx.get(f"{several[0].url}/health/{path}")
        assert answer.status_code == 200 and answer.json() == {"status": status}


def test_each_model_answers_by_its_name(several: Several) -> None:
    url = several[0].url
    cards = {card["id"]: card["bdh"] for card in httpx.get(f"{url}/v1/models").json()["data"]}
    assert list(cards) == ["tiny", "small", "half"]
    assert cards["tiny"]["dtype"] == "float32" and cards["half"]["dtype"] == "bfloat16"
    assert [cards[name]["quantization"] for name in cards] == [None, "int8", None]
    assert [cards[name]["slots"] for name in cards] == [5, 5, 3]
    scores = {}
    for name in cards:
        assert httpx.get(f"{url}/v1/models/{name}").json()["id"] == name
        body = {"model": name, "prompt": "The dragons", "max_tokens": 40, "temperature": 0, "logprobs": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body).json()
        assert answer["model"] == name
        scores[name] = tuple(answer["choices"][0]["logprobs"]["token_logprobs"])
    assert len(set(scores.values())) == 3  # three models indeed
    for wrong in ("nothing", "Tiny", ""):
        refused = httpx.post(f"{url}/v1/completions", json={"model": wrong, "prompt": "a"})
        assert refused.status_code == 404 and "there is tiny, small, half" in refused.json()["error"]["message"]


def test_a_flag_counts_more_than_files_and_they_more_than_the_environment(several: Several) -> None:
    url, body = several[0].url, {"model": "tiny", "prompt": "a"}
    refusals: dict[str, dict[str, Any]] = {
        "this server writes 40 for one request": {"n": 41},
        "this server takes 2 at a time": {"prompt": ["a"] * 3},
        "this server reads 33": {"prompt": "x" * 34},
    }
    for words, more in refusals.items():
        refused = httpx.post(f"{url}/v1/completions", json={**body, **more})
        assert refused.status_code == 400 and words in refused.json()["error"]["message"]


def test_help_comes_at_once_and_loads_nothing_heavy(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "bdh", "serve", "--help"]
    begin = time.monotonic()
    told = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
    assert time.monotonic() - begin < 10
    assert told.returncode == 0 and "--model [NAME=]DIR" in told.stdout and "--serve.drain_seconds" in told.stdout
    loaded = {line.rpartition("|")[2].strip() for line in told.stderr.splitlines()}
    assert "bdh.serving.config" in loaded and not loaded & {"torch", "transformers", "numpy", "uvicorn"}


def test_a_server_listens_before_torch_is_loaded() -> None:
    code = "import sys, bdh.serving.server; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# -------------------------------------------------------------------------------------------------------------- the end


def test_what_is_begun_is_finished(several: Several) -> None:
    """After SIGTERM: those inside stay until they have their answers, those outside stay outside."""
    server = several[0]
    tokens = speed(server, 1.5)
    kept = Wire(server.url)  # a connection that is there already, but asks nothing yet
    stream, whole = begun(server.url, max_tokens=tokens, stream=True), begun(server.url, max_tokens=tokens)
    until_at_work(server, 2)
    server.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 5
    while httpx.get(f"{server.url}/health/ready").status_code == 200:
        assert time.monotonic() < deadline
    refused = httpx.post(f"{server.url}/v1/completions", json=LONG)
    kept.send(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
    for answer in (refused.status_code, refused.headers, refused.json()), told(kept.answer()):
        assert answer[0] == 503 and answer[1]["connection"] == "close" and int(answer[1]["retry-after"]) >= 1
        assert answer[2]["error"]["code"] == "draining"
    assert kept.rest() == b""
    assert httpx.get(f"{server.url}/health/ready").status_code == 503
    assert httpx.get(f"{server.url}/health/live").status_code == 200
    written, streamed = whole.answer(), stream.answer()
    ended(server, 5)
    assert json.loads(written.body)["usage"]["completion_tokens"] == tokens
    assert streamed.body.endswith(b"data: [DONE]\n\n") and streamed.body.count(b"data: ") > 10
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health/live")


def told(answer: Answer) -> tuple[int, dict[str, str], Any]:
    return answer.status, answer.headers, json.loads(answer.body)


def speed(server: Running, seconds: float) -> int:
    """How many tokens are written in so many seconds, about."""
    begin = time.monotonic()
    assert httpx.post(f"{server.url}/v1/completions", json={**LONG, "max_tokens": 300}, timeout=60).status_code == 200
    return round(300 * seconds / (time.monotonic() - begin))


def taking_nothing(url: str) -> Wire:
    """A client that is sent more than the system buffers, and takes none of it."""
    body = json.dumps({"model": "tiny", "prompt": "é" * 140_000}).encode()
    connection = Wire(url, receive_buffer=4096)
    connection.send(b"POST /v1/tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
    connection.send(f"Content-Length: {len(body)}\r\n\r\n".encode(), body)
    assert connection.socket.recv(15) == b"HTTP/1.1 200 OK"
    return connection


@pytest.mark.parametrize(
    ("drain", "signals"),
    [
        pytest.param(0.5, [signal.SIGTERM], id="when-the-time-is-over"),
        pytest.param(60, [signal.SIGINT, signal.SIGINT], id="at-the-second-signal"),
    ],
)
def test_what_takes_too_long_is_cut_off(
    export: Path, tmp_path: Path, drain: float, signals: list[signal.Signals]
) -> None:
    flags = ["--serve.drain_seconds", drain, "--max_batch_size", 2, "--serve.requests.max_prompt_tokens", 300_000]
    with running(tmp_path, "--model", export, *flags) as server:
        inside = [begun(server.url, stream=stream) for stream in (True, False, True, False)]  # two of them wait
        silent, stuck = Wire(server.url), taking_nothing(server.url)
        until_at_work(server, 4)
        for one in signals:
            server.process.send_signal(one)
            time.sleep(0.3)
        answers = [connection.answer() for connection in inside]
        ended(server, 8)
        assert silent.rest() == b""
        stuck.close()
        assert "Waiting for connections to close" in server.log.read_text()  # for the one that is stuck
    for answer in answers:
        last = answer.body if answer.status == 503 else answer.body.rpartition(b"data: ")[2]
        assert json.loads(last)["error"]["code"] == "draining"
    assert [answer.status for answer in answers] == [200, 503, 200, 503]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_while_it_loads(export: Path, tmp_path: Path, how: signal.Signals) -> None:
    """And does not wait until it has loaded."""
    with running(tmp_path, "--model", export, ready=False) as server:
        assert httpx.get(f"{server.url}/health/ready").status_code == 503
        server.process.send_signal(how)
        ended(server, 8)
        assert "is ready after" not in server.log.read_text()


# ------------------------------------------------------------------------------------------------ what cannot be served


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", "there is no model to serve; name one: --model DIR"),
        ("--model a=", "names no folder"),
        ("--model", "names no folder"),
        ("--model --port 0", "--model is followed by --port"),
        ("--model ../a=tiny", "the model's name is '../a'"),
        ("--model tiny --model x/tiny", "two models are called tiny; give them names: --model NAME=DIR"),
        ("--config twice.yaml", "two models are called a"),
        ("--model tiny,dtype=float16", "dtype is float16; it must be one of auto, float32, bfloat16"),
        ("--model tiny,speed=9", "speed is not a setting of a model; there are device, dtype"),
        ("--model tiny,max_batch_size=0", "serve.models.tiny.max_batch_size is 0; it must be more than 0"),
        ("--model tiny --port 99999", "serve.port is 99999; it must be from 0 to 65535"),
        ("--model tiny --port x", "serve.port is x; it must be a whole number"),
        ("--model tiny --prot 80", "--prot is not an option; did you mean --serve.port?"),
        ("--model tiny --serve.requests.secnods 3", "did you mean --serve.requests.seconds?"),
        ("--model tiny --serve.requests.seconds 0", "serve.requests.seconds is 0.0; it must be more than 0"),
        ("--model tiny --serve.requests.seconds nan", "serve.requests.seconds is nan; it must be a number"),
        ("--model tiny --serve.drain_seconds -1", "serve.drain_seconds is -1.0; it must be at least 0"),
        ("--model tiny --serve.cors.origins x", "serve.cors.origins is x; it must be a list"),
        ("--model tiny --quantization int3", "it must be one of none, int8, int4; did you mean int8?"),
        ("--config typo.yaml", "serve.prot is not a setting; did you mean serve.port?"),
        ("--config train.yaml --model tiny", "model.n_layer is not a setting"),
        ("--config nothing.yaml --model tiny", "--config nothing.yaml does not exist"),
    ],
)
def test_a_setting_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("typo.yaml").write_text("serve:\n  prot: 5\n")
    Path("train.yaml").write_text("model:\n  n_layer: 3\n")
    Path("twice.yaml").write_text('serve:\n  models: [{"path": "x", "name": "a"}, {"path": "y", "name": "a"}]\n')
    with pytest.raises(BDHError) as refused:
        validate(parsed_config(argv.split()))
    assert words in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_variables_of_other_commands_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDH_MODEL", "abc")
    monkeypatch.setenv("BDH_TRAINING__SEED", "1")
    assert parsed_config([]).models == []


def refusal(*argv: object, cwd: Path, **variables: str) -> str:
    """The one line that a server which cannot begin says."""
    done = run_bdh("serve", *argv, cwd=cwd, env=environment(**variables))
    assert done.returncode == 2 and done.stdout == "", done
    lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]  # what it logged before
    assert len(lines) == 1 and lines[0].startswith("bdh serve: error: "), done.stderr
    assert "Traceback" not in done.stderr and len(lines[0]) < 400
    return lines[0].removeprefix("bdh serve: error: ")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--model nothing", "--model nothing is no folder of an export"),
        ("--model empty", "--model empty is no folder of an export: there is no config.json in it"),
        ("--model EXPORT --keys_file nothing.json", "the file of API keys nothing.json does not exist; make it with:"),
        ("--model EXPORT --serve.limits.requests_per_minute 0", "it must be at least 1, or null for any number"),
        ("--model EXPORT --serve.sessions.folder file.txt/x", "serve.sessions.folder file.txt/x cannot be used"),
        ("--model EXPORT --host no-such-host.invalid", "cannot be listened on"),
        ("--config five.yaml", "serve in five.yaml is 5; it must be a section with settings below it"),
        ("--config nameless.yaml", "a path is missing in the settings"),
    ],
)
def test_what_cannot_begin_says_why_in_one_line(export: Path, tmp_path: Path, argv: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / "five.yaml").write_text("serve: 5\n")
    (tmp_path / "nameless.yaml").write_text("serve:\n  models:\n    - name: dragon\n")
    assert words in refusal(*argv.replace("EXPORT", str(export)).split(), cwd=tmp_path)


def test_a_misspelt_variable_is_refused(tmp_path: Path) -> None:
    told = refusal("--model", "tiny", cwd=tmp_path, BDH_SERVE__PROT="80")
    assert told == "the environment variable BDH_SERVE__PROT is not a setting; did you mean BDH_SERVE__PORT?"


def test_a_port_that_is_taken(export: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = refusal("--model", export, "--port", port, cwd=tmp_path)
    assert told == f"127.0.0.1:{port} cannot be listened on: Address already in use; choose another --host or --port"


def test_weights_that_are_damaged(export: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(export, broken)
    os.truncate(broken / "model.safetensors", (broken / "model.safetensors").stat().st_size // 2)
    told = refusal("--model", f"good={export}", "--model", "broken", "--port", 0, cwd=tmp_path)
    assert told.startswith("the model broken cannot be served: the weights in broken cannot be loaded")


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["shapes", "kind", "no-weights", "no-tokenizer"])
def test_other_folders_that_are_no_export(export: Path, tmp_path: Path, harm: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(export, broken)
    config = json.loads((broken / "config.json").read_text())
    match harm:
        case "shapes":
            (broken / "config.json").write_text(json.dumps({**config, "n_embd": 32}))
        case "kind":
            (broken / "config.json").write_text('{"model_type": "gpt2"}')
        case "no-weights":
            (broken / "model.safetensors").unlink()
        case "no-tokenizer":
            (broken / "tokenizer.json").unlink()
            (broken / "tokenizer_config.json").unlink()
    assert refusal("--model", "broken", "--port", 0, cwd=tmp_path).startswith("the model broken cannot be served: ")


@pytest.mark.slow
def test_it_begins_and_ends_again_and_again(export: Path, tmp_path: Path) -> None:
    """And leaves nothing behind: no threads that keep it, no folders of sessions."""
    for how in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        with running(tmp_path, "--model", export, "--serve.sessions.folder", tmp_path / "sessions") as server:
            httpx.post(f"{server.url}/v1/sessions", json={"model": "tiny"})
            busy = threading.Thread(target=lambda: begun(server.url, stream=True).answer())
            busy.start()
            until_at_work(server, 1)
            server.process.send_signal(how)
            time.sleep(0.3)  # or both would be one
            server.process.send_signal(how)
            ended(server, 8)
            busy.join()
        left = {path.name for path in (tmp_path / "sessions").iterdir()}
        assert left <= {"saved"}, left
