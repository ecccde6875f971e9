"""GET /health, /health/live, /health/ready, /version and /metrics: the routes of probes and monitoring."""

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from bdh import __version__
from bdh.serving.api.dependencies import Drain, Models, OtherReplicas, ServerMetrics
from bdh.serving.api.errors import unavailable
from bdh.serving.api.openapi import errors

router = APIRouter(tags=["operation"])


class Health(BaseModel):
    status: str


class Version(BaseModel):
    version: str


@router.get("/health/live")
async def live() -> Health:
    """Liveness: 200 as long as the process answers, also while it loads and drains."""
    return Health(status="alive")


@router.get("/health", include_in_schema=False)  # the path of other servers
@router.get("/health/ready", responses=errors(503))
async def ready(models: Models, drain: Drain) -> Health:
    """Readiness: 200 if requests should be sent here: all models are loaded and work, and the server does not drain."""
    if drain.draining:
        raise unavailable("draining", "draining")
    if not models.ready:
        raise unavailable("loading", "loading", 2)
    if silent := models.silent:
        raise unavailable(f"the engine of {', '.join(silent)} does not answer", "engine_silent", 10)
    return Health(status="ready")


@router.get("/version", include_in_schema=False)
async def version() -> Version:
    """The version of bdh."""
    return Version(version=__version__)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(metrics: ServerMetrics, peers: OtherReplicas) -> Response:
    """Metrics for Prometheus."""
    text = metrics.render() if peers is None else await peers.metrics()
    return Response(text, media_type=metrics.content_type)
