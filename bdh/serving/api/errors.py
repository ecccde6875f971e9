"""Errors of the API: the JSON of the OpenAI API, its status codes, and the conversion of exceptions."""

import logging
import re
from collections.abc import Mapping
from dataclasses import fields

from pydantic import BaseModel

from bdh.errors import BDHError, ModelClosed, PromptTooLong, QueueFull
from bdh.inference.sampling_params import SamplingParams

log = logging.getLogger(__name__)

REQUEST_FIELDS = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "json_schema": "response_format"}
SAMPLING_FIELDS = frozenset(REQUEST_FIELDS.get(field.name, field.name) for field in fields(SamplingParams))


class ErrorDetails(BaseModel):
    """Details of an error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Error response of the OpenAI API."""

    error: ErrorDetails


class ApiError(Exception):
    """Error that is sent to the client as the response, or as the last event of a stream.

    Attributes:
        status: HTTP status.
        message: One line: what is wrong, where, and what to do.
        type: OpenAI's name of the kind of error.
        code: Name of the specific error, if it has one.
        param: Name of the invalid field of the request, if any.
        headers: Additional headers of the response.
        reason: Label of the refusal in the metrics; None if it is not counted.
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

    def response_model(self) -> ErrorResponse:
        details = ErrorDetails(message=self.message, type=self.type, param=self.param, code=self.code)
        return ErrorResponse(error=details)


class TooManyRequests(ApiError):  # noqa: N818
    """429 with the seconds after which the client should retry."""

    def __init__(self, message: str, retry_after: int, reason: str, headers: Mapping[str, str] | None = None):
        kind = "tokens" if reason == "token_limit" else "requests"
        headers = {**(headers or {}), "Retry-After": str(max(1, retry_after))}
        super().__init__(429, message, kind, code="rate_limit_exceeded", headers=headers, reason=reason)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unauthorized(message: str) -> ApiError:
    """401 for a missing or invalid key."""
    headers = {"WWW-Authenticate": "Bearer"}
    return ApiError(401, message, code="invalid_api_key", headers=headers, reason="auth")


def not_found(message: str, code: str | None = None, param: str | None = None) -> ApiError:
    return ApiError(404, message, code=code, param=param)


def unavailable(message: str, code: str, retry_after: int = 1) -> ApiError:
    """503 while the server or a model loads, drains or has failed."""
    return ApiError(503, message, "server_error", code=code, headers={"Retry-After": str(retry_after)}, reason=code)


def as_api_error(error: Exception) -> ApiError:
    """Convert an exception of the engine or of the server into the error that the client receives."""
    match error:
        case ApiError():
            return error
        case QueueFull():
            return TooManyRequests(str(error), 1, "queue_full")
        case ModelClosed():
            return unavailable("the server ends before the answer is complete; try again", "draining")
        case PromptTooLong():
            return bad_request(str(error), code="context_length_exceeded")
        case BDHError():
            return engine_refused(error)
        case RuntimeError() if "the engine failed" in str(error):
            log.error("the engine failed", exc_info=error)
            message = "the engine failed; try again in a moment"
            return ApiError(500, message, "server_error", code="engine_failed", reason="engine_failed")
    log.error("internal error", exc_info=error)
    return ApiError(500, "something went wrong in the server; its log tells more", "server_error", reason="internal")


def engine_refused(error: BDHError) -> ApiError:
    """400 for a request that the engine refuses, with the names that sampling parameters have in requests."""
    message = re.sub(rf"\b({'|'.join(REQUEST_FIELDS)})\b", lambda match: REQUEST_FIELDS[match[0]], str(error))
    first_word = message.partition(" ")[0]
    return bad_request(message, first_word if first_word in SAMPLING_FIELDS else None)
