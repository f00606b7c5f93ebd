"""The batch runner over stores: every row of the input ends in exactly one file, whatever fails."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from actors import batch_rows
from actors import runner as runner_module
from actors.runner import BatchRunner
from mora_serve.errors import (
    GenerationError,
    InvalidRequestError,
    OverloadedError,
    ScoringError,
    StorageError,
)
from mora_serve.fakes import FakeGenerator, FakeScorer
from mora_serve.store import Stores
from tests.unit.store.ledger_driver import all_pairs, content
from tests.unit.store.runner_driver import (
    EchoService,
    Hook,
    ended,
    make_runner,
    make_settings,
    row_line,
    running,
    submit,
)


async def test_every_row_appears_exactly_once_in_input_order(stores: Stores) -> None:
    service = EchoService()
    batch_id = await submit(stores, [row_line(number) for number in range(23)])
    async with running(make_runner(stores, service), make_runner(stores, service, "w2")):
        batch = await ended(stores, batch_id)
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 23, "completed": 23, "failed": 0}
    assert batch["error_file_id"] is None
    output = await content(stores, batch["output_file_id"])
    assert [item["custom_id"] for item in output] == [f"r{number}" for number in range(23)]
    assert all(set(item) == {"id", "custom_id", "response", "error"} for item in output)
    assert output[0]["response"]["status_code"] == 200
    assert output[0]["response"]["body"] == {"prompt": "p0"}
    assert len({item["id"] for item in output}) == 23
    pairs = await all_pairs(stores, batch_id)
    assert sorted(pair["prompt"] for pair in pairs) == sorted(f"p{n}" for n in range(23))
    assert set(service.calls.values()) == {1}


async def test_a_fake_backed_batch_completes_with_pairs() -> None:
    stores = Stores.memory()
    settings = make_settings()
    runner = BatchRunner(FakeGenerator(), FakeScorer(settings.dimensions), stores, settings, "w1")
    batch_id = await submit(stores, [row_line(number) for number in range(6)])
    async with running(runner):
        batch = await ended(stores, batch_id)
    assert batch["request_counts"]["completed"] == 6
    assert batch["usage"]["output_tokens"] > 0
    output = await content(stores, batch["output_file_id"])
    assert all(item["response"]["body"]["object"] == "rewrite" for item in output)
    assert sum((await stores.batches.progress(batch_id))["classes"].values()) == 6


async def test_bad_rows_end_in_the_error_file_and_stop_nothing(stores: Stores) -> None:
    lines = [
        row_line(0),
        b'{"custom_id": "broken"',
        row_line(2, method="GET"),
        row_line(3, url="/v1/scores"),
        row_line(4, body={"prompt": "x", "n": 0}),
        row_line(0),
        row_line(6),
        b"",
    ]
    batch_id = await submit(stores, lines)
    async with running(make_runner(stores, EchoService())):
        batch = await ended(stores, batch_id)
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 7, "completed": 2, "failed": 5}
    errors = await content(stores, batch["error_file_id"])
    assert [(item["custom_id"], item["error"]["code"]) for item in errors] == [
        (None, "invalid_json"),
        ("r2", "invalid_method"),
        ("r3", "invalid_url"),
        ("r4", "invalid_value"),
        ("r0", "duplicate_custom_id"),
    ]
    assert all(set(item) == {"id", "custom_id", "response", "error"} for item in errors)
    assert all(item["response"] is None for item in errors)
    assert [item["error"]["line"] for item in errors] == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("options", [{}, {"defaults": {"n": 4}}])
async def test_byte_order_mark_is_passed_over_at_the_start_of_the_input_alone(
    options: dict[str, Any],
) -> None:
    stores, mark = Stores.memory(), b"\xef\xbb\xbf"
    lines = [mark + row_line(0), row_line(0), mark + row_line(1), row_line(1)]
    batch_id = await submit(stores, lines, **options)
    async with running(make_runner(stores, EchoService())):
        batch = await ended(stores, batch_id)
    errors = await content(stores, batch["error_file_id"])
    assert batch["request_counts"] == {"total": 4, "completed": 2, "failed": 2}
    assert [(item["error"]["line"], item["error"]["code"]) for item in errors] == [
        (2, "duplicate_custom_id"),
        (3, "invalid_json"),
    ]


async def test_a_fault_that_the_service_finds_is_a_row_error(stores: Stores) -> None:
    def hook(prompt: str, _call: int) -> None:
        if prompt == "p1":
            raise InvalidRequestError("the prompt must fit", "prompt", "context_length_exceeded")

    service = EchoService(hook)
    batch_id = await submit(stores, [row_line(number) for number in range(3)])
    async with running(make_runner(stores, service)):
        batch = await ended(stores, batch_id)
    errors = await content(stores, batch["error_file_id"])
    assert [item["error"]["code"] for item in errors] == ["context_length_exceeded"]
    assert service.calls["p1"] == 1


@pytest.mark.parametrize(
    ("data", "code", "line"),
    [
        (b"", "empty_file", None),
        (b"\n  \n", "empty_file", None),
        (row_line(0) + b"\n\xff\xfe\n", "invalid_encoding", 2),
    ],
)
async def test_a_file_at_fault_fails_the_batch_and_names_the_line(
    data: bytes, code: str, line: int | None
) -> None:
    stores = Stores.memory()
    batch_id = await submit(stores, [data])
    async with running(make_runner(stores, EchoService())):
        batch = await ended(stores, batch_id)
    assert batch["status"] == "failed"
    assert [(item["code"], item["line"]) for item in batch["errors"]["data"]] == [(code, line)]


async def test_defaults_lie_under_each_rows_body() -> None:
    stores, service = Stores.memory(), EchoService()
    lines = [row_line(0), row_line(1, body={"prompt": "p1", "n": 2})]
    batch_id = await submit(stores, lines, defaults={"n": 5, "temperature": 0.5})
    async with running(make_runner(stores, service)):
        await ended(stores, batch_id)
    asked = {str(request.prompt): (request.n, request.temperature) for request in service.requests}
    assert asked == {"p0": (5, 0.5), "p1": (2, 0.5)}


async def test_what_a_batch_fixes_lies_over_each_rows_body() -> None:
    stores, service = Stores.memory(), EchoService()
    lines = [row_line(0), row_line(1, body={"prompt": "p1", "n": 2})]
    batch_id = await submit(stores, lines, defaults={"n": 5}, fixed={"n": 7, "mode": "sequential"})
    async with running(make_runner(stores, service)):
        await ended(stores, batch_id)
    asked = {str(request.prompt): (request.n, request.mode) for request in service.requests}
    assert asked == {"p0": (7, "sequential"), "p1": (7, "sequential")}


@pytest.fixture
def _no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_rows, "backoff_s", lambda _failures, _error: 0.0)


@pytest.mark.usefixtures("_no_backoff")
async def test_infrastructure_failures_are_retried_within_their_budget() -> None:
    def hook(prompt: str, call: int) -> None:
        if prompt == "p0" and call <= 3:
            raise GenerationError("the engine is gone")
        if prompt == "p1":
            raise ScoringError("the scorer is gone")

    stores, service = Stores.memory(), EchoService(hook)
    batch_id = await submit(stores, [row_line(number) for number in range(3)])
    async with running(make_runner(stores, service, max_infra_retries=3)):
        batch = await ended(stores, batch_id)
    assert batch["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    errors = await content(stores, batch["error_file_id"])
    assert [(e["custom_id"], e["error"]["code"]) for e in errors] == [("r1", "service_unavailable")]
    assert service.calls == {"p0": 4, "p1": 4, "p2": 1}


@pytest.mark.usefixtures("_no_backoff")
async def test_a_row_that_always_breaks_something_is_given_up_alone() -> None:
    def hook(prompt: str, _call: int) -> None:
        if prompt == "p1":
            raise ZeroDivisionError("secret prompt text")

    stores, service = Stores.memory(), EchoService(hook)
    batch_id = await submit(stores, [row_line(number) for number in range(3)])
    async with running(make_runner(stores, service, max_poison_tries=2)):
        batch = await ended(stores, batch_id)
    errors = await content(stores, batch["error_file_id"])
    assert [(e["custom_id"], e["error"]["code"]) for e in errors] == [("r1", "internal_error")]
    assert "secret" not in errors[0]["error"]["message"]
    assert service.calls["p1"] == 2


def test_backoff_has_full_jitter_under_a_doubling_bound() -> None:
    error = GenerationError("gone")
    for failures in range(1, 12):
        bound = min(batch_rows.FIRST_BACKOFF_S * 2 ** (failures - 1), batch_rows.LAST_BACKOFF_S)
        pauses = [batch_rows.backoff_s(failures, error) for _ in range(200)]
        assert all(0.0 <= pause <= bound for pause in pauses)
        assert min(pauses) < 0.2 * bound
        assert max(pauses) > 0.8 * bound


def test_backoff_keeps_to_what_a_full_queue_asked_for() -> None:
    assert batch_rows.backoff_s(1, OverloadedError("full", 7.0)) == 7.0
    assert batch_rows.backoff_s(10_000, StorageError("away")) <= batch_rows.LAST_BACKOFF_S


async def test_rows_in_flight_are_bounded_over_all_shards() -> None:
    stores, service = Stores.memory(), EchoService()
    batch_id = await submit(stores, [row_line(number) for number in range(40)])
    async with running(make_runner(stores, service, max_in_flight_rows=3)):
        await ended(stores, batch_id)
    assert service.most_in_flight == 3


async def test_further_shards_are_leased_while_permits_are_free() -> None:
    three = asyncio.Event()
    stores = Stores.memory()

    def hook(_prompt: str, _call: int) -> Any:
        if service.in_flight == 3:
            three.set()
        return three.wait()

    service = EchoService(hook)
    batch_id = await submit(stores, [row_line(number) for number in range(3)])
    async with running(make_runner(stores, service, shard_rows=1, max_in_flight_rows=3)):
        assert (await ended(stores, batch_id))["status"] == "completed"


async def test_two_batches_advance_side_by_side() -> None:
    order: list[str] = []
    both_open = asyncio.Event()

    async def answer(prompt: str) -> None:
        await both_open.wait()
        order.append(prompt[0])

    stores, service = Stores.memory(), EchoService(lambda prompt, _call: answer(prompt))
    ids = [
        await submit(stores, [row_line(n, body={"prompt": f"{name}{n}"}) for n in range(30)], name)
        for name in "ab"
    ]
    async with running(make_runner(stores, service, shard_rows=30, max_in_flight_rows=4)):
        for batch_id in ids:
            while (await stores.batches.get_batch(batch_id))["status"] == "validating":
                await asyncio.sleep(0.01)
        both_open.set()
        for batch_id in ids:
            assert (await ended(stores, batch_id))["status"] == "completed"
    assert set(order[8:20]) == {"a", "b"}


async def test_rows_that_an_expired_batch_did_not_reach_are_in_its_error_file() -> None:
    never = asyncio.Event()
    stores = Stores.memory()
    service = EchoService(lambda prompt, _call: never.wait() if prompt == "p2" else None)
    lines = [row_line(number) for number in range(6)]
    batch_id = await submit(stores, lines, completion_window_s=0.5)
    async with running(make_runner(stores, service, max_in_flight_rows=1, lease_ttl_s=0.3)):
        batch = await ended(stores, batch_id)
    assert batch["status"] == "expired"
    assert batch["request_counts"] == {"total": 6, "completed": 2, "failed": 4}
    assert len(await content(stores, batch["output_file_id"])) == 2
    errors = await content(stores, batch["error_file_id"])
    assert [(item["custom_id"], item["error"]["code"]) for item in errors] == [
        (f"r{number}", "batch_expired") for number in range(2, 6)
    ]


async def test_a_row_that_no_runner_survives_is_given_up_alone(stores: Stores) -> None:
    never = asyncio.Event()
    batch_id = await submit(stores, [row_line(number) for number in range(4)])

    def lethal(entered: asyncio.Event) -> Hook:
        def hook(prompt: str, _call: int) -> Any:
            if prompt == "p1":
                entered.set()
                return never.wait()
            return asyncio.sleep(0.02)

        return hook

    for attempt in range(3):
        entered = asyncio.Event()
        service = EchoService(lethal(entered))
        doomed = make_runner(stores, service, f"w{attempt}", lease_ttl_s=0.2, max_poison_tries=2)
        await _crash_when(stores, doomed, entered)
    async with running(make_runner(stores, EchoService(), "last", max_poison_tries=2)):
        batch = await ended(stores, batch_id)
    assert batch["request_counts"] == {"total": 4, "completed": 3, "failed": 1}
    errors = await content(stores, batch["error_file_id"])
    assert [(e["custom_id"], e["error"]["code"]) for e in errors] == [("r1", "runner_lost")]


async def test_rows_wait_while_the_pair_tail_is_full() -> None:
    stores, service = Stores.memory(), EchoService()
    batch_id = await submit(stores, [row_line(number) for number in range(20)])
    await stores.pairs.register_reader(batch_id, "slow", -1)
    async with running(make_runner(stores, service, max_stream_tail=5, max_in_flight_rows=2)):
        while await stores.pairs.tail_length(batch_id) < 5:
            await asyncio.sleep(0.01)
        for _ in range(20):
            await asyncio.sleep(0.01)
            assert await stores.pairs.tail_length(batch_id) <= 7
        await stores.pairs.register_reader(batch_id, "slow", 3)
        await stores.pairs.unregister_reader(batch_id, "slow")
        batch = await ended(stores, batch_id)
    assert batch["request_counts"]["completed"] == 20
    assert len(await all_pairs(stores, batch_id)) == 20


async def test_cancelling_stops_running_rows_and_keeps_finished_ones() -> None:
    entered, never = asyncio.Event(), asyncio.Event()

    def hook(prompt: str, _call: int) -> Any:
        if prompt == "p2":
            entered.set()
            return never.wait()
        return None

    stores, service = Stores.memory(), EchoService(hook)
    batch_id = await submit(stores, [row_line(number) for number in range(3)])
    async with running(make_runner(stores, service, lease_ttl_s=0.3, max_in_flight_rows=1)):
        await entered.wait()
        await stores.batches.cancel_batch(batch_id)
        batch = await ended(stores, batch_id)
    assert batch["status"] == "cancelled"
    assert batch["request_counts"] == {"total": 3, "completed": 2, "failed": 0}
    assert service.in_flight == 0


async def test_a_crashed_runners_shard_is_resumed_without_its_finished_rows(
    stores: Stores,
) -> None:
    entered, never = asyncio.Event(), asyncio.Event()

    def hook(prompt: str, _call: int) -> Any:
        if prompt == "p3":
            entered.set()
            return never.wait()
        return None

    crashing, resuming = EchoService(hook), EchoService()
    batch_id = await submit(stores, [row_line(number) for number in range(6)])
    doomed = make_runner(stores, crashing, "dead", max_in_flight_rows=1, lease_ttl_s=0.3)
    await _crash_when(stores, doomed, entered)
    async with running(make_runner(stores, resuming, "alive")):
        batch = await ended(stores, batch_id)
    output = await content(stores, batch["output_file_id"])
    assert [item["custom_id"] for item in output] == [f"r{number}" for number in range(6)]
    assert [pair["seq"] for pair in await all_pairs(stores, batch_id)] == list(range(6))
    done_before = {prompt for prompt in crashing.calls if prompt != "p3"}
    assert done_before
    assert not done_before & set(resuming.calls)


async def _crash_when(stores: Stores, runner: BatchRunner, event: asyncio.Event) -> None:
    """Let the runner vanish as a killed process does: it neither commits nor releases."""

    async def nothing(*_args: Any) -> None:
        return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores.batches, "release", nothing)
        patch.setattr(stores.batches, "forget_try", nothing)
        task = asyncio.create_task(runner.run())
        async with asyncio.timeout(30):
            await event.wait()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_a_stopped_runner_finishes_its_rows_and_hands_the_rest_back() -> None:
    entered, go = asyncio.Event(), asyncio.Event()

    def hook(_prompt: str, _call: int) -> Any:
        entered.set()
        return go.wait()

    stores, service = Stores.memory(), EchoService(hook)
    batch_id = await submit(stores, [row_line(number) for number in range(4)])
    runner = make_runner(stores, service, max_in_flight_rows=2)
    task = asyncio.create_task(runner.run())
    await entered.wait()
    stopping = asyncio.create_task(runner.stop())
    await asyncio.sleep(0)
    go.set()
    async with asyncio.timeout(20):
        await stopping
        await task
    counts = (await stores.batches.get_batch(batch_id))["request_counts"]
    assert 1 <= counts["completed"] <= 2
    lease = await stores.batches.lease_shard("next", 100.0)
    assert lease is not None
    assert len(lease.done) == counts["completed"]


async def test_stopping_a_runner_that_never_ran_returns() -> None:
    async with asyncio.timeout(5):
        await make_runner(Stores.memory(), EchoService()).stop()


async def test_a_small_batch_behind_a_huge_one_takes_turns_with_it() -> None:
    order: list[str] = []
    stores = Stores.memory()

    async def answer(prompt: str) -> None:
        order.append(prompt[0])
        await asyncio.sleep(0.005)

    def rows(name: str, number: int) -> list[bytes]:
        return [row_line(n, body={"prompt": f"{name}{n}"}) for n in range(number)]

    service = EchoService(lambda prompt, _call: answer(prompt))
    runners = [
        make_runner(stores, service, f"w{n}", shard_rows=256, max_in_flight_rows=8)
        for n in range(2)
    ]
    await submit(stores, rows("huge", 50_000), "huge")
    async with running(*runners):
        while len(order) < 100:
            await asyncio.sleep(0.01)
        before = len(order)
        small = await submit(stores, rows("small", 50), "small")
        batch = await ended(stores, small)
    assert batch["request_counts"]["completed"] == 50
    last = len(order) - order[::-1].index("s")
    first = order.index("s")
    # The runner that has the small batch takes a row of each in turn, while the other one goes on
    # with the huge one: three rows of it for one. Before that the small one is validated.
    assert order[first:last].count("h") <= 4 * 50
    assert order[before:last].count("h") <= 6 * 50


async def test_a_newcomer_gets_rows_at_once_however_many_huge_batches_are_served() -> None:
    order: list[str] = []
    stores = Stores.memory()

    async def answer(prompt: str) -> None:
        await asyncio.sleep(0)
        order.append(prompt[0])

    def rows(name: str, number: int) -> list[bytes]:
        return [row_line(n, body={"prompt": f"{name}{n}"}) for n in range(number)]

    service = EchoService(lambda prompt, _call: answer(prompt))
    huge = "abcdefgh"
    for name in huge:
        await submit(stores, rows(name, 1000), name)
    async with running(make_runner(stores, service, shard_rows=1000, max_in_flight_rows=16)):
        while set(order) != set(huge):
            await asyncio.sleep(0)
        small = await submit(stores, rows("small", 5), "small")
        while (await stores.batches.get_batch(small))["status"] == "validating":
            await asyncio.sleep(0)
        before = len(order)
        assert (await ended(stores, small))["request_counts"]["completed"] == 5
    assert order[before:].count("s") == 5
    last = len(order) - order[::-1].index("s")
    # Permits go round: a row of each batch for one of the newcomer, after what is in flight.
    assert last - before <= 16 + 2 * 5 * (len(huge) + 1)


async def test_batches_beyond_what_a_runner_serves_at_once_take_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner_module, "MAX_BATCHES", 2)
    order: list[str] = []
    all_open = asyncio.Event()

    async def answer(prompt: str) -> None:
        await all_open.wait()
        order.append(prompt[0])

    stores, service = Stores.memory(), EchoService(lambda prompt, _call: answer(prompt))
    ids = [
        await submit(stores, [row_line(n, body={"prompt": f"{name}{n}"}) for n in range(200)], name)
        for name in "abcdef"
    ]
    async with running(make_runner(stores, service, shard_rows=200, max_in_flight_rows=4)):
        for batch_id in ids:
            while (await stores.batches.get_batch(batch_id))["status"] == "validating":
                await asyncio.sleep(0.01)
        all_open.set()
        for batch_id in ids:
            counts = (await ended(stores, batch_id))["request_counts"]
            assert counts == {"total": 200, "completed": 200, "failed": 0}
    assert max(order.index(name) for name in "abcdef") < 200
    assert len(order) == 6 * 200


async def test_rows_that_are_handed_back_are_not_counted_against_them() -> None:
    stores = Stores.memory()
    batch_id = await submit(stores, [row_line(number) for number in range(4)])
    short = {"min_replicas": 1, "max_replicas": 2, "graceful_shutdown_timeout_s": 0.05}
    for name in ("w1", "w2"):
        service = EchoService(lambda _prompt, _call: asyncio.Event().wait())
        async with running(make_runner(stores, service, name, replica=short)):
            while service.in_flight < 4:
                await asyncio.sleep(0.01)
    lease = await stores.batches.lease_shard("next", 100.0)
    assert lease is not None
    assert (lease.batch_id, lease.token) == (batch_id, 3)
    assert set(lease.tries.values()) == {0}


async def test_shard_that_cannot_be_read_is_not_taken_again_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stores, num_reads, failed = Stores.memory(), 0, asyncio.Event()
    open_read = stores.blobs.open_read

    def broken(key: str, start: int = 0, length: int | None = None) -> Any:
        nonlocal num_reads
        if length is None:
            return open_read(key, start, length)
        num_reads += 1
        failed.set()
        raise StorageError("away")

    monkeypatch.setattr(stores.blobs, "open_read", broken)
    await submit(stores, [row_line(0)])
    async with running(make_runner(stores, EchoService(), poll_interval_s=30.0)):
        await failed.wait()
        for _ in range(1000):
            await asyncio.sleep(0)
    assert num_reads < 3
