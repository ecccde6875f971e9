"""Sessions on an engine that many share: `Session` for who waits in an event loop."""

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
from bdh.inference.params import SamplingParams

CheckTokens = Callable[[Sequence[int]], None]
ReserveTokens = Callable[[int], Awaitable[None]]


class TokensRead(NamedTuple):
    """How many tokens were read, and how many of these a kept state had read before."""

    tokens: int
    cached: int


class Turn:
    """Something that a session writes: begun, and to be waited for. Who has it ends it: `drop`, whatever came before.

    The session goes on from what was handed on: the pieces that `deltas` gave, or what `completion` returned. It is
    free for what comes next when the last piece comes.

    Attributes:
        text_request: The request. Its prompt is what this turn reads anew.
    """

    def __init__(self, session: "AsyncSession", plan: Plan, call: Call):
        self.text_request: TextRequest = plan.text_request
        self._session = session
        self._plan = plan
        self._call = call
        self._text: list[str] = []  # that was handed on
        self._whole = False  # all of it was
        self._settling: asyncio.Task[None] | None = None

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the turn reads."""
        return len(self.text_request.request.prompt)

    @property
    def output(self) -> RequestOutput | None:
        """As of the call: what was written so far, for figures."""
        return self._call.output

    @property
    def cached_tokens(self) -> int:
        """How many of these a kept state had read before; known with the first result."""
        return self._call.cached_tokens

    async def deltas(self) -> AsyncGenerator[list[Delta]]:
        """Pieces of the text, all that have come since the last ones; to the end.

        Raises:
            BDHError: The text cannot go on, or the model is closed.
            RuntimeError: The engine failed.
        """
        async for deltas in self._call.deltas():
            self._text += [delta.text for delta in deltas]
            if deltas[-1].finish_reason is not None:
                await self._end()
            yield deltas

    async def completion(self) -> Completion:
        """The whole, if it was not begun with `wants_deltas`. Raises as `deltas`."""
        completion = await self._call.completion()
        self._text = [completion.text]
        await self._end()
        return completion

    def drop(self) -> None:
        """Ends what is left; what comes next in the session waits until that has come about, within a step."""
        if self._settling is None:
            self._settling = self._session._settling = asyncio.create_task(self._settle())

    async def _end(self) -> None:
        """Settles the whole, before its end is handed on: who has that may go on at once."""
        self._whole = True
        self.drop()
        assert self._settling is not None
        await asyncio.shield(self._settling)

    async def _settle(self) -> None:
        session, output = self._session, self._call.output
        assert output is not None
        try:
            with suppress(BDHError, RuntimeError):  # the model is closed, or lost: nothing changes the answer any more
                await self._call.finish()
            session._settle(self._plan, output, "".join(self._text), self._whole)
        finally:
            session._free()


class AsyncSession(Conversation):
    """As `Session`, on an `AsyncModel`: what is long is done beside the event loop, and all else goes on meanwhile.

    For tasks of one event loop. One thing at a time: a second is refused with a BDHError.

    Attributes:
        when_free: Is called when what made it busy is over.
    """

    def __init__(self, llm: AsyncModel, system: str | None = None, params: SamplingParams | None = None):
        super().__init__(llm.prompt_encoder, system, params)
        self.llm = llm
        self.when_free: Callable[[], None] = lambda: None
        self._settling: asyncio.Task[None] | None = None  # of the last turn

    async def send(
        self,
        text: str,
        params: SamplingParams | None = None,
        *,
        wants_deltas: bool = True,
        check: CheckTokens | None = None,
        reserve: ReserveTokens | None = None,
    ) -> Turn:
        """Says something to the assistant, as `Session.send`; returns when the answer is in the engine's queue.

        Args:
            text: What is said.
            params: For the answer; the session's own if there are none.
            wants_deltas: Whether `Turn.deltas` will be iterated, or else `Turn.completion` awaited.
            check: Is called with the tokens of what is new, and may raise.
            reserve: Is awaited with how many tokens will be read, before they are, and may raise.

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
        """Reads a text, if there is one, and writes on from there, as `Session.write`; both come about or neither.

        Args and errors as for `send`.
        """
        checked = self._checked(params)
        return await self._begin(lambda: self._plan_write(text, checked), wants_deltas, check, reserve)

    async def read(
        self, text: str, *, check: CheckTokens | None = None, reserve: ReserveTokens | None = None
    ) -> TokensRead:
        """Reads a text that needs no answer; the last token waits for what follows. Errors as for `send`.

        Args:
            text: What is read.
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
        """Goes on with another engine of the same model: only for a session that has no state yet."""
        assert self.state is None and self.ahead is None
        self.llm, self.prompt_encoder = llm, llm.prompt_encoder

    async def settled(self) -> None:
        """Waits for a turn that was dropped to have ended."""
        if self._settling is not None and not self._settling.done():
            await asyncio.wait({self._settling})

    async def save(self, path: str | Path, **more: str) -> None:
        """Writes the session as it is now to a file, as `Session.save`; it can go on meanwhile.

        Args:
            path: The file.
            more: What else the file is to tell, for `bdh.inference.state_file.read_metadata`.

        Raises:
            BDHError: As for `Session.save`.
        """
        await self.settled()
        await self.llm.call_in_thread(engine_rpc.write_session, self._snapshot(), Path(path).absolute(), more)

    @classmethod
    async def load(cls, llm: AsyncModel, path: str | Path) -> "AsyncSession":
        """Reads a session that was saved. Raises BDHError if it is not one, or is of another model."""
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
        """Makes the session busy. Raises BDHError if it is."""
        await self.settled()
        self._check_idle()
        self.busy = True

    def _free(self) -> None:
        self.busy = False
        self.when_free()


def is_long(text: str) -> bool:
    return isinstance(text, str) and len(text) > SHORT_PROMPT
