"""What the OpenAPI description says that the routes' own types do not."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from bdh.serving.api.errors import ErrorAnswer
from bdh.serving.api.response_schemas import ChatChunk

WORDS = {
    400: "Something in the request is wrong.",
    401: "No API key, or none that counts.",
    404: "No such thing.",
    408: "The request did not come in time.",
    409: "It is busy.",
    413: "The request is too large.",
    429: "Too many requests; Retry-After says when to come again.",
    500: "Something went wrong in the server.",
    503: "The server is loading or draining; Retry-After says when to come again.",
    504: "The answer took too long.",
    507: "There is no room on the disk.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The documentation of these errors."""
    return {status: {"model": ErrorAnswer, "description": WORDS[status]} for status in statuses}


def links(value: str, **parameters: tuple[str, ...]) -> dict[str, Any]:
    """The documentation of what can be done with a value of an answer: for a path's parameter, the routes that take it.

    Args:
        value: Where it is, as "#/id".
        parameters: Names of functions that are routes.
    """
    return {
        "links": {
            route: {"operationId": route, "parameters": {parameter: f"$response.body{value}"}}
            for parameter, routes in parameters.items()
            for route in routes
        }
    }


def describe(app: FastAPI, keys_required: bool) -> dict[str, Any]:
    """The OpenAPI description of an app.

    FastAPI says that a mistake in a request is answered with 422 and a form of its own, which is not so here.
    """
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = found["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    chunk = ChatChunk.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= chunk.pop("$defs") | {"ChatChunk": chunk}  # which is no answer of its own
    for path, operations in found["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if keys_required and path.startswith("/v1/"):
                operation["security"] = [{"key": []}]
    if keys_required:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return found


COMMON = errors(400, 401, 404, 408, 413, 429, 500, 503)
WRITTEN = errors(504)


def streamed(piece: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The documentation of an answer that may be a stream of such pieces."""
    pieces = [{"$ref": f"#/components/schemas/{one.__name__}"} for one in (piece, ErrorAnswer)]
    data = {
        "anyOf": [
            {"const": "[DONE]"},
            {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": pieces}},
        ]
    }
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {
        **WRITTEN,
        200: {
            **links("#/brain/trace", trace=("whole_trace", "forget")),
            "description": "The answer; with `stream`, server-sent events whose data are pieces of it, and [DONE] at "
            "the end. An error on the way is an event of its own, and then there is no [DONE].",
            "content": {"text/event-stream": {"itemSchema": event}},
        },
    }
