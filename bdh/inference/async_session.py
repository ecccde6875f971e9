"""Sessions on an `AsyncModel`."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from bdh.data.chat_format import check_messages
from bdh.errors import BDHError
from bdh.inference import engine_rpc
from bdh.inference.async_model import SHORT_PROMPT, AsyncModel, Call
from bdh.inference.conversation import Conversation, Plan
from bdh.inference.outputs import Completion, Delta, RequestOutput, TextRequest
from bdh.inference.sampling_params import SamplingParams

CheckTokens = Callable[[Sequence[int]], None]
ReserveTokens = Callable[[int], Awaitable[None]]


class TokensRead(NamedTuple):
    """Number of tokens read, and number of these taken from the prefix cache."""

    tokens: int
    cached: int


class Turn:
    """A running generation of a session. The caller must end it with `drop`.

    The session continues from the output that the caller received: the pieces from `deltas`, or `completion`. It is
    ready for the next operation when the last piece is received.

    Attributes:
        text_request: The request. Its prompt has the tokens that this turn reads.
    """

    def __init__(self, session: "AsyncSession", plan: Plan, call: Call):
        self.text_request: TextRequest = plan.text_request
        self._session = session
        self._plan = plan
        self._call = call
        self._text: list[str] = []  # received by the caller
        self._whole = False  # whether the caller received all of it
        self._settling: asyncio.Task[None] | None = None

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens that the turn reads."""
        return len(self.text_request.request.prompt)

    @property
    def output(self) -> RequestOutput | None:
        """Output so far, for statistics."""
        return self._call.output

    @property
    def cached_tokens(self) -> int:
        """Number of these taken from the prefix cache; known with the first result."""
        return self._call.cached_tokens

    async def deltas(self) -> AsyncGenerator[list[Delta]]:
        """Yield all new pieces of the text at once, until the end.

        Raises:
            BDHError: The text cannot be continued, or the model is closed.
            RuntimeError: The engine failed.
        """
        async for deltas in self._call.deltas():
            self._text += [delta.text for delta in deltas]
            if deltas[-1].finish_reason is not None:
                await self._end()
            yield deltas

    async def completion(self) -> Completion:
        """Wait for the completion, of a turn without `wants_deltas`. Raises as `deltas`."""
        completion = await self._call.completion()
        self._text = [completion.text]
        await self._end()
        return completion

    def drop(self) -> None:
        """End the turn. The next operation of the session waits until that is done, within a step."""
        if self._settling is None:
            self._settling = self._session._settling = asyncio.create_task(self._settle())

    async def _end(self) -> None:
        """Settle the complete turn before the caller receives its end, so that the session is ready then."""
        self._whole = True
        self.drop()
        assert self._settling is not None
        await asyncio.shield(self._settling)

    async def _settle(self) -> None:
        session, output = self._session, self._call.output
        assert output is not None
        try:
            with suppress(BDHError, RuntimeError):  # closed or lost: the output is final
                await self._call.finish()
            session._settle(self._plan, output, "".join(self._text), self._whole)
        finally:
            session._free()


class AsyncSession(Conversation):
    """Asynchronous `Session` on an `AsyncModel`, for the tasks of one event loop.

    It runs one operation at a time; a second one is refused with a BDHError.

    Attributes:
        when_free: Called when an operation ends.
    """

    def __init__(self, llm: AsyncModel, system: str | None = None, params: SamplingParams | None = None):
        super().__init__(llm.prompt_encoder, system, params)
        self.llm = llm
        self.when_free: Callable[[], None] = lambda: None
        self._settling: asyncio.Task[None] | None = None  # ends the last turn

    async def send(
        self,
        text: str,
        params: SamplingParams | None = None,
        *,
        wants_deltas: bool = True,
        check: CheckTokens | None = None,
        reserve: ReserveTokens | None = None,
    ) -> Turn:
        """Send a message to the assistant, as `Session.send`; return when the request is queued in the engine.

        Args:
            text: The message.
            params: Params of the reply; by default those of the session.
            wants_deltas: Whether the caller iterates `Turn.deltas` instead of awaiting `Turn.completion`.
            check: Called with the new tokens; may raise.
            reserve: Awaited with the number of tokens to read before they are read; may raise.

        Raises:
            QueueFull: Too many requests wait (a BDHError).
            BDHError: The session is busy; or as for `Session.send`.
        """
        message = {"role": "user", "content": text}
        check_messages([message])
        checked = self._checked(params)
        return await self._begin(lambda: self._plan_send(message, checked), wants_deltas, check, reserve)

    async def write(
        self,
        params: SamplingParams | None = None,
        text: str = "",
        *,
        wants_deltas: bool = True,
        check: CheckTokens | None = None,
        reserve: ReserveTokens | None = None,
    ) -> Turn:
        """Read a text, if there is one, and continue it, as `Session.write`: both happen or neither.

        Args and errors as for `send`.
        """
        checked = self._checked(params)
        return await self._begin(lambda: self._plan_write(text, checked), wants_deltas, check, reserve)

    async def read(
        self, text: str, *, check: CheckTokens | None = None, reserve: ReserveTokens | None = None
    ) -> TokensRead:
        """Read a text without generating; its last token is read by the next operation. Errors as for `send`.

        Args:
            text: The text.
            check: As for `send`.
            reserve: As for `send`.
        """
        await self._take()
        try:
            if is_long(text):
                reading = await self.llm.run_in_thread(lambda: self._plan_read(text), self.client)
            else:
                reading = self._plan_read(text)
            if check is not None:
                check(reading.new)
            count = 0 if reading.text_request is None else len(reading.text_request.request.prompt)
            if reserve is not None:
                await reserve(count)
            if reading.text_request is None:
                self._settle_reading(reading, None)
                return TokensRead(count, 0)
            call = await self.llm.start(reading.text_request, wants_deltas=False)
            try:
                await call.completion()
            finally:
                call.drop()
            assert call.output is not None
            self._settle_reading(reading, call.output.continuations[0].state)
            return TokensRead(count, call.cached_tokens)
        finally:
            self._free()

    def move(self, llm: AsyncModel) -> None:
        """Continue on another engine of the same model. The session must have no state yet."""
        assert self.state is None and self.ahead is None
        self.llm, self.prompt_encoder = llm, llm.prompt_encoder

    async def settled(self) -> None:
        """Wait until a dropped turn has ended."""
        if self._settling is not None and not self._settling.done():
            await asyncio.wait({self._settling})

    async def save(self, path: str | Path, **more: str) -> None:
        """Save the session as it is now, as `Session.save`; it can be used meanwhile.

        Args:
            path: The file.
            more: Additional metadata, for `bdh.inference.state_metadata.read_metadata`.

        Raises:
            BDHError: As for `Session.save`.
        """
        await self.settled()
        await self.llm.call_in_thread(engine_rpc.write_session, self._snapshot(), Path(path).absolute(), more)

    @classmethod
    async def load(cls, llm: AsyncModel, path: str | Path) -> "AsyncSession":
        """Load a saved session. Raises BDHError if it is invalid, or of another model."""
        session = cls(llm)
        session._restore(await llm.call_in_thread(engine_rpc.read_session, path))
        return session

    async def _begin(
        self, make: Callable[[], Plan], wants_deltas: bool, check: CheckTokens | None, reserve: ReserveTokens | None
    ) -> Turn:
        await self._take()
        try:
            plan = await self.llm.render_in_thread(make, self.client)
            if check is not None:
                check(plan.new)
            if reserve is not None:
                await reserve(len(plan.text_request.request.prompt))
            return Turn(self, plan, await self.llm.start(plan.text_request, wants_deltas))
        except BaseException:
            self._free()
            raise

    async def _take(self) -> None:
        """Mark the session as busy. Raises BDHError if it is busy already."""
        await self.settled()
        self._check_idle()
        self.busy = True

    def _free(self) -> None:
        self.busy = False
        self.when_free()


def is_long(text: str) -> bool:
    return isinstance(text, str) and len(text) > SHORT_PROMPT
