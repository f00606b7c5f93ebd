"""The ledger's steps within one process: no persistence, same behaviour.

Ships for tests and simulations of everything that sits on the store. Each step runs without
awaiting, so the event loop makes it atomic; ``clock`` can be injected to test leases and windows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

from mora_serve.ports import Lease, RowCommit
from mora_serve.store.memory_batches import MemoryBatch, MemoryShard
from mora_serve.store.memory_files import MemoryFiles, page
from mora_serve.store.memory_pairs import MemoryPairs
from mora_serve.store.memory_quarantine import MemoryQuarantine
from mora_serve.store.rate import RateRing, recent_rate
from mora_serve.store.shapes import idempotency_conflict
from mora_serve.store.steps import (
    TERMINAL,
    Backlog,
    BatchState,
    RateState,
    SealedShard,
    ShardSpec,
    StoredRow,
)


class MemoryLedger(MemoryFiles, MemoryPairs, MemoryQuarantine):
    """:class:`~mora_serve.store.steps.LedgerSteps` in dictionaries."""

    def __init__(
        self,
        clock: Callable[[], float] = time.time,
        trained_on: Callable[[], Collection[str]] = tuple,
    ) -> None:
        """``trained_on`` names what active fine-tuning jobs read."""
        MemoryFiles.__init__(self, clock)
        MemoryPairs.__init__(self, clock)
        MemoryQuarantine.__init__(self, clock)
        self._trained_on = trained_on
        self._keys: dict[str, tuple[str, str]] = {}
        self._turn = 0

    async def ping(self) -> None:
        return None

    async def aclose(self) -> None:
        return None

    # batches

    async def create_batch(
        self,
        doc: Mapping[str, Any],
        options: Mapping[str, Any],
        idempotency_key: str | None,
        body_hash: str,
        window_s: float,
        *,
        input_bytes: int,
        input_rows: int,
        max_rows: int,
        max_bytes: int,
    ) -> str | Backlog:
        if idempotency_key is not None:
            known = await self.known_batch(idempotency_key, body_hash)
            if known is not None:
                return known
        waiting = await self.backlog()
        over = waiting.rows >= max_rows or waiting.num_bytes + input_bytes > max_bytes
        if over and waiting.rows > 0:
            return waiting
        now = self._clock()
        batch_id = str(doc["id"])
        stored = {**doc, "created_at": int(now), "expires_at": int(now + window_s)}
        state = BatchState(doc=stored, options=dict(options), status="validating")
        batch = MemoryBatch(
            state, expires_at=now + window_s, input_bytes=input_bytes, input_rows=input_rows
        )
        self._batches[batch_id] = batch
        if idempotency_key is not None:
            self._keys[idempotency_key] = (batch_id, body_hash)
        return batch_id

    async def known_batch(self, idempotency_key: str, body_hash: str) -> str | None:
        batch_id, known = self._keys.get(idempotency_key, (None, body_hash))
        if known != body_hash:
            raise idempotency_conflict()
        return batch_id

    async def get_state(self, batch_id: str) -> BatchState | None:
        batch = self._batches.get(batch_id)
        return None if batch is None else batch.snapshot(self._clock())

    async def list_batches(self, *, after: str | None, limit: int) -> list[BatchState]:
        states = [batch.snapshot(self._clock()) for batch in reversed(self._batches.values())]
        return page(states, lambda state: str(state.doc["id"]), after, limit)

    async def cancel(self, batch_id: str) -> bool:
        batch = self._batches.get(batch_id)
        if batch is None:
            return False
        if batch.state.status in ("validating", "in_progress"):
            self._enter(batch, "cancelling")
            batch.outcome = "cancelled"
        return True

    async def backlog(self) -> Backlog:
        rows, num_bytes, rate = 0, 0.0, 0.0
        for batch in self._batches.values():
            state = batch.state
            if state.status in TERMINAL:
                continue
            left = max(0, state.total - state.completed - state.failed)
            rows += max(1, batch.input_rows if state.status == "validating" else left)
            num_bytes += batch.input_bytes * (left / state.total if state.total else 1)
            rate += recent_rate(batch.ring.buckets, self._clock(), self._since(batch)) or 0.0
        return Backlog(rows, round(num_bytes), rate)

    async def progress(self, batch_id: str) -> tuple[BatchState, RateState] | None:
        batch = self._batches.get(batch_id)
        if batch is None:
            return None
        return batch.snapshot(self._clock()), RateState(self._since(batch), batch.ring.buckets)

    async def unfinished(self) -> list[BatchState]:
        batches = self._batches.values()
        return [b.snapshot(self._clock()) for b in batches if b.state.status not in TERMINAL]

    async def claim_validation(self, worker: str, ttl_s: float) -> tuple[str, int, int] | None:
        now = self._clock()
        for batch_id, batch in self._batches.items():
            if batch.state.status == "validating" and batch.claim_until <= now:
                batch.claim_until, batch.claimer = now + ttl_s, worker
                batch.claims += 1
                batch.claim_tries += 1
                return batch_id, batch.claims, batch.claim_tries
        return None

    async def renew_validation(self, batch_id: str, claim: int, ttl_s: float) -> bool:
        batch = self._batches[batch_id]
        if batch.state.status != "validating" or batch.claims != claim:
            return False
        batch.claim_until = self._clock() + ttl_s
        return True

    async def postpone_validation(self, batch_id: str, claim: int) -> float:
        batch, now = self._batches[batch_id], self._clock()
        if batch.state.status != "validating" or batch.claims != claim:
            return 0.0
        batch.claim_tries -= 1
        if batch.postponed_at is None:
            batch.postponed_at = now
        return now - batch.postponed_at

    async def renew_claim(self, batch_id: str, worker: str, ttl_s: float) -> bool:
        batch = self._batches[batch_id]
        if batch.state.status in TERMINAL or batch.claimer != worker:
            return False
        batch.claim_until = self._clock() + ttl_s
        return True

    async def open_batch(
        self, batch_id: str, shards: Sequence[ShardSpec], total: int, input_blob: str | None
    ) -> bool:
        batch = self._batches[batch_id]
        if batch.state.status != "validating":
            return False
        batch.shards = [MemoryShard(spec) for spec in shards]
        batch.state.total = total
        batch.state.input_blob = input_blob
        batch.claim_until = 0.0
        self._enter(batch, "in_progress")
        return True

    async def fail(self, batch_id: str, error: Mapping[str, Any]) -> bool:
        batch = self._batches[batch_id]
        if batch.state.status != "validating":
            return False
        batch.state.errors.append(dict(error))
        batch.state.closed = True
        self._enter(batch, "failed")
        return True

    # shards

    async def lease_shard(
        self, worker: str, ttl_s: float, exclude: Sequence[str] = ()
    ) -> Lease | None:
        now = self._clock()
        running = [
            batch
            for batch_id, batch in self._batches.items()
            if batch.state.status == "in_progress"
            and now < batch.expires_at
            and batch_id not in exclude
        ]
        running.sort(key=lambda b: (sum(s.leased(now) for s in b.shards), b.last_leased))
        for batch in running:
            for index, shard in enumerate(batch.shards):
                if shard.sealed is None and not shard.leased(now):
                    self._turn += 1
                    batch.last_leased = self._turn
                    if not any(other.leased(now) for other in batch.shards):
                        batch.working_since = now
                    return self._lease(batch, index, worker, ttl_s)
        return None

    async def lease_leftover(self, batch_id: str, worker: str, ttl_s: float) -> Lease | None:
        batch = self._batches[batch_id]
        if not batch.state.closed or batch.state.status in TERMINAL:
            return None
        for index, shard in enumerate(batch.shards):
            if shard.sealed is None:
                return self._lease(batch, index, worker, ttl_s)
        return None

    async def heartbeat(self, lease: Lease, ttl_s: float) -> Literal["ok", "stop", "lost"]:
        batch, shard = self._held(lease)
        if shard is None:
            return "lost"
        shard.expires_at = self._clock() + ttl_s
        return "ok" if batch.state.status == "in_progress" else "stop"

    async def release(self, lease: Lease) -> None:
        _, shard = self._held(lease)
        if shard is not None:
            shard.worker = None

    async def commit_row(
        self, lease: Lease, row: RowCommit
    ) -> Literal["committed", "repeated", "lost"]:
        batch, shard = self._held(lease)
        state = batch.state
        if shard is None or state.closed:
            return "lost"
        if row.line in shard.rows:
            return "repeated"
        data = row.output if row.output is not None else row.error
        assert data is not None
        shard.rows[row.line] = StoredRow(row.line, row.output is None, data)
        state.completed += row.output is not None
        state.failed += row.output is None
        state.version += 1
        batch.ring.add(self._clock())
        for pair in row.pairs:
            batch.tail.append({"seq": state.pairs, **json.loads(pair)})
            state.pairs += 1
        for counters, added in ((state.usage, row.usage), (state.classes, row.classes)):
            for name, number in added.items():
                counters[name] = counters.get(name, 0) + number
        return "committed"

    async def count_try(self, lease: Lease, line: int) -> int:
        _, shard = self._held(lease)
        if shard is None:
            return 0
        count, last = shard.tries.get(line, (0, None))
        if last != lease.token:
            count += 1
            shard.tries[line] = (count, lease.token)
        return count

    async def forget_try(self, lease: Lease, line: int) -> None:
        shard = self._batches[lease.batch_id].shards[lease.shard]
        count, last = shard.tries.get(line, (0, None))
        if last == lease.token:
            shard.tries[line] = (count - 1, None)

    async def shard_rows(self, lease: Lease) -> list[StoredRow]:
        rows = self._batches[lease.batch_id].shards[lease.shard].rows
        return [rows[line] for line in sorted(rows)]

    async def seal_shard(
        self, lease: Lease, sealed: SealedShard, num_rows: int, num_extra: int
    ) -> Literal["sealed", "changed", "lost"]:
        batch, shard = self._held(lease)
        if shard is None:
            return "lost"
        complete = len(shard.rows) == shard.spec[1] or batch.state.closed
        if len(shard.rows) != num_rows or not complete:
            return "changed"
        shard.sealed, shard.rows, shard.worker = sealed, {}, None
        batch.state.failed += num_extra
        batch.state.version += 1
        return "sealed"

    async def sealed_shards(self, batch_id: str) -> list[SealedShard]:
        shards = self._batches[batch_id].shards
        return [shard.sealed for shard in shards if shard.sealed is not None]

    async def claim_finalize(self, worker: str, ttl_s: float) -> str | None:
        now = self._clock()
        for batch_id, batch in self._batches.items():
            self._close_if_due(batch, now)
            open_ended = batch.state.closed and batch.state.status not in TERMINAL
            if open_ended and batch.claim_until <= now:
                batch.claim_until, batch.claimer = now + ttl_s, worker
                return batch_id
        return None

    async def finish(
        self,
        batch_id: str,
        output: tuple[dict[str, Any], str] | None,
        error: tuple[dict[str, Any], str] | None,
    ) -> str:
        batch = self._batches[batch_id]
        state = batch.state
        if state.status in TERMINAL or not state.closed:
            return state.status
        for found in (output, error):
            if found is not None:
                await self.put_file(*found)
        state.output_file_id = None if output is None else output[0]["id"]
        state.error_file_id = None if error is None else error[0]["id"]
        batch.shards, batch.ring = [], RateRing()
        self._enter(batch, batch.outcome)
        batch.trim(self._clock())
        return state.status

    # internal

    def _files_being_read(self) -> dict[str, str]:
        states = (batch.state for batch in self._batches.values())
        docs = (state.doc for state in states if state.status not in TERMINAL)
        return {doc["input_file_id"]: doc["id"] for doc in docs}

    def _collect_pairs(self) -> None:
        now, trained_on = self._clock(), self._trained_on()
        for batch_id, batch in self._batches.items():
            state = batch.state
            gone = state.output_file_id is not None and state.output_file_id not in self._files
            read = any(until > now for _, until in batch.readers.values()) or batch_id in trained_on
            if gone and not read and not state.pairs_removed:
                batch.tail, batch.parts, batch.readers = [], [], {}
                state.pairs_removed = True
                self._discard(f"batches/{batch_id}/pairs/")

    def _since(self, batch: MemoryBatch) -> float:
        return self._clock() if batch.working_since is None else batch.working_since

    def _enter(self, batch: MemoryBatch, status: str) -> None:
        batch.state.status = status
        batch.state.version += 1
        batch.state.stamps[f"{status}_at"] = int(self._clock())
        if status in TERMINAL:
            for name in ("rows", "duplicates", "input"):
                self._discard(f"batches/{batch.state.doc['id']}/{name}/")

    def _lease(self, batch: MemoryBatch, index: int, worker: str, ttl_s: float) -> Lease:
        shard = batch.shards[index]
        shard.token += 1
        shard.worker = worker
        shard.expires_at = self._clock() + ttl_s
        return Lease(
            str(batch.state.doc["id"]), index, shard.token, worker, shard.expires_at,
            *shard.spec, done=frozenset(shard.rows),
            tries={line: count for line, (count, _) in shard.tries.items()},
        )  # fmt: skip

    def _held(self, lease: Lease) -> tuple[MemoryBatch, MemoryShard | None]:
        batch = self._batches[lease.batch_id]
        if lease.shard >= len(batch.shards):
            return batch, None
        shard = batch.shards[lease.shard]
        held = shard.worker is not None and shard.token == lease.token and shard.sealed is None
        return batch, shard if held else None

    def _close_if_due(self, batch: MemoryBatch, now: float) -> None:
        state = batch.state
        if state.closed:
            return
        if state.status == "cancelling":
            state.closed = not any(shard.leased(now) for shard in batch.shards)
        elif state.status in ("validating", "in_progress") and now >= batch.expires_at:
            batch.outcome = "expired"
            state.closed = True
            self._enter(batch, "finalizing")
        elif state.status == "in_progress" and all(shard.sealed for shard in batch.shards):
            state.closed = True
            self._enter(batch, "finalizing")
        if state.closed:
            batch.claim_until = 0.0
