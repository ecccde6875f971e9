"""Authentication of callers: the API key and the address of a request, and the limits on the number of requests."""

from dataclasses import dataclass

from fastapi import Request
from starlette.types import Scope

from bdh.serving.api.errors import ApiError, unauthorized
from bdh.serving.auth.api_keys import Key, KeyRefused, KeyStore
from bdh.serving.auth.rate_limits import RateLimits, subject_of

REFUSALS = {
    "missing": "no API key was given; send it as: Authorization: Bearer KEY",
    "unknown": "this API key is not known here; check it for typing errors",
    "revoked": "this API key was revoked; ask for another",
    "expired": "this API key has expired; ask for another",
}


@dataclass(frozen=True)
class Caller:
    """The authenticated sender of a request.

    Attributes:
        key: None where no keys are asked for.
        address: The client's, or the one that a trusted proxy gives for it.
    """

    key: Key | None
    address: str

    @property
    def owner(self) -> str | None:
        """The owner of sessions and traces: the id of a key; None, everybody, where no keys are asked for."""
        return None if self.key is None else self.key.id

    @property
    def client(self) -> str:
        """The client that slots and queues are shared by: a key, or a network where no keys are asked for."""
        return subject_of(self.key, self.address)


def bearer_token(authorization: str | None) -> str | None:
    """The secret in an Authorization header, if it has one."""
    scheme, _, secret = (authorization or "").partition(" ")
    return secret.strip() or None if scheme.lower() == "bearer" else None


def requires_caller(path: str) -> bool:
    """Whether requests for a path are authenticated and limited: all but the page, health and metrics."""
    return path.startswith("/v1/") or path in ("/tokenize", "/detokenize")


async def admit_caller(scope: Scope, keys: KeyStore, limits: RateLimits) -> None:
    """Authenticates a request and counts it against its limits, before its body is read.

    The request is counted as in work last, so one that is refused for another reason keeps no other out.

    Raises:
        ApiError: 401 or 429.
    """
    request = Request(scope)
    address = request.client.host if request.client else "unknown"
    key: Key | None = None
    refusal: ApiError | None = None
    if keys.required:
        try:
            key = keys.check(bearer_token(request.headers.get("authorization")))
        except KeyRefused as refused:
            refusal = unauthorized(REFUSALS[refused.problem])
    headers = await limits.admit(key, address, refused=refusal is not None)
    if refusal is not None:
        raise refusal
    request.state.limit_headers = headers
    limits.acquire(key, address)
    request.state.caller = Caller(key, address)
    if key is not None:
        request.state.log.update(key=key.id, key_name=key.name)


def release_caller(scope: Scope, limits: RateLimits) -> None:
    """Counts a request as no longer in work, if it was admitted."""
    caller: Caller | None = scope["state"].get("caller")
    if caller is not None:
        limits.release(caller.key, caller.address)


async def current_caller(request: Request) -> Caller:
    """The caller of a request. A dependency of every route that `requires_caller`."""
    caller: Caller = request.state.caller
    return caller
