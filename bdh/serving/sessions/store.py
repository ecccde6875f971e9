"""Sessions of a server: whose they are, how many live in memory, and when they end."""

import asyncio
import logging
import math
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from bdh.errors import BDHError
from bdh.serving.api.errors import ApiError, bad_request, not_found
from bdh.serving.config import SessionSettings
from bdh.serving.sessions.files import SavedFiles, SavedSession, remove_left, unknown_saved
from bdh.serving.sessions.ids import check_place
from bdh.serving.sessions.memory import Kept, SessionMemory, discard, no_room

if TYPE_CHECKING:
    from bdh.inference.async_session import AsyncSession
    from bdh.serving.model_registry import ServedModel

log = logging.getLogger(__name__)

SHORTEST_PAUSE, LONGEST_PAUSE = 0.05, 60.0  # seconds between two looks for sessions that end
PAUSE_WHEN_FULL = 10.0  # seconds, when the disk is


class SessionStore:
    """All sessions of a server. For one event loop; `start` it, and `close` it in the end.

    Args:
        settings: What they may take.
        place: What stands for this server in their ids, if it is one of several.

    Raises:
        BDHError: A setting cannot be, or the folder cannot be used.
    """

    def __init__(self, settings: SessionSettings, place: str = ""):
        check(settings)
        self.settings = settings
        self.place = place
        self.files = None if settings.folder is None else SavedFiles(Path(settings.folder))
        self.memory: SessionMemory
        self._kept: dict[str, Kept] = {}
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()  # for the task

    async def start(self) -> None:
        """Begins to look after sessions. Raises BDHError if there cannot be a folder for those put away."""
        parent = Path(tempfile.gettempdir()) if self.files is None else self.files.folder
        self.memory = SessionMemory(self._kept, self.settings.memory_bytes, parent)
        self._task = asyncio.create_task(self._look_after(parent))

    async def close(self) -> None:
        """Ends all sessions that are not saved."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            await self.memory.close()
        self._kept.clear()

    # ------------------------------------------------------------------------------------------- coming and going

    async def create(self, owner: str | None, served: "ServedModel", system: str | None, name: str | None) -> Kept:
        """A new session. Raises ApiError 429 if the owner has as many as may be."""
        kept = self._add(owner, served, name)
        self._install(kept, served.llm.session(system))
        return kept

    async def reopen(self, owner: str | None, served: "ServedModel", saved: str, name: str | None) -> Kept:
        """A new session that is a copy of a saved one. Raises BDHError, and ApiError 404, 429 or 507."""
        if self.files is None:
            raise unknown_saved(saved)
        path = self.files.find(owner, saved)
        kept = self._add(owner, served, saved if name is None else name)
        kept.taken = True
        try:
            await self.memory.make_room(kept)
            self._install(kept, await served.llm.load_session(path))
        except BDHError as error:
            del self._kept[kept.id]
            words = str(error).replace(str(path), f"the saved session {saved}")  # where it lies is nobody's business
            raise bad_request(words, "saved") from error
        except BaseException:
            del self._kept[kept.id]
            raise
        finally:
            kept.taken = False
            self._free(kept)
        return kept

    def get(self, owner: str | None, id: str) -> Kept:
        """A session of an owner. Raises ApiError 404, also for those of others; 410 if it was elsewhere."""
        check_place(id, self.place, "reopen it from a saved one, or begin anew")
        self._expire(kept for kept in [self._kept.get(id)] if kept is not None)
        kept = self._kept.get(id)
        if kept is None or kept.owner != owner:
            raise unknown(id)
        return kept

    def of(self, owner: str | None) -> list[Kept]:
        """All sessions of an owner, the oldest first."""
        self._expire(kept for kept in self._kept.values() if kept.owner == owner)
        return [kept for kept in self._kept.values() if kept.owner == owner]

    def lose(self, served: "ServedModel") -> None:
        """Forgets the sessions whose states were in a model's process, which is no more.

        Those put away go on, and those that have no state yet.
        """
        for kept in [kept for kept in self._kept.values() if kept.served is served and kept.session is not None]:
            if kept.session is not None and (kept.session.nbytes or kept.session.busy):
                log.warning("the session %s is lost with its engine", kept.id)
                self._drop(kept)

    async def delete(self, kept: Kept) -> None:
        """Ends a session. Raises ApiError 409 while it is busy."""
        await self._check_free(kept)
        self._drop(kept)

    def nbytes(self, model: str | None = None) -> int:
        """Bytes of memory that sessions take: all, or those of one model."""
        return sum(kept.nbytes for kept in self._kept.values() if model is None or kept.served.name == model)

    # ------------------------------------------------------------------------------------------------------- using

    @asynccontextmanager
    async def taken(self, kept: Kept) -> AsyncGenerator["AsyncSession"]:
        """A session, in memory, for something to be begun with it: it is kept busy by that from then on.

        Raises:
            ApiError: 409 if it is busy; 507 if there is no room for it; 500 if it is lost.
        """
        await self._check_free(kept)
        kept.taken = True
        kept.uses += 1
        try:
            await self.memory.make_room(kept)
            if kept.id not in self._kept:  # lost meanwhile
                raise unknown(kept.id)
            if kept.session is None:
                self._install(kept, await self.memory.bring_back(kept))
            assert kept.session is not None
            if kept.session.llm is not kept.served.llm:  # a new engine; of the old one it has no state
                kept.session.move(kept.served.llm)
            yield kept.session
        finally:
            kept.taken = False
            self._free(kept)

    async def messages(self, kept: Kept) -> list[dict[str, str]]:
        """The messages of a session."""
        if kept.session is None and kept.file is not None:
            from bdh.inference.conversation import read_transcript

            with suppress(BDHError):  # it is being brought back just now
                return await asyncio.to_thread(read_transcript, kept.file)
        return [] if kept.session is None else list(kept.session.transcript)

    async def state_file(self, kept: Kept) -> BinaryIO:
        """A session as a file, which is open and has no name any more. Raises ApiError as `taken`."""
        await self._check_free(kept)
        if kept.session is None and kept.file is not None:
            return kept.file.open("rb")
        async with self.taken(kept) as session:
            path = self.memory.scratch.file()
            try:
                await session.save(path)
                return path.open("rb")
            except (BDHError, OSError) as error:
                raise no_room(f"the state of {kept.id} cannot be written", error) from error
            finally:
                discard(path)

    # ------------------------------------------------------------------------------------------------------ saving

    async def save(self, kept: Kept, name: str) -> int:
        """Saves a session for its owner; returns the bytes of the file. One of that name is replaced.

        Raises:
            BDHError: The name is none.
            ApiError: 400 if there is no folder, 429 if the owner has saved as many as may be, 507 if the disk is full;
                or as `taken`.
        """
        if self.files is None:
            raise bad_request("this server saves no sessions; its setting serve.sessions.folder says where it might")
        try:
            path = self.files.place(kept.owner, name)
            names = await asyncio.to_thread(self.files.names, kept.owner)
        except OSError as error:
            raise no_room(f"the session cannot be saved as {name}", error) from error
        if name not in names and len(names) >= self.settings.max_sessions:
            raise too_many(f"{len(names)} sessions are saved, as many as may be; delete one first")
        async with self.taken(kept) as session:
            try:
                await session.save(path, model=kept.served.name)
            except BDHError as error:
                raise no_room(f"the session cannot be saved as {name}", error) from error
        return path.lstat().st_size

    async def saved(self, owner: str | None) -> list[SavedSession]:
        """The saved sessions of an owner."""
        return [] if self.files is None else await asyncio.to_thread(self.files.list, owner)

    async def delete_saved(self, owner: str | None, name: str) -> None:
        """Raises BDHError for what is no name, and ApiError 404 if there is none."""
        if self.files is None:
            raise unknown_saved(name)
        await asyncio.to_thread(self.files.delete, owner, name)

    # ---------------------------------------------------------------------------------------- keeping

    def _add(self, owner: str | None, served: "ServedModel", name: str | None) -> Kept:
        mine = self.of(owner)
        if len(mine) >= self.settings.max_sessions:
            words = f"there are {len(mine)} sessions, as many as may be; delete one, or wait until one ends unused"
            left = min(kept.used for kept in mine) + self.settings.expire_seconds - time.monotonic()
            raise too_many(words, max(1, math.ceil(left)))
        kept = Kept(owner, served, name, self.place)
        self._kept[kept.id] = kept
        return kept

    def _install(self, kept: Kept, session: "AsyncSession") -> None:
        kept.session = session
        session.owner = kept.owner
        session.when_free = lambda: self._free(kept)

    def _free(self, kept: Kept) -> None:
        """Something that was done with a session is over."""
        if not kept.busy:
            kept.promised = 0
        kept.used = time.monotonic()
        self.memory.changed()
        self._wake.set()

    async def _check_free(self, kept: Kept) -> None:
        """Raises ApiError 409 if a session is busy, 404 if it has ended."""
        if not kept.taken and kept.session is not None:
            await kept.session.settled()
        if kept.busy:
            raise ApiError(409, f"the session {kept.id} is busy; wait for the end of its answer", code="session_busy")
        if kept.id not in self._kept:
            raise unknown(kept.id)

    def _drop(self, kept: Kept) -> None:
        del self._kept[kept.id]
        self.memory.drop(kept)

    def _expire(self, sessions: Iterable[Kept]) -> None:
        """Ends those that nobody has used for long."""
        oldest = time.monotonic() - self.settings.expire_seconds
        for kept in list(sessions):
            if kept.used < oldest and not kept.busy:
                self._drop(kept)

    async def _look_after(self, parent: Path) -> None:
        """Removes the files of servers that were killed, then expires and offloads sessions until it is cancelled."""
        await attempt(f"removing old session folders in {parent}", asyncio.to_thread(remove_left, parent))
        if self.files is not None:
            work = asyncio.to_thread(self.files.remove_leftovers)
            await attempt(f"removing incomplete session files in {self.files.root}", work)
        await repeat("expiring and offloading sessions", self._tidy, PAUSE_WHEN_FULL)

    async def _tidy(self) -> None:
        """Waits until a session may have to be ended or offloaded, and does so."""
        idle = [kept.used for kept in self._kept.values() if not kept.busy]
        left = min(idle, default=math.inf) + self.settings.expire_seconds - time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(min(max(left, SHORTEST_PAUSE), LONGEST_PAUSE)):
                await self._wake.wait()
        self._wake.clear()
        self._expire(self._kept.values())
        try:
            await self.memory.tidy()
        except ApiError:  # the disk is full, which is logged where it is noticed
            await asyncio.sleep(PAUSE_WHEN_FULL)


async def attempt(name: str, work: Awaitable[object]) -> bool:
    """Awaits work whose failure must not end its task: it is logged. Returns whether it succeeded."""
    try:
        await work
    except Exception:
        log.exception("%s failed; the server goes on", name)
        return False
    return True


async def repeat(name: str, step: Callable[[], Awaitable[object]], retry_seconds: float) -> None:
    """Repeats a step until the task is cancelled. A failure is logged, and the next step follows after a while."""
    while True:
        if not await attempt(name, step()):
            await asyncio.sleep(retry_seconds)


def check(settings: SessionSettings) -> None:
    """Raises BDHError for the first setting that cannot be."""
    if settings.memory_bytes < 0:
        raise BDHError(f"serve.sessions.memory_bytes is {settings.memory_bytes}; it must be at least 0")
    if settings.max_sessions < 1:
        raise BDHError(f"serve.sessions.max_sessions is {settings.max_sessions}; it must be at least 1")
    if not 0 < settings.expire_seconds < math.inf:
        raise BDHError(
            f"serve.sessions.expire_seconds is {settings.expire_seconds}; it must be more than 0, and finite"
        )


def unknown(id: str) -> ApiError:
    return not_found(f"there is no session {id[:80]!r}, or not any more", "session_not_found")


def too_many(words: str, retry_after: int | None = None) -> ApiError:
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return ApiError(429, words, "requests", code="too_many_sessions", headers=headers, reason="too_many_sessions")
