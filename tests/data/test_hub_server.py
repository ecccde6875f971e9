"""The loopback hub is believed by the real libraries: what it serves loads, what it refuses fails as it does online."""

import gzip
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from tests.data.hub import TOKEN, Hub

CARD = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: small/train-*.parquet}
  - {split: validation, path: small/validation-*.parquet}
- config_name: large
  data_files:
  - {split: train, path: large/*.parquet}
---
# Texts
"""

# Retries keep their number and lose their waits: otherwise one refused call takes 23 seconds.
START = """
import json
from huggingface_hub.utils import http_backoff, http_stream_backoff
for call in (http_backoff, http_stream_backoff):
    getattr(call, "__wrapped__", call).__kwdefaults__ |= {"base_wait_time": 0, "max_wait_time": 0}
from datasets import load_dataset
from transformers import AutoTokenizer

def texts(path, *args, **options):
    return [row["text"] for row in load_dataset(path, *args, **options)]

def failure(call, *args, **options):
    try:
        return f"no failure: {call(*args, **options)}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"

answer = {}
"""


def put(folder: Path, files: Mapping[str, str | bytes | list[str]]) -> None:
    """Writes a repository; a list becomes a parquet file with a row group for every hundred texts."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            pq.write_table(pa.table({"text": content}), folder / name, row_group_size=100)
        else:
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets, one of them also at an older revision, and a tokenizer; no test changes them."""
    root = tmp_path_factory.mktemp("repositories")
    shards: dict[str, str | bytes | list[str]] = {
        "README.md": CARD,
        "small/train-0.parquet": ["a dragon", "an egg"],
        "small/train-1.parquet": ["a nest"],
        "small/validation-0.parquet": ["a wing"],
        "large/0.parquet": [f"{n} {'ember' * 40}" for n in range(500)],
    }
    put(root / "datasets/owner/texts", shards)
    put(root / "datasets/owner/texts@v1", {**shards, "large/0.parquet": ["older"]})
    put(root / "datasets/owner/gated", shards)
    lines = "".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(3))
    put(root / "datasets/owner/lines", {"train.jsonl.gz": gzip.compress(lines.encode())})
    words = Tokenizer(WordLevel({"[UNK]": 0, "dragon": 1, "egg": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    settings = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"})
    for name in ("words", "gated"):
        put(root / f"models/owner/{name}", {"tokenizer.json": words.to_str(), "tokenizer_config.json": settings})
    return root


@pytest.fixture
def hub(root: Path) -> Iterator[Hub]:
    with Hub(root, gated=frozenset({"owner/gated"})) as hub:
        yield hub


def run(hub: Hub, folder: Path, script: str, **changes: str) -> dict[str, Any]:
    """What the script puts into `answer`, run in a process that knows no hub but this one."""
    command = [sys.executable, "-c", f"{START}\n{script}\nprint(json.dumps(answer))"]
    environment = {**hub.environment(folder / "home"), **changes}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def ask(
    hub: Hub, path: str, method: str = "GET", data: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """A request of our own, for what the libraries do not ask today and may tomorrow."""
    request = urllib.request.Request(hub.endpoint + path, data, headers, method=method)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=20) as reply:
            return reply.status, dict(reply.headers), reply.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def test_datasets_and_a_tokenizer_load(hub: Hub, tmp_path: Path) -> None:
    script = f"""
for streaming in (True, False):
    how = {{"streaming": streaming}}
    answer[f"data {{streaming}}"] = [
        texts("owner/texts", "small", split="train", **how),
        texts("owner/texts", name="small", split="validation", **how),
        len(texts("owner/texts", "large", split="train", revision="main", **how)),
        texts("owner/texts", "large", split="train", revision="v1", **how),
        texts("owner/lines", split="train", **how),
        texts("owner/gated", "small", split="validation", token="{TOKEN}", **how),
    ]
answer["ids"] = AutoTokenizer.from_pretrained("owner/words")("egg dragon wing")["input_ids"]
"""
    answer = run(hub, tmp_path, script)
    lines = ["line 0", "line 1", "line 2"]
    expected = [["a dragon", "an egg", "a nest"], ["a wing"], 500, ["older"], lines, ["a wing"]]
    assert answer == {"data True": expected, "data False": expected, "ids": [2, 1, 0]}
    fetched = [r for r in hub.requests if r.method == "GET" and r.path.endswith((".parquet", ".gz")) and r.sent]
    statuses = [request.status for request in fetched]
    assert statuses == sorted(statuses, reverse=True) and {*statuses} == {206, 200}  # parts first, then whole files


def test_what_is_refused_fails_with_its_reason(hub: Hub, tmp_path: Path) -> None:
    script = """
for streaming in (True, False):
    how = {"split": "train", "streaming": streaming}
    answer[f"data {streaming}"] = [
        failure(texts, "owner/gated", "small", **how),
        failure(texts, "owner/gated", "small", token="hf_other", **how),
        failure(texts, "owner/unknown", **how),
        failure(texts, "owner/unknown", token="hf_other", **how),
        failure(texts, "owner/texts", "small", revision="v9", **how),
    ]
load = AutoTokenizer.from_pretrained
answer["tokenizer"] = [
    failure(load, "owner/gated"), failure(load, "owner/unknown"), failure(load, "owner/words", revision="v9")
]
"""
    answer = run(hub, tmp_path, script)
    for given in (answer["data True"], answer["data False"]):
        assert all(line.startswith("DatasetNotFoundError: ") for line in given), given
        reasons = ["must be authenticated", "ask for access", "doesn't exist", "doesn't exist", "Revision 'v9' doesn't"]
        assert all(reason in line for reason, line in zip(reasons, given, strict=True)), given
    reasons = ["gated repo", "not a valid model identifier", "v9 is not a valid git identifier"]
    assert all(reason in line for reason, line in zip(reasons, answer["tokenizer"], strict=True)), answer["tokenizer"]
    seen = {(request.path.split("/resolve/")[0], request.status) for request in hub.requests}
    assert {("/datasets/owner/gated", 401), ("/datasets/owner/gated", 403), ("/owner/gated", 401)} <= seen
    assert {("/datasets/owner/unknown", 401), ("/datasets/owner/unknown", 404), ("/datasets/owner/texts", 404)} <= seen


@pytest.mark.parametrize("listening", [True, False])
def test_a_broken_hub_and_no_hub_fail(root: Path, tmp_path: Path, listening: bool) -> None:
    script = """
answer["data"] = [failure(texts, "owner/texts", "small", split="train", streaming=streaming) for streaming in (1, 0)]
answer["tokenizer"] = failure(AutoTokenizer.from_pretrained, "owner/words")
"""
    with Hub(root, broken=True) as hub:
        if not listening:
            hub.close()
        answer = run(hub, tmp_path, script)
    kind = "FileNotFoundError: Couldn't find" if listening else "ConnectionError: Couldn't reach"
    assert all(line.startswith(kind) for line in answer["data"]), answer
    assert "couldn't connect to" in answer["tokenizer"], answer
    assert {request.status for request in hub.requests} == ({500} if listening else set())


def test_files_are_served_whole_and_in_parts(hub: Hub, root: Path) -> None:
    address, file = "/datasets/owner/texts/resolve/main/large/0.parquet", root / "datasets/owner/texts/large/0.parquet"
    content, size = file.read_bytes(), file.stat().st_size
    status, headers, body = ask(hub, address, "HEAD")
    assert (status, body) == (200, b"") and hub.requests[-1].sent == 0
    assert headers["X-Linked-Size"] == headers["Content-Length"] == str(size) and headers["ETag"].startswith('"')
    assert ask(hub, address)[::2] == (200, content)
    deadline = time.monotonic() + 10  # the server counts what it has sent a moment after it is here
    while hub.requests[-1].sent < size and time.monotonic() < deadline:
        time.sleep(0.01)
    assert hub.requests[-1].sent == size
    for wanted, part in {"5-9": content[5:10], "7-": content[7:], "-8": content[-8:], "0-999999": content}.items():
        status, headers, body = ask(hub, address, Range=f"bytes={wanted}")
        assert (status, body) == (206, part) and headers["Content-Range"].endswith(f"/{size}")
    status, headers, _ = ask(hub, address, Range=f"bytes={size}-")
    assert (status, headers["Content-Range"]) == (416, f"bytes */{size}")


def test_listings_follow_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "datasets/owner/data"
    put(folder, {"README.md": "# Data\n", "a/b/c.txt": "c"})
    with Hub(tmp_path) as hub:

        def listed(path: str, data: bytes | None = None) -> Any:
            return json.loads(ask(hub, f"/api/datasets/owner/data{path}", data=data)[2])

        before = listed("")["sha"]
        assert [entry["path"] for entry in listed("/tree/main")] == ["README.md", "a"]
        assert [entry["path"] for entry in listed("/tree/main/a?recursive=True")] == ["a/b", "a/b/c.txt"]
        assert [entry["type"] for entry in listed("/tree/main/a%2Fb")] == ["file"]
        kinds = [entry["type"] for entry in listed("/paths-info/main", b"paths=a&paths=README.md&paths=none")]
        assert kinds == ["directory", "file"]
        status, headers, _ = ask(hub, "/api/datasets/owner/data/tree/main/none")
        assert (status, headers["X-Error-Code"], headers["X-Repo-Commit"]) == (404, "EntryNotFound", before)
        put(folder, {"a/b/c.txt": "changed"})
        assert listed("")["sha"] == listed("/revision/main")["sha"] != before
        assert ask(hub, f"/api/datasets/owner/data/revision/{before}")[1]["X-Error-Code"] == "RevisionNotFound"


def test_the_environment_knows_this_hub_only(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strange = {"HTTPS_PROXY": "http://proxy", "no_proxy": "*", "HF_TOKEN": "hf_mine", "HF_HUB_OFFLINE": "1"}
    for name, value in {**strange, "HF_ENDPOINT": "https://elsewhere", "HF_HUB_CACHE": "/elsewhere"}.items():
        monkeypatch.setenv(name, value)
    environment = hub.environment(tmp_path)
    assert not {*strange, "HF_HUB_CACHE"} & {*environment}
    assert (environment["HF_ENDPOINT"], environment["HF_HOME"]) == (hub.endpoint, str(tmp_path))
