"""GET /v1/models: what is served."""

from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from bdh.serving.api.response_schemas import ModelCard, ModelList
from bdh.serving.api.sse import JSONAnswer
from bdh.serving.auth.authentication import Caller, current_caller

if TYPE_CHECKING:
    from bdh.serving.server import Server

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models", response_model=ModelList)
async def models(request: Request, caller: Annotated[Caller, Depends(current_caller)]) -> Response:
    """All models that are loaded."""
    server: Server = request.app.state.server
    return JSONAnswer({"object": "list", "data": [served.card() for served in server.models.all()]})


@router.get("/v1/models/{id}", response_model=ModelCard)
async def model(id: str, request: Request, caller: Annotated[Caller, Depends(current_caller)]) -> Response:
    """One of them."""
    server: Server = request.app.state.server
    return JSONAnswer(server.models.get(id).card())
