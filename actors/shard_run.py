"""One leased shard: its rows side by side, its heartbeat, and how it ends.

::

    input lines --> room in the pair tail? --> permit --> row --> commit   (one task per row)
                                                                    '--> all done: seal
    heartbeat every third of the lease --> "stop" or lost: rows are cancelled, shard released

A shard that was leased before counts the starts of its rows: a row that runner after runner did not
survive is given up. Rows that a runner may have died of come last and alone, so that they alone are
counted. The shard ends sealed, or handed back with what was committed; another runner that takes it
over goes on with the rows that are missing.

While the store is away everything waits, and what was computed is kept: once it is back, the lease
either still holds, or is lost to another runner. No budget of a row is touched by that.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from actors.batch_rows import RowWorker, backoff_s
from actors.isolation import Place
from mora_serve.errors import LeaseLostError, MoraError, StorageError
from mora_serve.identity import content_hash
from mora_serve.ports import Lease
from mora_serve.store import Stores
from mora_serve.store.batch_input import Line, split_lines

log = logging.getLogger(__name__)

ROWS_PER_TURN = 8
"""Rows a shard may start before it has to make room for a batch that is not served."""
LOOKS_PER_TAIL = 64
"""A shard looks at the pair tail again after starting this share of ``max_stream_tail`` in rows."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ShardLimits:
    """What a shard run must keep to."""

    lease_ttl_s: float
    max_stream_tail: int
    poll_interval_s: float
    max_line_bytes: int
    storage_timeout_s: float
    """How long a step is repeated while the store fails; longer outages hand the shard back."""


def duplicates_key(batch_id: str, blob: str, first_line: int) -> str:
    """Blob with the line numbers of a shard that repeat a ``custom_id``; absent when none does.

    ``blob`` is what the shard is cut from: two validators may have cut different ones.
    """
    return f"batches/{batch_id}/duplicates/{content_hash([blob])[:16]}/{first_line:012d}.json"


class ShardRun:
    """Works through one lease. ``permits`` bounds rows in flight over all shards of the runner."""

    def __init__(
        self,
        lease: Lease,
        blob: str,
        worker: RowWorker,
        stores: Stores,
        *,
        limits: ShardLimits,
        permits: asyncio.Semaphore,
        stopping: asyncio.Event,
        on_turn: Callable[[], None],
    ) -> None:
        self.lease = lease
        self._blob = blob
        self._worker = worker
        self._stores = stores
        self._limits = limits
        self._permits = permits
        self._stopping = stopping
        self._on_turn = on_turn
        self._unseen_rows = 0
        self.all_started = False
        """True once no row of the shard waits to be started; ``on_turn`` was called then."""
        self.num_started = 0
        """Rows that were started under this lease; ``on_turn`` is called at ``ROWS_PER_TURN``."""
        self.is_leaving = False
        """True once the shard is to be handed back, see :meth:`hand_back`."""

    def hand_back(self) -> None:
        """Start no further row, and release the shard once those in flight are committed."""
        self.is_leaving = True

    async def run(self) -> bool:
        """True when the shard was sealed. A ``MoraError`` leaves the shard to its lease's end."""
        rows = asyncio.create_task(self._rows())
        beat = asyncio.create_task(self._beat())
        try:
            await asyncio.wait({rows, beat}, return_when=asyncio.FIRST_COMPLETED)
            complete = rows.done() and await rows
            if complete:
                await self._stores.batches.seal_shard(self.lease)
                return True
            if beat.done():
                await beat
            return False
        except LeaseLostError:
            log.info("shard %d of %s was taken over", self.lease.shard, self.lease.batch_id)
            return False
        finally:
            await _cancel(rows, beat)
            with contextlib.suppress(MoraError):
                await self._stores.batches.release(self.lease)

    async def _rows(self) -> bool:
        """Work on every missing row; False when the shard is to go before all were started."""
        duplicates = await self._duplicates()
        suspects: list[Line] = []
        tasks: set[asyncio.Task[None]] = set()
        try:
            async with contextlib.aclosing(self._lines()) as lines:
                async for line in lines:
                    if line.number in self.lease.done:
                        continue
                    if self.lease.tries.get(line.number, 0) > 0:
                        suspects.append(line)
                    elif not await self._start(line, line.number in duplicates, tasks):
                        await _join(tasks)
                        return False
            if not suspects:
                self._mark_started()
            await _join(tasks)
            for line in suspects:
                if not await self._start(line, line.number in duplicates, tasks, Place.ALONE):
                    return False
                await _join(tasks)
        finally:
            await _cancel(*tasks)
        return True

    async def _start(
        self,
        line: Line,
        duplicate: bool,
        tasks: set[asyncio.Task[None]],
        place: Place = Place.TOGETHER,
    ) -> bool:
        """Start a row once it has room and a permit; False when the shard is to go instead."""
        await self._room()
        await self._permits.acquire()
        if self._stopping.is_set() or self.is_leaving:
            self._permits.release()
            return False
        self.num_started += 1
        if self.num_started == ROWS_PER_TURN:
            self._on_turn()
        task = asyncio.create_task(self._row(line, duplicate, place))
        task.add_done_callback(lambda _: self._permits.release())
        tasks.add(task)
        _raise_first(tasks)
        return True

    async def _row(self, line: Line, duplicate: bool, place: Place) -> None:
        batches, counted = self._stores.batches, False

        async def count_try() -> int:
            nonlocal counted
            tries = await self._lasting(lambda: batches.count_try(self.lease, line.number))
            counted = True
            return tries

        taken_over = self.lease.token > 1
        try:
            commit = await self._worker.run(
                line, duplicate=duplicate, place=place, begin=count_try if taken_over else None
            )
            await self._lasting(lambda: batches.commit_row(self.lease, commit))
        except (asyncio.CancelledError, MoraError):
            if counted:
                with contextlib.suppress(MoraError):
                    await batches.forget_try(self.lease, line.number)
            raise

    async def _lasting(self, step: Callable[[], Awaitable[T]]) -> T:
        """Repeat a step of the store, which is safe to do, until it answers or for too long."""
        failures, deadline = 0, time.monotonic() + self._limits.storage_timeout_s
        while True:
            try:
                return await step()
            except LeaseLostError:
                raise
            except StorageError as error:
                failures += 1
                pause_s = backoff_s(failures, error)
                if time.monotonic() + pause_s > deadline:
                    raise
                log.warning("storage failed, trying again: %s", error)
                await asyncio.sleep(pause_s)

    def _mark_started(self) -> None:
        self.all_started = True
        self._on_turn()

    async def _lines(self) -> AsyncGenerator[Line, None]:
        lease = self.lease
        chunks = self._stores.blobs.open_read(self._blob, lease.offset_bytes, lease.num_bytes)
        async for line in split_lines(chunks, lease.first_line, self._limits.max_line_bytes):
            yield line

    async def _duplicates(self) -> frozenset[int]:
        key = duplicates_key(self.lease.batch_id, self._blob, self.lease.first_line)
        if not await self._stores.blobs.exists(key):
            return frozenset()
        data = b"".join([chunk async for chunk in self._stores.blobs.open_read(key)])
        return frozenset(json.loads(data))

    async def _room(self) -> None:
        """Wait while the pair tail is full: what is sealed can go, the rest waits for readers."""
        self._unseen_rows -= 1
        if self._unseen_rows > 0:
            return
        self._unseen_rows = self._limits.max_stream_tail // LOOKS_PER_TAIL
        batch_id, pairs = self.lease.batch_id, self._stores.pairs
        most = self._limits.max_stream_tail
        while not (self._stopping.is_set() or self.is_leaving):
            if await self._lasting(lambda: pairs.tail_length(batch_id)) < most:
                return
            await self._lasting(lambda: pairs.seal(batch_id, everything=True))
            if await self._lasting(lambda: pairs.tail_length(batch_id)) < most:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._limits.poll_interval_s):
                    await self._stopping.wait()

    async def _beat(self) -> None:
        ttl_s = self._limits.lease_ttl_s
        while True:
            await asyncio.sleep(ttl_s / 3)
            if not await self._lasting(lambda: self._stores.batches.heartbeat(self.lease, ttl_s)):
                return


async def _join(tasks: set[asyncio.Task[None]]) -> None:
    """Wait for all; raises the first error without waiting for the others."""
    if tasks:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    _raise_first(tasks)


def _raise_first(tasks: set[asyncio.Task[None]]) -> None:
    for task in [task for task in tasks if task.done()]:
        tasks.discard(task)
        task.result()


async def _cancel(*tasks: asyncio.Task[None] | asyncio.Task[bool]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
