"""Lists of calls that end together, and the gate."""

from __future__ import annotations

import asyncio

import pytest

from actors.aio import Gate, gather


async def test_results_keep_the_order_of_the_calls() -> None:
    async def after(turns: int) -> int:
        for _ in range(turns):
            await asyncio.sleep(0)
        return turns

    assert await gather([after(3), after(1), after(2)]) == [3, 1, 2]


async def test_an_error_ends_the_others_before_it_is_raised() -> None:
    ended = asyncio.Event()

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.set()

    async def fails() -> None:
        await asyncio.sleep(0)
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        await gather([endless(), fails()])
    assert ended.is_set()


async def test_a_closed_gate_waits_for_those_inside_and_keeps_others_out() -> None:
    gate, leave, log = Gate(), asyncio.Event(), list[str]()

    async def first() -> None:
        async with gate.open():
            await leave.wait()
            log.append("first left")

    async def alone() -> None:
        async with gate.closed():
            log.append("alone in")
            await asyncio.sleep(0)
            log.append("alone out")

    async def late() -> None:
        async with gate.open():
            log.append("late in")

    tasks = []
    for step in (first, alone, late):
        tasks.append(asyncio.create_task(step()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert log == []
    leave.set()
    await asyncio.gather(*tasks)
    assert log == ["first left", "alone in", "alone out", "late in"]


async def test_a_gate_reopens_when_waiting_to_be_alone_is_given_up() -> None:
    gate, leave = Gate(), asyncio.Event()

    async def inside() -> None:
        async with gate.open():
            await leave.wait()

    async def alone() -> None:
        async with gate.closed():
            raise AssertionError

    holder = asyncio.create_task(inside())
    await asyncio.sleep(0)
    waiting = asyncio.create_task(alone())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    async with asyncio.timeout(5), gate.open():
        leave.set()
    await holder


async def test_users_that_are_cancelled_all_at_once_leave_the_gate_to_the_one_who_waits() -> None:
    gate, inside = Gate(), asyncio.Semaphore(0)

    async def use() -> None:
        async with gate.open():
            inside.release()
            await asyncio.Event().wait()

    async def alone() -> str:
        async with gate.closed():
            return "alone"

    users = [asyncio.create_task(use()) for _ in range(5)]
    for _ in users:
        await inside.acquire()
    waiting = asyncio.create_task(alone())
    newcomer = asyncio.create_task(use())
    await asyncio.sleep(0)
    for user in users:
        user.cancel()
    newcomer.cancel()
    async with asyncio.timeout(5):
        assert await waiting == "alone"
