"""Pairs in order: sealed parts and the live tail look like one gapless sequence."""

from __future__ import annotations

import asyncio

import pytest

from mora_serve.store import Stores, pair_stream
from mora_serve.store.steps import PairPart
from tests.unit.store.ledger_driver import all_pairs, drain, lease, open_batch, row, work


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_stream, "PAIRS_PER_PART", 4)


async def test_reads_are_ascending_from_zero_and_after_is_exclusive(stores: Stores) -> None:
    batch_id = await open_batch(stores, [3])
    held = await lease(stores)
    for line in range(3):
        await stores.batches.commit_row(held, row(line, 2))
    pairs = await stores.pairs.read(batch_id)
    assert [pair["seq"] for pair in pairs] == [0, 1, 2, 3, 4, 5]
    assert [pair["line"] for pair in pairs] == [0, 0, 1, 1, 2, 2]
    assert [pair["seq"] for pair in await stores.pairs.read(batch_id, after=3)] == [4, 5]
    assert [pair["seq"] for pair in await stores.pairs.read(batch_id, 0, limit=2)] == [1, 2]
    assert await stores.pairs.read(batch_id, after=5) == []


async def test_pairs_of_interleaved_shards_stay_gapless_across_sealing(stores: Stores) -> None:
    batch_id = await open_batch(stores, [5, 5])
    one, two = await lease(stores), await lease(stores)
    for step in range(5):
        await stores.batches.commit_row(one, row(step, 2))
        await stores.batches.commit_row(two, row(5 + step, 1))
    await stores.batches.seal_shard(two)
    pairs = await all_pairs(stores, batch_id)
    assert [pair["seq"] for pair in pairs] == list(range(15))
    assert [pair["line"] for pair in pairs] == [0, 0, 5, 1, 1, 6, 2, 2, 7, 3, 3, 8, 4, 4, 9]
    assert await stores.pairs.tail_length(batch_id) < 4
    await stores.batches.seal_shard(one)
    await drain(stores)
    assert await all_pairs(stores, batch_id) == pairs
    assert await stores.pairs.tail_length(batch_id) == 0


async def test_the_tail_is_kept_for_registered_readers(stores: Stores) -> None:
    batch_id = await open_batch(stores, [8, 1])
    await stores.pairs.register_reader(batch_id, "trainer", -1)
    await work(stores, await lease(stores))
    assert await stores.pairs.tail_length(batch_id) == 8
    await stores.pairs.register_reader(batch_id, "trainer", 5)
    assert await stores.pairs.tail_length(batch_id) == 2
    await stores.pairs.unregister_reader(batch_id, "trainer")
    assert await stores.pairs.tail_length(batch_id) == 0
    assert len(await all_pairs(stores, batch_id)) == 8


async def test_the_tail_is_never_trimmed_ahead_of_sealing(stores: Stores) -> None:
    batch_id = await open_batch(stores, [3])
    held = await lease(stores)
    for line in range(3):
        await stores.batches.commit_row(held, row(line))
    await stores.pairs.register_reader(batch_id, "fast", 2)
    assert await stores.pairs.tail_length(batch_id) == 3


async def test_sealing_twice_at_once_keeps_every_pair_once(stores: Stores) -> None:
    batch_id = await open_batch(stores, [9, 1])
    held = await lease(stores)
    for line in range(9):
        await stores.batches.commit_row(held, row(line))
    await asyncio.gather(*(stores.pairs.seal(batch_id, everything=True) for _ in range(3)))
    assert [pair["seq"] for pair in await all_pairs(stores, batch_id, 2)] == list(range(9))
    assert await stores.pairs.tail_length(batch_id) == 0


async def test_a_part_counts_only_where_the_sealed_pairs_end(stores: Stores) -> None:
    batch_id = await open_batch(stores, [6, 1])
    held = await lease(stores)
    for line in range(6):
        await stores.batches.commit_row(held, row(line))
    await stores.pairs.seal(batch_id)
    steps = stores.pairs._steps
    for first, last in ((0, 1), (3, 5), (5, 5), (4, 6)):
        assert not await steps.add_pair_part(batch_id, PairPart(first, last, "absent"))
    assert await steps.add_pair_part(batch_id, PairPart(4, 5, "late"))
    assert await stores.pairs.tail_length(batch_id) == 0


async def test_a_follower_sees_every_pair_and_ends_with_the_batch(stores: Stores) -> None:
    batch_id = await open_batch(stores, [4, 4])
    seen: list[int] = []
    first_pairs = asyncio.Event()

    async def follow() -> None:
        async for pair in stores.pairs.follow(batch_id):
            seen.append(pair["seq"])
            first_pairs.set()

    async with asyncio.timeout(20):
        task = asyncio.create_task(follow())
        held = await lease(stores)
        await stores.batches.commit_row(held, row(0))
        await first_pairs.wait()
        assert seen == [0]
        assert not await stores.pairs.is_finished(batch_id)
        await drain(stores)
        await work(stores, held)
        await drain(stores)
        await task
    assert seen == list(range(8))


async def test_a_finished_batch_without_pairs_is_empty(stores: Stores) -> None:
    batch_id = await open_batch(stores, [1])
    await work(stores, await lease(stores), num_pairs=0)
    await drain(stores)
    assert [pair async for pair in stores.pairs.follow(batch_id)] == []
