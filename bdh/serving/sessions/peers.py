"""Requests between the servers that share one address, so that all give the same results."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from bdh.serving.sessions.routes import SessionCard


class Peers(Protocol):
    """All servers together, the one that asks among them."""

    async def metrics(self) -> bytes:
        """The figures of all, in Prometheus' text format, each with a label that says whose it is."""

    async def sessions(self, owner: str | None) -> "list[SessionCard]":
        """The cards of an owner's sessions, wherever they are."""
