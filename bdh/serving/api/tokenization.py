"""POST /tokenize and /detokenize: the tokens of a text, and back."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from bdh.serving.api.dependencies import CurrentCaller, Limits, Models
from bdh.serving.api.errors import bad_request
from bdh.serving.api.request_body import JSONBodyRoute
from bdh.serving.api.request_handler import LARGE_RESPONSE
from bdh.serving.api.request_schemas import ChatMessages, Strict, Token, plain_message
from bdh.serving.api.response_schemas import ModelResponse
from bdh.serving.api.sse import wait_for
from bdh.serving.auth.token_usage import TokenMeter
from bdh.serving.model_registry import ServedModel

if TYPE_CHECKING:
    from bdh.data.chat_format import Message

router = APIRouter(tags=["tokens"], route_class=JSONBodyRoute)


class TokenizeRequest(Strict):
    """Either a prompt, or the messages of a chat as the model would read them."""

    model: str
    prompt: str | None = None
    messages: ChatMessages | None = None


class TokenizeResponse(BaseModel):
    """Token ids, how many, and the text of each (bytes:… where it is a part of a character)."""

    tokens: list[int]
    count: int
    pieces: list[str]


class DetokenizeRequest(Strict):
    model: str
    tokens: Annotated[list[Token], Field(fail_fast=True)]


class DetokenizeResponse(BaseModel):
    text: str


@router.post("/v1/tokenize", response_model=TokenizeResponse)
@router.post("/tokenize", response_model=TokenizeResponse, include_in_schema=False)
async def tokenize(
    body: TokenizeRequest, request: Request, caller: CurrentCaller, models: Models, limits: Limits
) -> Response:
    """The tokens of a text. They count as tokens that are read."""
    served = models.get(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("give either a prompt or messages", "prompt")
    param = "prompt" if body.messages is None else "messages"
    messages = [plain_message(message, f"messages.{number}") for number, message in enumerate(body.messages or ())]
    texts = [message["content"] for message in messages] if body.prompt is None else [body.prompt]
    served.check_length(sum(map(len, texts)), param)
    encoding = TokenMeter(limits, caller, request).encode(
        encode(served, body.prompt, messages, caller.client), served.token_bound(texts)
    )
    tokens = await wait_for(request, encoding)
    if tokens:
        served.check_prompt(tokens, param)
    request.state.log.update(model=served.name, prompt_tokens=len(tokens))

    def respond() -> ModelResponse:
        pieces = [served.texts.text(token) for token in tokens]
        return ModelResponse(TokenizeResponse(tokens=tokens, count=len(tokens), pieces=pieces))

    return await asyncio.to_thread(respond) if len(tokens) > LARGE_RESPONSE else respond()


@router.post("/v1/detokenize")
@router.post("/detokenize", include_in_schema=False)
async def detokenize(
    body: DetokenizeRequest, request: Request, caller: CurrentCaller, models: Models, limits: Limits
) -> DetokenizeResponse:
    """The text of tokens, which count as tokens that are read."""
    served = models.get(body.model)
    encoder, tokens = served.llm.prompt_encoder, body.tokens
    if len(tokens) > (limit := served.limits.max_prompt_tokens):
        message = f"there are {len(tokens)} tokens; this server reads {limit} at most"
        raise bad_request(message, "tokens", "context_length_exceeded")
    for number, token in enumerate(tokens):
        if token >= encoder.vocab_size:
            message = f"tokens.{number} is {token}; the model's tokens are 0 to {encoder.vocab_size - 1}"
            raise bad_request(message, f"tokens.{number}")
    request.state.log.update(model=served.name, prompt_tokens=len(tokens))
    meter = TokenMeter(limits, caller, request)
    await meter.reserve(len(tokens))
    try:
        decoding = served.llm.run_in_thread(lambda: encoder.tokenizer.decode(tokens), caller.client)
        return DetokenizeResponse(text=await wait_for(request, decoding))
    finally:
        await meter.settle(len(tokens))


async def encode(served: ServedModel, prompt: str | None, messages: "Sequence[Message]", client: str) -> list[int]:
    """Encode a prompt, or else messages. Raises BDHError."""
    encoder = served.llm.prompt_encoder
    if prompt is None:
        return await served.llm.render_in_thread(lambda: encoder.chat_tokens(messages)[1], client)
    return await served.llm.run_in_thread(lambda: encoder.encode(prompt), client)
