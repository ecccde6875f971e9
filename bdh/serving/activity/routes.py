"""/v1/brain: the activity of neurons and synapses while a text was written with `"brain": true`."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request
from starlette.responses import Response

from bdh.serving.activity.schemas import BrainTrace, NeuronDetails, TokenDetails
from bdh.serving.activity.traces import ActivityTrace
from bdh.serving.api.dependencies import CurrentCaller, Traces
from bdh.serving.api.openapi import GENERATION_ERRORS
from bdh.serving.api.response_schemas import ModelResponse
from bdh.serving.api.sse import wait_for

router = APIRouter(prefix="/v1/brain", tags=["brain"])


async def own_trace(
    trace: Annotated[str, Path(pattern="^trc_[0-9a-f]{32}$", description="From the answer of a request.")],
    caller: CurrentCaller,
    traces: Traces,
) -> ActivityTrace:
    """Return the trace that a path names. Raises ApiError 404 if there is none, or it is another key's."""
    return traces.get(trace, caller.owner)


OwnTrace = Annotated[ActivityTrace, Depends(own_trace)]
Number = Annotated[int, Path(ge=0)]


@router.get("/{trace}", response_model=BrainTrace)
async def whole_trace(trace: OwnTrace) -> Response:
    """All tokens of a trace, and how active the neurons were at each."""
    return await asyncio.to_thread(lambda: ModelResponse(trace.whole()))  # megabytes


@router.get("/{trace}/tokens/{index}", response_model=TokenDetails, responses=GENERATION_ERRORS)
async def token(request: Request, trace: OwnTrace, index: Number) -> Response:
    """The effects of one token: neurons it excited, synapses it wrote and read, and the tokens that it read from."""
    return ModelResponse(await wait_for(request, trace.token(index)))


@router.get("/{trace}/neurons/{layer}/{neuron}", response_model=NeuronDetails)
async def neuron(request: Request, trace: OwnTrace, layer: Number, neuron: Number) -> Response:
    """The tokens that excited one neuron."""
    return ModelResponse(await wait_for(request, trace.neuron(layer, neuron)))


@router.delete("/{trace}", status_code=204, response_class=Response)
async def forget(trace: OwnTrace, traces: Traces) -> Response:
    """Forgets a trace. A text that is still being written goes on without it."""
    traces.delete(trace.id, trace.owner)
    return Response(status_code=204)
