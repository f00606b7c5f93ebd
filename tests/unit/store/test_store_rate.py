"""The rate of the last minute, and what it says to callers that are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.store import Stores
from mora_serve.store.backlog import BacklogLimits, retry_after_s
from mora_serve.store.rate import NUM_BUCKETS, RateRing, recent_rate
from mora_serve.store.steps import Backlog
from tests.unit.store.ledger_driver import lease, open_batch, row


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def test_steady_work_is_reported_as_it_is() -> None:
    ring = RateRing()
    for tenth in range(2000):
        ring.add(tenth / 10)

    assert recent_rate(ring.buckets, 200.0, since=0.0) == pytest.approx(10.0, rel=0.05)
    assert len(ring.buckets) == NUM_BUCKETS


def test_paused_work_stands_still_and_is_measured_anew_when_it_goes_on() -> None:
    ring = RateRing()
    for second in range(100):
        ring.add(float(second), rows=5)
    assert recent_rate(ring.buckets, 1000.0, since=0.0) is None

    for second in range(1000, 1010):
        ring.add(float(second), rows=2)

    assert recent_rate(ring.buckets, 1010.0, since=1000.0) == pytest.approx(2.0)


def test_slow_rows_that_end_together_are_no_burst() -> None:
    ring = RateRing()
    ring.add(100.0, rows=8)

    assert recent_rate(ring.buckets, 100.0, since=60.0) == pytest.approx(0.2)


@given(
    st.lists(st.tuples(st.floats(0, 20), st.integers(1, 50)), min_size=1, max_size=80),
    st.floats(0, 70),
)
def test_rate_never_exceeds_what_was_committed(steps: list[tuple[float, int]], wait: float) -> None:
    ring, now, total = RateRing(), 5000.0, 0
    for pause, rows in steps:
        now += pause
        total += rows
        ring.add(now, rows)

    rate = recent_rate(ring.buckets, now + wait, since=5000.0)

    assert rate is None or 0 < rate <= total


async def test_progress_tells_the_rate_of_both_stores(stores: Stores) -> None:
    batch_id = await open_batch(stores, [10])
    assert (await stores.batches.progress(batch_id))["rate"] is None
    held = await lease(stores)
    for number in range(6):
        await stores.batches.commit_row(held, row(number))

    rate = (await stores.batches.progress(batch_id))["rate"]

    assert rate is not None
    assert 1.0 <= rate <= 6.0


async def test_a_resumed_batch_forgets_the_pause() -> None:
    clock = Clock()
    stores = Stores.memory(clock)
    batch_id = await open_batch(stores, [200])
    held = await lease(stores, ttl_s=30.0)
    for number in range(100):
        clock.now += 0.1
        await stores.batches.commit_row(held, row(number))
    clock.now += 3600
    paused = (await stores.batches.progress(batch_id))["rate"]
    held = await lease(stores)
    for number in range(100, 120):
        clock.now += 0.5
        await stores.batches.commit_row(held, row(number))

    resumed = (await stores.batches.progress(batch_id))["rate"]

    assert paused is None
    assert resumed == pytest.approx(2.0, rel=0.05)


async def test_every_change_of_a_batch_has_a_higher_version(stores: Stores) -> None:
    versions = []

    async def note() -> None:
        versions.append((await stores.batches.progress(batch_id))["version"])

    batch_id = await open_batch(stores, [2])
    await note()
    held = await lease(stores)
    for number in range(2):
        await stores.batches.commit_row(held, row(number))
        await note()
    before = versions[-1]
    await stores.batches.commit_row(held, row(1))
    assert (await stores.batches.progress(batch_id))["version"] == before
    await stores.batches.seal_shard(held)
    await stores.batches.finalize_ready("w", 60.0)
    await note()

    assert versions == sorted(set(versions))


@pytest.mark.parametrize(
    ("waiting", "input_bytes", "seconds"),
    [
        (Backlog(rows=150, num_bytes=10, rate=5.0), 0, 51 / 5),
        (Backlog(rows=100, num_bytes=10, rate=500.0), 0, 1.0),
        (Backlog(rows=10_000, num_bytes=10, rate=5.0), 0, 60.0),
        (Backlog(rows=150, num_bytes=10, rate=0.0), 0, 60.0),
        (Backlog(rows=50, num_bytes=1000, rate=1.0), 200, 10.0),
    ],
)
def test_refused_batch_waits_until_the_measured_rate_has_made_room(
    waiting: Backlog, input_bytes: int, seconds: float
) -> None:
    limits = BacklogLimits(max_rows=100, max_bytes=1000)

    assert retry_after_s(waiting, input_bytes, limits) == pytest.approx(seconds)
