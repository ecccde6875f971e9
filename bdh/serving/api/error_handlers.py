"""Conversion of every exception in the app into an error of the OpenAI API."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match, Route

from bdh.errors import BDHError
from bdh.serving.api.errors import ApiError, as_api_error, bad_request, not_found
from bdh.serving.api.response_schemas import error_response
from bdh.serving.api.sse import ClientDisconnected
from bdh.serving.observability.logs import CLIENT_GONE

CHAT = "use POST /v1/chat/completions"
TEXT_ONLY = "this server reads and writes text only; there is no alternative here"
ALTERNATIVES = {  # by the path of a route of other servers: why it is not supported, and the alternative
    "/v1/responses": f"the Responses API is not supported; {CHAT}, or POST /v1/sessions for conversations that the "
    "server keeps",
    "/v1/conversations": "conversations of the Responses API are not supported; use POST /v1/sessions",
    "/v1/assistants": "the Assistants API is not supported; use POST /v1/sessions",
    "/v1/threads": "the Assistants API is not supported; use POST /v1/sessions",
    "/v1/embeddings": "embeddings are not supported, as the model is not trained to make any; use a model for "
    "embeddings, or echo and logprobs of POST /v1/completions to score texts",
    "/v1/moderations": f"moderations are not supported; {CHAT}",
    "/v1/messages": f"the Messages API is not supported; {CHAT}",
    "/v1/rerank": "reranking is not supported; use echo and logprobs of POST /v1/completions to score texts",
    "/v1/score": "this route is not supported; use echo and logprobs of POST /v1/completions to score texts",
    "/v1/audio": f"audio is not supported; {TEXT_ONLY}",
    "/v1/images": f"images are not supported; {TEXT_ONLY}",
    "/v1/files": "files are not supported; use bdh generate --prompts FILE for many prompts",
    "/v1/batches": "batches are not supported; use bdh generate --prompts FILE for many prompts, or several prompts in "
    "one POST /v1/completions",
    "/v1/fine_tuning": "fine-tuning is not supported by the server; use bdh train --init_from MODEL",
    "/api/generate": "this is not the API of Ollama; use POST /v1/completions",
    "/api/chat": f"this is not the API of Ollama; {CHAT}",
    "/api/tags": "this is not the API of Ollama; use GET /v1/models",
}
TYPE_NAMES = ("str", "int", "list[", "function-", "tagged-union", "constrained", "nullable")  # in pydantic's locations
TAGS = frozenset({"system", "developer", "user", "assistant", "tool", "function", "text", "json_object", "json_schema"})


def add_error_handlers(app: FastAPI, routers: Sequence[APIRouter]) -> None:
    """Answer every exception with an error of the OpenAI API, and count it."""

    async def handle(request: Request, exception: Exception) -> Response:
        if isinstance(exception, ClientDisconnected):
            request.state.log["disconnected"] = True
            return Response(status_code=CLIENT_GONE)
        error = convert(exception)
        if error.code == "unknown_url" and (alternative := alternative_to(request.url.path)) is not None:
            error = not_found(alternative, "unsupported_endpoint")
        if error.status == 405:
            error.headers["Allow"] = ", ".join(sorted(allowed_methods(request, routers))) or error.headers["Allow"]
        app.state.metrics.refused(error.reason)
        return error_response(error)

    kinds: Sequence[type[Exception]] = (
        ApiError,
        BDHError,
        ClientDisconnected,
        HTTPException,
        RequestValidationError,
        RuntimeError,
        Exception,  # starlette raises these again after the response, for the log
    )
    for kind in kinds:
        app.add_exception_handler(kind, handle)


def convert(exception: Exception) -> ApiError:
    """Convert an exception of FastAPI, of the engine or of the server."""
    match exception:
        case RequestValidationError():
            return validation_error(exception.errors())
        case HTTPException(status_code=404):
            return not_found("there is nothing here; GET /openapi.json lists what there is", "unknown_url")
        case HTTPException(status_code=405):
            message = "this method is not for this address; GET /openapi.json lists what there is"
            return ApiError(405, message, code="method_not_allowed", headers=exception.headers)
        case HTTPException(status_code=400):
            return bad_request("the body is not JSON in UTF-8, or goes too deep")
        case HTTPException():
            return ApiError(exception.status_code, str(exception.detail), headers=exception.headers)
    return as_api_error(exception)


def validation_error(errors: Sequence[Any]) -> ApiError:
    """Convert the first error that pydantic reports about a request."""
    error = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    parts = [str(part)[:60] for part in error["loc"] if part != "body"]
    field = ".".join(part for part in parts if not part.startswith(TYPE_NAMES) and part not in TAGS)
    if error["type"] == "extra_forbidden":
        return bad_request(f"Unrecognized request argument supplied: {field}", field)
    if error["type"] == "json_invalid":
        return bad_request(f"the body is not JSON: {error['ctx']['error']}")
    if not field:
        return bad_request("the body must be a JSON object, sent as Content-Type: application/json")
    messages = {other["msg"] for other in errors if other["loc"][:2] == error["loc"][:2]}
    message = error["msg"] if len(messages) == 1 else "; or ".join(sorted(messages)[:3])
    return bad_request(f"{field}: {message[0].lower()}{message[1:300]}", field)


def allowed_methods(request: Request, routers: Sequence[APIRouter]) -> set[str]:
    """Return the methods of all routes of a request's path; the exception has those of one route only."""
    routes = [route for router in routers for route in router.routes if isinstance(route, Route)]
    methods = {
        method for route in routes if route.matches(request.scope)[0] != Match.NONE for method in route.methods or ()
    }
    return methods | {"HEAD"} if "GET" in methods else methods


def alternative_to(path: str) -> str | None:
    """Return the message about a route of another server; None for any other path."""
    return next(
        (message for route, message in ALTERNATIVES.items() if path == route or path.startswith(f"{route}/")), None
    )
