"""The FastAPI application: routes, middleware and error handlers."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import cache
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from bdh import __version__
from bdh.serving.activity import routes as activity_routes
from bdh.serving.api import chat_completions, completions, health, models, tokenization
from bdh.serving.api.error_handlers import add_error_handlers
from bdh.serving.api.middleware import AdmissionMiddleware, NormalizationMiddleware
from bdh.serving.api.openapi import COMMON_ERRORS, openapi
from bdh.serving.observability.logs import RequestLog
from bdh.serving.sessions import routes as session_routes
from bdh.serving.web import routes as web_routes

if TYPE_CHECKING:
    from bdh.serving.server import Server

DESCRIPTION = (
    "A server of Dragon Hatchling language models: the OpenAI API, sessions that are states of synapses, and a view of "
    "what the neurons do."
)
ROUTERS = (completions, chat_completions, models, tokenization, session_routes, activity_routes)
PUBLIC_ROUTERS = (health, web_routes)  # need no API key
RATE_HEADERS = [
    f"X-RateLimit-{name}-{unit}" for unit in ("Requests", "Tokens") for name in ("Limit", "Remaining", "Reset")
]
STATE_FIELDS = ("config", "models", "sessions", "traces", "limits", "metrics", "drain", "peers")


def create_app(server: "Server") -> ASGIApp:
    """Create the ASGI app of a server. The log includes the responses of FastAPI's own errors."""
    return RequestLog(create_fastapi_app(server), server.metrics, server.config.logging)


def create_fastapi_app(server: "Server") -> FastAPI:
    """Create the app without the request log; its lifespan starts and closes the server."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        await server.start()
        yield
        await server.close()

    config = server.config
    cors = Middleware(
        CORSMiddleware,
        allow_origins=config.cors.origins,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],  # OpenAI's client sends many of its own
        expose_headers=["X-Request-ID", "Retry-After", *RATE_HEADERS],
    )
    admission = Middleware(
        AdmissionMiddleware,
        settings=config.requests,
        drain=server.drain,
        hosts=server.hosts,
        keys=server.keys,
        limits=server.limits,
        metrics=server.metrics,
    )
    app = FastAPI(
        title="bdh serve",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        middleware=[*([cors] if config.cors.origins else []), Middleware(NormalizationMiddleware), admission],
        docs_url=None,  # its page loads scripts from other servers
        redoc_url=None,
        openapi_url="/openapi.json" if config.docs else None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    for name in STATE_FIELDS:  # for the dependencies of routes
        setattr(app.state, name, getattr(server, name))
    app.openapi = cache(lambda: openapi(app, server.keys.required))  # type: ignore[method-assign]
    for module in ROUTERS:
        app.include_router(module.router, responses=COMMON_ERRORS)
    for module in PUBLIC_ROUTERS:
        app.include_router(module.router)
    add_error_handlers(app, [module.router for module in (*ROUTERS, *PUBLIC_ROUTERS)])
    return app
