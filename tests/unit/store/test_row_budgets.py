"""What a row may use up before it is given up, and which code says so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from actors import batch_rows, shard_run
from actors.batch_rows import RowWorker
from mora_serve.errors import (
    GenerationError,
    InvalidRequestError,
    OverloadedError,
    ScoringError,
    StorageError,
)
from mora_serve.fakes import FakeGenerator, FakeScorer, fake_calibrator
from mora_serve.requests import DUPLICATE_CUSTOM_ID, MoraRequest
from mora_serve.row_codes import BATCH_EXPIRED, DATA_CODES, ROW_CODES, SERVICE_CODES
from mora_serve.service import MoraService, RowResult
from mora_serve.store import Stores
from mora_serve.store.batch_input import Line
from tests.unit.store.ledger_driver import content
from tests.unit.store.runner_driver import (
    EchoService,
    ended,
    make_isolation,
    make_runner,
    make_settings,
    row_line,
    running,
    submit,
)

LIMIT_BYTES = 4096


class Failing:
    """A service that raises ``errors`` one after the other, and then answers."""

    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)
        self.num_calls = 0

    async def run_row(self, request: MoraRequest) -> RowResult:
        self.num_calls += 1
        if self._errors:
            raise self._errors.pop(0)
        return RowResult({})


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


def worker(service: Any, clock: Clock | None = None, **runner: Any) -> RowWorker:
    clock = clock or Clock()
    return RowWorker(
        make_isolation(service),
        make_settings(**runner).runner,
        {"id": "batch_x", "endpoint": "/v1/rewrites"},
        defaults={},
        fixed={},
        max_line_bytes=LIMIT_BYTES,
        sleep=clock.sleep,
        clock=clock,
    )


async def code_of(
    row: RowWorker, data: bytes | None, *, duplicate: bool = False, **options: Any
) -> str | None:
    commit = await row.run(Line(0, data), duplicate=duplicate, **options)
    return None if commit.error is None else str(json.loads(commit.error)["error"]["code"])


async def test_a_row_waits_by_time_while_nothing_answers() -> None:
    clock = Clock()
    service = Failing(*(OverloadedError("full", 1.0) for _ in range(100)))
    row = worker(service, clock, max_infra_retries=0, unavailable_timeout_s=86_400.0)
    assert await code_of(row, row_line(0)) is None
    assert service.num_calls == 101


@pytest.mark.parametrize("error", [OverloadedError("full", 1.0), StorageError("away")])
async def test_a_row_is_given_up_when_nothing_answered_for_too_long(error: Exception) -> None:
    clock = Clock()
    service = Failing(*(error for _ in range(10_000)))
    row = worker(service, clock, unavailable_timeout_s=300.0)
    assert await code_of(row, row_line(0)) == "service_unavailable"
    assert 300.0 <= clock.now <= 300.0 + batch_rows.LAST_BACKOFF_S


@pytest.mark.parametrize("error", [GenerationError("broken"), ScoringError("broken")])
async def test_an_engine_that_answers_with_errors_is_asked_a_bounded_number_of_times(
    error: Exception,
) -> None:
    service = Failing(*(error for _ in range(100)))
    assert await code_of(worker(service, max_infra_retries=4), row_line(0)) == "service_unavailable"
    assert service.num_calls == 5


async def test_budgets_are_apart() -> None:
    kinds: list[Callable[[], Exception]] = [
        lambda: GenerationError("broken"),
        lambda: OverloadedError("full", 0.1),
        lambda: GenerationError("gone", lost=True),
        lambda: ZeroDivisionError(),
    ]
    service = Failing(*(kind() for _ in range(2) for kind in kinds))
    row = worker(service, max_infra_retries=2, max_poison_tries=3)
    assert await code_of(row, row_line(0)) is None
    assert service.num_calls == 9


# --- the table of codes ---------------------------------------------------------------------------


def body(**fields: Any) -> bytes:
    return row_line(0, body={"prompt": "Why?", **fields})


FAULTS: dict[str, bytes | None] = {
    "invalid_json": b"{",
    "invalid_row": b"[]",
    "invalid_custom_id": row_line(0, custom_id=""),
    "invalid_method": row_line(0, method="GET"),
    "invalid_url": row_line(0, url="/v1/scores"),
    "missing_body": json.dumps(
        {"custom_id": "a", "method": "POST", "url": "/v1/rewrites"}
    ).encode(),
    "missing_required_parameter": row_line(0, body={}),
    "unknown_parameter": body(promt="x"),
    "invalid_type": body(n="four"),
    "invalid_value": body(n=0),
    "empty_prompt": body(prompt=" \n"),
    "invalid_prompt": body(prompt=[{"role": "assistant", "content": "Hello."}]),
    "context_length_exceeded": body(prompt="word " * 1100),
    "unknown_dimension": body(dimensions=["brief"]),
    "model_not_found": body(model="policy-none"),
    "row_too_large": None,
}


def mora_service() -> MoraService:
    settings = make_settings()
    scorer = FakeScorer(settings.dimensions)
    return MoraService(FakeGenerator(), scorer, fake_calibrator(settings.dimensions), settings)


@pytest.mark.parametrize("code", FAULTS)
async def test_a_fault_of_the_row_is_reported_at_once_with_its_code(code: str) -> None:
    clock = Clock()
    row = worker(mora_service(), clock)
    assert await code_of(row, FAULTS[code]) == code
    assert clock.now == 0.0


async def test_a_refusal_by_the_engine_is_a_fault_of_the_row() -> None:
    service = Failing(InvalidRequestError("the engine refused it", None, "invalid_request"))
    assert await code_of(worker(service), row_line(0)) == "invalid_request"
    assert service.num_calls == 1


async def test_every_code_of_the_table_is_one_that_rows_can_end_with() -> None:
    async def three() -> int:
        return 4

    lost = [GenerationError("gone", lost=True)] * 9
    found = {
        await code_of(worker(Failing(*[GenerationError("broken")] * 99)), row_line(0)),
        await code_of(worker(Failing(*lost)), row_line(0)),
        await code_of(worker(Failing(*[ZeroDivisionError()] * 9)), row_line(0)),
        await code_of(worker(Failing(), max_poison_tries=3), row_line(0), begin=three),
        BATCH_EXPIRED,
    }
    assert found == set(SERVICE_CODES)
    duplicate = await code_of(worker(Failing()), row_line(0), duplicate=True)
    assert {*FAULTS, duplicate, "invalid_request"} == set(DATA_CODES)
    assert duplicate == DUPLICATE_CUSTOM_ID
    assert set(ROW_CODES) == set(DATA_CODES) | set(SERVICE_CODES)


# --- an outage of the store -----------------------------------------------------------------------


class Outage:
    """Lets the first ``length`` calls of each named step of a batch store fail."""

    def __init__(self, stores: Stores, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
        self._left: dict[str, int] = {}
        for name in ("commit_row", "count_try", "heartbeat"):
            self._left[name] = length
            step = getattr(stores.batches, name)
            monkeypatch.setattr(stores.batches, name, self._wrapped(name, step))
        self.over = asyncio.Event()

    def _wrapped(self, name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        async def call(*args: Any) -> Any:
            if self._left[name] > 0:
                self._left[name] -= 1
                raise StorageError("redis could not be used")
            return await step(*args)

        return call


@pytest.fixture
def _no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_run, "backoff_s", lambda _failures, _error: 0.0)


@pytest.mark.usefixtures("_no_backoff")
async def test_an_outage_of_the_store_costs_neither_rows_nor_budgets_nor_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stores, service = Stores.memory(), EchoService()
    batch_id = await submit(stores, [row_line(number) for number in range(12)])
    Outage(stores, monkeypatch, 50)
    async with running(make_runner(stores, service, max_infra_retries=0, max_poison_tries=1)):
        batch = await ended(stores, batch_id)
    assert batch["request_counts"] == {"total": 12, "completed": 12, "failed": 0}
    assert set(service.calls.values()) == {1}
    assert len(await content(stores, batch["output_file_id"])) == 12


async def test_an_outage_that_outlasts_patience_hands_the_shard_back() -> None:
    stores, service = Stores.memory(), EchoService()
    batch_id = await submit(stores, [row_line(number) for number in range(4)])
    with pytest.MonkeyPatch.context() as patch:
        Outage(stores, patch, 3)
        runner = make_runner(stores, service, unavailable_timeout_s=1e-9, max_poison_tries=1)
        async with running(runner):
            batch = await ended(stores, batch_id)
    assert batch["request_counts"] == {"total": 4, "completed": 4, "failed": 0}
