"""What clients are told when something is wrong: OpenAI's JSON shape, and the status that goes with it."""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pydantic import BaseModel

from bdh.errors import BDHError
from bdh.inference.params import SamplingParams

NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "json_schema": "response_format"}
FIELDS = frozenset(NAMES.get(field.name, field.name) for field in fields(SamplingParams))


class ErrorBody(BaseModel):
    """The inside of an error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """An error as every client of the OpenAI API knows it."""

    error: ErrorBody


class ApiError(Exception):
    """What is answered instead of a result.

    Attributes:
        status: Of HTTP.
        message: One line: what is wrong, where, and what to do.
        type: OpenAI's name for its kind.
        code: A name for this very thing, if there is one.
        param: The field of the request that is wrong, if one is.
        headers: To go with it.
        reason: A short name for the metrics, if this is a refusal to be counted.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        reason: str | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        self.reason = reason

    def body(self) -> dict[str, Any]:
        """The JSON of it."""
        inside = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": inside}


class TooManyRequests(ApiError):  # noqa: N818
    """429: come again in `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int, reason: str, headers: Mapping[str, str] | None = None):
        kind = "tokens" if reason == "token_limit" else "requests"
        wait = {"Retry-After": str(max(1, retry_after))}
        super().__init__(
            429, message, kind, code="rate_limit_exceeded", headers={**(headers or {}), **wait}, reason=reason
        )


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def engine_refused(error: BDHError) -> ApiError:
    """400: what the engine does not take. Its sentence may begin with a setting; requests call some by other names."""
    words = re.sub(rf"\b({'|'.join(NAMES)})\b", lambda found: NAMES[found[0]], str(error))
    first = words.partition(" ")[0]
    return bad_request(words, first if first in FIELDS else None)


def unauthorized(message: str) -> ApiError:
    """401: no key, or none that counts."""
    headers = {"WWW-Authenticate": "Bearer"}
    return ApiError(401, message, code="invalid_api_key", headers=headers, reason="auth")


def not_found(message: str, code: str | None = None, param: str | None = None) -> ApiError:
    return ApiError(404, message, code=code, param=param)


def too_large(message: str) -> ApiError:
    return ApiError(413, message, code="request_too_large", reason="body_too_large")


def timed_out(message: str) -> ApiError:
    return ApiError(504, message, "server_error", code="timeout", reason="timeout")


def unavailable(message: str, code: str, retry_after: int = 1) -> ApiError:
    """503: loading, draining, or a model that could not be loaded."""
    return ApiError(503, message, "server_error", code=code, headers={"Retry-After": str(retry_after)}, reason=code)


def engine_failed(message: str) -> ApiError:
    return ApiError(500, message, "server_error", code="engine_failed", reason="engine_failed")
