"""The store of sessions: memory and disk, ends, and whose they are."""

import asyncio
import fcntl
import logging
import os
import resource
from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from bdh.atomic_files import PREFIX
from bdh.errors import BDHError
from bdh.file_locks import LOCK
from bdh.inference.async_llm import AsyncLLM
from bdh.inference.sampling_params import SamplingParams
from bdh.serving.api.errors import ApiError
from bdh.serving.config import ModelSettings, ServeConfig, SessionSettings
from bdh.serving.model_registry import ServedModel
from bdh.serving.sessions import store as sessions
from bdh.serving.sessions.files import SCRATCH, SavedFiles
from bdh.serving.sessions.memory import Kept
from bdh.serving.sessions.store import SessionStore
from tests.inference.small import BYTES, letters, small_llm, small_model

STATE = 16384  # bytes of the small model's
ENDLESS = letters(max_new_tokens=10**9)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 8))


@asynccontextmanager
async def serving(folder: Path | None, **settings: Any) -> AsyncGenerator[tuple[SessionStore, ServedModel]]:
    """A store and a model, at work."""
    where = None if folder is None else str(folder)
    store = SessionStore(SessionSettings(folder=where, **settings))
    async with AsyncLLM(small_model(), BYTES, max_batch_size=2) as llm:
        await store.start()
        try:
            yield store, ServedModel(ModelSettings("export", "tiny"), ServeConfig(), llm)
        finally:
            await store.close()


async def answer(store: SessionStore, kept: Kept, text: str, params: SamplingParams | None = None) -> str:
    async with store.taken(kept) as session:
        turn = await session.send(text, params or letters(), wants_deltas=False)
    return (await turn.completion()).text


def expected(*texts: str) -> list[str]:
    """What a session answers that is never put away."""
    session = small_llm().session("You are a dragon.")
    return ["".join(delta.text for delta in session.send(text, letters())) for text in texts]


async def new(store: SessionStore, served: ServedModel, owner: str | None = None) -> Kept:
    return await store.create(owner, served, "You are a dragon.", None)


def away(store: SessionStore) -> list[Path]:
    """The files of sessions that are put away."""
    return sorted(store.memory.scratch.folder.glob("*.safetensors"))


@pytest.mark.parametrize("memory_bytes", [0, STATE, 2 * STATE])
def test_a_session_that_was_put_away_goes_on_exactly(memory_bytes: int) -> None:
    texts = ("Who are you?", "Indeed?", "Hm.")
    said = expected(*texts)

    async def work() -> None:
        async with serving(None, memory_bytes=memory_bytes) as (store, served):
            sessions = [await new(store, served) for _ in range(4)]
            for number, text in enumerate(texts):
                for kept in sessions:
                    assert await answer(store, kept, text) == said[number]
                    assert store.nbytes() <= max(memory_bytes, STATE)
                messages = [await store.messages(kept) for kept in sessions]
                assert all([one["content"] for one in found][2::2] == said[: number + 1] for found in messages)
            positions = [kept.position for kept in sessions]
            assert len(set(positions)) == 1 and positions[0] > 100
            while store.nbytes() > memory_bytes:  # beside, and soon
                await asyncio.sleep(0.01)
            folder = store.memory.scratch.folder
            assert len(away(store)) >= 4 - memory_bytes // STATE and folder.stat().st_mode & 0o077 == 0
            for kept in sessions:
                with await store.state_file(kept) as file:
                    assert len(file.read()) > STATE
            assert store.nbytes("tiny") == store.nbytes() and store.nbytes("other") == 0
        assert not folder.exists()

    run(work())


def test_sessions_expire_though_the_folder_of_saved_ones_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saved = tmp_path / "saved"
    iterdir = Path.iterdir

    def refuse(self: Path) -> Iterator[Path]:
        if self == saved:
            raise PermissionError(13, "Permission denied", str(self))
        return iterdir(self)

    monkeypatch.setattr(Path, "iterdir", refuse)

    async def work() -> None:
        async with serving(tmp_path, expire_seconds=0.1) as (store, served):
            await new(store, served)
            while store._kept:  # without a request for it
                await asyncio.sleep(0.01)

    run(work())
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert f"removing incomplete session files in {saved} failed; the server goes on" in record.getMessage()


def test_sessions_expire_though_looking_after_them_failed_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sessions, "PAUSE_WHEN_FULL", 0.01)
    expire = SessionStore._expire
    failures = [OSError("a disk that is gone"), KeyError("anything")]

    def fail_first(self: SessionStore, kept: Iterable[Kept]) -> None:
        if failures:
            raise failures.pop()
        expire(self, kept)

    async def work() -> None:
        async with serving(None, expire_seconds=0.1) as (store, served):
            await new(store, served)
            monkeypatch.setattr(SessionStore, "_expire", fail_first)
            while store._kept:
                await asyncio.sleep(0.01)

    run(work())
    assert not failures and caplog.text.count("expiring and offloading sessions failed") == 2


def test_an_unreadable_folder_of_one_key_does_not_keep_those_of_others_from_being_cleaned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = SavedFiles(tmp_path)
    left = []
    for number in range(4):
        left.append(files.root / f"key_{number}" / f"{PREFIX}x")
        left[-1].mkdir(parents=True)
    glob = Path.glob

    def refuse(self: Path, pattern: str) -> Iterator[Path]:
        if self.name == "key_2":
            raise PermissionError(13, "Permission denied", str(self))
        return glob(self, pattern)

    monkeypatch.setattr(Path, "glob", refuse)
    files.remove_leftovers()
    assert [path.exists() for path in left] == [False, False, True, False]
    assert "key_2 cannot be removed: Permission denied" in caplog.text


def test_turns_wait_for_room_and_put_away_the_longest_unused() -> None:
    async def work() -> None:
        async with serving(None, memory_bytes=2 * STATE) as (store, served):
            first, second, third = [await new(store, served) for _ in range(3)]
            for kept in (first, second):
                await answer(store, kept, "Hi")
            await answer(store, third, "Hi")
            assert [kept.session is None for kept in (first, second, third)] == [True, False, False]
            turns = []
            for kept in (second, third):
                async with store.taken(kept) as session:
                    turns.append(await session.send("Ho", ENDLESS))
            waiting = asyncio.create_task(answer(store, first, "Ho"))
            await asyncio.sleep(0.1)
            assert not waiting.done() and first.busy and first.session is None
            with pytest.raises(ApiError, match="is busy") as refused:
                await answer(store, first, "Ho")
            assert refused.value.status == 409 and refused.value.code == "session_busy"
            turns[0].drop()
            assert await waiting and second.session is None and third.session is not None
            cancelled = asyncio.create_task(answer(store, second, "Hm"))  # puts away the first, is then given up
            await asyncio.sleep(0)
            cancelled.cancel()
            await asyncio.gather(cancelled, return_exceptions=True)
            assert not second.busy and second.promised == 0
            turns[1].drop()
            assert await answer(store, second, "Hm")

    run(work())


def test_a_session_that_is_used_while_it_is_written_to_disk_stays() -> None:
    async def work() -> None:
        async with serving(None, memory_bytes=STATE) as (store, served):
            first, second = [await new(store, served) for _ in range(2)]
            await answer(store, first, "Hi")
            turn = asyncio.create_task(answer(store, second, "Hi"))
            while first.moving is None:
                await asyncio.sleep(0)
            async with store.taken(first) as session:
                going_on = await session.send("Ho", ENDLESS)
            await asyncio.sleep(0.1)
            assert not turn.done() and first.session is session
            going_on.drop()
            assert await turn == expected("Hi")[0]

    run(work())


def test_sessions_end_unused_or_deleted() -> None:
    async def work() -> None:
        async with serving(None, memory_bytes=STATE, expire_seconds=0.3, max_sessions=3) as (store, served):
            busy, idle, away_one = [await new(store, served, "key_1") for _ in range(3)]
            with pytest.raises(ApiError, match="there are 3 sessions, as many as may be") as refused:
                await new(store, served, "key_1")
            assert refused.value.status == 429 and refused.value.headers["Retry-After"] == "1"
            other = await new(store, served, "key_2")
            for one, owner in ((busy, "key_2"), (other, "key_1"), (busy, None)):
                with pytest.raises(ApiError, match="there is no session") as refused:
                    store.get(owner, one.id)
                assert refused.value.status == 404
            await answer(store, away_one, "Hi")
            async with store.taken(busy) as session:
                turn = await session.send("Hi", ENDLESS)
            with pytest.raises(ApiError, match="is busy"):
                await store.delete(busy)
            assert store.of("key_1") == [busy, idle, away_one] and store.of("key_2") == [other]
            await asyncio.sleep(0.4)
            assert list(store._kept.values()) == [busy]  # the background has seen to it
            turn.drop()
            await store.delete(busy)
            assert store._kept == {} and away(store) == []
            with pytest.raises(ApiError, match="there is no session"):
                await answer(store, busy, "Ho")

    run(work())


def test_saved_ones_are_their_owners_and_stay(tmp_path: Path) -> None:
    said = expected("Hi", "Ho", "Hm")

    async def first_server() -> None:
        async with serving(tmp_path, memory_bytes=0, max_sessions=2) as (store, served):
            kept = await new(store, served, "key_1")
            assert await answer(store, kept, "Hi") == said[0]
            size = await store.save(kept, "mine")
            assert await answer(store, kept, "Ho") == said[1]
            assert [(one.name, one.model, one.bytes) for one in await store.saved("key_1")] == [("mine", "tiny", size)]
            assert await store.saved("key_2") == await store.saved(None) == []
            await store.save(kept, "more")
            with pytest.raises(ApiError, match="2 sessions are saved, as many as may be"):
                await store.save(kept, "most")
            await store.save(kept, "more")

    async def second_server() -> None:
        async with serving(tmp_path) as (store, served):
            for owner in ("key_2", None):
                with pytest.raises(ApiError, match="there is no saved session 'mine'") as refused:
                    await store.reopen(owner, served, "mine", None)
                assert refused.value.status == 404
                with pytest.raises(ApiError, match="there is no saved session"):
                    await store.delete_saved(owner, "mine")
            copies = [await store.reopen("key_1", served, name, None) for name in ("mine", "mine", "more")]
            await store.delete_saved("key_1", "mine")
            for kept in copies[:2]:
                assert [await answer(store, kept, text) for text in ("Ho", "Hm")] == said[1:]
            assert await answer(store, copies[2], "Hm") == said[2]
            assert [kept.name for kept in copies] == ["mine", "mine", "more"] and not copies[0].busy
            assert [one.name for one in await store.saved("key_1")] == ["more"]

            other = ServedModel(served.settings, ServeConfig(), AsyncLLM(small_model(seed=1), BYTES))
            with pytest.raises(ApiError, match=r"^the saved session more is the state of another model") as refused:
                await store.reopen("key_1", other, "more", None)
            assert refused.value.status == 400 and len(store.of("key_1")) == 3
            await other.llm.close()

    run(first_server())
    run(second_server())


@pytest.mark.parametrize("name", ["../x", "..", ".x", "/etc/passwd", "a/b", "a\0b", "", "a" * 65, "a\n", "\ud800", "é"])
def test_names_lead_nowhere_else(tmp_path: Path, name: str) -> None:
    files = SavedFiles(tmp_path)
    for method in (files.place, files.find, files.delete):
        with pytest.raises(BDHError, match="it must begin with a letter or digit") as caught:
            method("key_1", name)
        assert "\n" not in str(caught.value)


def test_links_lead_nowhere(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()

    async def work() -> None:
        async with serving(folder) as (store, served):
            kept = await new(store, served, "key_1")
            await answer(store, kept, "Hi")
            await store.save(kept, "good")
            own = folder / "saved" / "key_1"
            (outside / "secret").write_bytes((own / "good.safetensors").read_bytes())
            (own / "link.safetensors").symlink_to(outside / "secret")
            (own / "folder.safetensors").mkdir()
            (own / "other.txt").write_text("no session")
            (own / "broken.safetensors").write_text("no session")
            assert [one.name for one in await store.saved("key_1")] == ["good"]
            for name in ("link", "folder"):
                with pytest.raises(ApiError, match="there is no saved session"):
                    await store.reopen("key_1", served, name, None)
                with pytest.raises(ApiError, match="there is no saved session"):
                    await store.delete_saved("key_1", name)
            with pytest.raises(ApiError, match=r"^the saved session broken is damaged: ") as refused:
                await store.reopen("key_1", served, "broken", None)
            assert refused.value.status == 400 and str(folder) not in refused.value.message
            before = (outside / "secret").read_bytes()
            await answer(store, kept, "Ho")
            await store.save(kept, "link")  # takes the link's place, and leaves alone what it leads to
            assert (outside / "secret").read_bytes() == before and not (own / "link.safetensors").is_symlink()

            (folder / "saved" / "key_2").symlink_to(outside)
            (outside / "theirs.safetensors").write_bytes(before)
            other = await new(store, served, "key_2")
            assert await store.saved("key_2") == []
            with pytest.raises(ApiError, match="there is no saved session"):
                await store.reopen("key_2", served, "theirs", None)
            with pytest.raises(ApiError, match="not as it should be"):
                await store.save(other, "mine")
            assert sorted(path.name for path in outside.iterdir()) == ["secret", "theirs.safetensors"]

    run(work())


def test_a_full_disk_harms_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = expected("Hi", "Ho", "Hm")

    async def work() -> None:
        async with serving(tmp_path, memory_bytes=STATE) as (store, served):
            kept, other = await new(store, served), await new(store, served)
            assert await answer(store, kept, "Hi") == said[0]
            await store.save(kept, "mine")
            path = tmp_path / "saved" / "everybody" / "mine.safetensors"
            whole = path.read_bytes()
            assert await answer(store, kept, "Ho") == said[1]
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
            try:
                refusals = [store.save(kept, "mine"), store.state_file(kept), answer(store, other, "Hi")]
                for refused in refusals:
                    with pytest.raises(ApiError) as caught:
                        await refused
                    assert caught.value.status == 507 and "\n" not in caught.value.message
                    assert str(tmp_path) not in caught.value.message
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert path.read_bytes() == whole and list(path.parent.iterdir()) == [path]
            assert not kept.busy and not other.busy
            assert await answer(store, kept, "Hm") == said[2] and await answer(store, other, "Hi") == said[0]

    with caplog.at_level(logging.WARNING):
        run(work())
    assert any(str(tmp_path) in record.getMessage() for record in caplog.records)


def test_what_a_killed_server_left_is_removed_and_what_another_has_is_not(tmp_path: Path) -> None:
    left, theirs, link = (tmp_path / f"{SCRATCH}{name}" for name in ("left", "theirs", "link"))
    for folder in (left, theirs):
        folder.mkdir()
        (folder / LOCK).touch()
        (folder / "0.safetensors").touch()
    link.symlink_to(theirs)
    descriptor = os.open(theirs / LOCK, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)

    async def work() -> None:
        async with serving(tmp_path) as (one, _), serving(tmp_path) as (another, _):
            while left.exists():
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            assert theirs.exists() and link.exists()
            assert one.memory.scratch.folder.exists() and another.memory.scratch.folder.exists()

    run(work())
    os.close(descriptor)
    assert sorted(path.name for path in tmp_path.iterdir()) == [link.name, theirs.name, "saved"]


def test_without_a_folder_nothing_is_saved() -> None:
    async def work() -> None:
        async with serving(None) as (store, served):
            kept = await new(store, served)
            with pytest.raises(ApiError, match=r"serve\.sessions\.folder") as refused:
                await store.save(kept, "mine")
            assert refused.value.status == 400 and await store.saved(None) == []
            for one in (store.reopen(None, served, "mine", None), store.delete_saved(None, "mine")):
                with pytest.raises(ApiError, match="there is no saved session 'mine'"):
                    await one

    run(work())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_bytes": -1}, "serve.sessions.memory_bytes is -1; it must be at least 0"),
        ({"max_sessions": 0}, "serve.sessions.max_sessions is 0; it must be at least 1"),
        ({"expire_seconds": 0.0}, "serve.sessions.expire_seconds is 0.0; it must be more than 0"),
        ({"expire_seconds": float("inf")}, "expire_seconds is inf"),
        ({"folder": "/proc/none"}, "serve.sessions.folder /proc/none cannot be used: "),
        ({"folder": "/etc/passwd"}, "serve.sessions.folder /etc/passwd cannot be used: "),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BDHError, match=message):
        SessionStore(SessionSettings(**settings))
