"""List calls and bounded fan-out: company, order, errors, cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

import pytest

from mora_serve.concurrency import MicroBatcher, bounded


class Calls:
    """A list call that records its lists; ``gate`` holds it back, ``error`` breaks it."""

    def __init__(self) -> None:
        self.lists: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.started = asyncio.Event()
        self.cancelled = 0
        self.error: Exception | None = None

    async def __call__(self, items: list[int]) -> Sequence[int]:
        self.lists.append(items)
        self.started.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return [item * 10 for item in items]


def batcher(calls: Calls, max_items: int = 3) -> MicroBatcher[int, int]:
    return MicroBatcher(calls, max_items=max_items, window_s=0.0)


async def test_items_submitted_together_share_a_call() -> None:
    calls = Calls()
    batch = batcher(calls)
    assert await asyncio.gather(*(batch.submit(i) for i in range(5))) == [0, 10, 20, 30, 40]
    assert calls.lists == [[0, 1, 2], [3, 4]]


async def test_a_later_call_does_not_wait_for_an_earlier_one() -> None:
    calls = Calls()
    calls.gate.clear()
    batch = batcher(calls, max_items=1)
    slow = asyncio.ensure_future(batch.submit(1))
    await calls.started.wait()
    calls.started.clear()
    also = asyncio.ensure_future(batch.submit(2))
    await calls.started.wait()
    assert calls.lists == [[1], [2]]
    calls.gate.set()
    assert (await slow, await also) == (10, 20)


async def test_an_error_reaches_everyone_in_its_call_and_no_one_else() -> None:
    calls = Calls()
    calls.error = ValueError("broken")
    batch = batcher(calls)
    results = await asyncio.gather(batch.submit(1), batch.submit(2), return_exceptions=True)
    assert [str(result) for result in results] == ["broken", "broken"]
    calls.error = None
    assert await batch.submit(3) == 30


async def test_a_call_is_cancelled_when_nobody_waits_for_it_any_more() -> None:
    calls = Calls()
    calls.gate.clear()
    batch = batcher(calls)
    first, second = (asyncio.ensure_future(batch.submit(i)) for i in range(2))
    await calls.started.wait()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert calls.cancelled == 0
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert calls.cancelled == 1


async def test_an_item_cancelled_before_its_call_is_left_out() -> None:
    calls = Calls()
    batch = batcher(calls)
    first, second = (asyncio.ensure_future(batch.submit(i)) for i in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert await second == 10
    assert calls.lists == [[1]]


async def test_a_wrong_number_of_results_is_an_error_not_a_mix_up() -> None:
    async def short(items: list[int]) -> list[int]:
        return items[:-1]

    batch: MicroBatcher[int, int] = MicroBatcher(short, max_items=2, window_s=0.0)
    with pytest.raises(RuntimeError, match="gave 1 results"):
        await asyncio.gather(batch.submit(1), batch.submit(2))


async def test_bounded_runs_at_most_limit_jobs_and_yields_everything() -> None:
    running, most = 0, 0

    async def job(value: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return value

    jobs = (partial(job, i) for i in range(20))
    assert sorted([value async for value in bounded(jobs, 4)]) == list(range(20))
    assert most == 4


async def test_bounded_starts_no_job_before_its_predecessor_was_taken() -> None:
    started = []

    async def job(value: int) -> int:
        started.append(value)
        return value

    stream = bounded((partial(job, i) for i in range(100)), 2)
    await anext(stream)
    assert len(started) <= 2
    await stream.aclose()


async def test_leaving_bounded_early_cancels_what_runs() -> None:
    cancelled = []

    async def job(value: int) -> int:
        if value == 0:
            return value
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(value)
            raise
        return value

    stream = bounded((partial(job, i) for i in range(3)), 3)
    assert await anext(stream) == 0
    await stream.aclose()
    assert sorted(cancelled) == [1, 2]


async def test_bounded_raises_the_first_error() -> None:
    async def job(value: int) -> int:
        if value == 1:
            raise ValueError("broken")
        return value

    with pytest.raises(ValueError, match="broken"):
        _ = [value async for value in bounded((partial(job, i) for i in range(3)), 1)]
