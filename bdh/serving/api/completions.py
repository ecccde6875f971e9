"""POST /v1/completions: text goes on."""

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from bdh.errors import QueueFull
from bdh.inference.outputs import TextRequest, TokenLogprob, token_logprobs
from bdh.inference.params import SamplingParams
from bdh.serving.api.choices import Choices, CompletionDialect, Scored
from bdh.serving.api.errors import bad_request
from bdh.serving.api.generation import Writing
from bdh.serving.api.logprobs import LogprobWriter, ScoredToken
from bdh.serving.api.openapi import streamed
from bdh.serving.api.request_body import JSONBodyRoute
from bdh.serving.api.request_handler import answered, as_events
from bdh.serving.api.request_schemas import CompletionRequest
from bdh.serving.api.response_schemas import CompletionAnswer, Envelope
from bdh.serving.auth.authentication import Caller, current_caller
from bdh.serving.model_registry import ServedModel

if TYPE_CHECKING:
    from bdh.inference.prompt_encoder import PromptEncoder
    from bdh.serving.server import Server

router = APIRouter(route_class=JSONBodyRoute)

USUAL_MAX_TOKENS = 16  # the API's own, for completions
READ_ONLY = SamplingParams(max_new_tokens=1, temperature=0)  # the engine writes a token at least; it is not used


@router.post("/v1/completions", response_model=CompletionAnswer, responses=streamed(CompletionAnswer), tags=["OpenAI"])
async def completions(
    body: CompletionRequest, request: Request, caller: Annotated[Caller, Depends(current_caller)]
) -> Response:
    """Continues each prompt."""
    server: Server = request.app.state.server
    served = server.models.get(body.model)
    work = CompletionWork(server, served, body, Writing(server, served, caller, request))
    return await answered(work, request)


@dataclass
class Echo:
    """A prompt that is part of its answer."""

    text: str = ""
    scored: Scored = field(default_factory=list)


class CompletionWork:
    """One request to continue prompts."""

    def __init__(self, server: "Server", served: ServedModel, body: CompletionRequest, writing: Writing):
        self.server = server
        self.served = served
        self.body = body
        self.writing = writing
        self.envelope = Envelope("cmpl", served.name)
        self.asked: list[TextRequest] = []
        self.scores_prompts = bool(body.echo) and body.logprobs is not None

    @property
    def streamed(self) -> bool:
        return bool(self.body.stream)

    @property
    def only_tokenizes(self) -> bool:
        """Whether the answer needs nothing of the model: the prompt is echoed and not scored."""
        return self.writing.only_reads and not self.scores_prompts

    async def begin(self) -> None:
        """Checks the request and gives it to the engine. Raises ApiError or BDHError."""
        body = self.body
        if body.suffix:
            raise bad_request("suffix is not supported: the model reads from left to right; leave it out", "suffix")
        if body.brain and (body.n or 1) * len(body.prompts()) > 1:
            raise bad_request("brain is for one text at a time; leave n and other prompts out", "brain")
        max_tokens = USUAL_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        if max_tokens == 0 and not (body.echo and not body.stream):
            raise bad_request("max_tokens is 0, which is for echo without stream; give at least 1", "max_tokens")
        if max_tokens == 0 and body.brain:
            raise bad_request("brain is for texts that are written; leave it out, or set max_tokens to 1", "brain")
        prompts = body.prompts()
        if len(prompts) > self.served.limits.max_prompts:
            most = self.served.limits.max_prompts
            raise bad_request(f"there are {len(prompts)} prompts; this server takes {most} at a time", "prompt")
        params = body.sampling(
            self.served.limits, max(1, max_tokens), n=body.n or 1, best_of=body.best_of, logprobs=body.logprobs
        )
        self.writing.check_count(len(prompts) * (params.best_of or params.n))
        self.served.check_length(sum(len(prompt) for prompt in prompts if isinstance(prompt, str)), "prompt")
        for prompt in prompts:
            if not isinstance(prompt, str):  # before a text is made of its tokens
                self.served.check_prompt(prompt, "prompt")
        self.writing.only_reads = max_tokens == 0
        params = READ_ONLY if self.writing.only_reads else params
        if self.only_tokenizes:
            bound = sum(self.served.token_bound([one]) if isinstance(one, str) else len(one) for one in prompts)
            await self.writing.meter.reserve(bound, is_estimate=True)
            self.writing.prompt_tokens = bound  # until it is known, also if the client disconnects before
        try:
            self.asked = [
                await self.served.llm.text_request(prompt, params, self.writing.caller.client) for prompt in prompts
            ]
        except QueueFull:  # nothing was tokenized
            self.writing.prompt_tokens = 0
            raise
        for one in self.asked:
            self.served.check_prompt(one.request.prompt, "prompt")
            if self.scores_prompts:
                one.request.prompt_logprobs = body.logprobs
        if self.only_tokenizes:
            self.writing.prompt_tokens = sum(len(one.request.prompt) for one in self.asked)
        else:
            await self.writing.begin(self.asked, wants_deltas=bool(body.stream))
        if body.brain:
            prompt = list(self.asked[0].request.prompt)
            await self.writing.look(prompt, None)

    def echo(self, number: int) -> Echo:
        """A prompt as the answer has it, scored if log-probabilities are asked for and it was read."""
        if not self.body.echo:
            return Echo()
        asked, tokens = self.asked[number], list(self.asked[number].request.prompt)
        answer = self.writing.calls[number].output if self.scores_prompts else None
        if answer is None or answer.prompt_logprobs is None:
            return Echo(asked.prompt)
        scores = [TokenLogprob(tokens[0], float("nan")), *token_logprobs(tokens[1:], answer.prompt_logprobs)]
        return Echo(asked.prompt, place_tokens(self.served.llm.prompt_encoder, asked.prompt, scores))

    def choices(self, number: int) -> Choices:
        """What makes choices of a prompt's continuations."""
        n, texts, params = self.body.n or 1, self.served.texts, self.asked[number].request.params
        dialect = CompletionDialect(texts, bool(self.body.logprobs))
        if self.body.logprobs is None:
            return Choices(dialect, None, number * n)
        ends, offset = self.asked[number].request.ends, len(self.asked[number].prompt) if self.body.echo else 0
        writers = [LogprobWriter(texts, ends, offset=offset, tells_end=True) for _ in range(params.n)]
        return Choices(dialect, writers, number * n)

    async def answer(self) -> Callable[[], dict[str, Any]]:
        """What makes the JSON of the whole answer. Raises ApiError, BDHError or RuntimeError."""
        several = [completion.raise_for_error().choices for completion in await self.writing.completions()]
        if self.writing.only_reads:
            return lambda: self.envelope.whole(self.echoed_only(), usage=self.writing.usage())
        brain = await self.writing.observed_whole(several[0][0].tokens)
        if self.server.config.logging.prompts:
            self.writing.log["answer"] = [one.text for found in several for one in found]

        def make() -> dict[str, Any]:
            whole = []
            for number, found in enumerate(several):
                choices, echo = self.choices(number), self.echo(number)
                whole += [choices.whole(one, echo.text, echo.scored) for one in found]
            return self.envelope.whole(whole, usage=self.writing.usage(), **brain)

        return make

    def echoed_only(self) -> list[dict[str, Any]]:
        """Choices that are prompts and nothing more."""
        dialect = CompletionDialect(self.served.texts, bool(self.body.logprobs))
        n = self.body.n or 1
        choices = []
        for number in range(len(self.asked)):
            echo = self.echo(number)
            scored = echo.scored if self.scores_prompts else None
            choices += [dialect.whole(number * n + index, echo.text, scored, "length") for index in range(n)]
        return choices

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer as a stream of events."""
        usage = self.writing.usage if self.body.wants_usage else None
        async for event in as_events(self.pieces(), self.envelope, usage):
            yield event

    async def pieces(self) -> AsyncGenerator[dict[str, Any]]:
        """The pieces of its stream, without what they tell of the usage."""
        made = [self.choices(number) for number in range(len(self.asked))]
        unopened = set(range(len(made))) if self.body.echo else set()
        if not self.scores_prompts:  # what is echoed is known
            for number in sorted(unopened):
                for event in self.opening(made[number], self.echo(number)):
                    yield self.envelope.piece([event])
            unopened.clear()
        if self.writing.watch is not None:
            yield self.envelope.piece([], brain=await self.writing.watch.prompt())
        async for number, deltas in self.writing.pieces():
            if number in unopened:
                unopened.remove(number)
                echo = await self.served.llm.run_in_thread(partial(self.echo, number), self.writing.caller.client)
                for event in self.opening(made[number], echo):
                    yield self.envelope.piece([event])
            brain = await self.writing.observed(deltas)
            for piece in made[number].pieces(deltas):
                yield self.envelope.piece([piece], **brain)

    def opening(self, choices: Choices, echo: Echo) -> list[dict[str, Any]]:
        """An echoed prompt, as the first pieces of its choices."""
        return [
            choices.dialect.piece(choices.first_index + index, echo.text, echo.scored or None, None)
            for index in range(self.body.n or 1)
        ]


def place_tokens(texts: "PromptEncoder", text: str, scores: Sequence[TokenLogprob]) -> Scored:
    """The tokens of a prompt with their offsets in its text.

    The decoded tokens are the text, unless the vocabulary loses something of what it encodes; then the tokenizer knows
    which characters each token was made of.
    """
    from bdh.data.tokenizer import OffsetDecoder

    decoder = OffsetDecoder(texts.tokenizer, skip_special_tokens=False)
    for one in scores:
        decoder.step(one.token)
    decoder.end()
    starts = decoder.starts
    if decoder.written != text:
        encoded = texts.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if encoded.input_ids == [one.token for one in scores]:
            starts = [start for start, _ in encoded.offset_mapping]
    return [ScoredToken(start, one) for start, one in zip(starts, scores, strict=True)]
