"""Two small pieces of asyncio: gathering single items into list calls, and a bounded fan-out.

:class:`MicroBatcher` waits for its window (or a full list), then makes one call for all items
submitted meanwhile; whoever submitted is woken by that call's end. Calls run side by side, so no
item waits for an earlier call. :func:`bounded` waits for the first of its tasks to finish whenever
``limit`` are running. Neither retries anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class MicroBatcher(Generic[T, R]):
    """Turns concurrent ``submit(item)`` into calls of lists.

    ``call`` returns one result per item, in order. ``window_s`` is how long the first item of a
    list waits for company. Cancelling a ``submit`` cancels the call once nobody waits for it.
    """

    def __init__(
        self,
        call: Callable[[list[T]], Awaitable[Sequence[R]]],
        *,
        max_items: int,
        window_s: float,
    ) -> None:
        self._call = call
        self._max_items = max_items
        self._window_s = window_s
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def submit(self, item: T) -> R:
        """The result for ``item``; raises what its call raised."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()
        self._waiting.append((item, future))
        if len(self._waiting) >= self._max_items:
            self._flush()
        elif self._timer is None:
            self._timer = loop.call_later(self._window_s, self._flush)
        return await future

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batch = [(item, future) for item, future in self._waiting if not future.done()]
        self._waiting = []
        if not batch:
            return
        futures = [future for _, future in batch]
        task = asyncio.get_running_loop().create_task(
            self._run([item for item, _ in batch], futures)
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

        def abandon(_: asyncio.Future[R]) -> None:
            if all(future.cancelled() for future in futures):
                task.cancel()

        for future in futures:
            future.add_done_callback(abandon)

    async def _run(self, items: list[T], futures: list[asyncio.Future[R]]) -> None:
        try:
            results = await self._call(items)
            if len(results) != len(items):
                raise RuntimeError(f"a call of {len(items)} items gave {len(results)} results")
        except Exception as error:  # noqa: BLE001 - relayed to those who wait for the call
            for future in futures:
                if not future.done():
                    future.set_exception(error)
            return
        for future, result in zip(futures, results, strict=True):
            if not future.done():
                future.set_result(result)


async def bounded(
    jobs: Iterable[Callable[[], Coroutine[Any, Any, T]]], limit: int
) -> AsyncGenerator[T, None]:
    """Run ``jobs``, at most ``limit`` at a time, and yield their results as they finish.

    A job starts only when its predecessors' results were taken, so memory stays bounded. Raises the
    first error; leaving early cancels what still runs.
    """
    running: set[asyncio.Task[T]] = set()
    try:
        for job in jobs:
            running.add(asyncio.create_task(job()))
            if len(running) < limit:
                continue
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()
        while running:
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
