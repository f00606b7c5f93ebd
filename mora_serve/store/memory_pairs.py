"""The pair streams of batches within one process; :mod:`mora_serve.store.memory` has the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mora_serve.store.memory_batches import MemoryBatch
from mora_serve.store.steps import READER_TTL_S, PairPart


class MemoryPairs:
    """Tail, sealed parts and readers of :class:`~mora_serve.store.steps.LedgerSteps`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._batches: dict[str, MemoryBatch] = {}

    async def tail(self, batch_id: str, after: int, limit: int) -> list[dict[str, Any]]:
        tail = self._batches[batch_id].tail if batch_id in self._batches else []
        skip = max(0, after + 1 - tail[0]["seq"]) if tail else 0
        return [dict(pair) for pair in tail[skip : skip + limit]]

    async def tail_length(self, batch_id: str) -> int:
        return len(self._batches[batch_id].tail) if batch_id in self._batches else 0

    async def add_pair_part(self, batch_id: str, part: PairPart) -> bool:
        batch = self._batches[batch_id]
        if part.first != batch.state.pairs_sealed or part.last >= batch.state.pairs:
            return False
        batch.parts.append(part)
        batch.state.pairs_sealed = part.last + 1
        batch.trim(self._clock())
        return True

    async def pair_part(self, batch_id: str, seq: int) -> PairPart | None:
        parts = self._batches[batch_id].parts if batch_id in self._batches else []
        return next((part for part in parts if part.first <= seq <= part.last), None)

    async def set_reader(self, batch_id: str, reader: str, position: int | None) -> None:
        batch = self._batches.get(batch_id)
        if batch is None:
            return
        if position is None:
            batch.readers.pop(reader, None)
        else:
            batch.readers[reader] = (position, self._clock() + READER_TTL_S)
        batch.trim(self._clock())
