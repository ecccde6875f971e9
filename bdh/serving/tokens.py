"""POST /tokenize and /detokenize: what a model reads of a text, and back."""

import asyncio
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from bdh.serving.access import Caller, caller
from bdh.serving.errors import bad_request
from bdh.serving.protocol import ChatMessage, Strict, Token, plain_message
from bdh.serving.streaming import JSONAnswer

if TYPE_CHECKING:
    from bdh.serving.server import Server

router = APIRouter(tags=["tokens"])


class TokenizeRequest(Strict):
    """Either a prompt, or the messages of a chat as the model would read them."""

    model: str
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = None


class Tokenized(BaseModel):
    """Token ids, how many, and the text of each (bytes:… where it is a part of a character)."""

    tokens: list[int]
    count: int
    pieces: list[str]


class DetokenizeRequest(Strict):
    model: str
    tokens: Annotated[list[Token], Field(fail_fast=True)]


class Detokenized(BaseModel):
    text: str


@router.post("/v1/tokenize", response_model=Tokenized)
@router.post("/tokenize", response_model=Tokenized, include_in_schema=False)
async def tokenize(body: TokenizeRequest, request: Request, who: Annotated[Caller, Depends(caller)]) -> Response:
    """The tokens of a text."""
    server: Server = request.app.state.server
    served = server.models.get(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("give either a prompt or messages", "prompt")
    messages = [plain_message(message, f"messages.{number}") for number, message in enumerate(body.messages or ())]

    def answer() -> JSONAnswer:
        text = served.llm.texts.chat_format.render(messages) if body.prompt is None else body.prompt
        tokens = served.llm.texts.encode(text)
        return JSONAnswer({"tokens": tokens, "count": len(tokens), "pieces": [*map(served.texts.text, tokens)]})

    return await asyncio.to_thread(answer)  # of megabytes, at times


@router.post("/v1/detokenize", response_model=Detokenized)
@router.post("/detokenize", response_model=Detokenized, include_in_schema=False)
async def detokenize(body: DetokenizeRequest, request: Request, who: Annotated[Caller, Depends(caller)]) -> Response:
    """The text of tokens."""
    server: Server = request.app.state.server
    served = server.models.get(body.model)
    size = served.llm.texts.vocab_size
    for number, token in enumerate(body.tokens):
        if token >= size:
            raise bad_request(f"tokens.{number} is {token}; the model's tokens are 0 to {size - 1}", f"tokens.{number}")
    text = await asyncio.to_thread(served.llm.texts.tokenizer.decode, body.tokens)
    return JSONAnswer({"text": text})
