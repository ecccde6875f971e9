"""The application: all routes, what stands around them, and how mistakes are answered."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp

from bdh import __version__
from bdh.errors import BDHError
from bdh.serving.activity import routes as activity_routes
from bdh.serving.api import chat_completions, completions, health, models, tokenization
from bdh.serving.api.admission import Door
from bdh.serving.api.errors import ApiError, bad_request, not_found
from bdh.serving.api.openapi import COMMON, describe
from bdh.serving.api.routing import RouteNormalizer
from bdh.serving.api.sse import ClientGone, as_api_error, error_answer
from bdh.serving.api.unsupported import alternative_to
from bdh.serving.observability.logs import CLIENT_GONE, RequestLog
from bdh.serving.sessions import routes as session_routes
from bdh.serving.web import routes as web_routes

if TYPE_CHECKING:
    from bdh.serving.server import Server

ABOUT = (
    "A server of Dragon Hatchling language models: the OpenAI API, sessions that are states of synapses, and a view of "
    "what the neurons do."
)
ROUTERS = (completions, chat_completions, models, tokenization, session_routes, activity_routes)
PUBLIC_ROUTERS = (health, web_routes)  # need no API key
RATE_HEADERS = [f"X-RateLimit-{what}-{of}" for of in ("Requests", "Tokens") for what in ("Limit", "Remaining", "Reset")]
KINDS = ("str", "int", "list[", "function-", "tagged-union", "constrained", "nullable")  # of pydantic, in places


def create_app(server: "Server") -> ASGIApp:
    """The ASGI app of a server; its lifespan is the server's."""
    return RequestLog(application(server), server.metrics, server.config.logging)


def application(server: "Server") -> FastAPI:
    """All of it but the log, which stands around everything, also around what FastAPI makes of a mistake."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        await server.start()
        yield
        await server.close()

    config = server.config
    around = []
    if config.cors.origins:
        around.append(
            Middleware(
                CORSMiddleware,
                allow_origins=config.cors.origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],  # OpenAI's client sends many of its own
                expose_headers=["X-Request-ID", "Retry-After", *RATE_HEADERS],
            )
        )
    around += [Middleware(RouteNormalizer), Middleware(Door, server=server)]
    app = FastAPI(
        title="bdh serve",
        version=__version__,
        description=ABOUT,
        lifespan=lifespan,
        middleware=around,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        openapi_url="/openapi.json" if config.docs else None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.server = server
    app.openapi = cache(lambda: describe(app, server.keys.required))  # type: ignore[method-assign]
    for routes in ROUTERS:
        app.include_router(routes.router, responses=COMMON)
    for routes in PUBLIC_ROUTERS:
        app.include_router(routes.router)
    add_error_answers(app, server)
    return app


def add_error_answers(app: FastAPI, server: "Server") -> None:
    """Every exception becomes an answer in OpenAI's shape, and is counted."""

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientGone):
            request.state.log["disconnected"] = True
            return Response(status_code=CLIENT_GONE)
        told = as_told(error)
        if told.code == "unknown_url" and (words := alternative_to(request.url.path)) is not None:
            told = not_found(words, "unsupported_endpoint")
        if told.status == 405:
            told.headers["Allow"] = ", ".join(sorted(methods_here(request))) or told.headers["Allow"]
        server.count(told)
        return error_answer(told)

    kinds: Sequence[type[Exception]] = (
        ApiError,
        BDHError,
        ClientGone,
        HTTPException,
        RequestValidationError,
        RuntimeError,
    )
    for kind in kinds:
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(Exception, answer)  # is raised once more after it was answered, for the log


def as_told(error: Exception) -> ApiError:
    """What a client is told of an exception."""
    match error:
        case RequestValidationError():
            return told_mistake(error.errors())
        case HTTPException(status_code=404):
            return ApiError(404, "there is nothing here; GET /openapi.json lists what there is", code="unknown_url")
        case HTTPException(status_code=405):
            words = "this method is not for this address; GET /openapi.json lists what there is"
            return ApiError(405, words, code="method_not_allowed", headers=error.headers)
        case HTTPException(status_code=400):
            return bad_request("the body is not JSON in UTF-8, or goes too deep")
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
    return as_api_error(error)


def methods_here(request: Request) -> set[str]:
    """The methods of all routes of a request's path; the one that raised 405 knows its own only."""
    routes = (
        route for module in (*ROUTERS, *PUBLIC_ROUTERS) for route in module.router.routes if isinstance(route, Route)
    )
    here = (route for route in routes if route.matches(request.scope)[0] != Match.NONE)
    methods = {method for route in here for method in route.methods or ()}
    return methods | {"HEAD"} if "GET" in methods else methods


def told_mistake(mistakes: Sequence[Any]) -> ApiError:
    """The first mistake that pydantic found in a request, in a line."""
    mistake = next((one for one in mistakes if one["type"] == "extra_forbidden"), mistakes[0])
    parts = [str(part)[:60] for part in mistake["loc"] if part != "body"]
    where = ".".join(part for part in parts if not part.startswith(KINDS) and part not in TAGS)
    if mistake["type"] == "extra_forbidden":
        return bad_request(f"Unrecognized request argument supplied: {where}", where)
    if mistake["type"] == "json_invalid":
        return bad_request(f"the body is not JSON: {mistake['ctx']['error']}")
    if not where:
        return bad_request("the body must be a JSON object, sent as Content-Type: application/json")
    others = {one["msg"] for one in mistakes if one["loc"][:2] == mistake["loc"][:2]}
    words = mistake["msg"] if len(others) == 1 else "; or ".join(sorted(others)[:3])
    return bad_request(f"{where}: {words[0].lower()}{words[1:300]}", where)


TAGS = frozenset({"system", "developer", "user", "assistant", "tool", "function", "text", "json_object", "json_schema"})
