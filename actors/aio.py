"""Structured waiting: lists of calls that end together, and a gate that can be closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import TypeVar

T = TypeVar("T")


async def gather(calls: Iterable[Awaitable[T]]) -> list[T]:
    """Results in order. The first error, or a cancellation, cancels the calls still running and
    waits for them to end."""
    tasks = [asyncio.ensure_future(item) for item in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        pending = [task for task in tasks if not task.done()]
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.wait(pending)


class Gate:
    """Lets any number of users through together, or one that needs to be alone.

    Leaving never waits, so that a user who is cancelled cannot leave the others waiting.
    """

    def __init__(self) -> None:
        self.num_inside = 0
        """Users who are inside, together or alone."""
        self._is_closed = False
        self.is_paused = False
        """Whether newcomers wait because of :meth:`pause`."""
        self._waiting: set[asyncio.Future[None]] = set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Inside together with others; waits while the gate is closed."""
        await self._until(lambda: not (self._is_closed or self.is_paused))
        self.num_inside += 1
        try:
            yield
        finally:
            self.num_inside -= 1
            self._wake()

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        """Alone: keeps newcomers out, waits until everyone inside has left and no pause is on."""
        await self._until(lambda: not self._is_closed)
        self._is_closed = True
        try:
            await self._until(lambda: not (self.num_inside or self.is_paused))
            self.num_inside += 1
            try:
                yield
            finally:
                self.num_inside -= 1
        finally:
            self._is_closed = False
            self._wake()

    def pause(self, paused: bool) -> None:
        """Keep newcomers out, or no longer. Does not wait for those inside."""
        self.is_paused = paused
        self._wake()

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            turn = asyncio.get_running_loop().create_future()
            self._waiting.add(turn)
            try:
                await turn
            finally:
                self._waiting.discard(turn)

    def _wake(self) -> None:
        for turn in self._waiting:
            if not turn.done():
                turn.set_result(None)
