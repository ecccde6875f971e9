"""GET /health, /health/live, /health/ready, /version and /metrics: the routes of probes and monitoring."""

from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from bdh import __version__
from bdh.serving.api.errors import unavailable
from bdh.serving.api.openapi import errors
from bdh.serving.api.sse import JSONAnswer

if TYPE_CHECKING:
    from bdh.serving.server import Server

router = APIRouter(tags=["operation"])


class Health(BaseModel):
    status: str


@router.get("/health/live", response_model=Health)
async def live(request: Request) -> Response:
    """Liveness: 200 as long as the process answers, also while it loads and drains."""
    return JSONAnswer({"status": "alive"})


@router.get("/health", include_in_schema=False)  # as other servers call it
@router.get("/health/ready", response_model=Health, responses=errors(503))
async def ready(request: Request) -> Response:
    """Readiness: 200 if requests should be sent here: all models are loaded and work, and the server does not drain."""
    server: Server = request.app.state.server
    if server.draining:
        raise unavailable("draining", "draining")
    if not server.models.ready:
        raise unavailable("loading", "loading", 2)
    if silent := server.models.silent:
        raise unavailable(f"the engine of {', '.join(silent)} does not answer", "engine_silent", 10)
    return JSONAnswer({"status": "ready"})


@router.get("/version", include_in_schema=False)
async def version(request: Request) -> Response:
    """The version of bdh."""
    return JSONAnswer({"version": __version__})


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Metrics for Prometheus."""
    server: Server = request.app.state.server
    text = server.metrics.render() if server.peers is None else await server.peers.metrics()
    return Response(text, media_type=server.metrics.content_type)
