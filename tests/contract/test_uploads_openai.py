"""The unmodified ``openai`` client over real HTTP: uploads in parts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest
from openai.types import Upload

from mora_serve.config import load_settings
from mora_serve.store import Stores, file_steps
from tests.contract.gateway_server import gateway, http_server

DATA = os.urandom(5000)


@pytest.fixture
async def client(stores: Stores) -> AsyncIterator[openai.AsyncOpenAI]:
    limits = {"max_part_bytes": 2048, "max_parts_bytes": 10_000}
    settings = load_settings("fake", overrides={"server": limits}, environ={})
    async with (
        http_server(gateway(stores, settings)) as url,
        openai.AsyncOpenAI(api_key="any", base_url=f"{url}/v1", max_retries=0) as client,
    ):
        yield client


async def announce(client: openai.AsyncOpenAI, num_bytes: int = len(DATA)) -> Upload:
    return await client.uploads.create(
        bytes=num_bytes, filename="rows.jsonl", mime_type="application/jsonl", purpose="batch"
    )


async def test_chunked_upload_becomes_a_file(
    client: openai.AsyncOpenAI, stores: Stores, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(DATA)

    done = await client.uploads.upload_file_chunked(
        file=path,
        mime_type="application/jsonl",
        purpose="batch",
        part_size=1000,
        md5=hashlib.md5(DATA).hexdigest(),
    )

    assert done.status == "completed"
    assert done.file is not None
    assert (done.file.bytes, done.file.filename) == (len(DATA), "rows.jsonl")
    assert (await client.files.content(done.file.id)).content == DATA
    assert await stores.blobs.list_keys(f"uploads/{done.id}/") == []


async def test_part_ids_give_the_order_and_a_repeated_completion_the_same_file(
    client: openai.AsyncOpenAI,
) -> None:
    upload = await announce(client)
    second = await client.uploads.parts.create(upload.id, data=DATA[2000:4000])
    third = await client.uploads.parts.create(upload.id, data=DATA[4000:])
    first = await client.uploads.parts.create(upload.id, data=DATA[:2000])
    order = [first.id, second.id, third.id]

    done = await client.uploads.complete(upload.id, part_ids=order)
    again = await client.uploads.complete(upload.id, part_ids=order)

    assert first.upload_id == upload.id
    assert done.file is not None
    assert again == done
    assert (await client.files.content(done.file.id)).content == DATA
    assert [file.id async for file in client.files.list()] == [done.file.id]


async def test_wrong_md5_or_parts_leave_the_upload_to_be_completed_rightly(
    client: openai.AsyncOpenAI, stores: Stores
) -> None:
    upload = await announce(client, 4000)
    first = await client.uploads.parts.create(upload.id, data=DATA[:2000])
    second = await client.uploads.parts.create(upload.id, data=DATA[2000:4000])
    order = [first.id, second.id]

    with pytest.raises(openai.BadRequestError) as checksum:
        await client.uploads.complete(upload.id, part_ids=order, md5="0" * 32)
    with pytest.raises(openai.BadRequestError) as missing:
        await client.uploads.complete(upload.id, part_ids=order[:1])
    with pytest.raises(openai.BadRequestError) as twice:
        await client.uploads.complete(upload.id, part_ids=[first.id, first.id])
    with pytest.raises(openai.BadRequestError) as unknown:
        await client.uploads.complete(upload.id, part_ids=["part_x"])

    assert (checksum.value.param, checksum.value.code) == ("md5", "checksum_mismatch")
    assert missing.value.param == "part_ids"
    assert (twice.value.param, unknown.value.param) == ("part_ids.1", "part_ids.0")
    assert await stores.blobs.list_keys("files/") == []
    done = await client.uploads.complete(upload.id, part_ids=order)
    assert done.status == "completed"


async def test_more_than_announced_or_allowed_is_refused_and_leaves_no_bytes(
    client: openai.AsyncOpenAI, stores: Stores
) -> None:
    upload = await announce(client, 1000)
    with pytest.raises(openai.BadRequestError) as over:
        await client.uploads.parts.create(upload.id, data=DATA[:1001])
    with pytest.raises(openai.APIStatusError) as large:
        await client.uploads.parts.create(upload.id, data=DATA[:3000])
    with pytest.raises(openai.BadRequestError) as huge:
        await announce(client, 10_001)

    assert over.value.code == "upload_too_large"
    assert large.value.status_code == 413
    assert huge.value.param == "bytes"
    assert await stores.blobs.list_keys(f"uploads/{upload.id}/") == []


async def test_cancelled_upload_takes_nothing_and_leaves_nothing(
    client: openai.AsyncOpenAI, stores: Stores
) -> None:
    upload = await announce(client)
    part = await client.uploads.parts.create(upload.id, data=DATA[:1000])

    cancelled = await client.uploads.cancel(upload.id)

    assert cancelled.status == "cancelled"
    assert await stores.blobs.list_keys(f"uploads/{upload.id}/") == []
    with pytest.raises(openai.BadRequestError) as late:
        await client.uploads.parts.create(upload.id, data=DATA[:1000])
    with pytest.raises(openai.BadRequestError):
        await client.uploads.complete(upload.id, part_ids=[part.id])
    assert late.value.code == "upload_cancelled"
    with pytest.raises(openai.NotFoundError):
        await client.uploads.cancel("upload_x")


async def test_expiry_of_the_file_is_asked_for_when_the_upload_is_announced(
    client: openai.AsyncOpenAI,
) -> None:
    upload = await client.uploads.create(
        bytes=4,
        filename="rows.jsonl",
        mime_type="text/jsonl",
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    part = await client.uploads.parts.create(upload.id, data=b"{}\n\n")
    done = await client.uploads.complete(upload.id, part_ids=[part.id])

    assert upload.expires_at == upload.created_at + 3600
    assert done.file is not None
    assert done.file.expires_at == done.file.created_at + 3600


async def test_empty_parts_and_more_parts_than_allowed_are_refused_and_leave_no_bytes(
    client: openai.AsyncOpenAI, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_steps, "MAX_PARTS", 2)
    upload = await announce(client)
    with pytest.raises(openai.BadRequestError) as empty:
        await client.uploads.parts.create(upload.id, data=b"")
    for _ in range(2):
        await client.uploads.parts.create(upload.id, data=DATA[:10])
    with pytest.raises(openai.BadRequestError) as more:
        await client.uploads.parts.create(upload.id, data=DATA[:10])

    assert (empty.value.param, empty.value.code) == ("data", "invalid_value")
    assert more.value.code == "too_many_parts"
    assert len(await stores.blobs.list_keys(f"uploads/{upload.id}/")) == 2
