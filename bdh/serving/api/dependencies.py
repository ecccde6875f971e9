"""FastAPI dependencies: the parts of the server that routes use, from the state of the app."""

from typing import Annotated, Any

from fastapi import Depends, Request

from bdh.serving.activity.traces import TraceStore
from bdh.serving.api.middleware import RequestDrain
from bdh.serving.auth.authentication import Caller, current_caller
from bdh.serving.auth.rate_limits import RateLimits
from bdh.serving.model_registry import ModelRegistry
from bdh.serving.observability.metrics import Metrics
from bdh.serving.sessions.peers import Peers
from bdh.serving.sessions.store import SessionStore


def app_state(name: str) -> Any:
    """Create a dependency that returns a field of `app.state`."""

    async def field(request: Request) -> Any:
        return getattr(request.app.state, name)

    return Depends(field)


CurrentCaller = Annotated[Caller, Depends(current_caller)]
Models = Annotated[ModelRegistry, app_state("models")]
Sessions = Annotated[SessionStore, app_state("sessions")]
Traces = Annotated[TraceStore, app_state("traces")]
Limits = Annotated[RateLimits, app_state("limits")]
ServerMetrics = Annotated[Metrics, app_state("metrics")]
Drain = Annotated[RequestDrain, app_state("drain")]
OtherReplicas = Annotated[Peers | None, app_state("peers")]
