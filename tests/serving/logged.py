"""A small server that logs as `bdh serve` does: `python -m tests.serving.logged JSON` with fields of LogSettings."""

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from bdh.serving.config import LogSettings
from bdh.serving.observability.logs import RequestLog, configure_logging
from bdh.serving.observability.metrics import Metrics

logger = logging.getLogger("bdh.test")
metrics = Metrics()
router = APIRouter(prefix="/v1")


class Strict(BaseModel):
    number: int


@router.post("/echo/{name}")
async def echo(name: str, request: Request) -> dict[str, Any]:
    text = (await request.json())["prompt"]
    request.state.log.update(
        model="m" * 300, key="key_1", key_name="alice", prompt=text, answer=text.upper(), prompt_tokens=3, message="x"
    )
    logger.info("a line of the handler", extra={"tokens": 3})
    logger.debug("a line for who looks for faults")
    await asyncio.to_thread(logger.warning, "a line of a thread")
    return {"text": text}


@router.get("/stream")
async def stream(request: Request) -> StreamingResponse:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(600):  # a minute at most
            yield b"data: x\n\n"
            await asyncio.sleep(0.1)

    request.state.log["model"] = "tiny"
    return StreamingResponse(pieces(), media_type="text/event-stream")


@router.get("/broken")
async def broken() -> StreamingResponse:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"data: x\n\n"
        raise RuntimeError("the engine stopped")

    return StreamingResponse(pieces())


@router.post("/fail")
async def fail(request: Request) -> None:
    text = (await request.json())["prompt"]
    try:
        Strict.model_validate({"number": text})
    except ValueError as error:
        raise KeyError(text) from error


def main() -> None:
    configure_logging(LogSettings(**json.loads(sys.argv[1])))
    app = FastAPI()
    app.include_router(router)

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {}

    @app.get("/metrics")
    async def figures() -> Response:
        return Response(metrics.render(), media_type=metrics.content_type)

    settings = LogSettings(**json.loads(sys.argv[1]))
    server = uvicorn.Server(
        uvicorn.Config(RequestLog(app, metrics, settings), port=0, log_config=None, access_log=False)
    )
    server.run()


if __name__ == "__main__":
    main()
