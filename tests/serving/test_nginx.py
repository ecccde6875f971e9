"""Two real replicas behind a real nginx with the shipped configuration: who gets what, and what a death costs."""

import asyncio
import json
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.nginx import NGINX, Nginx, free_ports
from tests.serving.running import Running, running

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NGINX is None, reason="nginx is not installed")]

KEYS = [f"key-{i}-of-the-test-{i}" for i in range(8)]
COMPLETIONS = "/v1/completions"


class Site:
    """Two replicas and nginx before them."""

    def __init__(self, folder: Path, export: Path):
        self.folder, self.export = folder, export
        self.port, *self.ports = free_ports(3)
        self.url = f"http://127.0.0.1:{self.port}"
        self.stack = ExitStack()
        self.replicas: list[Running] = []

    def __enter__(self) -> "Site":
        self.replicas = [self.start(port) for port in self.ports]
        for replica in self.replicas:
            replica.wait_until_ready()
        self.stack.enter_context(Nginx(self.folder, self.port, (self.ports[0], self.ports[1])))
        for _ in range(200):
            try:
                if httpx.get(f"{self.url}/health/ready").status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.02)
        raise AssertionError((self.folder / "stderr").read_text())

    def __exit__(self, *what: object) -> None:
        self.stack.close()

    def start(self, port: int) -> Running:
        keys = ",".join(f"user-{i}:{key}" for i, key in enumerate(KEYS))
        settings = ("--serve.sessions.folder", self.folder / f"sessions-{port}", "--max_batch_size", 8)
        arguments = ("--model", f"tiny={self.export}", "--port", port, *settings)
        return self.stack.enter_context(running(self.folder, *arguments, ready=False, BDH_API_KEYS=keys))

    def requests(self, path: str) -> list[dict[str, Any]]:
        """What nginx has logged about requests for this path."""
        time.sleep(0.05)  # it writes when an answer is complete, which its client may know first
        lines = [json.loads(line) for line in (self.folder / "stdout").read_text().splitlines()]
        return [line for line in lines if line["path"] == path]

    def used(self, path: str) -> list[str]:
        """The replicas that got these requests."""
        return [line["replica"] for line in self.requests(path)]

    def inside(self) -> list[float]:
        """Continuations in work, of each replica that lives."""
        return [one.metric("bdh_engine_running") for one in self.replicas if one.process.poll() is None]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, export: Path) -> Iterator[Site]:
    with Site(tmp_path_factory.mktemp("nginx"), export) as made:
        yield made


def client(site: Site, key: int = 0, **headers: str) -> httpx.Client:
    return httpx.Client(base_url=site.url, headers={"Authorization": f"Bearer {KEYS[key]}", **headers}, timeout=30)


def asked(tokens: int, **more: object) -> dict[str, Any]:
    """A request for so many tokens."""
    return {"model": "tiny", "prompt": "abc", "max_tokens": tokens, "ignore_eos": True, "seed": 1, **more}


def test_streams_come_as_they_are_written_and_end_when_their_client_goes(site: Site) -> None:
    with client(site) as one, one.stream("POST", COMPLETIONS, json=asked(60000, stream=True)) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        assert [next(lines)[:6] for _ in range(20)].count("data: ") == 10  # each is followed by an empty line
        assert sum(site.inside()) == 1
    for replica in site.replicas:
        replica.wait_until_idle()
    assert sum(one.metric("bdh_client_disconnects_total") for one in site.replicas) == 1


def test_requests_go_to_both_and_keep_their_ids(site: Site) -> None:
    with client(site) as one:
        for i in range(6):
            answer = one.post(COMPLETIONS, json=asked(3), headers={"X-Request-ID": f"request-{i}"})
            assert answer.headers["x-request-id"] == f"request-{i}"
        odd = one.post(COMPLETIONS, json=asked(3), headers={"X-Request-ID": "no id"})
    lines = site.requests(COMPLETIONS)
    assert len({line["replica"] for line in lines}) == 2
    assert "request-5" in [line["request_id"] for line in lines]
    assert lines[-1]["request_id"] == odd.headers["x-request-id"] != "no id"
    told = "".join(replica.log.read_text() for replica in site.replicas)
    assert all(f'"request-{i}"' in told for i in range(6))
    assert not any(key in (site.folder / "stdout").read_text() for key in KEYS)


def test_sessions_stay_with_their_replica_whoever_asks(site: Site) -> None:
    def talk(one: httpx.Client, name: str) -> str:
        """Says something twice in a new session; the address of the replica that had it."""
        session = one.post("/v1/sessions", json={"model": "tiny", "name": name})
        assert session.status_code == 201, session.text
        path = f"/v1/sessions/{session.json()['id']}"
        for _ in range(2):
            answer = one.post(f"{path}/messages", json={"content": "Hi", "max_tokens": 4})
            assert answer.status_code == 200, answer.text
        assert one.get(path).json()["position"] > 0
        assert session.json()["id"] in [each["id"] for each in one.get("/v1/sessions").json()["data"]]
        (replica,) = set(site.used(path))
        return replica

    by_key = []
    for key in range(len(KEYS)):
        with client(site, key) as one:
            by_key.append(talk(one, "by-key"))
    assert len(set(by_key)) == 2
    by_header = []
    for i in range(8):
        with client(site, 0, **{"X-BDH-Session": f"talk-{i}"}) as one:
            by_header.append(talk(one, "by-header"))
    assert len(set(by_header)) == 2


def test_a_page_talks_to_one_replica(site: Site) -> None:
    seen = set()
    for _ in range(6):
        with client(site) as browser:
            cookie = browser.get("/").headers["set-cookie"]
            assert cookie.startswith("bdh_client=") and "HttpOnly" in cookie and "SameSite=Strict" in cookie
            assert "set-cookie" not in browser.get("/").headers
            ids = [browser.post(COMPLETIONS, json=asked(3)).headers["x-request-id"] for _ in range(3)]
            browser.get("/v1/brain/trc_0")
        (replica,) = {line["replica"] for line in site.requests(COMPLETIONS) if line["request_id"] in ids}
        assert site.used("/v1/brain/trc_0")[-1] == replica
        seen.add(replica)
    assert len(seen) == 2


def test_what_nginx_itself_refuses_is_told_as_clients_know_it(site: Site) -> None:
    with client(site) as one:
        for answer, status in (
            (one.get("/metrics"), 404),
            (one.post(COMPLETIONS, content=b"x" * ((4 << 20) + 1)), 413),
            (one.post(COMPLETIONS, content=b"x" * (4 << 20)), 400),  # this one by a replica
        ):
            assert answer.status_code == status
            assert answer.headers["content-type"] == "application/json"
            assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


# --------------------------------------------------------------------------------------------------------------- deaths


@dataclass
class Outcome:
    """What became of a stream."""

    began: float
    ended: float
    whole: bool
    status: int | None
    text: str


async def stream_once(one: httpx.AsyncClient, tokens: int) -> Outcome:
    began, status, text = time.monotonic(), None, ""
    try:
        async with one.stream("POST", COMPLETIONS, json=asked(tokens, stream=True)) as answer:
            status = answer.status_code
            async for line in answer.aiter_lines():
                if line.startswith("data: {") and status == 200:
                    text += json.loads(line[6:])["choices"][0]["text"]
                elif line == "data: [DONE]":
                    return Outcome(began, time.monotonic(), True, status, text)
    except httpx.TransportError:
        pass
    return Outcome(began, time.monotonic(), False, status, text)


async def load(site: Site, stop: asyncio.Event, clients: int, tokens: int) -> list[Outcome]:
    """Clients that ask one thing after another until they are told to stop."""
    outcomes: list[Outcome] = []
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    async with httpx.AsyncClient(base_url=site.url, headers=headers, timeout=60) as one:

        async def ask() -> None:
            for _ in range(10_000):
                if stop.is_set():
                    return
                outcomes.append(await stream_once(one, tokens))

        await asyncio.gather(*(ask() for _ in range(clients)))
    return outcomes


def test_a_killed_replica_costs_its_own_streams_and_nothing_else(tmp_path: Path, export: Path) -> None:
    async def scenario(site: Site) -> tuple[list[Outcome], float]:
        stop = asyncio.Event()
        work = asyncio.create_task(load(site, stop, clients=12, tokens=300))
        await asyncio.sleep(2)
        for _ in range(500):
            inside = await asyncio.to_thread(site.inside)
            if min(inside) > 1:
                break
        assert min(inside) > 1, inside
        site.replicas[0].process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        await asyncio.sleep(3)
        stop.set()
        return await work, killed

    with Site(tmp_path, export) as site:
        outcomes, killed = asyncio.run(scenario(site))
        broken = [one for one in outcomes if not one.whole]
        assert broken, "nothing was in work at the replica that died"
        for one in broken:  # its own requests end at once, and never as if they were whole
            assert one.began < killed + 0.1 and killed - 0.1 < one.ended < killed + 1, (one, killed)
            assert one.status in (None, 200, 502)
        unaffected = [one for one in outcomes if one.began < killed < one.ended and one.whole]
        assert unaffected, "nothing was in work at the replica that lives"
        later = [one for one in outcomes if one.began > killed + 0.1]
        assert len(later) > 12 and all(one.status == 200 for one in later)
        (text,) = {one.text for one in outcomes if one.whole}  # the same seed: nobody got anything of another's
        assert len(text) > 100 and all(text.startswith(one.text) for one in broken)
        site.replicas[1].wait_until_idle()

        site.replicas[0] = site.start(site.ports[0])
        site.replicas[0].wait_until_ready()
        with client(site) as asking:
            deadline = time.monotonic() + 15
            while not site.replicas[0].metric("bdh_engine_finished_total"):  # it is used again by and by
                assert asking.post(COMPLETIONS, json=asked(3)).status_code == 200
                assert time.monotonic() < deadline
                time.sleep(0.1)


def test_draining_and_absence(tmp_path: Path, export: Path) -> None:
    with Site(tmp_path, export) as site, client(site) as asking:
        long = [asking.stream("POST", COMPLETIONS, json=asked(3000, stream=True)) for _ in range(2)]
        with long[0] as first, long[1] as second:
            assert site.inside() == [1, 1]
            site.replicas[0].process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            for _ in range(10):  # what a draining replica turns away goes to the other
                assert asking.post(COMPLETIONS, json=asked(3)).status_code == 200
            for answer in (first, second):
                assert [line for line in answer.iter_lines() if line][-1] == "data: [DONE]"
        assert site.replicas[0].process.wait(20) == 0
        assert asking.get("/v1/models").status_code == 200
        site.replicas[1].stop()
        for answer in (asking.get("/v1/models"), asking.post(COMPLETIONS, json=asked(3))):
            assert answer.status_code == 502
            assert answer.json()["error"]["code"] == "no_replica"
            assert answer.headers["retry-after"] == "2"
