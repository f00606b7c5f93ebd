"""Batches: creation with idempotency and defaults, lists, cancel, the pair stream, events."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
from fastapi import FastAPI

from api import schemas
from api.app import create_app
from api.deps import Deps
from api.parquet import PARQUET, pair_schema, prefers_parquet
from mora_serve.ports import Lease, RowCommit
from tests.unit.api.conftest import error_of, make_client, make_deps

ROW = {"custom_id": "a", "method": "POST", "url": "/v1/rewrites", "body": {"prompt": "x"}}


@pytest.fixture
def app(deps: Deps) -> FastAPI:
    return create_app(deps)


async def upload(client: httpx.AsyncClient, purpose: str = "batch") -> str:
    response = await client.post(
        "/v1/files", files={"file": ("rows.jsonl", json.dumps(ROW))}, data={"purpose": purpose}
    )
    return str(response.json()["id"])


async def create(client: httpx.AsyncClient, **extra: Any) -> dict[str, Any]:
    file_id = await upload(client)
    body = {"input_file_id": file_id, "endpoint": "/v1/rewrites", "completion_window": "24h"}
    response = await client.post("/v1/batches", json={**body, **extra})
    assert response.status_code == 200, response.text
    return dict(response.json())


def pair(index: int) -> dict[str, Any]:
    reward = {k: {"value": 0.1 * index, "raw": 1.0} for k in ("helpful", "harmless", "truthful")}
    return {
        "prompt_id": f"p{index}",
        "prompt": [{"role": "user", "content": f"question {index}"}],
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
        "margin": 1.5,
        "mode": "simultaneous",
        "stage": None,
        "chosen_scores": reward,
        "rejected_scores": reward,
        "policy_version": "fake-policy",
        "provenance": {"strategy": "compose", "seed": index},
    }


class Runner:
    """Does by hand what a batch runner does, so that a test decides when."""

    def __init__(self, deps: Deps, batch_id: str, rows: int) -> None:
        self._store = deps.stores.batches
        self._id = batch_id
        self._rows = rows
        self._lease: Lease | None = None

    async def open(self) -> None:
        await self._store.claim_validation("w", 60)
        await self._store.open_batch(self._id, [(0, self._rows, 0, 1)], self._rows)
        self._lease = await self._store.lease_shard("w", 60)

    async def commit(self, line: int, pairs: int = 1) -> None:
        assert self._lease is not None
        rows = tuple(json.dumps(pair(line * 10 + i)).encode() for i in range(pairs))
        row = RowCommit(line, b"{}", None, rows, {"input_tokens": 3}, {"multi": 1})
        await self._store.commit_row(self._lease, row)

    async def finish(self) -> None:
        assert self._lease is not None
        await self._store.seal_shard(self._lease)
        await self._store.finalize_ready("w", 60)


async def test_created_batch_has_every_field_of_openais_object(client: httpx.AsyncClient) -> None:
    batch = schemas.Batch.model_validate(await create(client, metadata={"owner": "me"}))

    assert (batch.status, batch.endpoint) == ("validating", "/v1/rewrites")
    assert batch.request_counts.total == 0
    assert batch.metadata == {"owner": "me"}
    assert batch.expires_at == batch.created_at + 86_400


async def test_same_idempotency_key_returns_the_same_batch_and_another_body_conflicts(
    client: httpx.AsyncClient,
) -> None:
    file_id = await upload(client)
    body = {"input_file_id": file_id, "endpoint": "/v1/rewrites"}
    headers = {"idempotency-key": "k-1"}

    first = await client.post("/v1/batches", json=body, headers=headers)
    again = await client.post("/v1/batches", json=body, headers=headers)
    other = await client.post(
        "/v1/batches", json={**body, "endpoint": "/v1/scores"}, headers=headers
    )
    without = await client.post("/v1/batches", json=body)

    assert first.json()["id"] == again.json()["id"] != without.json()["id"]
    assert other.status_code == 409
    assert other.headers["x-should-retry"] == "false"
    error_of(other)


async def test_defaults_are_kept_for_the_runner_and_checked_at_once(
    client: httpx.AsyncClient, deps: Deps
) -> None:
    batch = await create(client, defaults={"n": 12, "mode": "sequential"})

    options = await deps.stores.batches.batch_options(batch["id"])
    assert options["defaults"] == {"n": 12, "mode": "sequential"}


@pytest.mark.parametrize(
    ("defaults", "param"),
    [
        ({"n": 0}, "defaults.n"),
        ({"colour": 1}, "defaults.colour"),
        ({"prompt": "x"}, "defaults.prompt"),
    ],
)
async def test_defaults_that_would_fail_every_row_are_refused(
    client: httpx.AsyncClient, defaults: dict[str, Any], param: str
) -> None:
    body = {"input_file_id": await upload(client), "endpoint": "/v1/rewrites"}

    response = await client.post("/v1/batches", json={**body, "defaults": defaults})

    assert response.status_code == 400
    assert error_of(response)["param"] == param


async def test_file_for_training_is_no_batch_input(client: httpx.AsyncClient) -> None:
    file_id = await upload(client, "fine-tune")

    response = await client.post(
        "/v1/batches", json={"input_file_id": file_id, "endpoint": "/v1/scores"}
    )

    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_file_purpose"


async def test_lists_are_paged_by_cursor(client: httpx.AsyncClient) -> None:
    ids = [(await create(client))["id"] for _ in range(3)]

    first = (await client.get("/v1/batches", params={"limit": 2})).json()
    second = (await client.get("/v1/batches", params={"after": first["last_id"]})).json()

    schemas.Page[schemas.Batch].model_validate(first)
    assert [item["id"] for item in first["data"] + second["data"]] == ids[::-1]
    assert (first["has_more"], second["has_more"]) == (True, False)


async def test_cancel_stops_a_batch_and_leaves_a_finished_one_unchanged(
    client: httpx.AsyncClient, deps: Deps
) -> None:
    running = await create(client)
    cancelled = await client.post(f"/v1/batches/{running['id']}/cancel")
    assert cancelled.json()["status"] in ("cancelling", "cancelled")
    await deps.stores.batches.finalize_ready("w", 60)

    done = await create(client)
    runner = Runner(deps, done["id"], 1)
    await runner.open()
    await runner.commit(0)
    await runner.finish()
    before = (await client.get(f"/v1/batches/{done['id']}")).json()
    after = await client.post(f"/v1/batches/{done['id']}/cancel")

    assert before["status"] == "completed"
    assert after.json() == before


async def test_finished_batch_offers_its_output_file(client: httpx.AsyncClient, deps: Deps) -> None:
    batch = await create(client)
    runner = Runner(deps, batch["id"], 2)
    await runner.open()
    for line in range(2):
        await runner.commit(line)
    await runner.finish()

    done = schemas.Batch.model_validate((await client.get(f"/v1/batches/{batch['id']}")).json())
    content = await client.get(f"/v1/files/{done.output_file_id}/content")

    assert (done.request_counts.completed, done.request_counts.failed) == (2, 0)
    assert content.text.splitlines() == ["{}", "{}"]
    assert done.error_file_id is None


async def test_pairs_come_in_ascending_seq_and_after_is_exclusive(
    client: httpx.AsyncClient, deps: Deps
) -> None:
    batch = await create(client)
    runner = Runner(deps, batch["id"], 3)
    await runner.open()
    await runner.commit(0, pairs=2)
    await runner.commit(1, pairs=2)
    url = f"/v1/batches/{batch['id']}/pairs"

    running = [json.loads(line) for line in (await client.get(url)).text.splitlines()]
    await runner.commit(2, pairs=1)
    await runner.finish()
    response = await client.get(url)
    finished = [json.loads(line) for line in response.text.splitlines()]
    rest = [json.loads(line) for line in (await client.get(f"{url}?after=2")).text.splitlines()]
    limited = (await client.get(f"{url}?limit=2")).text.splitlines()

    assert response.headers["content-type"] == "application/x-ndjson"
    assert [row["seq"] for row in running] == [0, 1, 2, 3]
    assert [row["seq"] for row in finished] == [0, 1, 2, 3, 4]
    assert [row["seq"] for row in rest] == [3, 4]
    assert len(limited) == 2
    for row in finished:
        schemas.Pair.model_validate(row)


async def test_follow_tails_a_running_batch_to_its_end(
    client: httpx.AsyncClient, deps: Deps
) -> None:
    batch = await create(client)
    runner = Runner(deps, batch["id"], 2)
    await runner.open()
    await runner.commit(0)
    tail = asyncio.create_task(client.get(f"/v1/batches/{batch['id']}/pairs?follow=true"))
    await asyncio.sleep(0)
    await runner.commit(1, pairs=2)
    await runner.finish()
    async with asyncio.timeout(10):
        response = await tail

    assert [json.loads(line)["seq"] for line in response.text.splitlines()] == [0, 1, 2]


async def test_parquet_needs_a_finished_batch_and_has_one_schema(
    client: httpx.AsyncClient, deps: Deps
) -> None:
    batch = await create(client)
    runner = Runner(deps, batch["id"], 1)
    await runner.open()
    await runner.commit(0, pairs=3)
    url, headers = f"/v1/batches/{batch['id']}/pairs", {"accept": "application/vnd.apache.parquet"}

    early = await client.get(url, headers=headers)
    await runner.finish()
    response = await client.get(url, headers=headers)
    table = pq.read_table(io.BytesIO(response.content))
    limited = await client.get(f"{url}?after=0&limit=1", headers=headers)

    assert pq.read_table(io.BytesIO(limited.content)).column("seq").to_pylist() == [1]
    assert early.status_code == 409
    assert early.headers["x-should-retry"] == "false"
    assert response.status_code == 200
    assert table.schema.equals(pair_schema(deps.settings.dimensions))
    assert table.column("seq").to_pylist() == [0, 1, 2]
    assert table.column("stage").to_pylist() == [None, None, None]
    assert json.loads(table.column("provenance")[0].as_py())["strategy"] == "compose"


@pytest.mark.parametrize(
    ("accept", "parquet"),
    [
        (PARQUET, True),
        (PARQUET.upper(), True),
        (f"{PARQUET};q=0.5, */*;q=0.1", True),
        (f"text/html, {PARQUET} ; q=1.0", True),
        (f"{PARQUET};q=0", False),
        (f"{PARQUET};q=0.000, application/x-ndjson", False),
        (f"{PARQUET};q=high", False),
        (f"{PARQUET};q=0.5, application/x-ndjson", False),
        ("application/not-parquet", False),
        ("application/*", False),
        ("*/*", False),
        ("", False),
        (",;q", False),
    ],
)
def test_parquet_is_sent_to_those_who_prefer_it(accept: str, parquet: bool) -> None:
    assert prefers_parquet(accept) is parquet


async def test_parquet_without_pairs_still_has_the_schema(
    client: httpx.AsyncClient, deps: Deps
) -> None:
    batch = await create(client)
    runner = Runner(deps, batch["id"], 1)
    await runner.open()
    await runner.commit(0, pairs=0)
    await runner.finish()

    response = await client.get(
        f"/v1/batches/{batch['id']}/pairs", headers={"accept": "application/vnd.apache.parquet"}
    )

    table = pq.read_table(io.BytesIO(response.content))
    assert table.num_rows == 0
    assert table.schema.equals(pair_schema(deps.settings.dimensions))


async def test_events_tell_each_change_and_end_with_the_batch(
    client: httpx.AsyncClient, deps: Deps
) -> None:
    batch = await create(client)
    runner = Runner(deps, batch["id"], 2)
    await runner.open()
    await runner.commit(0)
    stream = asyncio.create_task(client.get(f"/v1/batches/{batch['id']}/events"))
    await asyncio.sleep(0)
    await runner.commit(1)
    await runner.finish()
    async with asyncio.timeout(10):
        response = await stream

    assert response.headers["content-type"] == "text/event-stream"
    data = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    events = [schemas.BatchEvent.model_validate_json(item) for item in data]
    assert events[-1].status == "completed"
    assert events[-1].request_counts.completed == 2
    assert events[-1].classes == {"multi": 2}
    assert events[-1].pairs == 2
    assert events[-1].eta_s is None


async def test_stream_of_a_deleted_batchless_store_is_not_opened() -> None:
    async with make_client(create_app(make_deps())) as client:
        response = await client.get("/v1/batches/batch_gone/events")

    assert response.status_code == 404
