"""One runner at a time has the engines for itself, while all others hold their rows back.

Engines are shared by runners, so a row is alone in an engine only when every runner sees to it::

    holder   claim in the store -> wait until every living runner is quiet for it -> its row runs
    others   report every period -> see the claim -> start nothing -> last row out -> report quiet

A runner that stops reporting is taken for dead after a time, and a claim that is not renewed ends:
so does what its holder did under it, for others may run rows from then on.
What the gateway asks of the engines meanwhile is not held back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Protocol

from actors.aio import Gate
from mora_serve.errors import MoraError, StorageError

log = logging.getLogger(__name__)

CLAIM_TTL_S = 15.0
REPORT_TTL_S = 15.0
"""Both outlast a restart of the store."""


class QuarantineLostError(MoraError):
    """The claim ended, or became another's, while it was needed. What ran is to be done again."""


class QuarantineStore(Protocol):
    """The part of :class:`~mora_serve.ports.BatchStore` that is needed here."""

    async def claim_quarantine(self, claim: str, ttl_s: float) -> bool: ...
    async def leave_quarantine(self, claim: str) -> None: ...
    async def report_runner(
        self, worker: str, ttl_s: float, quiet_for: str | None
    ) -> str | None: ...
    async def num_unquiet(self, worker: str, claim: str) -> int: ...


class Quarantine:
    """One runner's side. ``gate`` is what its rows go through; ``period_s`` is between reports."""

    def __init__(self, store: QuarantineStore, worker: str, gate: Gate, *, period_s: float) -> None:
        self._store = store
        self._worker = worker
        self._gate = gate
        self._period_s = period_s
        self._claim: str | None = None
        """Our own claim while we have the quarantine or want it."""
        self._other: str | None = None
        """The claim of the runner that has it, when we have not."""

    async def run(self) -> None:
        """Report, and hold rows back while another runner has the quarantine; until cancelled."""
        try:
            while True:
                with contextlib.suppress(StorageError):
                    await self.report()
                await asyncio.sleep(self._period_s)
        finally:
            with contextlib.suppress(MoraError):
                await self._store.report_runner(self._worker, 0.0, None)

    async def report(self) -> None:
        """Say once that we live and whether we are quiet, and see who has the quarantine."""
        quiet_for = None if self._gate.num_inside else self._other
        holder = await self._store.report_runner(self._worker, REPORT_TTL_S, quiet_for)
        self._other = None if holder == self._claim else holder
        self._gate.pause(self._other is not None)

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Have the quarantine; waits for it, and for the store when that is away.

        Cancels the block and raises ``QuarantineLostError`` when the claim is lost meanwhile.
        """
        claim = self._claim = f"{self._worker}/{uuid.uuid4().hex}"
        await self._until(lambda: self._store.claim_quarantine(claim, CLAIM_TTL_S))
        end = asyncio.timeout(CLAIM_TTL_S)
        try:
            async with end:
                renewing = asyncio.create_task(self._renew(claim, end))
                try:
                    yield
                finally:
                    renewing.cancel()
        except TimeoutError:
            if not end.expired():
                raise
            raise QuarantineLostError("the quarantine ended under its holder") from None
        finally:
            with contextlib.suppress(MoraError):
                await self._store.leave_quarantine(claim)

    async def others_quiet(self) -> None:
        """Wait until no other living runner has a row in an engine. Needs the quarantine."""
        assert self._claim is not None
        claim = self._claim

        async def quiet() -> bool:
            return await self._store.num_unquiet(self._worker, claim) == 0

        await self._until(quiet)

    async def _renew(self, claim: str, end: asyncio.Timeout) -> None:
        """Move ``end`` on with every renewal: it comes no later than the claim's own end."""
        clock = asyncio.get_running_loop().time
        while not end.expired():
            asked_at, renewed = clock(), None
            with contextlib.suppress(StorageError):
                renewed = await self._store.claim_quarantine(claim, CLAIM_TTL_S)
            if end.expired():
                return
            if renewed is not None:
                end.reschedule(asked_at + CLAIM_TTL_S if renewed else asked_at)
            await asyncio.sleep(CLAIM_TTL_S / 5)

    async def _until(self, holds: Callable[[], Awaitable[bool]]) -> None:
        while True:
            try:
                if await holds():
                    return
            except StorageError as error:
                log.warning("storage failed, trying again: %s", error)
            await asyncio.sleep(self._period_s)
