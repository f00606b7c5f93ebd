"""The unmodified ``openai`` client over real HTTP: files and batches with a real batch runner."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from openai.types import Batch

from mora_serve.config import Settings, load_settings
from mora_serve.errors import NotFoundError
from mora_serve.store import Stores, backlog
from mora_serve.store.batches import LedgerBatches
from tests.contract.gateway_server import (
    Gate,
    GatedGenerator,
    GatedScorer,
    gateway,
    http_server,
    working,
)

BODIES: dict[str, dict[str, Any]] = {
    "/v1/rewrites": {"prompt": "Why is the sky blue?"},
    "/v1/diagnostics": {"prompts": ["Why is the sky blue?"]},
    "/v1/scores": {"rows": [{"prompt": "Why is the sky blue?", "response": "It scatters light."}]},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "/v1/rewrites": {"n": 8, "n_max": 8, "candidates": 1, "n_confirm": 8},
    "/v1/diagnostics": {"n": 8, "n_max": 8},
    "/v1/scores": {"dimensions": ["harmless"]},
}
Poll = Callable[[str, str], Awaitable[Batch]]


@dataclass
class World:
    """A served gateway, its stores, and the gate of the runner's engines."""

    client: openai.AsyncOpenAI
    stores: Stores
    settings: Settings
    gate: Gate

    def runner(self) -> Any:
        generator = GatedGenerator(self.gate)
        scorer = GatedScorer(self.gate, self.settings.dimensions)
        return working(self.stores, self.settings, generator, scorer)

    async def upload(self, data: bytes, **kwargs: Any) -> str:
        file = await self.client.files.create(file=("rows.jsonl", data), purpose="batch", **kwargs)
        return str(file.id)

    async def submit(self, data: bytes, endpoint: str = "/v1/scores", **kwargs: Any) -> Batch:
        return await self.client.batches.create(
            input_file_id=await self.upload(data),
            endpoint=endpoint,  # type: ignore[arg-type]
            completion_window="24h",
            **kwargs,
        )

    async def until(self, batch_id: str, status: str) -> Batch:
        async with asyncio.timeout(60):
            while (batch := await self.client.batches.retrieve(batch_id)).status != status:
                assert batch.status != "failed", batch.errors
                await asyncio.sleep(0.01)
            return batch

    async def rows_of(self, file_id: str | None) -> list[dict[str, Any]]:
        if file_id is None:
            return []
        content = await self.client.files.content(file_id)
        return [json.loads(line) for line in content.text.splitlines()]


def small_settings(**overrides: Any) -> Settings:
    runner = {"poll_interval_s": 0.01, "shard_rows": 2, "max_in_flight_rows": 2}
    return load_settings("fake", overrides={"runner": runner, **overrides}, environ={})


@pytest.fixture
async def world(stores: Stores) -> AsyncIterator[World]:
    settings = small_settings()
    async with (
        http_server(gateway(stores, settings)) as url,
        openai.AsyncOpenAI(api_key="any", base_url=f"{url}/v1") as client,
    ):
        yield World(client, stores, settings, Gate())


def line(number: int, endpoint: str = "/v1/scores", **fields: Any) -> bytes:
    row = {"custom_id": f"r{number}", "method": "POST", "url": endpoint, "body": BODIES[endpoint]}
    return json.dumps({**row, **fields}).encode() + b"\n"


@pytest.mark.parametrize("endpoint", list(BODIES))
async def test_batch_passes_every_status_to_its_files(
    world: World, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    joining, join = asyncio.Event(), world.stores.blobs.concat

    async def held_join(key: str, parts: Any) -> int:
        await joining.wait()
        return await join(key, parts)

    monkeypatch.setattr(world.stores.blobs, "concat", held_join)
    data = line(0, endpoint) + b"not json\n" + line(2, endpoint) + line(2, endpoint)
    created = await world.submit(
        data, endpoint, metadata={"k": "v"}, extra_body={"defaults": DEFAULTS[endpoint]}
    )
    async with world.runner():
        running = await world.until(created.id, "in_progress")
        world.gate.allow()
        await world.until(created.id, "finalizing")
        joining.set()
        done = await world.until(created.id, "completed")

    assert created.status == "validating"
    assert running.request_counts is not None
    assert running.request_counts.total == 4
    assert done.request_counts is not None
    assert (done.request_counts.completed, done.request_counts.failed) == (2, 2)
    assert done.model == (None if endpoint == "/v1/scores" else "fake-policy")
    assert done.metadata == {"k": "v"}
    assert done.usage is not None
    assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens
    assert done.in_progress_at
    assert done.finalizing_at
    assert done.completed_at
    output = await world.rows_of(done.output_file_id)
    errors = await world.rows_of(done.error_file_id)
    assert [row["custom_id"] for row in output] == ["r0", "r2"]
    assert [row["error"]["code"] for row in errors] == ["invalid_json", "duplicate_custom_id"]
    assert {tuple(row) for row in output + errors} == {("id", "custom_id", "response", "error")}
    scored = output[0]["response"]["body"]
    if endpoint == "/v1/scores":
        assert set(scored["data"][0]["scores"]) == {"harmless"}, "defaults reach the rows"


async def test_finished_batches_leave_their_files_and_pairs_only(world: World) -> None:
    world.gate.allow()
    async with world.runner():
        batch = await world.submit(line(0) + line(1) + line(1))
        await world.until(batch.id, "completed")
        await world.stores.batches.sweep()

    blobs = world.stores.blobs
    for name in ("rows", "duplicates", "input"):
        assert await blobs.list_keys(f"batches/{batch.id}/{name}/") == []


@pytest.mark.parametrize(
    ("data", "code", "where"),
    [
        (line(0) + b'{"custom_id": "\xff"}\n', "invalid_encoding", 2),
        (b"\n \n", "empty_file", None),
        (b"", "empty_file", None),
    ],
)
async def test_file_at_fault_as_a_whole_fails_the_batch_and_names_the_line(
    world: World, data: bytes, code: str, where: int | None
) -> None:
    batch = await world.submit(data)
    async with world.runner(), asyncio.timeout(30):
        while (failed := await world.client.batches.retrieve(batch.id)).status != "failed":
            await asyncio.sleep(0.01)

    assert failed.errors is not None
    assert failed.errors.data is not None
    assert [(error.code, error.line) for error in failed.errors.data] == [(code, where)]
    assert failed.failed_at
    assert failed.output_file_id is failed.error_file_id is None


async def test_cancelled_batch_keeps_what_is_done(world: World) -> None:
    batch = await world.submit(b"".join(line(number) for number in range(8)))
    async with world.runner():
        world.gate.allow(3)
        async with asyncio.timeout(30):
            while (await world.stores.batches.get_batch(batch.id))["request_counts"][
                "completed"
            ] < 3:
                await asyncio.sleep(0.01)
        cancelling = await world.client.batches.cancel(batch.id)
        world.gate.allow()
        cancelled = await world.until(batch.id, "cancelled")
    again = await world.client.batches.cancel(batch.id)

    assert cancelling.status == "cancelling"
    assert cancelling.cancelling_at
    assert cancelled.cancelled_at
    assert cancelled.request_counts is not None
    assert 3 <= cancelled.request_counts.completed <= 8
    rows = await world.rows_of(cancelled.output_file_id)
    assert len(rows) == cancelled.request_counts.completed
    assert again == cancelled


async def test_batch_past_its_window_expires_and_accounts_for_every_row(
    world: World, stores: Stores
) -> None:
    steps = stores.batches._steps  # type: ignore[attr-defined]
    create = steps.create_batch

    async def with_short_window(*args: Any, **kwargs: Any) -> Any:
        return await create(*args[:4], 0.3, **kwargs)

    steps.create_batch = with_short_window
    batch = await world.submit(b"".join(line(number) for number in range(4)))
    world.gate.allow(1)
    async with world.runner():
        expired = await world.until(batch.id, "expired")

    assert expired.expired_at
    assert expired.request_counts is not None
    counts = expired.request_counts
    assert counts.completed + counts.failed == counts.total
    errors = await world.rows_of(expired.error_file_id)
    assert {row["error"]["code"] for row in errors} <= {"batch_expired"}


async def test_pages_of_batches_and_files_are_walked_by_cursor(world: World) -> None:
    ids = [(await world.submit(line(0))).id for _ in range(5)]

    batches = [batch.id async for batch in world.client.batches.list(limit=2)]
    files = [file.id async for file in world.client.files.list(limit=2, purpose="batch")]
    first = await world.client.batches.list(limit=3)
    rest = await world.client.batches.list(limit=3, after=first.data[-1].id)

    assert batches == ids[::-1]
    assert len(files) == len(set(files)) == 5
    assert (first.has_more, rest.has_more) == (True, False)
    with pytest.raises(openai.NotFoundError):
        await world.client.batches.list(after="batch_gone")


async def test_one_idempotency_key_makes_one_batch_even_at_once(world: World) -> None:
    file_id = await world.upload(line(0))

    async def create(window: str = "24h") -> Batch:
        return await world.client.batches.create(
            input_file_id=file_id,
            endpoint="/v1/scores",  # type: ignore[arg-type]
            completion_window=window,  # type: ignore[arg-type]
            extra_headers={"Idempotency-Key": "key"},
        )

    batches = await asyncio.gather(*(create() for _ in range(8)))
    with pytest.raises(openai.ConflictError) as conflict:
        await create("2h")

    assert len({batch.id for batch in batches}) == 1
    assert len([batch async for batch in world.client.batches.list()]) == 1
    assert conflict.value.response.headers["x-should-retry"] == "false"


async def test_repeated_create_is_answered_after_its_file_is_gone(world: World) -> None:
    file_id = await world.upload(line(0))
    create = {
        "input_file_id": file_id,
        "endpoint": "/v1/scores",
        "completion_window": "24h",
        "extra_headers": {"Idempotency-Key": "key"},
    }
    world.gate.allow()
    async with world.runner():
        first = await world.client.batches.create(**create)  # type: ignore[arg-type]
        await world.until(first.id, "completed")
    await world.client.files.delete(file_id)

    again = await world.client.batches.create(**create)  # type: ignore[arg-type]

    assert again.id == first.id


async def test_output_files_end_when_the_batch_asked_for_it(world: World) -> None:
    world.gate.allow()
    async with world.runner():
        batch = await world.submit(
            line(0), output_expires_after={"anchor": "created_at", "seconds": 7200}
        )
        done = await world.until(batch.id, "completed")

    assert done.output_file_id is not None
    file = await world.client.files.retrieve(done.output_file_id)
    assert file.expires_at == file.created_at + 7200


async def test_expired_file_is_gone_with_its_bytes_once_no_batch_reads_it(world: World) -> None:
    batches = world.stores.batches
    file_id = await world.upload(line(0), expires_after={"anchor": "created_at", "seconds": 3600})
    kept = await world.client.files.retrieve(file_id)
    batch = await world.client.batches.create(
        input_file_id=file_id,
        endpoint="/v1/scores",  # type: ignore[arg-type]
        completion_window="24h",
    )
    file, blob = await batches.get_file(file_id)
    await batches.put_file({**file, "expires_at": kept.created_at - 1}, blob)
    await batches.sweep()

    assert kept.expires_at == kept.created_at + 3600
    with pytest.raises(openai.NotFoundError):
        await world.client.files.retrieve(file_id)
    with pytest.raises(openai.NotFoundError):
        await world.client.files.content(file_id)
    assert file_id not in [item.id async for item in world.client.files.list()]
    assert await world.stores.blobs.exists(blob), "an unfinished batch reads it"
    world.gate.allow()
    async with world.runner():
        await world.until(batch.id, "completed")
        await batches.sweep()
    assert not await world.stores.blobs.exists(blob)
    with pytest.raises(NotFoundError):
        await batches.delete_file(file_id)


async def test_batch_beyond_the_backlog_is_told_when_to_come_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = world.stores.batches
    assert isinstance(batches, LedgerBatches)
    monkeypatch.setattr(batches, "_limits", backlog.BacklogLimits(max_rows=4, max_bytes=10**6))
    first = await world.submit(b"".join(line(number) for number in range(6)))
    async with world.runner():
        await world.until(first.id, "in_progress")
        file_id = await world.upload(line(0))
        with pytest.raises(openai.RateLimitError) as refused:
            await world.client.with_options(max_retries=0).batches.create(
                input_file_id=file_id,
                endpoint="/v1/scores",  # type: ignore[arg-type]
                completion_window="24h",
            )
        world.gate.allow()
        await world.until(first.id, "completed")
        admitted = await world.submit(line(0))
        await world.until(admitted.id, "completed")

    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
    assert refused.value.code == "overloaded"
