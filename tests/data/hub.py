"""A Hugging Face Hub on the loopback: enough of it for the unchanged code of `datasets` and `transformers`.

Repositories are folders: ROOT/datasets/OWNER/NAME and ROOT/models/OWNER/NAME hold the branch main, OWNER/NAME@REV by
their side another revision. Every answer is made from the files as they are then, so a test may change them.
"""

import hashlib
import json
import os
import re
import sys
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn
from urllib.parse import parse_qs, quote, unquote, urlsplit

TOKEN = "hf_granted"  # the one token that opens gated repositories

FILE = re.compile(r"/(?:(?P<kind>datasets)/)?(?P<repo>[^/]+/[^/@]+)/(?P<what>resolve)/(?P<revision>[^/]+)/(?P<path>.+)")
API = re.compile(
    r"/api/(?P<kind>datasets|models)/(?P<repo>[^/]+/[^/@]+)"
    r"(?:/(?P<what>revision|tree|paths-info)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?"
)


@dataclass
class Request:
    """One request as it came in, and what went back."""

    method: str
    path: str  # with the query
    range: str = ""
    status: int = 0
    sent: int = 0  # bytes of the body only, so a HEAD sends none


class RefusedError(Exception):
    """An answer other than the one hoped for, with the header by which the libraries tell refusals apart."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message} if code else {}
        self.headers |= {name.replace("_", "-"): value for name, value in headers.items()}


@cache
def _digest(file: Path, size: int, modified: int) -> str:
    """The file's hash; size and time of change are there to make the cache notice a new content."""
    return hashlib.sha1(file.read_bytes()).hexdigest()


class Snapshot:
    """A repository at one revision. The commit follows from the content, so new content is a new commit."""

    def __init__(self, folder: Path) -> None:
        found = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        self.files = {file.relative_to(folder).as_posix(): file for file in found}
        self.folders = {str(parent) for name in self.files for parent in PurePosixPath(name).parents} - {"."}
        listing = "\n".join(f"{name} {self.hash(name)}" for name in self.files)
        self.commit = hashlib.sha1(listing.encode()).hexdigest()

    def hash(self, name: str) -> str:
        stat = self.files[name].stat()
        return _digest(self.files[name], stat.st_size, stat.st_mtime_ns)

    def entry(self, name: str) -> dict[str, Any]:
        """What the listings say about a file or a folder."""
        if name in self.folders:
            return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
        return {"type": "file", "path": name, "oid": self.hash(name), "size": self.files[name].stat().st_size}

    def missing(self, path: str) -> NoReturn:
        raise RefusedError(404, "EntryNotFound", f"{path} does not exist", X_Repo_Commit=self.commit)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes; waiting between them costs 40 ms
    server: "Server"

    def do_GET(self) -> None:
        posted = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        if self.server.hub.closed:
            self.close_connection = True  # connections kept alive end with the server
            return
        request = Request(self.command, self.path, self.headers.get("Range", ""))
        self.server.hub.requests.append(request)
        body: bytes
        try:
            status, headers, body = self.answer(posted)
        except RefusedError as refusal:
            body = json.dumps({"error": str(refusal)}).encode()
            status, headers = refusal.status, {"Content-Type": "application/json", **refusal.headers}
        request.status = status
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            for start in range(0, len(body), 1 << 16):  # in pieces, so that `sent` stops where the client does
                request.sent += self.wfile.write(body[start : start + (1 << 16)])

    do_HEAD = do_POST = do_GET  # noqa: N815 - the names are http.server's

    def answer(self, posted: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body; refusals are raised."""
        if self.server.hub.broken:
            raise RefusedError(500, "", "Internal Error - We're working hard to fix this as soon as possible!")
        url = urlsplit(self.path)
        match = FILE.fullmatch(url.path) or API.fullmatch(url.path)
        if not match:
            raise RefusedError(404, "", "Sorry, we can't find the page you are looking for.")
        what, repo = match["what"], match["repo"]
        path, revision = unquote(match["path"] or ""), unquote(match["revision"] or "main")
        snapshot = self.snapshot(match["kind"] or "models", repo, revision)
        if what == "resolve":
            return self.file(snapshot, repo, path)
        if what == "tree":
            if path and path not in snapshot.folders:
                snapshot.missing(path)
            deep = parse_qs(url.query).get("recursive", ["false"])[0].lower() == "true"
            above = {name: list(map(str, PurePosixPath(name).parents)) for name in {*snapshot.files, *snapshot.folders}}
            inside = [name for name in above if (path or ".") in above[name][: None if deep else 1]]
            reply: Any = [snapshot.entry(name) for name in sorted(inside)]
        elif what == "paths-info":
            known = {*snapshot.files, *snapshot.folders}
            reply = [snapshot.entry(name) for name in parse_qs(posted).get("paths", []) if name in known]
        else:
            gated = "manual" if repo in self.server.hub.gated else False
            reply = {"id": repo, "sha": snapshot.commit, "private": False, "gated": gated, "tags": []}
            reply["siblings"] = [{"rfilename": name} for name in snapshot.files]
        return 200, {"Content-Type": "application/json"}, json.dumps(reply).encode()

    def snapshot(self, kind: str, repo: str, revision: str) -> Snapshot:
        main = self.server.hub.root / kind / repo
        if not main.is_dir():  # without a token the real hub does not even say whether it exists
            raise RefusedError(404 if "Authorization" in self.headers else 401, "RepoNotFound", "Repository not found")
        for folder in [main, *sorted(main.parent.glob(f"{main.name}@*"))]:
            snapshot = Snapshot(folder)
            if revision in (unquote(folder.name.partition("@")[2]) or "main", snapshot.commit):
                return snapshot
        raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {quote(revision)}")

    def file(self, snapshot: Snapshot, repo: str, path: str) -> tuple[int, dict[str, str], bytes]:
        """A file, or the part of it that the Range header asks for."""
        given = self.headers.get("Authorization")
        if repo in self.server.hub.gated and given != f"Bearer {TOKEN}":
            kept = f"Access to {repo} is restricted" + (", ask for access." if given else ". Please log in.")
            raise RefusedError(403 if given else 401, "GatedRepo", kept)
        if path not in snapshot.files:
            snapshot.missing(path)
        body = snapshot.files[path].read_bytes()
        size = len(body)
        headers = {"ETag": f'"{snapshot.hash(path)}"', "X-Repo-Commit": snapshot.commit, "X-Linked-Size": str(size)}
        headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return 200, headers, body
        first, last = wanted.groups()
        start = int(first) if first else max(0, size - int(last or 0))
        end = min(size, int(last) + 1) if first and last else size
        if start >= end:
            raise RefusedError(416, "", "Range Not Satisfiable", Content_Range=f"bytes */{size}")
        return 206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{size}"}, body[start:end]

    def log_message(self, format: str, *args: object) -> None:
        return None


class Server(ThreadingHTTPServer):
    hub: "Hub"
    request_queue_size = 64  # the libraries list folders with 16 threads

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle of an answer, as streaming ones do, is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Hub(AbstractContextManager["Hub"]):
    """The server; it runs from construction to `close`. `gated` names OWNER/NAME, `broken` may be switched later."""

    def __init__(self, root: Path, gated: frozenset[str] = frozenset(), broken: bool = False) -> None:
        self.root, self.gated, self.broken, self.closed = root, gated, broken, False
        self.requests: list[Request] = []
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def environment(self, home: Path) -> dict[str, str]:
        """A whole environment for a process that knows this hub only and keeps what it fetches in `home`."""
        strange = re.compile(r"(HF|HUGGING_?FACE|TRANSFORMERS|BDH)_.*|.*_PROXY", re.IGNORECASE)
        kept = {name: value for name, value in os.environ.items() if not strange.fullmatch(name)}
        switches = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS")
        kept |= dict.fromkeys(switches, "1")
        kept["RES_OPTIONS"] = "timeout:1 attempts:1"  # `datasets` looks up datasets-server.ENDPOINT, which is nowhere
        return {**kept, "HF_ENDPOINT": self.endpoint, "HF_HOME": str(home)}

    def close(self) -> None:
        """Stops; from then on nothing listens at the endpoint. May be called twice."""
        if not self.closed:
            self.closed = True
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def __exit__(self, *raised: object) -> None:
        self.close()
