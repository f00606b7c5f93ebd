"""Small steps that the ledger tests share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mora_serve.ports import Lease, RowCommit
from mora_serve.store import Stores


async def new_batch(stores: Stores, **options: Any) -> str:
    batch = await stores.batches.create_batch(
        {"endpoint": "/v1/rewrites", "input_file_id": "file-in"}, options, None, "hash"
    )
    return str(batch["id"])


async def open_batch(stores: Stores, shard_rows: Sequence[int], **options: Any) -> str:
    """A running batch whose shards have the given numbers of rows, lines numbered through."""
    batch_id = await new_batch(stores, **options)
    shards, first = [], 0
    for rows in shard_rows:
        shards.append((first, rows, first * 10, rows * 10))
        first += rows
    await stores.batches.open_batch(batch_id, shards, first)
    return batch_id


async def lease(stores: Stores, worker: str = "w", ttl_s: float = 100.0) -> Lease:
    found = await stores.batches.lease_shard(worker, ttl_s)
    assert found is not None
    return found


async def expire(stores: Stores, held: Lease) -> None:
    """Let the lease run out now."""
    await stores.batches.heartbeat(held, 0.0)


def row(line: int, num_pairs: int = 1, *, failed: bool = False) -> RowCommit:
    data = json.dumps({"line": line}).encode()
    return RowCommit(
        line=line,
        output=None if failed else data,
        error=data if failed else None,
        pairs=tuple(json.dumps({"line": line, "k": k}).encode() for k in range(num_pairs)),
        usage={"output_tokens": 2},
        classes={"multi": 1},
    )


async def work(stores: Stores, held: Lease, num_pairs: int = 1) -> None:
    """Commit what is missing of the shard and seal it."""
    for line in range(held.first_line, held.first_line + held.num_rows):
        if line not in held.done:
            await stores.batches.commit_row(held, row(line, num_pairs))
    await stores.batches.seal_shard(held)


async def drain(stores: Stores, worker: str = "drain") -> None:
    """Work until no shard is open, then finish what is due."""
    while (held := await stores.batches.lease_shard(worker, 100.0)) is not None:
        await work(stores, held)
    await stores.batches.finalize_ready(worker, 100.0)


async def content(stores: Stores, file_id: str | None) -> list[dict[str, Any]]:
    """Rows of a file; [] without one."""
    if file_id is None:
        return []
    _, blob = await stores.batches.get_file(file_id)
    data = b"".join([chunk async for chunk in stores.blobs.open_read(blob)])
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


async def all_pairs(stores: Stores, batch_id: str, limit: int = 7) -> list[dict[str, Any]]:
    """Every pair, read in small steps as a client would."""
    pairs: list[dict[str, Any]] = []
    while page := await stores.pairs.read(batch_id, len(pairs) - 1, limit):
        assert len(page) <= limit
        pairs += page
    return pairs
