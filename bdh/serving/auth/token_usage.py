"""Metering of the tokens that one request uses against the limit of its caller."""

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING

from fastapi import Request

from bdh.errors import QueueFull
from bdh.serving.auth.authentication import Caller

if TYPE_CHECKING:
    from bdh.serving.auth.rate_limits import RateLimits, Reservation


class TokenMeter:
    """The tokens that one request reserves before it is worked on, and settles when it ends.

    Args:
        limits: The limits that the tokens count against.
        caller: Of the request; the tokens count for it.
        request: Its answer gets the headers about the limit.
    """

    def __init__(self, limits: "RateLimits", caller: Caller, request: Request):
        self._limits = limits
        self._caller = caller
        self._headers: dict[str, str] = request.state.limit_headers
        self._reservation: Reservation | None = None

    async def reserve(self, tokens: int, is_estimate: bool = False) -> None:
        """Reserves tokens, once. Args and errors as for `RateLimits.reserve`."""
        reservation = await self._limits.reserve(self._caller.key, self._caller.address, tokens, is_estimate)
        if reservation is not None:
            self._headers.update(reservation.headers)
            self._reservation = reservation

    async def settle(self, used: int) -> None:
        """Counts the tokens that were used instead of those reserved; nothing if none were reserved.

        It is done to its end if the task of the request is cancelled, as it is when the client disconnects.
        """
        reservation, self._reservation = self._reservation, None
        if reservation is not None:
            self._headers.update(await asyncio.shield(reservation.settle(used)))

    async def encode(self, tokens: Awaitable[list[int]], bound: int) -> list[int]:
        """Awaits the tokens of a text, for a request that does nothing else with the model.

        Args:
            tokens: The text's tokens.
            bound: At most as many as there are. So many are reserved before, and used if it is not known how many there
                are: a text is tokenized to its end, also if the client disconnects or the tokens are too many.

        Raises:
            TooManyRequests: The caller has too few tokens left.
            Exception: As `tokens`.
        """
        used = bound
        await self.reserve(bound, is_estimate=True)
        try:
            result = await tokens
            used = len(result)
            return result
        except QueueFull:  # nothing was tokenized
            used = 0
            raise
        finally:
            await self.settle(used)
