"""OpenAPI description of the server, beyond the types of the routes."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from bdh.serving.api.errors import ErrorResponse
from bdh.serving.api.response_schemas import ChatChunk

DESCRIPTIONS = {
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
    """Document the errors with these statuses."""
    return {status: {"model": ErrorResponse, "description": DESCRIPTIONS[status]} for status in statuses}


def links(value: str, **parameters: tuple[str, ...]) -> dict[str, Any]:
    """Document the routes that take a value of the response as a parameter of their path.

    Args:
        value: JSON pointer to the value, as "#/id".
        parameters: For each parameter, the names of the functions of the routes.
    """
    return {
        "links": {
            route: {"operationId": route, "parameters": {parameter: f"$response.body{value}"}}
            for parameter, routes in parameters.items()
            for route in routes
        }
    }


def openapi(app: FastAPI, keys_required: bool) -> dict[str, Any]:
    """Create the OpenAPI description of an app, without FastAPI's own errors (422), which this server does not send."""
    description = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = description["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    chunk = ChatChunk.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= chunk.pop("$defs") | {"ChatChunk": chunk}  # used in the documentation of streams
    for path, operations in description["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if keys_required and path.startswith("/v1/"):
                operation["security"] = [{"key": []}]
    if keys_required:
        description["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return description


COMMON_ERRORS = errors(400, 401, 404, 408, 413, 429, 500, 503)
GENERATION_ERRORS = errors(504)


def streamed(chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Document a response that may be a stream of chunks of this type."""
    schemas = [{"$ref": f"#/components/schemas/{model.__name__}"} for model in (chunk, ErrorResponse)]
    data = {
        "anyOf": [
            {"const": "[DONE]"},
            {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": schemas}},
        ]
    }
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {
        **GENERATION_ERRORS,
        200: {
            **links("#/brain/trace", trace=("whole_trace", "forget")),
            "description": "The answer; with `stream`, server-sent events whose data are pieces of it, and [DONE] at "
            "the end. An error on the way is an event of its own, and then there is no [DONE].",
            "content": {"text/event-stream": {"itemSchema": event}},
        },
    }
