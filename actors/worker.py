"""A replica that serves no calls: a component that works by itself, watched by Serve."""

from __future__ import annotations

import asyncio
from typing import Protocol

from mora_serve.errors import MoraError


class Worker(Protocol):
    """Works until it is stopped, for example a batch runner."""

    async def run(self) -> None: ...
    async def stop(self) -> None: ...


class WorkerReplica:
    """Runs a :class:`Worker` in the background; unhealthy once it has ended by itself."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._worker.run())

    async def stop(self) -> None:
        """Let the worker finish what it holds and end."""
        await self._worker.stop()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    async def check_health(self) -> None:
        if self._task is not None and self._task.done():
            error = None if self._task.cancelled() else self._task.exception()
            raise MoraError(f"the worker ended by itself ({type(error).__name__})") from error
