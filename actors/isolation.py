"""Where the rows of one runner run: together, aside, or alone. Finds rows that end engines.

An engine that ends takes every call down that was in it, and nothing says whose fault it was. So a
row whose engine was lost is a suspect, and moves on with each loss::

    together     beside other rows, its calls merged with theirs      a loss proves nothing
    aside        a few suspects at a time, their calls unmerged       a loss counts
    quarantined  nothing else of any runner is in flight              a loss counts, and may convict

Most losses have other reasons, and then nothing but the suspects themselves waits. A row is given
up only when an engine ended while it was in quarantine: however many rows of a batch end engines,
the others come through. A row that runners may have died of runs *alone*, with nothing else of its
own runner in flight, and not while another runner has the quarantine.

With N rows in flight the square root of N may be aside: a lost engine costs N / sqrt(N) turns, and
a row that ends another one sends sqrt(N) rows into quarantine.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import IntEnum
from typing import Protocol

from actors.aio import Gate
from actors.quarantine import Quarantine
from mora_serve.requests import MoraRequest
from mora_serve.service import RowResult


class RowService(Protocol):
    """The part of :class:`~mora_serve.service.MoraService` that rows need."""

    async def run_row(self, request: MoraRequest) -> RowResult: ...


class Place(IntEnum):
    """Where a row runs, see the module docstring."""

    TOGETHER = 0
    ASIDE = 1
    ALONE = 2
    QUARANTINED = 3

    def next(self) -> Place:
        """Where a row goes whose engine was lost here."""
        return Place.ASIDE if self is Place.TOGETHER else Place.QUARANTINED


class Isolation:
    """The places of one runner; one instance per runner, shared by all its rows.

    ``service`` may merge the calls of rows that run together; ``apart`` gets one row at a time.
    All rows go through ``gate``, which ``quarantine`` holds for other runners.
    """

    def __init__(
        self,
        service: RowService,
        apart: RowService,
        gate: Gate,
        quarantine: Quarantine,
        *,
        max_in_flight_rows: int,
    ) -> None:
        self._service = service
        self._apart = apart
        self._gate = gate
        self._quarantine = quarantine
        self._one = asyncio.Lock()
        self._few = asyncio.Semaphore(math.isqrt(max_in_flight_rows))

    @asynccontextmanager
    async def enter(self, place: Place) -> AsyncIterator[RowService]:
        """Wait for room in ``place``, and have it while the context is open.

        Raises ``QuarantineLostError`` out of a quarantine that ended too early.
        """
        if place is Place.TOGETHER:
            async with self._gate.open():
                yield self._service
        elif place is Place.ASIDE:
            async with self._few, self._gate.open():
                yield self._apart
        elif place is Place.ALONE:
            async with self._one, self._gate.closed():
                yield self._apart
        else:
            async with self._one, self._quarantine.held(), self._gate.closed():
                await self._quarantine.others_quiet()
                yield self._apart
