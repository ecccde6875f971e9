"""The page of the server: static files of the package, with headers that keep a browser careful with them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from fastapi import APIRouter, Request, Response

from bdh.serving.api.errors import not_found

FOLDER = Path(__file__).parent / "static"
INDEX = "index.html"
TYPES = {  # a file of another kind is not served
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {  # besides those that every answer of the server has
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-cache",  # keep it, but ask whether it is still this one
}

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class PageFile:
    """One file as it is sent."""

    content: bytes
    media_type: str
    etag: str


@cache
def files() -> Mapping[str, PageFile]:
    """All files of the page by name. What is not in here is not served, whatever path a request has."""
    found = {}
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in TYPES:
            content = path.read_bytes()
            found[path.name] = PageFile(content, TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return MappingProxyType(found)


@router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    """The page itself."""
    return answer(files()[INDEX], request)


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
async def page_file(name: str, request: Request) -> Response:
    """One of the files the page is made of. Raises ApiError 404."""
    file = files().get(name)
    if file is None:
        raise not_found(f"the page has no file {name[:80]!r}")
    return answer(file, request)


def answer(file: PageFile, request: Request) -> Response:
    """The file, or 304 if the browser has it already."""
    headers = {**HEADERS, "ETag": file.etag}
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if file.etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
