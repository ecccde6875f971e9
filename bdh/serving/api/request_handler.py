"""Answers an HTTP request that generates text: starts its engine requests, meters their tokens, and responds."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from fastapi import Request
from starlette.responses import Response

from bdh.inference.outputs import Completion, Delta, RequestOutput, TextRequest
from bdh.serving.api.request_schemas import KnownFields
from bdh.serving.api.response_builder import Echo, ResponseBuilder
from bdh.serving.api.response_schemas import (
    ChunkChoice,
    CompletionChoice,
    CompletionTokensDetails,
    ModelResponse,
    PromptTokensDetails,
    TokenUsage,
)
from bdh.serving.api.sse import DONE, EventStream, sse_event, wait_for
from bdh.serving.auth.authentication import Caller
from bdh.serving.auth.token_usage import TokenMeter
from bdh.serving.model_registry import ServedModel

if TYPE_CHECKING:
    from bdh.inference.async_model import Call
    from bdh.inference.async_session import Turn
    from bdh.model import BDHState
    from bdh.serving.activity.traces import TraceRecorder, TraceStore
    from bdh.serving.observability.metrics import Metrics

LARGE_RESPONSE = 200  # tokens above which a response is encoded in a thread


class RequestHandler(ABC):
    """Answers one HTTP request that generates text, and ends its engine requests in any case.

    Args:
        request: The HTTP request; its log fields are filled in.
        caller: The authenticated caller, who is charged for the tokens.
        served: The model.
        body: The parsed body of the request.
        builder: Builds the responses.

    Attributes:
        calls: The engine requests, one for each prompt.
        prompt_tokens: Tokens given to the engine, or tokenized, so far.
        prepaid_tokens: Number of these that were charged to an earlier request.
        cached_tokens_read: Tokens from the prefix cache that were read without an engine request.
        reads_only: Whether the response has no generated text.
        opens_with_output: Whether the opening choices of a stream depend on output of the engine.
    """

    def __init__(
        self, request: Request, caller: Caller, served: ServedModel, body: KnownFields, builder: ResponseBuilder
    ):
        state = request.app.state
        self.request = request
        self.caller = caller
        self.served = served
        self.builder = builder
        self.stream = bool(body.stream)
        self.include_usage = body.wants_usage
        self.num_prompts = 1
        self.choices_per_prompt = 1
        self.opens_with_output = False
        self.meter = TokenMeter(state.limits, caller, request)
        self.calls: list[Call | Turn] = []
        self.trace: TraceRecorder | None = None
        self.prompt_tokens = 0
        self.prepaid_tokens = 0
        self.cached_tokens_read = 0
        self.reads_only = False
        self.log: dict[str, Any] = request.state.log
        self.log["model"] = served.name
        if ignored := body.ignored_fields():
            self.log["ignored"] = ",".join(ignored)
        self._metrics: Metrics = state.metrics
        self._traces: TraceStore = state.traces
        self._logs_text: bool = state.config.logging.prompts
        self._started_at = time.perf_counter()
        self._closed = False

    @abstractmethod
    async def start(self) -> None:
        """Check the request and start its engine requests. Raises ApiError or BDHError."""

    async def respond(self) -> Response:
        """Return the response: whole, or a stream. Raises as `start` and `wait_for`."""
        try:
            await wait_for(self.request, self.start())
            if self.stream:
                return EventStream(self.request, self.events(), self.close)
            completions, fields = await wait_for(self.request, self._results())
            if self.prompt_tokens + self.completion_tokens > LARGE_RESPONSE:
                response = await asyncio.to_thread(self._whole_response, completions, fields)
            else:
                response = self._whole_response(completions, fields)
        except BaseException:
            await self.close()
            raise
        await self.close()
        return response

    # ------------------------------------------------------------------------------------------- engine requests

    async def start_calls(self, text_requests: Sequence[TextRequest]) -> None:
        """Reserve the tokens of requests and start them in the engine: all or none. Raises ApiError or BDHError."""
        all_params = [text_request.request.params for text_request in text_requests]
        continuations = [params.best_of or params.n for params in all_params]
        self.served.check_queue(self.caller.client, sum(continuations))
        tokens = sum(len(text_request.request.prompt) for text_request in text_requests)
        if not self.reads_only:
            tokens += sum(params.max_new_tokens * n for params, n in zip(all_params, continuations, strict=True))
        await self.meter.reserve(tokens)
        self.log_text("prompt", [text_request.prompt for text_request in text_requests])
        for text_request in text_requests:
            text_request.request.prefix_owner, text_request.request.client = self.caller.owner, self.caller.client
            self.calls.append(await self.served.llm.start(text_request, self.stream))
            self.prompt_tokens += len(text_request.request.prompt)

    async def start_trace(self, prompt: Sequence[int], state: "BDHState | None" = None) -> None:
        """Start to record the activity of neurons, from a prompt after a state. Raises ApiError."""
        self.trace = await self._traces.start(self.served, self.caller.owner, list(prompt), state)

    def log_text(self, field: Literal["prompt", "answer"], texts: list[str]) -> None:
        """Add texts to the request's log line, if the settings ask for them."""
        if self._logs_text:
            self.log[field] = texts

    async def deltas(self) -> AsyncGenerator[tuple[int, list[Delta]]]:
        """Yield the deltas of all engine requests, each with the index of its prompt. Raises BDHError, RuntimeError."""
        if len(self.calls) == 1:
            async for deltas in self.calls[0].deltas():
                yield 0, deltas
            return
        queue: asyncio.Queue[tuple[int, list[Delta] | Exception | None]] = asyncio.Queue()

        async def forward(number: int, call: "Call | Turn") -> None:
            try:
                async for deltas in call.deltas():
                    queue.put_nowait((number, deltas))
                queue.put_nowait((number, None))
            except Exception as error:
                queue.put_nowait((number, error))

        tasks = [asyncio.create_task(forward(number, call)) for number, call in enumerate(self.calls)]
        try:
            unfinished = len(tasks)
            while unfinished:
                number, result = await queue.get()
                if isinstance(result, Exception):
                    raise result
                if result is None:
                    unfinished -= 1
                else:
                    yield number, result
        finally:
            for task in tasks:
                task.cancel()

    # ------------------------------------------------------------------------------------------------- responses

    def echo(self, number: int) -> Echo:
        """Return the prompt with this index as the response contains it."""
        return Echo()

    async def opening_choices(self, number: int) -> Sequence[ChunkChoice | CompletionChoice]:
        """Build the choices of a stream that precede the generated text of a prompt."""
        return []

    async def events(self) -> AsyncGenerator[bytes]:
        """Yield the events of the stream."""
        builder, trace = self.builder, self.trace
        unopened = set(range(self.num_prompts))
        if not self.opens_with_output:
            for number in range(self.num_prompts):
                for choice in await self.opening_choices(number):
                    yield sse_event(builder.chunk([choice]))
            unopened.clear()
        if trace is not None:
            yield sse_event(builder.chunk([], brain=await trace.read_prompt()))
        async for number, deltas in self.deltas():
            if number in unopened:
                unopened.remove(number)
                for choice in await self.opening_choices(number):
                    yield sse_event(builder.chunk([choice]))
            fields = {}
            if trace is not None:
                fields["brain"] = await trace.read([token for delta in deltas for token in delta.tokens])
            for choice in builder.chunk_choices(deltas, number * self.choices_per_prompt):
                yield sse_event(builder.chunk([choice], **fields))
        if self.include_usage:
            yield sse_event(builder.chunk([], usage=self.usage()))
        yield DONE

    async def _results(self) -> tuple[list[Completion], dict[str, Any]]:
        """Wait for the completions; return them with the additional fields of the response."""
        completions = [(await call.completion()).raise_for_error() for call in self.calls]
        choices = [choice for completion in completions for choice in completion.choices]
        if not self.reads_only:
            self.log_text("answer", [choice.text for choice in choices])
        if self.trace is None:
            return completions, {}
        await self.trace.read_prompt()
        await self.trace.read(choices[0].tokens)
        return completions, {"brain": self.trace.reference()}

    def whole_choices(self, completions: list[Completion]) -> list[Any]:
        """Build the choices of the whole response."""
        return [
            self.builder.choice(choice, number * self.choices_per_prompt, echo)
            for number, completion in enumerate(completions)
            for echo in [self.echo(number)]
            for choice in completion.choices
        ]

    def _whole_response(self, completions: list[Completion], fields: dict[str, Any]) -> ModelResponse:
        return ModelResponse(self.builder.response(self.whole_choices(completions), self.usage(), **fields))

    # ---------------------------------------------------------------------------------------------------- tokens

    @property
    def outputs(self) -> list[RequestOutput]:
        return [call.output for call in self.calls if call.output is not None]

    @property
    def completion_tokens(self) -> int:
        """Number of generated tokens so far, including continuations that `best_of` discards."""
        if self.reads_only:
            return 0
        return sum(len(part.tokens) for output in self.outputs for part in output.continuations)

    @property
    def cached_tokens(self) -> int:
        return self.cached_tokens_read + sum(call.cached_tokens for call in self.calls)

    def usage(self) -> TokenUsage:
        return TokenUsage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self.cached_tokens),
            completion_tokens_details=CompletionTokensDetails(reasoning_tokens=0),
        )

    async def close(self) -> None:
        """Cancel unfinished engine requests and charge the used tokens; also after an error or a disconnect."""
        if self._closed:
            return
        self._closed = True
        for call in self.calls:
            call.drop()
        if self.trace is not None:
            self.trace.close()
        generated, cached = self.completion_tokens, self.cached_tokens
        self.log.update(prompt_tokens=self.prompt_tokens, completion_tokens=generated, cached_tokens=cached)
        self._metrics.usage(self.served.name, self.prompt_tokens, cached, generated)
        if not self.reads_only:
            self._record_output()
        if self.calls:
            self.served.record_request_seconds(time.perf_counter() - self._started_at)
        await self.meter.settle(self.prompt_tokens - self.prepaid_tokens + generated)

    def _record_output(self) -> None:
        """Record the finish reasons in the log, and the times of tokens in the metrics."""
        name, outputs = self.served.name, self.outputs
        reasons = {part.finish_reason for output in outputs for part in output.continuations if part.finish_reason}
        if reasons:
            self.log["finish_reason"] = ",".join(sorted(reasons))
        for output in outputs:
            if not output.first_at:
                continue
            self._metrics.first_token(name, output.first_at - self._started_at)
            continuations, tokens = len(output.continuations), sum(len(part.tokens) for part in output.continuations)
            if tokens > continuations:
                steps = tokens / continuations - 1  # of one continuation, after its first token
                self._metrics.token_times(name, (output.last_at - output.first_at) / steps, tokens - continuations)
