"""Where the rows of one runner run: together, aside, or alone. Finds rows that end engines.

An engine that ends takes every call down that was in it, and nothing says whose fault it was. So a
row whose engine was lost is a suspect, and moves one place on with each loss::

    together   beside other rows, its calls merged with theirs      a loss proves nothing
    aside      one suspect of the runner at a time, calls unmerged  a loss counts
    alone      nothing else of the runner is in flight              a loss counts, and may convict

Most losses have other reasons, and then nothing but the suspects themselves waits. A row is given
up only when an engine ended while it was alone: however many rows of a runner end engines, the
others come through.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import IntEnum
from typing import Protocol

from actors.aio import Gate
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

    def next(self) -> Place:
        """Where a row goes whose engine was lost here."""
        return Place(min(self + 1, Place.ALONE))


class Isolation:
    """The places of one runner; one instance per runner, shared by all its rows.

    ``service`` may merge the calls of rows that run together; ``apart`` gets one row at a time.
    """

    def __init__(self, service: RowService, apart: RowService) -> None:
        self._service = service
        self._apart = apart
        self._gate = Gate()
        self._one = asyncio.Lock()

    @asynccontextmanager
    async def enter(self, place: Place) -> AsyncIterator[RowService]:
        """Wait for room in ``place``, and have it while the context is open."""
        if place is Place.TOGETHER:
            async with self._gate.open():
                yield self._service
            return
        async with self._one, self._gate.closed() if place is Place.ALONE else self._gate.open():
            yield self._apart
