"""A validation that does not end well costs its batch alone, within a budget."""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from actors import batch_validation
from actors.batch_validation import BatchValidator
from actors.inputs.sources import input_parts
from mora_serve.errors import StorageError
from mora_serve.ports import ValidationClaim
from mora_serve.store import Stores
from tests.unit.store.runner_driver import (
    EchoService,
    ended,
    make_runner,
    make_settings,
    row_line,
    running,
    submit,
)

MAX_LINE_BYTES = 2**20


async def submit_zipped(stores: Stores, num_rows: int = 8) -> str:
    data = gzip.compress(b"\n".join(row_line(number) for number in range(num_rows)))
    await stores.blobs.put("files/z", data)
    file = {"id": "file-z", "purpose": "batch", "bytes": len(data), "filename": "z.jsonl.gz"}
    await stores.batches.put_file(file, "files/z")
    batch = await stores.batches.create_batch(
        {"endpoint": "/v1/rewrites", "input_file_id": "file-z"}, {}, None, "hash-z"
    )
    return str(batch["id"])


async def claimed(stores: Stores, worker: str = "w1", ttl_s: float = 30.0) -> ValidationClaim:
    claim = await stores.batches.claim_validation(worker, ttl_s)
    assert claim is not None
    return claim


def validator(stores: Stores, **runner: Any) -> BatchValidator:
    return BatchValidator(stores, make_settings(**runner).runner, MAX_LINE_BYTES)


def errors_of(batch: dict[str, Any]) -> list[str]:
    return [error["code"] for error in batch["errors"]["data"]]


async def left(stores: Stores, batch_id: str) -> list[str]:
    await stores.batches.sweep()
    return await stores.blobs.list_keys(f"batches/{batch_id}/input/")


class HeldPut:
    """Lets whoever writes a converted input wait for the test."""

    def __init__(self, stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on = asyncio.Event(), asyncio.Event()
        self._put = stores.blobs.put
        monkeypatch.setattr(stores.blobs, "put", self._held)

    async def _held(self, key: str, chunks: AsyncIterator[bytes] | bytes) -> int:
        if "/input/" in key and not self.begun.is_set():
            self.begun.set()
            await self.go_on.wait()
        return await self._put(key, chunks)


async def test_unforeseen_failures_end_the_batch_and_nothing_else(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(blobs: Any, filename: str, key: str) -> Any:
        if filename.endswith(".gz"):
            raise ZeroDivisionError
        return await input_parts(blobs, filename, key)

    monkeypatch.setattr(batch_validation, "input_parts", broken)
    bad = await submit_zipped(stores)
    good = await submit(stores, [row_line(0)])
    async with running(make_runner(stores, EchoService(), lease_ttl_s=0.1)):
        assert (await ended(stores, good))["status"] == "completed"
        batch = await ended(stores, bad)
    assert batch["status"] == "failed"
    assert errors_of(batch) == ["validation_failed"]


async def test_batch_whose_validators_all_died_fails(stores: Stores) -> None:
    batch_id = await submit_zipped(stores)
    for _ in range(3):
        await claimed(stores, ttl_s=0.0)
    await validator(stores, max_poison_tries=3).validate(await claimed(stores))
    assert errors_of(await stores.batches.get_batch(batch_id)) == ["validation_failed"]


async def test_input_that_storage_never_reads_fails_when_its_time_is_over(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any) -> Any:
        raise StorageError("no permission")

    monkeypatch.setattr(batch_validation, "input_parts", broken)
    batch_id = await submit_zipped(stores)
    for _ in range(5):
        with pytest.raises(StorageError):
            await validator(stores, max_poison_tries=1).validate(await claimed(stores, ttl_s=0.0))
    await asyncio.to_thread(time.sleep, 0.01)
    await validator(stores, unavailable_timeout_s=1e-3).validate(await claimed(stores))
    assert errors_of(await stores.batches.get_batch(batch_id)) == ["input_unreadable"]


async def test_bug_in_one_step_does_not_end_the_runner(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, calls = stores.batches.claim_validation, 0

    async def broken(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ZeroDivisionError
        return await claim(*args)

    monkeypatch.setattr(stores.batches, "claim_validation", broken)
    batch_id = await submit(stores, [row_line(0)])
    async with running(make_runner(stores, EchoService())):
        assert (await ended(stores, batch_id))["status"] == "completed"


async def test_validator_that_lost_its_claim_publishes_nothing(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = await submit_zipped(stores)
    first = await claimed(stores, ttl_s=0.0)
    put = HeldPut(stores, monkeypatch)
    renew, taken, refused = stores.batches.renew_validation, asyncio.Event(), asyncio.Event()

    async def seen(*args: Any) -> bool:
        await taken.wait()
        held = await renew(*args)
        if not held:
            refused.set()
        return held

    monkeypatch.setattr(stores.batches, "renew_validation", seen)
    late = asyncio.create_task(validator(stores, lease_ttl_s=0.03).validate(first))
    await put.begun.wait()
    second = await claimed(stores, "w2")
    taken.set()
    await refused.wait()
    put.go_on.set()
    await late
    assert (await stores.batches.get_batch(batch_id))["status"] == "validating"
    assert await left(stores, batch_id) == []
    await validator(stores).validate(second)
    assert (await stores.batches.get_batch(batch_id))["status"] == "in_progress"
    blob = f"batches/{batch_id}/input/2.jsonl"
    assert await left(stores, batch_id) == [blob]
    # A repeated step whose first answer was lost is refused, too.
    await stores.batches.discard_validation(batch_id, blob)
    assert await left(stores, batch_id) == [blob]


async def test_claim_is_kept_when_storage_fails_once(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    await submit_zipped(stores)
    first = await claimed(stores)
    renew, calls, renewed = stores.batches.renew_validation, 0, asyncio.Event()

    async def once_broken(*args: Any) -> bool:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise StorageError("away for a moment")
        held = await renew(*args)
        renewed.set()
        return held

    monkeypatch.setattr(stores.batches, "renew_validation", once_broken)
    put = HeldPut(stores, monkeypatch)
    work = asyncio.create_task(validator(stores, lease_ttl_s=0.03).validate(first))
    await asyncio.wait_for(renewed.wait(), 10)
    put.go_on.set()
    await work
    assert calls > 1


async def test_what_is_written_after_a_cancellation_is_discarded(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = await submit_zipped(stores)
    first = await claimed(stores)
    put = HeldPut(stores, monkeypatch)
    work = asyncio.create_task(validator(stores).validate(first))
    await put.begun.wait()
    await stores.batches.cancel_batch(batch_id)
    async with running(make_runner(stores, EchoService(), "w2")):
        assert (await ended(stores, batch_id))["status"] == "cancelled"
        put.go_on.set()
        await work
    assert await left(stores, batch_id) == []
