"""Structured waiting: lists of calls that end together, and a gate that can be closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterable
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
    """Lets any number of users through together, or one that needs to be alone."""

    def __init__(self) -> None:
        self._condition = asyncio.Condition()
        self._num_inside = 0
        self._is_closed = False

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Inside together with others; waits while the gate is closed."""
        async with self._condition:
            await self._condition.wait_for(lambda: not self._is_closed)
            self._num_inside += 1
        try:
            yield
        finally:
            self._num_inside -= 1
            async with self._condition:
                self._condition.notify_all()

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        """Alone: keeps newcomers out, waits until everyone inside has left."""
        async with self._condition:
            await self._condition.wait_for(lambda: not self._is_closed)
            self._is_closed = True
        try:
            async with self._condition:
                await self._condition.wait_for(lambda: self._num_inside == 0)
            yield
        finally:
            self._is_closed = False
            async with self._condition:
                self._condition.notify_all()
