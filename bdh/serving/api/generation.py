"""The engine requests of one HTTP request: started, metered and cancelled together."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import Request

from bdh.inference.outputs import Completion, Delta, TextRequest
from bdh.inference.params import SamplingParams
from bdh.inference.stats import queue_has_room
from bdh.serving.api.errors import TooManyRequests, bad_request
from bdh.serving.api.response_schemas import usage
from bdh.serving.auth.authentication import Caller
from bdh.serving.auth.token_usage import TokenMeter
from bdh.serving.model_registry import ServedModel

if TYPE_CHECKING:
    from bdh.inference.async_llm import Call
    from bdh.inference.async_session import Turn
    from bdh.inference.outputs import RequestOutput
    from bdh.model import BDHState
    from bdh.serving.activity.traces import Watch
    from bdh.serving.server import Server


def max_written_tokens(params: SamplingParams) -> int:
    """The most tokens that a request may write, of all its continuations."""
    return params.max_new_tokens * (params.best_of or params.n)


class Writing:
    """Tracks the engine requests of one HTTP request. Made when it comes, begun once it is checked, and always ended.

    Args:
        server: The server.
        served: The model that writes.
        caller: The authenticated caller that the tokens count for.
        request: Its log fields are filled in.

    Attributes:
        prompt_tokens: Tokens that were given to the engine, or tokenized, so far.
        prepaid_tokens: How many of them were counted by an earlier request.
    """

    def __init__(self, server: "Server", served: ServedModel, caller: Caller, request: Request):
        self.server = server
        self.served = served
        self.caller = caller
        self.meter = TokenMeter(server, caller, request)
        self.log: dict[str, Any] = request.state.log
        self.log["model"] = served.name
        self.calls: list[Call | Turn] = []
        self.watch: Watch | None = None  # records the activity of neurons meanwhile
        self.prompt_tokens = 0
        self.prepaid_tokens = 0
        self.only_reads = False  # what is written is no part of the answer
        self.began = time.perf_counter()
        self._ended = False

    # ---------------------------------------------------------------------------------------------------- beginning

    async def begin(self, asked: Sequence[TextRequest], wants_deltas: bool) -> None:
        """Gives requests to the engine, all or none. Raises ApiError or BDHError."""
        self.check_queue(sum(one.request.params.best_of or one.request.params.n for one in asked))
        write = 0 if self.only_reads else sum(max_written_tokens(one.request.params) for one in asked)
        await self.meter.reserve(sum(len(one.request.prompt) for one in asked) + write)
        if self.server.config.logging.prompts:
            self.log["prompt"] = [one.prompt for one in asked]
        try:
            for one in asked:
                one.request.prefix_owner, one.request.client = self.caller.owner, self.caller.client
                self.calls.append(await self.served.llm.start(one, wants_deltas))
                self.prompt_tokens += len(one.request.prompt)
        except BaseException:
            self.drop()
            raise

    def check_count(self, texts: int) -> None:
        """Raises ApiError for a request of too many texts."""
        if texts > (most := self.served.limits.max_choices):
            raise bad_request(f"{texts} texts are asked for; this server writes {most} for one request at most", "n")

    def check_queue(self, count: int = 1) -> None:
        """Refuses at once, before anything is made of the request, where the queue is full, or the engine is lost."""
        self.server.models.get(self.served.name)
        stats, most = self.served.llm.stats, self.server.config.queue_size
        if stats.waiting >= most and not queue_has_room(stats, self.caller.client, count, most, 0):
            words = f"{stats.waiting} requests wait already, of {most} that may; try again later"
            raise TooManyRequests(words, self.seconds_of_queue(), "queue_full")

    def seconds_of_queue(self) -> int:
        """An estimate of how long the queue takes, for the Retry-After of a refusal."""
        return self.server.queue_seconds(self.served)

    async def look(self, prompt: list[int], state: "BDHState | None") -> None:
        """Begins a trace of what the neurons do, from a prompt after a state. Raises ApiError."""
        traces = self.server.traces
        self.watch = await traces.begin(self.served.name, self.served.llm, self.caller.owner, prompt, state)

    # ------------------------------------------------------------------------------------------------------ results

    async def completions(self) -> list[Completion]:
        """The whole of each. Raises BDHError where a constrained text could not go on, RuntimeError as the engine."""
        return [await call.completion() for call in self.calls]

    async def pieces(self) -> AsyncGenerator[tuple[int, list[Delta]]]:
        """Pieces of all, each with the number of its request."""
        if len(self.calls) == 1:
            async for deltas in self.calls[0].deltas():
                yield 0, deltas
            return
        queue: asyncio.Queue[tuple[int, list[Delta] | Exception | None]] = asyncio.Queue()

        async def pump(number: int, call: "Call | Turn") -> None:
            try:
                async for deltas in call.deltas():
                    queue.put_nowait((number, deltas))
                queue.put_nowait((number, None))
            except Exception as error:
                queue.put_nowait((number, error))

        pumps = [asyncio.create_task(pump(number, call)) for number, call in enumerate(self.calls)]
        try:
            unfinished = len(pumps)
            while unfinished:
                number, came = await queue.get()
                if isinstance(came, Exception):
                    raise came
                if came is None:
                    unfinished -= 1
                else:
                    yield number, came
        finally:
            for task in pumps:
                task.cancel()

    async def observed(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """The fields of a stream's piece about the activity of neurons; none if it is not recorded."""
        if self.watch is None:
            return {}
        return {"brain": await self.watch.tokens([token for delta in deltas for token in delta.tokens])}

    async def observed_whole(self, tokens: Sequence[int]) -> dict[str, Any]:
        """The field of a whole answer that names its trace; none if the activity of neurons is not recorded."""
        if self.watch is None:
            return {}
        await self.watch.prompt()
        await self.watch.tokens(tokens)
        return {"brain": {"trace": self.watch.id}}

    # ------------------------------------------------------------------------------------------------------- ending

    @property
    def completion_tokens(self) -> int:
        """Tokens written so far, of all continuations, those that `best_of` gives up among them."""
        if self.only_reads:
            return 0
        return sum(len(part.tokens) for answer in self._answers() for part in answer.continuations)

    def _answers(self) -> "list[RequestOutput]":
        return [call.output for call in self.calls if call.output is not None]

    def usage(self) -> dict[str, Any]:
        """The JSON of the answer's `usage`."""
        return usage(self.prompt_tokens, self.completion_tokens, sum(call.cached_tokens for call in self.calls))

    def drop(self) -> None:
        for call in self.calls:
            call.drop()

    async def end(self) -> None:
        """Cancels what is left, and counts what was used. Also if the client has disconnected or something failed."""
        if self._ended:
            return
        self._ended = True
        self.drop()
        if self.watch is not None:
            self.watch.close()
        written, cached = self.completion_tokens, sum(call.cached_tokens for call in self.calls)
        self.log.update(prompt_tokens=self.prompt_tokens, completion_tokens=written, cached_tokens=cached)
        parts = [part for answer in self._answers() for part in answer.continuations]
        finish_reasons = {part.finish_reason for part in parts if part.finish_reason}
        if finish_reasons and not self.only_reads:
            self.log["finish_reason"] = ",".join(sorted(finish_reasons))
        self.server.metrics.usage(self.served.name, self.prompt_tokens, cached, written)
        if not self.only_reads:
            self._record_times()
        if self.calls:
            self.server.took(time.perf_counter() - self.began)
        await self.meter.settle(self.prompt_tokens - self.prepaid_tokens + written)

    def _record_times(self) -> None:
        """Records in the metrics how long clients waited for first tokens, and for those that followed."""
        metrics, name = self.server.metrics, self.served.name
        for answer in self._answers():
            if not answer.first_at:
                continue
            metrics.first_token(name, answer.first_at - self.began)
            texts, written = len(answer.continuations), sum(len(part.tokens) for part in answer.continuations)
            if written > texts:
                steps = written / texts - 1  # of one continuation, after its first token
                metrics.token_times(name, (answer.last_at - answer.first_at) / steps, written - texts)
