"""One runner at a time has the engines for itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from actors.aio import Gate
from actors.quarantine import CLAIM_TTL_S, REPORT_TTL_S, Quarantine
from mora_serve.store import Stores

PERIOD_S = 0.001


def side(stores: Stores, name: str) -> tuple[Quarantine, Gate]:
    gate = Gate()
    return Quarantine(stores.batches, name, gate, period_s=PERIOD_S), gate


@asynccontextmanager
async def reporting(*sides: Quarantine) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(item.run()) for item in sides]
    try:
        async with asyncio.timeout(10):
            yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_quarantine_begins_when_every_other_runner_has_nothing_in_flight() -> None:
    stores, order = Stores.memory(), list[str]()
    ours, _ = side(stores, "ours")
    theirs, gate = side(stores, "theirs")
    inside, may_leave = asyncio.Event(), asyncio.Event()

    async def their_row() -> None:
        async with gate.open():
            inside.set()
            await may_leave.wait()
            order.append("their row ends")

    async def our_row() -> None:
        async with ours.held():
            await ours.others_quiet()
            order.append("ours, alone")
            await asyncio.sleep(10 * PERIOD_S)
            order.append("ours ends")

    async def their_next() -> None:
        async with gate.open():
            order.append("their next row")

    async with reporting(ours, theirs):
        tasks = [asyncio.create_task(their_row())]
        await inside.wait()
        tasks.append(asyncio.create_task(our_row()))
        while not gate.is_paused:
            await asyncio.sleep(PERIOD_S)
        tasks.append(asyncio.create_task(their_next()))
        await asyncio.sleep(10 * PERIOD_S)
        assert order == []
        may_leave.set()
        await asyncio.gather(*tasks)
    assert order == ["their row ends", "ours, alone", "ours ends", "their next row"]


async def test_one_quarantine_at_a_time() -> None:
    stores = Stores.memory()
    sides = [side(stores, name)[0] for name in "abc"]
    inside = most = 0

    async def use(item: Quarantine) -> None:
        nonlocal inside, most
        async with item.held():
            await item.others_quiet()
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(2 * PERIOD_S)
            inside -= 1

    async with reporting(*sides):
        await asyncio.gather(*(use(item) for item in sides))
    assert most == 1


async def test_a_runner_that_vanished_is_not_waited_for_and_its_claim_ends() -> None:
    now = [1000.0]
    stores = Stores.memory(clock=lambda: now[0])
    dead, dead_gate = side(stores, "dead")
    ours, _ = side(stores, "ours")
    async with dead_gate.open():
        await dead.report()
        assert await stores.batches.claim_quarantine("dead", CLAIM_TTL_S)
        assert not await stores.batches.claim_quarantine("ours", CLAIM_TTL_S)
        now[0] += max(CLAIM_TTL_S, REPORT_TTL_S) + 1
        async with asyncio.timeout(5), ours.held():
            await ours.others_quiet()


async def test_a_runner_that_ends_is_forgotten_at_once() -> None:
    stores = Stores.memory()
    ended, _ = side(stores, "ended")
    async with reporting(ended):
        while await stores.batches.num_unquiet("ours", "claim") == 0:
            await asyncio.sleep(0)
    assert await stores.batches.num_unquiet("ours", "claim") == 0


async def test_who_was_quiet_for_an_earlier_claim_is_not_quiet_for_the_next() -> None:
    stores = Stores.memory()
    ours, _ = side(stores, "ours")
    theirs, gate = side(stores, "theirs")
    async with ours.held():
        await theirs.report()
        await theirs.report()
        await ours.others_quiet()
    await theirs.report()
    async with gate.open(), ours.held():
        waiting = asyncio.create_task(ours.others_quiet())
        for _ in range(10):
            await asyncio.sleep(PERIOD_S)
        assert not waiting.done()
        waiting.cancel()
