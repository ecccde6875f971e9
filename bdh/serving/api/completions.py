"""POST /v1/completions: continuations of prompts."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import Response

from bdh.errors import QueueFull
from bdh.inference.outputs import Completion, TextRequest, TokenLogprob, token_logprobs
from bdh.inference.sampling_params import SamplingParams
from bdh.serving.api.dependencies import CurrentCaller, Models
from bdh.serving.api.errors import bad_request
from bdh.serving.api.logprobs import ScoredToken
from bdh.serving.api.openapi import streamed
from bdh.serving.api.request_body import JSONBodyRoute
from bdh.serving.api.request_handler import RequestHandler
from bdh.serving.api.request_schemas import CompletionRequest
from bdh.serving.api.response_builder import CompletionResponseBuilder, Echo
from bdh.serving.api.response_schemas import CompletionChoice, CompletionResponse
from bdh.serving.auth.authentication import Caller
from bdh.serving.model_registry import ServedModel

if TYPE_CHECKING:
    from bdh.inference.prompt_encoder import PromptEncoder

router = APIRouter(route_class=JSONBodyRoute)

DEFAULT_MAX_TOKENS = 16  # of the OpenAI API
READ_ONLY_PARAMS = SamplingParams(max_new_tokens=1, temperature=0)  # the engine generates at least one token


@router.post(
    "/v1/completions", response_model=CompletionResponse, responses=streamed(CompletionResponse), tags=["OpenAI"]
)
async def completions(body: CompletionRequest, request: Request, caller: CurrentCaller, models: Models) -> Response:
    """Continues each prompt."""
    return await CompletionHandler(request, caller, models.get(body.model), body).respond()


class CompletionHandler(RequestHandler):
    """Handler of a request to continue prompts."""

    builder: CompletionResponseBuilder

    def __init__(self, request: Request, caller: Caller, served: ServedModel, body: CompletionRequest):
        builder = CompletionResponseBuilder(
            served.name, served.texts, include_usage=body.wants_usage, top_logprobs=bool(body.logprobs)
        )
        super().__init__(request, caller, served, body, builder)
        self.body = body
        self.prompts = body.prompts()
        self.num_prompts = len(self.prompts)
        self.choices_per_prompt = body.n or 1
        self.text_requests: list[TextRequest] = []
        self.scores_prompts = bool(body.echo) and body.logprobs is not None
        self.opens_with_output = self.scores_prompts

    async def start(self) -> None:
        params = self._checked_params()
        body, served, prompts = self.body, self.served, self.prompts
        only_tokenizes = self.reads_only and not self.scores_prompts
        if only_tokenizes:
            bound = sum(served.token_bound([p]) if isinstance(p, str) else len(p) for p in prompts)
            await self.meter.reserve(bound, is_estimate=True)
            self.prompt_tokens = bound  # until the number is known, also if the client disconnects before
        try:
            self.text_requests = [
                await served.llm.text_request(prompt, params, self.caller.client) for prompt in prompts
            ]
        except QueueFull:  # nothing was tokenized
            self.prompt_tokens = 0
            raise
        for text_request in self.text_requests:
            served.check_prompt(text_request.request.prompt, "prompt")
            if self.scores_prompts:
                text_request.request.prompt_logprobs = body.logprobs
        if only_tokenizes:
            self.prompt_tokens = sum(len(text_request.request.prompt) for text_request in self.text_requests)
        else:
            await self.start_calls(self.text_requests)
        if body.logprobs is not None:
            for number, text_request in enumerate(self.text_requests):
                offset = len(text_request.prompt) if body.echo else 0
                self.builder.add_logprobs(text_request, number * self.choices_per_prompt, offset)
        if body.brain:
            await self.start_trace(self.text_requests[0].request.prompt)

    def _checked_params(self) -> SamplingParams:
        """Check the fields of the request that need no tokenizer; return its parameters. Raises ApiError, BDHError."""
        body, served, prompts = self.body, self.served, self.prompts
        if body.suffix:
            raise bad_request("suffix is not supported: the model reads from left to right; leave it out", "suffix")
        if body.brain and self.choices_per_prompt * len(prompts) > 1:
            raise bad_request("brain is for one text at a time; leave n and other prompts out", "brain")
        max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        if max_tokens == 0 and not (body.echo and not body.stream):
            raise bad_request("max_tokens is 0, which is for echo without stream; give at least 1", "max_tokens")
        if max_tokens == 0 and body.brain:
            raise bad_request("brain is for texts that are written; leave it out, or set max_tokens to 1", "brain")
        if len(prompts) > (limit := served.limits.max_prompts):
            raise bad_request(f"there are {len(prompts)} prompts; this server takes {limit} at a time", "prompt")
        params = body.sampling_params(
            served.limits, max(1, max_tokens), n=self.choices_per_prompt, best_of=body.best_of, logprobs=body.logprobs
        )
        served.check_num_choices(len(prompts) * (params.best_of or params.n))
        served.check_length(sum(len(prompt) for prompt in prompts if isinstance(prompt, str)), "prompt")
        for prompt in prompts:
            if not isinstance(prompt, str):  # before the tokens are decoded
                served.check_prompt(prompt, "prompt")
        self.reads_only = max_tokens == 0
        return READ_ONLY_PARAMS if self.reads_only else params

    def echo(self, number: int) -> Echo:
        if not self.body.echo:
            return Echo()
        text_request = self.text_requests[number]
        tokens = list(text_request.request.prompt)
        output = self.calls[number].output if self.scores_prompts else None
        if output is None or output.prompt_logprobs is None:
            return Echo(text_request.prompt)
        scores = [TokenLogprob(tokens[0], float("nan")), *token_logprobs(tokens[1:], output.prompt_logprobs)]
        return Echo(text_request.prompt, locate_tokens(self.served.llm.prompt_encoder, text_request.prompt, scores))

    async def opening_choices(self, number: int) -> list[CompletionChoice]:
        if not self.body.echo:
            return []
        if self.scores_prompts:
            echo = await self.served.llm.run_in_thread(partial(self.echo, number), self.caller.client)
        else:
            echo = self.echo(number)
        first = number * self.choices_per_prompt
        return [
            self.builder.chunk_choice(index, echo.text, echo.scored or None, None)
            for index in range(first, first + self.choices_per_prompt)
        ]

    def whole_choices(self, completions: list[Completion]) -> list[CompletionChoice]:
        if not self.reads_only:
            return super().whole_choices(completions)
        choices, n = [], self.choices_per_prompt
        for number in range(self.num_prompts):
            echo = self.echo(number)
            scored = echo.scored if self.scores_prompts else None
            choices += [self.builder.whole_choice(number * n + i, echo.text, scored, "length") for i in range(n)]
        return choices


def locate_tokens(encoder: "PromptEncoder", text: str, scores: Sequence[TokenLogprob]) -> list[ScoredToken]:
    """Return the tokens of a prompt with their offsets in its text.

    The decoded tokens are the text, unless encoding loses part of it; then the tokenizer maps tokens to characters.
    """
    from bdh.data.tokenizer import OffsetDecoder

    decoder = OffsetDecoder(encoder.tokenizer, skip_special_tokens=False)
    for score in scores:
        decoder.step(score.token)
    decoder.end()
    starts = decoder.starts
    if decoder.written != text:
        encoded = encoder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if encoded.input_ids == [score.token for score in scores]:
            starts = [start for start, _ in encoded.offset_mapping]
    return [ScoredToken(start, score) for start, score in zip(starts, scores, strict=True)]
