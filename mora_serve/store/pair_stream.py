"""Preference pairs in ``seq`` order: sealed parts first, then the live tail.

``seq`` is consecutive from 0 per batch, so a reader can prove that nothing is missing: whatever is
read next starts at ``after + 1``. Tail and parts overlap until the tail is trimmed; a read that
loses the race against trimming finds the rows in a part.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import AsyncGenerator
from typing import Any

from mora_serve.errors import StorageError
from mora_serve.ports import BlobStore
from mora_serve.store.shapes import json_lines, no_such, pairs_removed
from mora_serve.store.steps import LedgerSteps, PairPart

FOLLOW_INTERVAL_S = 0.25
"""How often a follower that has caught up asks for new pairs."""
PAIRS_PER_PART = 512
"""Pairs in one sealed part: large enough to be few, small enough to be read whole."""
CACHED_PARTS = 4


class LedgerPairs:
    """The :class:`~mora_serve.ports.PairStream` port."""

    def __init__(
        self, steps: LedgerSteps, blobs: BlobStore, *, follow_interval_s: float = FOLLOW_INTERVAL_S
    ) -> None:
        self._steps = steps
        self._blobs = blobs
        self._interval_s = follow_interval_s
        self._parts: OrderedDict[str, list[dict[str, Any]]] = OrderedDict()

    async def read(self, batch_id: str, after: int = -1, limit: int = 256) -> list[dict[str, Any]]:
        """Up to ``limit`` consecutive pairs from ``after + 1`` on; [] when there are none yet."""
        for _ in range(3):
            pairs = await self._steps.tail(batch_id, after, limit)
            if pairs and pairs[0]["seq"] == after + 1:
                return pairs
            part = await self._steps.pair_part(batch_id, after + 1)
            if part is not None:
                rows = await self._load(part)
                return rows[after + 1 - part.first :][:limit]
            state = await self._steps.get_state(batch_id)
            if state is None:
                raise no_such("batch", batch_id, "batch_id", "batch_not_found")
            if after + 1 >= state.pairs:
                return []
            if state.pairs_removed:
                raise pairs_removed(batch_id)
        raise StorageError(f"pair {after + 1} of {batch_id} must be in the tail or in a part")

    async def is_finished(self, batch_id: str) -> bool:
        """True when the batch is closed: no further pair can appear."""
        state = await self._steps.get_state(batch_id)
        if state is None:
            raise no_such("batch", batch_id, "batch_id", "batch_not_found")
        return state.closed

    async def follow(self, batch_id: str, after: int = -1) -> AsyncGenerator[dict[str, Any], None]:
        """Every pair after ``after``, until the batch is finished and all are read."""
        while True:
            finished = await self.is_finished(batch_id)
            pairs = await self.read(batch_id, after)
            for pair in pairs:
                yield pair
                after = pair["seq"]
            if not pairs and finished:
                return
            if not pairs:
                await asyncio.sleep(self._interval_s)

    async def register_reader(self, batch_id: str, reader: str, position: int) -> None:
        """Hold the tail behind ``position``; call again to move on and to stay registered."""
        await self._steps.set_reader(batch_id, reader, position)

    async def unregister_reader(self, batch_id: str, reader: str) -> None:
        """Stop holding the tail."""
        await self._steps.set_reader(batch_id, reader, None)

    async def tail_length(self, batch_id: str) -> int:
        """Pairs in the live tail; runners wait while it is over their bound."""
        return await self._steps.tail_length(batch_id)

    async def seal(self, batch_id: str, *, everything: bool = False) -> None:
        """Move pairs from the tail into parts, in ``seq`` order and whole parts at a time.

        ``everything`` also seals the last, partly filled part: for closed batches, and when the
        tail is full. A part is named by its range and its content never changes, so two runners
        that seal at once, or one that is interrupted, do no harm.
        """
        while True:
            state = await self._steps.get_state(batch_id)
            if state is None:
                raise no_such("batch", batch_id, "batch_id", "batch_not_found")
            first, waiting = state.pairs_sealed, state.pairs - state.pairs_sealed
            if waiting == 0 or (waiting < PAIRS_PER_PART and not everything):
                return
            pairs = await self._steps.tail(batch_id, first - 1, min(waiting, PAIRS_PER_PART))
            if not pairs or pairs[0]["seq"] != first:
                continue
            last = pairs[-1]["seq"]
            key = f"batches/{batch_id}/pairs/{first:012d}-{last:012d}.jsonl"
            await self._blobs.put(key, json_lines(pairs))
            await self._steps.add_pair_part(batch_id, PairPart(first, last, key))

    async def _load(self, part: PairPart) -> list[dict[str, Any]]:
        cached = self._parts.get(part.key)
        if cached is None:
            data = b"".join([chunk async for chunk in self._blobs.open_read(part.key)])
            cached = [json.loads(line) for line in data.splitlines()]
            if len(cached) != part.last - part.first + 1:
                raise StorageError(f"part {part.key} must hold {part.last - part.first + 1} pairs")
            self._parts[part.key] = cached
            while len(self._parts) > CACHED_PARTS:
                self._parts.popitem(last=False)
        self._parts.move_to_end(part.key)
        return cached
