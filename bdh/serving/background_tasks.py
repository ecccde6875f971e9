"""Background tasks of the server that go on after a failure."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)


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
