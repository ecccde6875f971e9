"""POST /v1/chat/completions: the assistant's reply to a conversation."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from bdh.serving.api.dependencies import CurrentCaller, Models
from bdh.serving.api.errors import bad_request
from bdh.serving.api.openapi import streamed
from bdh.serving.api.request_body import JSONBodyRoute
from bdh.serving.api.request_handler import RequestHandler
from bdh.serving.api.request_schemas import ChatRequest
from bdh.serving.api.response_builder import ChatResponseBuilder
from bdh.serving.api.response_schemas import ChatChunk, ChatResponse, ChunkChoice
from bdh.serving.auth.authentication import Caller
from bdh.serving.model_registry import ServedModel

router = APIRouter(route_class=JSONBodyRoute)


@router.post("/v1/chat/completions", response_model=ChatResponse, responses=streamed(ChatChunk), tags=["OpenAI"])
async def chat_completions(body: ChatRequest, request: Request, caller: CurrentCaller, models: Models) -> Response:
    """Answers a conversation."""
    return await ChatHandler(request, caller, models.get(body.model), body).respond()


class ChatHandler(RequestHandler):
    """Handler of a request for the reply to a conversation."""

    builder: ChatResponseBuilder

    def __init__(self, request: Request, caller: Caller, served: ServedModel, body: ChatRequest):
        builder = ChatResponseBuilder(served.name, served.texts, include_usage=body.wants_usage)
        super().__init__(request, caller, served, body, builder)
        self.body = body
        self.choices_per_prompt = body.n or 1

    async def start(self) -> None:
        body, served, n = self.body, self.served, self.choices_per_prompt
        messages = body.plain_messages()
        if body.brain and n > 1:
            raise bad_request("brain is for one text at a time; leave n out", "brain")
        limits = served.limits
        params = body.sampling_params(limits, body.answer_tokens(limits), n=n, logprobs=body.wanted_logprobs())
        served.check_num_choices(n)
        served.check_length(sum(len(message["content"]) for message in messages), "messages")
        text_request = await served.llm.chat_request(messages, params, self.caller.client)
        served.check_prompt(text_request.request.prompt, "messages")
        await self.start_calls([text_request])
        if params.logprobs is not None:
            self.builder.add_logprobs(text_request)
        if body.brain:
            await self.start_trace(text_request.request.prompt)

    async def opening_choices(self, number: int) -> list[ChunkChoice]:
        return [self.builder.role_choice(index) for index in range(self.choices_per_prompt)]
