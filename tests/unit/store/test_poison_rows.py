"""Rows that end engines are found and given up; their neighbours always come through."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import pytest

from actors import batch_rows, shard_run
from actors.isolation import Place
from mora_serve.errors import GenerationError
from mora_serve.requests import MoraRequest, RewriteRequest
from mora_serve.service import RowResult
from mora_serve.store import Stores
from tests.unit.store.ledger_driver import content
from tests.unit.store.runner_driver import (
    EchoService,
    ended,
    make_isolation,
    make_runner,
    row_line,
    running,
    submit,
)

TRIES = 3
STEPS = 4
"""Turns of the event loop that a row spends in its engine."""


class MortalEngine:
    """One engine for all rows in flight: when it ends, every one of them is lost.

    ``is_lethal(prompt, call)`` says whether that call ends it, half way through.
    """

    def __init__(self, is_lethal: Callable[[str, int], bool]) -> None:
        self.calls: Counter[str] = Counter()
        self.company: dict[str, list[int]] = {}
        """Rows in flight at each death that a prompt caused."""
        self._is_lethal = is_lethal
        self._in_flight = 0
        self._life = 0

    async def run_row(self, request: MoraRequest) -> RowResult:
        assert isinstance(request, RewriteRequest)
        prompt, life = str(request.prompt), self._life
        self.calls[prompt] += 1
        lethal = self._is_lethal(prompt, self.calls[prompt])
        self._in_flight += 1
        try:
            for step in range(STEPS):
                await asyncio.sleep(0)
                if lethal and step == STEPS // 2 and life == self._life:
                    self.company.setdefault(prompt, []).append(self._in_flight)
                    self._life += 1
                if life != self._life:
                    raise GenerationError("the replica ended under the call", lost=True)
        finally:
            self._in_flight -= 1
        return RowResult({"prompt": prompt})


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_rows, "backoff_s", lambda _failures, _error: 0.0)
    monkeypatch.setattr(shard_run, "backoff_s", lambda _failures, _error: 0.0)


async def codes_of_failed_rows(stores: Stores, batch_id: str) -> dict[str, str]:
    batch = await ended(stores, batch_id)
    if batch["error_file_id"] is None:
        return {}
    errors = await content(stores, batch["error_file_id"])
    return {item["custom_id"]: item["error"]["code"] for item in errors}


@pytest.mark.parametrize("num_runners", [1, 3])
@pytest.mark.parametrize("every", [2, 3, 16])
async def test_rows_that_end_engines_are_given_up_and_all_others_come_through(
    every: int, num_runners: int
) -> None:
    poison = {f"p{number}" for number in range(0, 48, every)}
    engine = MortalEngine(lambda prompt, _call: prompt in poison)
    stores = Stores.memory()
    batch_id = await submit(stores, [row_line(number) for number in range(48)])
    settings = {"max_poison_tries": TRIES, "max_in_flight_rows": 8, "shard_rows": 8}
    runners = [make_runner(stores, engine, f"w{n}", **settings) for n in range(num_runners)]
    async with running(*runners):
        failed = await codes_of_failed_rows(stores, batch_id)
        batch = await stores.batches.get_batch(batch_id)
    assert failed == {f"r{prompt[1:]}": "engine_lost" for prompt in poison}
    assert batch["request_counts"]["completed"] == 48 - len(poison)
    # Given up with nothing else in the engine, of whichever runner.
    assert {deaths[-1] for deaths in engine.company.values()} == {1}
    assert max(len(deaths) for deaths in engine.company.values()) <= TRIES + 1


async def test_rows_whose_engines_end_for_other_reasons_are_not_given_up() -> None:
    engine = MortalEngine(lambda _prompt, call: call == 1)
    stores = Stores.memory()
    batch_id = await submit(stores, [row_line(number) for number in range(40)])
    async with running(make_runner(stores, engine, max_in_flight_rows=8, max_poison_tries=1)):
        assert await codes_of_failed_rows(stores, batch_id) == {}


async def test_one_loss_alone_convicts_where_one_is_allowed() -> None:
    engine = MortalEngine(lambda prompt, _call: prompt == "p0")
    stores = Stores.memory()
    batch_id = await submit(stores, [row_line(0)])
    async with running(make_runner(stores, engine, max_poison_tries=1)):
        assert await codes_of_failed_rows(stores, batch_id) == {"r0": "engine_lost"}
    assert engine.calls["p0"] == 3


@pytest.mark.parametrize("place", [Place.ALONE, Place.QUARANTINED])
async def test_a_row_that_is_alone_waits_for_others_and_keeps_them_out(place: Place) -> None:
    service, apart = EchoService(), EchoService()
    isolation = make_isolation(service, apart)
    order: list[str] = []
    beside_inside, beside_may_leave = asyncio.Event(), asyncio.Event()

    async def beside() -> None:
        async with isolation.enter(Place.TOGETHER) as found:
            assert found is service
            beside_inside.set()
            await beside_may_leave.wait()
            order.append("beside")

    async def alone() -> None:
        async with isolation.enter(place) as found:
            assert found is apart
            order.append("alone")
            await asyncio.sleep(0)
            order.append("alone ends")

    async def late() -> None:
        async with isolation.enter(Place.TOGETHER):
            order.append("late")

    tasks = [asyncio.create_task(beside())]
    await beside_inside.wait()
    for step in (alone, late):
        tasks.append(asyncio.create_task(step()))
        for _ in range(10):
            await asyncio.sleep(0)
    assert order == []
    beside_may_leave.set()
    await asyncio.gather(*tasks)
    assert order == ["beside", "alone", "alone ends", "late"]


@pytest.mark.parametrize(("in_flight", "few"), [(1, 1), (8, 2), (64, 8)])
async def test_suspects_run_aside_a_few_at_a_time_while_others_go_on(
    in_flight: int, few: int
) -> None:
    isolation = make_isolation(EchoService(), max_in_flight_rows=in_flight)
    inside = most = 0

    async def suspect() -> None:
        nonlocal inside, most
        async with isolation.enter(Place.ASIDE):
            inside += 1
            most = max(most, inside)
            async with isolation.enter(Place.TOGETHER):
                await asyncio.sleep(0)
            inside -= 1

    await asyncio.gather(*(suspect() for _ in range(20)))
    assert most == few
