"""Inputs by reference and in other formats, through client and runner, to their output."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from openai.types import Batch, FileObject

from mora_serve.config import Settings, load_settings
from mora_serve.fakes import FakeGenerator, FakeScorer
from mora_serve.identity import new_id
from mora_serve.store import Stores, open_stores
from tests.contract.gateway_server import Gate, GatedScorer, gateway, http_server, working
from tests.s3_fixtures import s3_client

pytestmark = pytest.mark.redis
ANSWERS = [{"prompt": "why?", "response": f"because {number}"} for number in range(5)]


@dataclass
class Service:
    client: openai.AsyncOpenAI
    stores: Stores
    settings: Settings
    allowed: Path

    async def register(self, uri: str) -> FileObject:
        return await self.client.post(
            "/files", body={"uri": uri, "purpose": "batch"}, cast_to=FileObject
        )

    async def run(self, file_id: str) -> Batch:
        """The finished batch over a file of answers to score."""
        batch = await self.client.batches.create(
            input_file_id=file_id,
            endpoint="/v1/scores",  # type: ignore[arg-type]
            completion_window="24h",
        )
        generator, scorer = FakeGenerator(), FakeScorer(self.settings.dimensions)
        async with working(self.stores, self.settings, generator, scorer):
            return await self.until(batch.id, "completed", "failed")

    async def until(self, batch_id: str, *statuses: str) -> Batch:
        async with asyncio.timeout(60):
            while (batch := await self.client.batches.retrieve(batch_id)).status not in statuses:
                await asyncio.sleep(0.01)
        return batch

    async def ids(self, batch: Batch) -> list[str]:
        assert batch.output_file_id is not None, batch.errors
        text = (await self.client.files.content(batch.output_file_id)).text
        return [json.loads(line)["custom_id"] for line in text.splitlines()]


@pytest.fixture
async def service(redis_url: str, tmp_path: Path) -> AsyncIterator[Service]:
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    overrides = {
        "data_dir": str(tmp_path),
        "redis": {"url": redis_url, "key_prefix": new_id("test")},
        "runner": {"poll_interval_s": 0.01},
        "server": {"file_uri_prefixes": [f"file://{allowed}", "s3://data/inputs"]},
    }
    settings = load_settings("fake", overrides=overrides, environ={})
    stores = open_stores(settings)
    async with (
        http_server(gateway(stores, settings)) as url,
        openai.AsyncOpenAI(api_key="any", base_url=f"{url}/v1", max_retries=0) as client,
    ):
        yield Service(client, stores, settings, allowed)
    await stores.aclose()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def json_lines() -> bytes:
    rows = (
        {"custom_id": f"row-{i}", "method": "POST", "url": "/v1/scores", "body": {"rows": [row]}}
        for i, row in enumerate(ANSWERS)
    )
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


EXPECTED = [f"row-{number}" for number in range(5)]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
async def test_uploaded_file_is_read_by_its_name(service: Service, kind: str) -> None:
    data = {
        "jsonl": json_lines(),
        "jsonl.gz": gzip.compress(json_lines()),
        "parquet": parquet(ANSWERS),
    }[kind]
    file = await service.client.files.create(file=(f"rows.{kind}", data), purpose="batch")

    batch = await service.run(file.id)

    assert await service.ids(batch) == EXPECTED
    await service.stores.batches.sweep()
    assert await service.stores.blobs.list_keys(f"batches/{batch.id}/input/") == []


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
async def test_registered_file_is_read_from_its_place(service: Service, kind: str) -> None:
    data = {
        "jsonl": json_lines(),
        "jsonl.gz": gzip.compress(json_lines()),
        "parquet": parquet(ANSWERS),
    }[kind]
    path = service.allowed / f"rows.{kind}"
    path.write_bytes(data)
    file = await service.register(f"file://{path}")

    batch = await service.run(file.id)

    assert (file.bytes, file.filename) == (len(data), path.name)
    assert await service.ids(batch) == EXPECTED
    assert (await service.client.files.content(file.id)).content == data
    await service.client.files.delete(file.id)
    assert path.exists()


async def test_batch_works_on_the_file_as_it_was_when_validated(service: Service) -> None:
    path, gate = service.allowed / "rows.jsonl", Gate()
    path.write_bytes(json_lines())
    file = await service.register(f"file://{path}")
    batch = await service.client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/scores",  # type: ignore[arg-type]
        completion_window="24h",
    )
    scorer = GatedScorer(gate, service.settings.dimensions)
    async with working(service.stores, service.settings, FakeGenerator(), scorer):
        await service.until(batch.id, "in_progress")
        path.unlink()
        gate.allow()
        done = await service.until(batch.id, "completed")

    assert await service.ids(done) == EXPECTED


async def test_registered_dataset_directory_is_one_input(service: Service) -> None:
    folder = service.allowed / "data"
    folder.mkdir()
    for name, rows in (("0.parquet", ANSWERS[:2]), ("1.parquet", ANSWERS[2:])):
        (folder / name).write_bytes(parquet(rows))
    file = await service.register(f"file://{folder}")

    batch = await service.run(file.id)

    assert file.bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert await service.ids(batch) == EXPECTED
    with pytest.raises(openai.BadRequestError) as refused:
        await service.client.files.content(file.id)
    assert refused.value.code == "file_is_directory"


async def test_fault_of_a_table_fails_the_batch_and_names_the_column(service: Service) -> None:
    rows = [{**row, "label": 1} for row in ANSWERS]
    file = await service.client.files.create(file=("x.parquet", parquet(rows)), purpose="batch")

    batch = await service.run(file.id)

    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [(e.code, e.param) for e in batch.errors.data] == [("unknown_column", "label")]


async def test_link_swapped_in_after_registration_fails_the_batch(
    service: Service, tmp_path: Path
) -> None:
    secret, path = tmp_path / "secret.jsonl", service.allowed / "rows.jsonl"
    secret.write_bytes(json_lines())
    path.write_bytes(json_lines())
    file = await service.register(f"file://{path}")
    path.unlink()
    path.symlink_to(secret)

    batch = await service.run(file.id)

    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [error.code for error in batch.errors.data] == ["uri_not_allowed"]
    with pytest.raises(openai.BadRequestError):
        await service.client.files.content(file.id)


async def test_registered_file_that_is_gone_fails_the_batch(service: Service) -> None:
    path = service.allowed / "rows.jsonl"
    path.write_bytes(json_lines())
    file = await service.register(f"file://{path}")
    path.unlink()

    batch = await service.run(file.id)

    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [error.code for error in batch.errors.data] == ["input_file_not_found"]


@pytest.mark.parametrize(
    "uri",
    ["file:///etc/passwd", "file://{allowed}/../secret", "file://{allowed}/link", "s3://other/x",
     "s3://data/inputs/../x", "local:///etc/passwd", "http://localhost/x"],
)  # fmt: skip
async def test_uri_that_leaves_the_prefixes_is_refused(
    service: Service, tmp_path: Path, uri: str
) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    (service.allowed / "link").symlink_to(tmp_path / "secret")

    with pytest.raises(openai.BadRequestError) as refused:
        await service.register(uri.format(allowed=service.allowed))

    assert refused.value.param == "uri"


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "directory"])
async def test_input_on_s3_is_read_from_there(service: Service, s3_bucket: str, kind: str) -> None:
    s3 = s3_client()
    objects = {
        "jsonl": {"rows.jsonl": json_lines()},
        "parquet": {"rows.parquet": parquet(ANSWERS)},
        "directory": {"set/0.parquet": parquet(ANSWERS[:2]), "set/1.parquet": parquet(ANSWERS[2:])},
    }[kind]
    for name, data in objects.items():
        s3.put_object(Bucket=s3_bucket, Key=f"inputs/{name}", Body=data)
        s3.put_object(Bucket=s3_bucket, Key=f"elsewhere/{name}", Body=data)
    name = next(iter(objects)).split("/")[0]

    file = await service.register(f"s3://{s3_bucket}/inputs/{name}")
    batch = await service.run(file.id)

    assert file.bytes == sum(len(data) for data in objects.values())
    assert await service.ids(batch) == EXPECTED
    for elsewhere in (f"elsewhere/{name}", "inputs/missing.jsonl"):
        with pytest.raises(openai.BadRequestError):
            await service.register(f"s3://{s3_bucket}/{elsewhere}")
    await service.client.files.delete(file.id)
    assert "Contents" in s3.list_objects_v2(Bucket=s3_bucket, Prefix="inputs/")
