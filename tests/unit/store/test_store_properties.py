"""Random interleavings of leases, commits, expiries, crashes and seals lose or repeat nothing."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mora_serve.config import load_settings
from mora_serve.errors import LeaseLostError, StorageError
from mora_serve.identity import new_id
from mora_serve.ports import Lease
from mora_serve.store import Stores, open_stores, pair_stream
from tests.unit.store.ledger_driver import all_pairs, content, drain, expire, open_batch, row

WORKERS = 3
SHARDS = st.lists(st.integers(1, 4), min_size=1, max_size=4)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["lease", "commit", "commit", "commit", "repeat", "expire", "crash", "release", "seal",
             "seal pairs", "reader", "finalize"]
        ),
        st.integers(0, WORKERS - 1),
    ),
    max_size=60,
)  # fmt: skip


class Simulation:
    """Workers that act on beliefs which may be out of date, as real ones do."""

    def __init__(self, stores: Stores, batch_id: str) -> None:
        self.stores = stores
        self.batch_id = batch_id
        self.held: dict[int, Lease] = {}
        self.last_token: dict[int, int] = {}
        self.committed: set[int] = set()
        self.num_reported = 0

    async def step(self, action: str, worker: int) -> None:
        batches, held = self.stores.batches, self.held.get(worker)
        try:
            if action == "lease" and held is None:
                await self._lease(worker)
            elif action == "seal pairs":
                await self.stores.pairs.seal(self.batch_id, everything=worker == 0)
            elif action == "reader":
                await self.stores.pairs.register_reader(self.batch_id, "r", self.num_reported)
            elif action == "finalize":
                await batches.finalize_ready(f"w{worker}", 0.0)
            elif held is not None:
                await self._act(action, worker, held)
        except LeaseLostError:
            self.held.pop(worker, None)

    async def _lease(self, worker: int) -> None:
        found = await self.stores.batches.lease_shard(f"w{worker}", 1000.0)
        if found is None:
            return
        assert found.token > self.last_token.get(found.shard, 0)
        assert set(found.done) == self.committed & set(_lines(found))
        self.last_token[found.shard] = found.token
        self.held[worker] = found

    async def _act(self, action: str, worker: int, held: Lease) -> None:
        batches = self.stores.batches
        open_lines = [line for line in _lines(held) if line not in self.committed]
        if action == "commit" and open_lines:
            line = open_lines[0]
            assert await batches.commit_row(held, row(line, line % 3, failed=line % 4 == 3))
            self.committed.add(line)
            self.num_reported += 1
        elif action == "repeat" and self.committed & set(_lines(held)):
            line = min(self.committed & set(_lines(held)))
            assert not await batches.commit_row(held, row(line, 2))
        elif action == "expire":
            await expire(self.stores, held)
        elif action == "crash":
            await expire(self.stores, held)
            del self.held[worker]
        elif action == "release":
            await batches.release(held)
            del self.held[worker]
        elif action == "seal":
            await self._seal(worker, held, complete=not open_lines)

    async def _seal(self, worker: int, held: Lease, *, complete: bool) -> None:
        if complete:
            await self.stores.batches.seal_shard(held)
            del self.held[worker]
        else:
            with pytest.raises((StorageError, LeaseLostError)):
                await self.stores.batches.seal_shard(held)


def _lines(held: Lease) -> range:
    return range(held.first_line, held.first_line + held.num_rows)


async def _check(stores: Stores, shards: Sequence[int], steps: Sequence[tuple[str, int]]) -> None:
    batch_id = await open_batch(stores, shards)
    simulation = Simulation(stores, batch_id)
    for action, worker in steps:
        await simulation.step(action, worker)
        counts = (await stores.batches.get_batch(batch_id))["request_counts"]
        assert counts["completed"] + counts["failed"] == len(simulation.committed)
    for held in simulation.held.values():
        await stores.batches.release(held)
    await _finish(stores)
    total = sum(shards)
    batch = await stores.batches.get_batch(batch_id)
    assert batch["status"] == "completed"
    output = [item["line"] for item in await content(stores, batch["output_file_id"])]
    errors = [item["line"] for item in await content(stores, batch["error_file_id"])]
    assert output == [line for line in range(total) if line % 4 != 3]
    assert errors == [line for line in range(total) if line % 4 == 3]
    pairs = await all_pairs(stores, batch_id, limit=3)
    assert [pair["seq"] for pair in pairs] == list(range(len(pairs)))
    kept = [(pair["line"], pair["k"]) for pair in pairs]
    assert sorted(kept) == [(line, k) for line in range(total) for k in range(line % 3)]
    assert [k for line in range(total) for ln, k in kept if ln == line] == [
        k for _, k in sorted(kept)
    ]


async def _check_cancelled(
    stores: Stores, shards: Sequence[int], steps: Sequence[tuple[str, int]], after: int
) -> None:
    """A batch cancelled amid its rows keeps what was committed until it closed, once each."""
    batch_id = await open_batch(stores, shards)
    simulation = Simulation(stores, batch_id)
    for number, (action, worker) in enumerate(steps):
        if number == after:
            await stores.batches.cancel_batch(batch_id)
        await simulation.step(action, worker)
    await stores.batches.cancel_batch(batch_id)
    for held in simulation.held.values():
        await stores.batches.release(held)
    assert await stores.batches.lease_shard("late", 1000.0) is None
    await stores.batches.finalize_ready("last", 1000.0)
    batch, committed = await stores.batches.get_batch(batch_id), simulation.committed
    assert batch["status"] == ("cancelled" if batch["cancelling_at"] else "completed")
    assert len(committed) == sum(shards) or batch["status"] == "cancelled"
    output = [item["line"] for item in await content(stores, batch["output_file_id"])]
    errors = [item["line"] for item in await content(stores, batch["error_file_id"])]
    assert sorted(output + errors) == sorted(committed)
    assert all(line % 4 == 3 for line in errors)
    pairs = await all_pairs(stores, batch_id, limit=3)
    assert [pair["seq"] for pair in pairs] == list(range(len(pairs)))
    kept = sorted((pair["line"], pair["k"]) for pair in pairs)
    assert kept == [(line, k) for line in sorted(committed) for k in range(line % 3)]


async def _finish(stores: Stores) -> None:
    while (held := await stores.batches.lease_shard("last", 1000.0)) is not None:
        for line in _lines(held):
            if line not in held.done:
                await stores.batches.commit_row(held, row(line, line % 3, failed=line % 4 == 3))
        await stores.batches.seal_shard(held)
    await drain(stores)


@given(SHARDS, STEPS)
@settings(max_examples=150, deadline=None)
def test_no_interleaving_loses_or_repeats_a_row_in_memory(
    shards: list[int], steps: list[tuple[str, int]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_stream, "PAIRS_PER_PART", 2)
        asyncio.run(_check(Stores.memory(), shards, steps))


@given(SHARDS, STEPS, st.integers(0, 60))
@settings(max_examples=150, deadline=None)
def test_cancelling_amid_any_interleaving_keeps_what_was_committed(
    shards: list[int], steps: list[tuple[str, int]], after: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_stream, "PAIRS_PER_PART", 2)
        asyncio.run(_check_cancelled(Stores.memory(), shards, steps, after))


@pytest.mark.redis
@given(SHARDS, STEPS, st.none() | st.integers(0, 60))
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_no_interleaving_loses_or_repeats_a_row_on_redis(
    redis_url: str, shards: list[int], steps: list[tuple[str, int]], cancel_after: int | None
) -> None:
    async def check(directory: str) -> None:
        overrides = {
            "data_dir": directory,
            "redis": {"url": redis_url, "key_prefix": new_id("test")},
        }
        stores = open_stores(load_settings("fake", overrides=overrides, environ={}))
        try:
            if cancel_after is None:
                await _check(stores, shards, steps)
            else:
                await _check_cancelled(stores, shards, steps, cancel_after)
        finally:
            await stores.aclose()

    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_stream, "PAIRS_PER_PART", 2)
        asyncio.run(check(directory))
