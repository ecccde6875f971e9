"""Memory of a server's sessions: states in memory up to a limit, the others on disk."""

import asyncio
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from bdh.errors import BDHError
from bdh.serving.api.errors import ApiError
from bdh.serving.sessions.files import Scratch
from bdh.serving.sessions.ids import new_id

if TYPE_CHECKING:
    from bdh.inference.async_session import AsyncSession
    from bdh.serving.model_registry import ServedModel

log = logging.getLogger(__name__)


class Kept:
    """A session, in memory or put away.

    Attributes:
        id: "ses_" and 32 hexadecimal digits, which nobody guesses.
        owner: The id of a key; None: everybody's.
        served: Its model.
        name: What its maker called it.
        created: Seconds since 1970.
        used: When it was used last, by the monotonic clock.
        uses: How often it was.
        session: None while it is put away.
        file: Where it is put away.
        prepaid_tokens: Tokens of its system message, which were counted when the session was made, until the first
            message has them read.
    """

    def __init__(self, owner: str | None, served: "ServedModel", name: str | None, place: str):
        self.id = new_id("ses", place)
        self.owner = owner
        self.served = served
        self.name = name
        self.created = int(time.time())
        self.used = time.monotonic()
        self.uses = 0
        self.session: AsyncSession | None = None
        self.file: Path | None = None
        self.prepaid_tokens = 0
        self.taken = False  # something is about to be done with it
        self.promised = 0  # bytes that there must be room for when it is done
        self.moving: asyncio.Task[None] | None = None  # to the disk
        self._position = 0  # when it was put away

    @property
    def busy(self) -> bool:
        return self.taken or (self.session is not None and self.session.busy)

    @property
    def position(self) -> int:
        """Tokens said and heard."""
        return self._position if self.session is None else self.session.position

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes, or is about to."""
        return max(self.promised, 0 if self.session is None else self.session.nbytes)

    @property
    def state_nbytes(self) -> int:
        """Bytes of the state of a session with this model."""
        return self.served.llm.model_info.state_nbytes

    def put_away(self, file: Path) -> None:
        self._position = self.position
        self.session, self.file = None, file


class SessionMemory:
    """Keeps the states of sessions within a number of bytes.

    Args:
        kept: All sessions by id; who ends one takes it out of here, and then calls `drop`.
        memory_bytes: What their states may take.
        parent: Where the folder is to be that sessions are put away in.

    Raises:
        BDHError: The folder cannot be made.
    """

    def __init__(self, kept: dict[str, Kept], memory_bytes: int, parent: Path):
        self.memory_bytes = memory_bytes
        self.scratch = Scratch(parent)
        self._kept = kept
        self._change = asyncio.Event()  # for those who wait for room

    async def close(self) -> None:
        moving = [kept.moving for kept in self._kept.values() if kept.moving is not None]
        await asyncio.gather(*moving, return_exceptions=True)
        await asyncio.to_thread(self.scratch.close)

    def nbytes(self) -> int:
        """Bytes that sessions take, or are about to."""
        return sum(kept.nbytes for kept in self._kept.values())

    def changed(self) -> None:
        """Something may be put away, or has ended: those who wait for room look again."""
        self._change.set()
        self._change.clear()

    def drop(self, kept: Kept) -> None:
        """Forgets a session."""
        kept.session = None
        if kept.file is not None:
            discard(kept.file)
        self.changed()

    async def make_room(self, kept: Kept) -> None:
        """Waits until a session's state has room in memory. Raises ApiError 507 if the disk has none for another."""
        if kept.nbytes:
            return
        while self.nbytes() + kept.state_nbytes > self.memory_bytes:
            others = [other for other in self._kept.values() if other.nbytes]
            idle = [other for other in others if not other.busy]
            if idle:
                await self._put_away(min(idle, key=lambda other: other.used))
            elif others:
                await self._change.wait()
            else:
                break
        kept.promised = kept.state_nbytes

    async def _put_away(self, kept: Kept) -> None:
        """Puts an idle session on disk, unless it is used meanwhile. Raises ApiError 507."""
        if kept.moving is None:
            assert kept.session is not None
            kept.moving = asyncio.create_task(self._move(kept, kept.session, kept.uses))
            kept.moving.add_done_callback(log_unexpected)
        await asyncio.shield(kept.moving)  # whoever waits for it

    async def _move(self, kept: Kept, session: "AsyncSession", uses: int) -> None:
        file = self.scratch.file()
        try:
            await session.save(file)
            if kept.uses == uses and not kept.busy and self._kept.get(kept.id) is kept:
                kept.put_away(file)
        except (BDHError, RuntimeError) as error:
            # It could not be saved because it is busy, or is lost with its engine, and what it took is free; or else:
            if kept.uses == uses and not session.llm.is_lost:
                raise no_room("there is no room for another session in memory", error) from error
        finally:
            kept.moving = None
            if kept.file is not file:
                discard(file)

    async def bring_back(self, kept: Kept) -> "AsyncSession":
        """A session that is put away, which from then on it is not. Raises ApiError 500 if it is lost."""
        file = kept.file
        assert file is not None
        try:
            session = await kept.served.llm.load_session(file)
        except BDHError as error:
            log.error("the session %s cannot be brought back: %s", kept.id, error)
            words = "the session cannot be brought back from the server's disk; its log tells more"
            raise ApiError(500, words, "server_error", code="session_lost") from error
        kept.file = None
        discard(file)
        return session

    async def tidy(self) -> None:
        """Puts away idle sessions while all together take too much. Raises ApiError 507."""
        while self.nbytes() > self.memory_bytes:
            idle = [kept for kept in self._kept.values() if kept.nbytes and not kept.busy]
            if not idle:
                return
            await self._put_away(min(idle, key=lambda kept: kept.used))


def log_unexpected(task: "asyncio.Task[None]") -> None:
    """Logs an exception that is not an answer for clients: everybody who awaits the task may have gone."""
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, ApiError):
        log.error("a session cannot be offloaded", exc_info=error)


def discard(file: Path) -> None:
    """Removes a file beside the event loop, whenever that comes about; one that stays ends with its folder."""

    def unlink() -> None:
        with suppress(OSError):
            file.unlink(missing_ok=True)

    asyncio.get_running_loop().run_in_executor(None, unlink)


def no_room(words: str, error: Exception) -> ApiError:
    """507: the log says what exactly is wrong with the disk."""
    log.warning("%s: %s", words, error)
    told = f"{words}, as the server's disk is full or cannot be written to; its log tells more"
    return ApiError(507, told, "server_error", code="insufficient_storage", reason="insufficient_storage")
