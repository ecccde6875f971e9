"""`bdh serve --ray`: real replicas under a real Ray on this machine."""

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from bdh.errors import BDHError
from bdh.serving.api.errors import ApiError
from bdh.serving.config import RaySettings
from bdh.serving.ray.deployment import check
from bdh.serving.sessions.ids import check_place, new_id, place_in, place_of_replica
from tests.conftest import environment
from tests.serving.running import Running, running

SECRET = "ray-test-secret-0123456789"
KEY = {"Authorization": f"Bearer {SECRET}"}
LONG = {"model": "tiny", "prompt": "abc", "max_tokens": 60000, "ignore_eos": True}


# --------------------------------------------------------------------------------------------------------- without Ray


def test_settings_that_cannot_be() -> None:
    for settings, words in (
        (RaySettings(min_replicas=0), "serve.ray.min_replicas is 0; it must be more than 0"),
        (RaySettings(min_replicas=3, max_replicas=2), "it must be at least serve.ray.min_replicas, which is 3"),
        (RaySettings(target_queue=float("nan")), "serve.ray.target_queue is nan"),
        (RaySettings(gpus=-1), "serve.ray.gpus is -1"),
    ):
        with pytest.raises(BDHError, match=re.escape(words)):
            check(settings)
    check(RaySettings())


def test_without_ray_installed(tmp_path: Path) -> None:
    code = "import sys; sys.modules['ray'] = None; from bdh.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "serve", "--ray", "--model", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "bdh serve: error: --ray needs Ray Serve, which is not installed; " + (
        "install it: pip install 'bdh[ray]'\n"
    )


def test_ids_say_where() -> None:
    here, there = place_of_replica("a1b2c3d4"), place_of_replica("e5f6g7h8")
    id = new_id("ses", here)
    assert re.fullmatch("ses_[0-9a-f]{32}", id) and place_in(id) == here != there
    assert re.fullmatch("trc_[0-9a-f]{32}", new_id("trc", "")) and place_in("ses_nothing") is None
    check_place(id, here, "")
    check_place(id, "", "")  # of a server that is alone
    check_place("ses_nothing", there, "")  # nobody's: 404, from whoever is asked
    with pytest.raises(ApiError, match="was on a replica that is gone; reopen it") as raised:
        check_place(id, there, "reopen it")
    assert (raised.value.status, raised.value.code) == (410, "session_gone")


# ------------------------------------------------------------------------------------------------------------ with Ray


class Replicas(Running):
    """What `bdh serve --ray` runs."""

    def client(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={**KEY, **headers}, timeout=60)

    def openai(self, key: str = SECRET) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def names(self) -> set[str]:
        """Of the replicas that answer."""
        return set(re.findall(r'bdh_build_info\{replica="(\w+)"', httpx.get(f"{self.url}/metrics").text))

    def processes(self, name: str = "") -> list[Any]:
        """Those of Ray whose titles begin so."""
        psutil = pytest.importorskip("psutil")
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if " ".join(child.cmdline()).startswith(name)]

    def wait(self, what: Callable[[], bool], seconds: float) -> float:
        """Waits until it is so; how long it took."""
        start = time.monotonic()
        while not what():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() - start < seconds, self.log.read_text()[-5000:]
            time.sleep(0.05)
        return time.monotonic() - start


@pytest.fixture(scope="module")
def replicas(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    """One replica, and another one as soon as there is more to do."""
    pytest.importorskip("ray")
    folder = tmp_path_factory.mktemp("ray")
    options = {
        "--serve.ray.max_replicas": 2,
        "--serve.ray.target_queue": 2,
        "--serve.sessions.folder": folder / "sessions",
        "--serve.requests.body_seconds": 2,
    }
    flat = [part for option in options.items() for part in option]
    with running(folder, "--ray", "--model", f"tiny={export}", *flat, patience=150, BDH_API_KEYS=SECRET) as server:
        it = Replicas(server.process, server.log)
        with load(it, 6) as failures:
            it.wait(lambda: len(it.names()) == 2, 90)
        assert failures == []
        it.wait_until_idle()
        yield it


@contextmanager
def load(replicas: Replicas, clients: int) -> Iterator[list[str]]:
    """So many clients, who never stop asking within it; what they complain about."""
    failures: list[str] = []
    over = threading.Event()

    def ask() -> None:
        with replicas.client() as client:
            while not over.is_set():
                answer = client.post("/v1/completions", json={**LONG, "max_tokens": 200})
                if answer.status_code != 200:
                    failures.append(f"{answer.status_code} {answer.text}")
                    return

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield failures
    finally:
        over.set()
        for thread in threads:
            thread.join()


@pytest.mark.slow
class TestReplicas:
    def test_openai_client(self, replicas: Replicas) -> None:
        client = replicas.openai()
        messages: Any = [{"role": "user", "content": "Hello"}]
        whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, seed=1, temperature=0)
        chunks = list(
            client.chat.completions.create(
                model="tiny", messages=messages, max_tokens=8, seed=1, temperature=0, stream=True
            )
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
        assert [model.id for model in client.models.list()] == ["tiny"]
        with pytest.raises(openai.NotFoundError, match="there is no model 'huge' here; there is tiny"):
            client.completions.create(model="huge", prompt="a")
        with pytest.raises(openai.AuthenticationError, match="this API key is not known here"):
            replicas.openai("wrong-key-0123456789").models.list()

    def test_all_replicas_get_work(self, replicas: Replicas) -> None:
        client = replicas.openai()
        seen = {
            client.completions.with_raw_response.create(model="tiny", prompt="a", max_tokens=1).headers["x-replica"]
            for _ in range(30)
        }
        assert seen == replicas.names()
        for name in seen:
            assert replicas.metric("bdh_usage_completion_tokens_total", replica=name) > 0

    def test_sessions_stay_where_they_are(self, replicas: Replicas) -> None:
        with replicas.client() as client:
            homes = sessions_everywhere(client)
            position: dict[str, int] = defaultdict(int)
            for _ in range(10):
                for id, home in homes.items():
                    said = client.post(f"/v1/sessions/{id}/messages", json={"content": "go on", "max_tokens": 2})
                    assert (said.status_code, said.headers["x-replica"]) == (200, home), said.text
                    now = client.get(f"/v1/sessions/{id}").json()["position"]
                    assert now > position[id]
                    position[id] = now
            listed = {one["id"]: one["position"] for one in client.get("/v1/sessions").json()["data"]}
            assert {id: listed[id] for id in homes} == position
            first, *_ = homes
            assert client.post(f"/v1/sessions/{first}/save", json={"name": "kept"}).status_code == 200
            copies = {client.post("/v1/sessions", json={"model": "tiny", "saved": "kept"}).json()["position"]
                      for _ in range(8)}  # fmt: skip
            assert copies == {position[first]}, "a saved one can be reopened anywhere"
            missing = client.get(f"/v1/sessions/ses_{'0' * 32}")
            assert (missing.status_code, missing.json()["error"]["code"]) == (410, "session_gone")
            assert client.get("/v1/sessions/ses_0").status_code == 404

    def test_traces_stay_where_they_are(self, replicas: Replicas) -> None:
        with replicas.client() as client:
            for _ in range(4):
                asked = {"model": "tiny", "prompt": "abc", "max_tokens": 3, "brain": True}
                trace = client.post("/v1/completions", json=asked).json()["brain"]["trace"]
                for _ in range(4):
                    assert client.get(f"/v1/brain/{trace}").json()["trace"] == trace

    @pytest.mark.parametrize("stream", [False, True])
    def test_who_hangs_up_frees_the_slot(self, replicas: Replicas, stream: bool) -> None:
        headers = {"x-request-disconnect-disabled": "?1"}  # which Ray would obey
        before = replicas.metric("bdh_client_disconnects_total")
        with replicas.client(**headers) as client:
            if stream:
                with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
                    next(answer.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/completions", json=LONG, timeout=0.5)
        replicas.wait_until_idle(5)
        replicas.wait(lambda: replicas.metric("bdh_client_disconnects_total") == before + 1, 5)

    def test_the_gate(self, replicas: Replicas) -> None:
        with replicas.client() as client:
            large = client.post("/v1/completions", content=b" " * (5 << 20))
            assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")
            assert "x-replica" not in large.headers, "no replica had to look at it"
            named = client.get("/v1/models", headers={"x-request-id": "mine"})
            assert named.headers.get_list("x-request-id") == ["mine"]
            assert client.get("/nothing").json()["error"]["code"] == "unknown_url"
            assert client.get("/health/live").json() == {"status": "alive"}
        host, port = replicas.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 10) as slow:
            slow.sendall(b"GET /v1/models HTTP/1.1\r\nhost: slow")
            assert slow.recv(100) == b"", "a head that does not come to its end is not waited for"

    def test_a_replica_that_is_killed(self, replicas: Replicas) -> None:
        before = replicas.names()
        with replicas.client() as client:
            homes = sessions_everywhere(client)
            writers = [Writer(replicas, stream=False) for _ in range(2)]
            while {writer.replica for writer in writers if writer.stream} != before:
                assert len(writers) < 14
                writers.append(Writer(replicas, stream=True))
                replicas.wait(lambda: writers[-1].replica is not None, 5)
            replicas.processes("ray::ServeReplica")[0].kill()
            killed = time.monotonic()
            answers = {id: client.get(f"/v1/sessions/{id}") for id in homes}
            assert time.monotonic() - killed < 5
            gone = {homes[id] for id, answer in answers.items() if answer.status_code == 410}
            assert len(gone) == 1
            for id, answer in answers.items():
                assert answer.status_code == (410 if homes[id] in gone else 200), answer.text
                if homes[id] in gone:
                    assert answer.json()["error"]["code"] == "session_gone"
            for writer in writers:
                writer.join()
                lost = writer.replica in gone and writer.stream
                assert writer.error == ("replica_failed" if lost else None), "others are tried again, or go on"
                assert writer.ended - killed < 5 or not lost
        replicas.wait(lambda: len(replicas.names()) == 2, 60)
        assert len(replicas.names() & before) == 1

    def test_an_end_in_order(self, replicas: Replicas) -> None:
        processes = replicas.processes()
        parts = [re.search("/[^=]*/bdh-ray-[^/]*", part) for one in processes for part in one.cmdline()]
        folder = next(Path(part[0]) for part in parts if part)
        assert folder.stat().st_mode & 0o777 == 0o700
        writers = [Writer(replicas, stream=False, tokens=3000) for _ in range(3)]
        replicas.wait(lambda: replicas.metric("bdh_engine_running") == 3, 10)
        replicas.process.send_signal(signal.SIGTERM)
        replicas.wait(lambda: httpx.get(f"{replicas.url}/health/ready").status_code == 503, 5)
        refused = httpx.get(f"{replicas.url}/v1/models", headers=KEY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        for writer in writers:
            writer.join()
            assert writer.error is None
        assert replicas.process.wait(30) == 0, replicas.log.read_text()
        assert [one for one in processes if one.is_running()] == []
        assert not folder.exists()
        assert not list((replicas.log.parent / "sessions").glob(".*")), "what was put away is gone too"


class Writer(threading.Thread):
    """A client that has a long text written.

    Attributes:
        replica: Which wrote it, or the end of it.
        error: The code of the error that came instead of its end.
        ended: When it was over.
    """

    def __init__(self, replicas: Replicas, stream: bool, tokens: int = 4000):
        super().__init__()
        self.client = replicas.client()
        self.stream = stream
        self.body = {**LONG, "max_tokens": tokens, "stream": stream}
        self.replica: str | None = None
        self.error: str | None = None
        self.start()

    def run(self) -> None:
        with self.client, self.client.stream("POST", "/v1/completions", json=self.body) as answer:
            self.replica = answer.headers.get("x-replica")
            text = answer.read().decode()
        self.ended = time.monotonic()
        if found := re.search(r'"error":\{.*"code":"(\w+)"', text):
            self.error = found[1]
        elif answer.status_code != 200 or (self.stream and not text.endswith("data: [DONE]\n\n")):
            self.error = f"{answer.status_code} {text[-200:]}"


def sessions_everywhere(client: httpx.Client) -> dict[str, str]:
    """New sessions, at least two on each of two replicas: where each is."""
    homes: dict[str, str] = {}
    counts: dict[str, int] = defaultdict(int)
    while len(counts) < 2 or min(counts.values()) < 2:
        made = client.post("/v1/sessions", json={"model": "tiny"})
        assert made.status_code == 201 and len(homes) < 100, made.text
        homes[made.json()["id"]] = made.headers["x-replica"]
        counts[made.headers["x-replica"]] += 1
    return homes
