"""Who calls: the key of a request, its address, and whether it may come in."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import Request
from starlette.types import Scope

from bdh.serving.errors import ApiError, unauthorized
from bdh.serving.keys import Key, KeyRefused
from bdh.serving.limits import network, subject

if TYPE_CHECKING:
    from bdh.serving.server import Server

REFUSALS = {
    "missing": "no API key was given; send it as: Authorization: Bearer KEY",
    "unknown": "this API key is not known here; check it for typing errors",
    "revoked": "this API key was revoked; ask for another",
    "expired": "this API key has expired; ask for another",
}


@dataclass(frozen=True)
class Caller:
    """Who made a request.

    Attributes:
        key: None where no keys are asked for.
        address: The client's, or what a trusted proxy says it is.
    """

    key: Key | None
    address: str

    @property
    def owner(self) -> str | None:
        """Whom sessions and traces belong to: a key, or everybody."""
        return None if self.key is None else self.key.id

    @property
    def client(self) -> str:
        """Who shares the engine with others like it: a key, or where no keys are asked for a network."""
        return subject(self.key, network(self.address))


def presented(authorization: str | None) -> str | None:
    """The secret in an Authorization header, if it has one."""
    scheme, _, secret = (authorization or "").partition(" ")
    return secret.strip() or None if scheme.lower() == "bearer" else None


def costs(path: str) -> bool:
    """Whether what is at a path is for callers who may come in: all but the page, health and figures."""
    return path.startswith("/v1/") or path in ("/tokenize", "/detokenize")


async def let_in(scope: Scope, server: "Server") -> None:
    """Finds out who calls, before anything of the request's body is read. Raises ApiError 401 or 429."""
    request = Request(scope)
    address = request.client.host if request.client else "unknown"
    key: Key | None = None
    refusal: ApiError | None = None
    if server.keys.required:
        try:
            key = server.keys.check(presented(request.headers.get("authorization")))
        except KeyRefused as refused:
            refusal = unauthorized(REFUSALS[refused.reason])
    if refusal is None:
        server.limits.enter(key, address)
        request.state.entered = Caller(key, address)
    headers = await server.limits.admit(key, address, refused=refusal is not None)
    if refusal is not None:
        raise refusal
    request.state.limit_headers = headers
    if key is not None:
        request.state.log.update(key=key.id, key_name=key.name)
    request.state.caller = Caller(key, address)


def let_out(scope: Scope, server: "Server") -> None:
    """Counts a request as answered, if it was let in."""
    if (entered := scope["state"].pop("entered", None)) is not None:
        server.limits.leave(entered.key, entered.address)


async def caller(request: Request) -> Caller:
    """Who was let in. A dependency of every route that `costs`; there is nobody elsewhere."""
    who: Caller = request.state.caller
    return who
