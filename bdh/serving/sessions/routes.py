"""/v1/sessions: conversations that the server keeps, as states of synapses."""

import asyncio
import os
from collections.abc import AsyncGenerator
from typing import Annotated, BinaryIO, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field
from starlette.responses import Response, StreamingResponse

from bdh.serving.api.dependencies import CurrentCaller, Limits, Models, OtherReplicas, Sessions
from bdh.serving.api.errors import bad_request
from bdh.serving.api.openapi import errors, links, streamed
from bdh.serving.api.request_body import JSONBodyRoute
from bdh.serving.api.request_schemas import Strict
from bdh.serving.api.response_schemas import ChatChunk, ChatResponse, CompletionResponse, ModelResponse
from bdh.serving.auth.authentication import Caller
from bdh.serving.auth.rate_limits import RateLimits
from bdh.serving.auth.token_usage import TokenMeter
from bdh.serving.config import NAME
from bdh.serving.model_registry import ServedModel
from bdh.serving.sessions.generation import MessageHandler, MessageRequest, WriteHandler, WriteRequest
from bdh.serving.sessions.memory import Kept

router = APIRouter(prefix="/v1/sessions", tags=["sessions"], route_class=JSONBodyRoute)

PIECE = 1 << 20  # bytes of a file that are sent at once

SavedName = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]


class NewSession(Strict):
    """A session that begins with nothing or with a system message, or a copy of a saved one."""

    model: str
    system: str | None = Field(default=None, description="What the assistant is told before all else.")
    name: str | None = Field(default=None, min_length=1, max_length=200, description="For people to know it by.")
    saved: SavedName | None = Field(default=None, description="Which saved session to go on with.")


class SaveRequest(Strict):
    name: SavedName


class SessionCard(BaseModel):
    """A session."""

    id: str
    object: Literal["session"]
    model: str
    name: str | None
    created: int
    position: int = Field(description="Tokens said and heard so far.")
    state_bytes: int = Field(description="What its synapses take, however much it has heard.")
    busy: bool


class SaidMessage(BaseModel):
    role: str
    content: str


class SessionDetails(SessionCard):
    """A session, and what was said in it; texts that were read or written beside the messages are not told."""

    messages: list[SaidMessage]


class SavedCard(BaseModel):
    """A saved session."""

    name: str
    model: str | None = Field(description="What it was called here; null if another program saved the session.")
    created: int
    bytes: int


class SessionList(BaseModel):
    """The caller's sessions, the oldest first, and those that it has saved."""

    object: Literal["list"]
    data: list[SessionCard]
    saved: list[SavedCard]


class SavedAnswer(BaseModel):
    name: str
    bytes: int


async def own_session(id: str, caller: CurrentCaller, sessions: Sessions) -> Kept:
    """The session that a path names. Raises ApiError 404 if there is none, or it is another key's."""
    return sessions.get(caller.owner, id)


Own = Annotated[Kept, Depends(own_session)]


@router.post(
    "",
    response_model=SessionCard,
    status_code=201,
    responses={
        **errors(507),
        201: links("#/id", id=("one_session", "say", "write", "save", "state", "end")),
    },
)
async def create(
    body: NewSession, request: Request, caller: CurrentCaller, models: Models, sessions: Sessions, limits: Limits
) -> Response:
    """Begins a session."""
    served = models.get(body.model)
    if body.saved is None:
        count = 0 if body.system is None else await count_tokens(request, limits, caller, served, body.system)
        kept = await sessions.create(caller.owner, served, body.system, body.name)
        kept.prepaid_tokens = count
    elif body.system is None:
        kept = await sessions.reopen(caller.owner, served, body.saved, body.name)
    else:
        raise bad_request("a saved session has its own system message; leave system out", "system")
    return ModelResponse(card(kept), 201)


@router.get("", response_model=SessionList)
async def all_sessions(caller: CurrentCaller, sessions: Sessions, peers: OtherReplicas) -> Response:
    """The sessions there are."""
    saved = [SavedCard(**vars(one)) for one in await sessions.saved(caller.owner)]
    if peers is None:
        data = [card(kept) for kept in sessions.of(caller.owner)]
    else:
        data = await peers.sessions(caller.owner)
    return ModelResponse(SessionList(object="list", data=data, saved=saved))


@router.get("/{id}", response_model=SessionDetails)
async def one_session(sessions: Sessions, kept: Own) -> Response:
    """A session, and what was said in it."""
    messages = [SaidMessage(**message) for message in await sessions.messages(kept)]
    return ModelResponse(SessionDetails(**card(kept).model_dump(), messages=messages))


@router.post("/{id}/messages", response_model=ChatResponse, responses={**streamed(ChatChunk), **errors(409, 507)})
async def say(body: MessageRequest, request: Request, kept: Own, caller: CurrentCaller) -> Response:
    """Says something to the assistant, who answers. Only what is new is read."""
    return await MessageHandler(request, caller, kept, body).respond()


@router.post(
    "/{id}/completions",
    response_model=CompletionResponse,
    responses={**streamed(CompletionResponse), **errors(409, 507)},
)
async def write(body: WriteRequest, request: Request, kept: Own, caller: CurrentCaller) -> Response:
    """Reads a text, if there is one, and writes on from there; with `max_tokens` 0 it only reads.

    After an answer that was cut short, and without a prompt, this goes on with the answer.
    """
    return await WriteHandler(request, caller, kept, body).respond()


@router.post(
    "/{id}/save",
    response_model=SavedAnswer,
    responses={**errors(409, 507), 200: links("#/name", name=("delete_saved",))},
)
async def save(body: SaveRequest, sessions: Sessions, kept: Own) -> Response:
    """Saves a session under a name; what was saved under it before is replaced."""
    return ModelResponse(SavedAnswer(name=body.name, bytes=await sessions.save(kept, body.name)))


@router.get(
    "/{id}/state",
    response_class=StreamingResponse,
    responses={
        **errors(409, 507),
        200: {
            "description": "The session as a safetensors file, which bdh chat --session FILE goes on with.",
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        },
    },
)
async def state(sessions: Sessions, kept: Own) -> Response:
    """The state itself."""
    file = await sessions.state_file(kept)
    headers = {
        "content-length": str(os.fstat(file.fileno()).st_size),
        "content-disposition": f'attachment; filename="{kept.id}.safetensors"',
    }
    return StreamingResponse(pieces_of(file), headers=headers, media_type="application/octet-stream")


@router.delete("/{id}", status_code=204, response_class=Response, responses=errors(409))
async def end(sessions: Sessions, kept: Own) -> Response:
    """Ends a session. What was saved of it stays."""
    await sessions.delete(kept)
    return Response(status_code=204)


@router.delete("/saved/{name}", status_code=204, response_class=Response)
async def delete_saved(name: SavedName, sessions: Sessions, caller: CurrentCaller) -> Response:
    """Deletes a saved session. Sessions that it was reopened as go on."""
    await sessions.delete_saved(caller.owner, name)
    return Response(status_code=204)


def card(kept: Kept) -> SessionCard:
    return SessionCard(
        id=kept.id,
        object="session",
        model=kept.served.name,
        name=kept.name,
        created=kept.created,
        position=kept.position,
        state_bytes=kept.state_nbytes,
        busy=kept.busy,
    )


async def count_tokens(request: Request, limits: RateLimits, caller: Caller, served: ServedModel, system: str) -> int:
    """The number of tokens of a system message, which then count as read. Raises ApiError if no message could follow
    it, or the caller has too few tokens left."""
    check_text(system, "system")
    served.check_length(len(system), "system")
    meter, llm = TokenMeter(limits, caller, request), served.llm
    tokens = await meter.encode(
        llm.run_in_thread(lambda: llm.prompt_encoder.encode(system, literal=True), caller.client),
        served.token_bound([system]),
    )
    if tokens:
        served.check_prompt(tokens, "system")
    return len(tokens)


def check_text(text: str, what: str) -> None:
    """Raises ApiError for half a character, which nothing could be made of later."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise bad_request(f"{what} is not valid text: character {error.start} is half of one", what) from error


async def pieces_of(file: BinaryIO) -> AsyncGenerator[bytes]:
    """A file, read beside the event loop, and closed in the end."""
    with file:
        while piece := await asyncio.to_thread(file.read, PIECE):
            yield piece
