"""POST /tokenize and /detokenize: the tokens of a text, and back."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from bdh.serving.api.errors import bad_request
from bdh.serving.api.request_body import JSONBodyRoute
from bdh.serving.api.request_handler import LARGE
from bdh.serving.api.request_schemas import ChatMessages, Strict, Token, plain_message
from bdh.serving.api.sse import JSONAnswer, until_gone
from bdh.serving.auth.authentication import Caller, current_caller
from bdh.serving.auth.token_usage import TokenMeter
from bdh.serving.model_registry import ServedModel

if TYPE_CHECKING:
    from bdh.data.chat_format import Message
    from bdh.serving.server import Server

router = APIRouter(tags=["tokens"], route_class=JSONBodyRoute)


class TokenizeRequest(Strict):
    """Either a prompt, or the messages of a chat as the model would read them."""

    model: str
    prompt: str | None = None
    messages: ChatMessages | None = None


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
async def tokenize(
    body: TokenizeRequest, request: Request, caller: Annotated[Caller, Depends(current_caller)]
) -> Response:
    """The tokens of a text. They count as tokens that are read."""
    server: Server = request.app.state.server
    served = server.models.get(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("give either a prompt or messages", "prompt")
    what = "prompt" if body.messages is None else "messages"
    messages = [plain_message(message, f"messages.{number}") for number, message in enumerate(body.messages or ())]
    texts = [message["content"] for message in messages] if body.prompt is None else [body.prompt]
    served.check_length(sum(map(len, texts)), what)
    encoding = TokenMeter(server, caller, request).encode(
        encode(served, body.prompt, messages, caller.client), served.token_bound(texts)
    )
    tokens = await until_gone(request, encoding)
    if tokens:
        served.check_prompt(tokens, what)
    request.state.log.update(model=served.name, prompt_tokens=len(tokens))

    def answer() -> JSONAnswer:
        pieces = [served.texts.text(token) for token in tokens]
        return JSONAnswer({"tokens": tokens, "count": len(tokens), "pieces": pieces})

    return await asyncio.to_thread(answer) if len(tokens) > LARGE else answer()


@router.post("/v1/detokenize", response_model=Detokenized)
@router.post("/detokenize", response_model=Detokenized, include_in_schema=False)
async def detokenize(
    body: DetokenizeRequest, request: Request, caller: Annotated[Caller, Depends(current_caller)]
) -> Response:
    """The text of tokens, which count as tokens that are read."""
    server: Server = request.app.state.server
    served = server.models.get(body.model)
    texts, size = served.llm.prompt_encoder, served.llm.prompt_encoder.vocab_size
    if len(body.tokens) > (most := served.limits.max_prompt_tokens):
        words = f"there are {len(body.tokens)} tokens; this server reads {most} at most"
        raise bad_request(words, "tokens", "context_length_exceeded")
    for number, token in enumerate(body.tokens):
        if token >= size:
            raise bad_request(f"tokens.{number} is {token}; the model's tokens are 0 to {size - 1}", f"tokens.{number}")
    request.state.log.update(model=served.name, prompt_tokens=len(body.tokens))
    meter = TokenMeter(server, caller, request)
    await meter.reserve(len(body.tokens))
    try:
        text = await until_gone(
            request, served.llm.run_in_thread(lambda: texts.tokenizer.decode(body.tokens), caller.client)
        )
    finally:
        await meter.settle(len(body.tokens))
    return JSONAnswer({"text": text})


async def encode(served: ServedModel, prompt: str | None, messages: "Sequence[Message]", client: str) -> list[int]:
    """The tokens of a prompt, or else of messages. Raises BDHError."""
    texts = served.llm.prompt_encoder
    if prompt is None:
        return await served.llm.render_in_thread(lambda: texts.chat_tokens(messages)[1], client)
    return await served.llm.run_in_thread(lambda: texts.encode(prompt), client)
