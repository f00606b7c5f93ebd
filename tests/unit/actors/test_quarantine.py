"""One runner at a time has the engines for itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from actors import quarantine as quarantine_module
from actors.aio import Gate
from actors.batch_rows import RowWorker
from actors.isolation import Isolation, Place
from actors.quarantine import CLAIM_TTL_S, REPORT_TTL_S, Quarantine, QuarantineLostError
from mora_serve.errors import StorageError
from mora_serve.requests import MoraRequest
from mora_serve.service import RowResult
from mora_serve.store import Stores
from mora_serve.store.batch_input import Line
from tests.unit.store.runner_driver import EchoService, make_settings, row_line

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


def runner(stores: Stores, name: str) -> tuple[Isolation, Quarantine]:
    quarantine, gate = side(stores, name)
    service = EchoService()
    return Isolation(service, service, gate, quarantine, max_in_flight_rows=4), quarantine


@pytest.mark.parametrize("first", [Place.ALONE, Place.QUARANTINED])
async def test_a_row_alone_and_another_runners_quarantine_exclude_each_other(first: Place) -> None:
    stores = Stores.memory()
    sides = {Place.ALONE: runner(stores, "alone"), Place.QUARANTINED: runner(stores, "held")}
    second = next(place for place in sides if place is not first)
    entered, may_leave, order = asyncio.Event(), asyncio.Event(), list[str]()

    async def first_row() -> None:
        async with sides[first][0].enter(first):
            entered.set()
            await may_leave.wait()
            order.append("first ends")

    async def second_row() -> None:
        async with sides[second][0].enter(second):
            order.append("second")

    async with reporting(*(quarantine for _, quarantine in sides.values())):
        tasks = [asyncio.create_task(first_row())]
        await entered.wait()
        tasks.append(asyncio.create_task(second_row()))
        await asyncio.sleep(20 * PERIOD_S)
        assert order == []
        may_leave.set()
        await asyncio.gather(*tasks)
    assert order == ["first ends", "second"]


async def test_the_holder_ends_when_another_has_the_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine_module, "CLAIM_TTL_S", 0.05)
    now = [1000.0]
    stores = Stores.memory(clock=lambda: now[0])
    ours, _ = side(stores, "ours")

    async def hold() -> None:
        async with asyncio.timeout(5), ours.held():
            now[0] += 1
            assert await stores.batches.claim_quarantine("theirs", CLAIM_TTL_S)
            await asyncio.Event().wait()

    with pytest.raises(QuarantineLostError):
        await hold()
    assert await stores.batches.report_runner("x", 0, None) == "theirs"


async def test_the_holder_ends_when_its_claim_may_have_lapsed_while_the_store_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quarantine_module, "CLAIM_TTL_S", 0.05)
    stores = Stores.memory()
    ours, _ = side(stores, "ours")

    async def away(claim: str, ttl_s: float) -> bool:
        raise StorageError("away")

    async def hold() -> None:
        async with asyncio.timeout(5), ours.held():
            monkeypatch.setattr(stores.batches, "claim_quarantine", away)
            await asyncio.Event().wait()

    with pytest.raises(QuarantineLostError):
        await hold()


async def test_a_row_whose_quarantine_is_lost_is_tried_again_and_not_convicted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quarantine_module, "CLAIM_TTL_S", 0.05)
    now = [1000.0]
    stores = Stores.memory(clock=lambda: now[0])
    calls = 0

    class Service:
        async def run_row(self, request: MoraRequest) -> RowResult:
            nonlocal calls
            calls += 1
            if calls == 1:
                now[0] += 1
                await stores.batches.claim_quarantine("theirs", CLAIM_TTL_S)
                try:
                    await asyncio.Event().wait()
                finally:
                    await stores.batches.leave_quarantine("theirs")
            return RowResult({"calls": calls})

    quarantine, gate = side(stores, "ours")
    isolation = Isolation(Service(), Service(), gate, quarantine, max_in_flight_rows=4)
    worker = RowWorker(
        isolation, make_settings(max_poison_tries=1).runner,
        {"id": "batch_1", "endpoint": "/v1/rewrites"},
        defaults={}, fixed={}, max_line_bytes=2**20,
    )  # fmt: skip
    async with asyncio.timeout(5):
        commit = await worker.run(Line(0, row_line(0)), place=Place.QUARANTINED)
    assert commit.error is None
    assert calls == 2
