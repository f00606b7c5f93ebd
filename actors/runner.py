"""The batch runner: validates new batches, works through shards, finishes batches.

Four loops run side by side in one process; any number of runners may do so at once, the ledger
keeps them apart::

    validate     claim validation -> actors.batch_validation: open shards | fail    waits: poll
    finalize     finalize batches that are due                        waits: poll, or a sealed shard
    work         lease a shard -> ShardRun (actors.shard_run)         waits: poll, or rows run dry
    sweep        delete bytes that nothing needs any more             waits: poll

Everything durable is in the stores; a runner that dies loses nothing but the rows in flight, which
another one does again after the lease has run out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from actors.aio import Gate
from actors.batch_rows import RowWorker, backoff_s
from actors.batch_validation import BatchValidator
from actors.isolation import Isolation, RowService
from actors.quarantine import Quarantine
from actors.shard_run import ROWS_PER_TURN, ShardLimits, ShardRun
from mora_serve.calibrators import load_calibrator
from mora_serve.config import Settings
from mora_serve.errors import MoraError, NotFoundError, StorageError
from mora_serve.ports import Generator, Lease, Scorer
from mora_serve.presampling import ListCalls
from mora_serve.service import MoraService
from mora_serve.store import Stores

log = logging.getLogger(__name__)

MAX_LEASES = 4
"""Shards one runner holds before it takes only those of batches it does not serve yet."""
MAX_BATCHES = 64
"""Batches one runner serves side by side; when there are more, they take turns."""
ROW_LISTS = ListCalls(max_items=64, window_s=0.05)
"""Rows wait longer for company than callers do: nobody waits for a single row, the time is little
beside what sampling takes, and lists of a dozen cost a fraction of a dozen calls."""
SUSPECT_LISTS = ListCalls(max_items=1, window_s=0.0)
"""No prompt of a row that may have ended an engine shares a call."""
STOP_SHARE = 0.8
"""Share of the graceful shutdown time that running rows get before they are handed back."""


class BatchRunner:
    """Plain class; ``run`` works until ``stop``. One instance per process and event loop."""

    def __init__(
        self,
        generator: Generator,
        scorer: Scorer,
        stores: Stores,
        settings: Settings,
        worker_id: str,
        *,
        service: RowService | None = None,
    ) -> None:
        together, apart = (
            service
            or MoraService(generator, scorer, load_calibrator(settings), settings, lists=lists)
            for lists in (ROW_LISTS, SUSPECT_LISTS)
        )
        gate = Gate()
        self._quarantine = Quarantine(
            stores.batches, worker_id, gate, period_s=settings.runner.poll_interval_s
        )
        most = settings.runner.max_in_flight_rows
        self._isolation = Isolation(
            together, apart, gate, self._quarantine, max_in_flight_rows=most
        )
        self._stores = stores
        self._settings = settings.runner
        self._worker_id = worker_id
        self._limits = ShardLimits(
            lease_ttl_s=settings.runner.lease_ttl_s,
            max_stream_tail=settings.runner.max_stream_tail,
            poll_interval_s=settings.runner.poll_interval_s,
            max_line_bytes=settings.server.max_body_bytes,
            storage_timeout_s=settings.runner.unavailable_timeout_s,
        )
        self._validator = BatchValidator(stores, settings.runner, self._limits.max_line_bytes)
        self._permits = asyncio.Semaphore(settings.runner.max_in_flight_rows)
        self._stopping = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._work_wake = asyncio.Event()
        self._validate_wake = asyncio.Event()
        self._finalize_wake = asyncio.Event()
        self._sweep_wake = asyncio.Event()
        self._shards: dict[asyncio.Task[bool], ShardRun] = {}

    async def run(self) -> None:
        """Work until ``stop``. Steps that fail are repeated, whatever they fail with."""
        self._idle.clear()
        quarantine = asyncio.create_task(self._quarantine.run())
        loops = [
            asyncio.create_task(self._loop(self._lease_next, self._work_wake)),
            asyncio.create_task(self._loop(self._validate_next, self._validate_wake)),
            asyncio.create_task(self._loop(self._finalize, self._finalize_wake)),
            asyncio.create_task(self._loop(self._sweep, self._sweep_wake)),
        ]
        try:
            await self._stopping.wait()
            grace_s = self._settings.replica.graceful_shutdown_timeout_s * STOP_SHARE
            await asyncio.wait([*loops, *self._shards], timeout=grace_s)
        finally:
            tasks = [*loops, *self._shards, quarantine]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._idle.set()

    async def stop(self) -> None:
        """Start no further row, let running ones finish within the grace time, hand back the rest.

        Returns when ``run`` has ended; a ``run`` that was not started yet ends at once.
        """
        self._stopping.set()
        self._work_wake.set()
        self._validate_wake.set()
        self._finalize_wake.set()
        self._sweep_wake.set()
        await self._idle.wait()

    async def _loop(self, step: Callable[[], Awaitable[bool]], wake: asyncio.Event) -> None:
        """Repeat ``step`` while it finds work, else wait to be woken or for the poll interval."""
        failures = 0
        while not self._stopping.is_set():
            wake.clear()
            try:
                worked = await step()
                failures, pause_s = 0, self._settings.poll_interval_s
            except StorageError as error:
                failures += 1
                worked, pause_s = False, backoff_s(failures, error)
                log.warning("storage failed, trying again: %s", error)
            except Exception as error:  # a bug in one step must not end the runner's other work
                failures += 1
                worked, pause_s = False, backoff_s(failures, error)
                log.exception("%s failed, trying again", step.__name__)
            if not worked:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await wake.wait()

    # work

    async def _lease_next(self) -> bool:
        """Lease another shard: any when rows run dry, else only of batches not served yet.

        A batch that is not served gets a lease however many shards are held; beyond
        ``MAX_BATCHES`` the shard that has started the most rows is handed back for it.
        """
        runs = list(self._shards.values())
        held = {run.lease.batch_id for run in runs}
        full = len(held) >= MAX_BATCHES
        leaving = _had_its_turn(runs) if full else None
        if full and leaving is None:
            return False
        dry = len(runs) < MAX_LEASES and all(run.all_started for run in runs)
        lease = await self._stores.batches.lease_shard(
            self._worker_id, self._limits.lease_ttl_s, exclude=() if dry else tuple(held)
        )
        if lease is None:
            return False
        if leaving is not None:
            leaving.hand_back()
        await self._start(lease)
        return True

    async def _start(self, lease: Lease) -> None:
        batch = await self._stores.batches.get_batch(lease.batch_id)
        options = await self._stores.batches.batch_options(lease.batch_id)
        try:
            _, blob = await self._stores.batches.batch_input(lease.batch_id)
        except NotFoundError as error:
            await self._stores.batches.release(lease)
            raise StorageError(f"the input file of {lease.batch_id} must exist: {error}") from error
        worker = RowWorker(
            self._isolation,
            self._settings,
            batch,
            defaults=options.get("defaults") or {},
            fixed=options.get("fixed") or {},
            max_line_bytes=self._limits.max_line_bytes,
        )
        run = ShardRun(
            lease,
            blob,
            worker,
            self._stores,
            limits=self._limits,
            permits=self._permits,
            stopping=self._stopping,
            on_turn=self._work_wake.set,
        )
        task = asyncio.create_task(run.run())
        self._shards[task] = run
        task.add_done_callback(self._shard_ended)

    def _shard_ended(self, task: asyncio.Task[bool]) -> None:
        run = self._shards.pop(task)
        self._finalize_wake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            place = f"shard {run.lease.shard} of {run.lease.batch_id}"
            log.error("%s was handed back: %s", place, error, exc_info=_unless_expected(error))
            return  # and is leased again after the poll interval
        self._work_wake.set()

    # before and after

    async def _validate_next(self) -> bool:
        batches, ttl_s = self._stores.batches, self._limits.lease_ttl_s
        claim = await batches.claim_validation(self._worker_id, ttl_s)
        if claim is None:
            return False
        await self._validator.validate(claim)
        self._work_wake.set()
        self._finalize_wake.set()
        return True

    async def _finalize(self) -> bool:
        batches, ttl_s = self._stores.batches, self._limits.lease_ttl_s
        return bool(await batches.finalize_ready(self._worker_id, ttl_s))

    async def _sweep(self) -> bool:
        await self._stores.batches.sweep()
        return False


def _had_its_turn(runs: list[ShardRun]) -> ShardRun | None:
    """The shard to be handed back next; one at a time."""
    turns = [r for r in runs if r.num_started >= ROWS_PER_TURN and not r.all_started]
    if not turns or any(run.is_leaving for run in runs):
        return None
    return max(turns, key=lambda run: run.num_started)


def _unless_expected(error: BaseException) -> BaseException | None:
    return None if isinstance(error, MoraError) else error
