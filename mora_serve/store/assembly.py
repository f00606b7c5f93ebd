"""From committed rows to files: sealing shards into parts, and joining parts into the result files.

Both may be repeated or interrupted at any point: parts are named by shard and token, and only an
atomic step makes them count. Files are joined from parts without ever holding one in memory. Pairs
are numbered across shards, so they are sealed apart from them, by
:mod:`mora_serve.store.pair_stream`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from mora_serve.errors import StorageError
from mora_serve.ports import BlobStore, Lease
from mora_serve.requests import custom_id_of
from mora_serve.row_codes import BATCH_EXPIRED
from mora_serve.store.batch_input import row_id, split_lines
from mora_serve.store.pair_stream import LedgerPairs
from mora_serve.store.shapes import file_object, json_lines, lease_lost
from mora_serve.store.steps import BatchState, LedgerSteps, SealedShard, StoredRow

ASSEMBLY_TTL_S = 300.0
"""Claim on the assembly of a batch's files, which may be gigabytes. Two runners that assemble the
same batch do no harm, they only work twice."""
MAX_LINE_BYTES = 8 * 2**20
"""Longer input lines are not searched for their ``custom_id`` when a batch expires."""


class Assembly:
    """Writes parts and files of batches."""

    def __init__(self, steps: LedgerSteps, blobs: BlobStore) -> None:
        self._steps = steps
        self._blobs = blobs
        self._pairs = LedgerPairs(steps, blobs)

    async def seal(self, lease: Lease, extra: Sequence[StoredRow] = ()) -> None:
        """Write the rows of a shard as parts and drop them from the ledger.

        ``extra`` are failed rows that were never committed. Raises ``LeaseLostError``, and
        ``StorageError`` while rows are missing and the batch is open.
        """
        rows = await self._steps.shard_rows(lease)
        sealed = await self._write_parts(lease, sorted([*rows, *extra], key=lambda row: row.line))
        answer = await self._steps.seal_shard(lease, sealed, len(rows), len(extra))
        if answer == "sealed":
            await self._pairs.seal(lease.batch_id)
            return
        # A step that is repeated because its answer was lost finds the shard sealed by itself.
        if answer == "lost" and sealed in await self._steps.sealed_shards(lease.batch_id):
            await self._pairs.seal(lease.batch_id)
            return
        for key in (sealed.output, sealed.error):
            if key is not None:
                await self._blobs.delete(key)
        if answer == "lost":
            raise lease_lost(lease)
        raise StorageError(
            f"shard {lease.shard} of {lease.batch_id} must be complete to be sealed, "
            f"got {len(rows)} of {lease.num_rows} rows"
        )

    async def finalize(self, batch_id: str, worker: str, ttl_s: float) -> None:
        """Seal what a closed batch has left, join its files and give it its terminal status."""
        while (lease := await self._steps.lease_leftover(batch_id, worker, ttl_s)) is not None:
            await self.seal(lease, await self._expired_rows(lease))
        await self._pairs.seal(batch_id, everything=True)
        await self._steps.renew_claim(batch_id, worker, max(ttl_s, ASSEMBLY_TTL_S))
        shards = await self._steps.sealed_shards(batch_id)
        state = await self._steps.get_state(batch_id)
        assert state is not None
        output = await self._join(state, "output", [shard.output for shard in shards])
        error = await self._join(state, "error", [shard.error for shard in shards])
        await self._steps.finish(batch_id, output, error)

    async def _expired_rows(self, lease: Lease) -> list[StoredRow]:
        """Error rows for what an expired batch did not get to; none for a cancelled one."""
        state = await self._steps.get_state(lease.batch_id)
        if state is None or state.status != "finalizing" or len(lease.done) == lease.num_rows:
            return []
        found = await self._steps.get_file(state.doc["input_file_id"], even_expired=True)
        if found is None:
            return []
        chunks = self._blobs.open_read(
            state.input_blob or found[1], lease.offset_bytes, lease.num_bytes
        )
        return [
            _expired_row(lease.batch_id, line.number, line.data)
            async for line in split_lines(chunks, lease.first_line, MAX_LINE_BYTES)
            if line.number not in lease.done
        ]

    async def _write_parts(self, lease: Lease, rows: Sequence[StoredRow]) -> SealedShard:
        stem = f"batches/{lease.batch_id}/rows/{lease.shard:08d}-{lease.token}"
        keys: list[str | None] = []
        for name, is_error in (("output", False), ("error", True)):
            lines = [row.data for row in rows if row.is_error == is_error]
            key = f"{stem}.{name}.jsonl" if lines else None
            if key is not None:
                await self._blobs.put(key, b"".join(line + b"\n" for line in lines))
            keys.append(key)
        return SealedShard(lease.shard, keys[0], keys[1])

    async def _join(
        self, state: BatchState, name: str, parts: Sequence[str | None]
    ) -> tuple[dict[str, Any], str] | None:
        keys = [key for key in parts if key is not None]
        if not keys:
            return None
        batch_id = str(state.doc["id"])
        digest = hashlib.sha256(f"{batch_id}:{name}".encode()).hexdigest()
        file_id = f"file-{digest[:24]}"
        blob = f"files/{file_id}"
        num_bytes = await self._blobs.concat(blob, keys)
        file = file_object(
            file_id,
            num_bytes,
            f"{batch_id}_{name}.jsonl",
            purpose="batch_output",
            created_at=int(state.now),
            lifetime_s=state.options.get("output_expires_after_s"),
        )
        return file, blob


def _expired_row(batch_id: str, line: int, data: bytes | None) -> StoredRow:
    error = {
        "code": BATCH_EXPIRED,
        "message": "the completion window ended before the row was worked on",
        "line": line + 1,
    }
    row = {
        "id": row_id("batch_req", batch_id, line),
        "custom_id": None if data is None else custom_id_of(data),
        "response": None,
        "error": error,
    }
    return StoredRow(line, True, json_lines([row]).rstrip())
