"""Ends of files and uploads, and the removal of bytes that nothing needs."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from mora_serve.errors import NotFoundError, StorageError
from mora_serve.store import Stores


async def stored(stores: Stores, name: str, **fields: Any) -> str:
    blob = f"files/{name}"
    await stores.blobs.put(blob, b"data")
    file = {"id": name, "purpose": "batch", "bytes": 4, "expires_at": None, **fields}
    await stores.batches.put_file(file, blob)
    return blob


async def test_expired_file_is_not_found_and_swept_and_others_stay(stores: Stores) -> None:
    now = int(time.time())
    gone = await stored(stores, "file-old", expires_at=now)
    kept = await stored(stores, "file-new", expires_at=now + 3600)

    with pytest.raises(NotFoundError):
        await stores.batches.get_file("file-old")
    listed, _ = await stores.batches.list_files(after=None, limit=10, purpose=None)
    await stores.batches.sweep()

    assert [file["id"] for file in listed] == ["file-new"]
    assert not await stores.blobs.exists(gone)
    assert await stores.blobs.exists(kept)


async def test_reserved_blob_is_swept_unless_a_file_claims_it_in_time(stores: Stores) -> None:
    for name in ("abandoned", "coming"):
        await stores.blobs.put(f"files/{name}", b"data")
    await stores.batches.reserve_blob("files/abandoned", 0.0)
    await stores.batches.reserve_blob("files/coming", 3600.0)
    await stores.batches.reserve_blob("files/claimed", 0.0)
    await stored(stores, "claimed")

    await stores.batches.sweep()

    there = [await stores.blobs.exists(f"files/{n}") for n in ("claimed", "abandoned", "coming")]
    assert there == [True, False, True]


async def test_sweeps_at_once_do_no_harm(stores: Stores) -> None:
    for number in range(5):
        await stored(stores, f"file-{number}", expires_at=1)

    await asyncio.gather(*(stores.batches.sweep() for _ in range(4)))

    assert await stores.blobs.list_keys("files/") == []


async def test_blob_that_cannot_be_deleted_is_tried_again_and_holds_up_no_other(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        await stored(stores, f"file-{number}", expires_at=1)
    delete = stores.blobs.delete

    async def broken(key: str) -> None:
        if key == "files/file-0":
            raise StorageError("no")
        await delete(key)

    with monkeypatch.context() as patch:
        patch.setattr(stores.blobs, "delete", broken)
        with pytest.raises(StorageError):
            await stores.batches.sweep()
    assert await stores.blobs.list_keys("files/") == ["files/file-0"]
    await stores.batches.sweep()
    assert await stores.blobs.list_keys("files/") == []


async def announced(stores: Stores, num_bytes: int, lifetime_s: float = 60.0) -> str:
    doc = {"id": "upload_1", "bytes": num_bytes, "filename": "x", "purpose": "batch"}
    upload = await stores.batches.create_upload(doc, lifetime_s)
    assert upload.doc["expires_at"] == upload.doc["created_at"] + lifetime_s
    return str(upload.doc["id"])


async def test_parts_count_once_and_up_to_what_was_announced(stores: Stores) -> None:
    upload_id = await announced(stores, 10)

    await stores.batches.add_part(upload_id, "part_a", 6)
    await stores.batches.add_part(upload_id, "part_a", 6)
    await stores.batches.add_part(upload_id, "part_b", 5)
    upload = await stores.batches.add_part(upload_id, "part_c", 4)

    assert upload.parts == {"part_a": 6, "part_c": 4}
    assert (upload.status, upload.received_bytes) == ("pending", 10)


async def test_completed_upload_is_a_file_and_takes_nothing_more(stores: Stores) -> None:
    upload_id = await announced(stores, 4)
    await stores.blobs.put("uploads/upload_1/part_a", b"data")
    await stores.batches.add_part(upload_id, "part_a", 4)
    await stores.blobs.put("files/file-1", b"data")
    file = {"id": "file-1", "purpose": "batch", "bytes": 4, "created_at": 1, "expires_at": None}

    done = await stores.batches.complete_upload(upload_id, file, "files/file-1")
    other = await stores.batches.complete_upload(upload_id, {**file, "id": "file-2"}, "files/2")
    late = await stores.batches.add_part(upload_id, "part_b", 0)
    cancelled = await stores.batches.cancel_upload(upload_id)

    assert done.status == other.status == late.status == cancelled.status == "completed"
    assert done.file == other.file == file
    assert set(late.parts) == {"part_a"}
    assert (await stores.batches.get_file("file-1"))[1] == "files/file-1"
    assert await stores.blobs.list_keys("uploads/upload_1/") == []


@pytest.mark.parametrize("end", ["cancelled", "expired"])
async def test_upload_that_is_over_keeps_no_part(stores: Stores, end: str) -> None:
    upload_id = await announced(stores, 4, 60.0 if end == "cancelled" else 0.0)
    await stores.blobs.put("uploads/upload_1/part_a", b"data")
    if end == "cancelled":
        await stores.batches.add_part(upload_id, "part_a", 4)
        await stores.batches.cancel_upload(upload_id)

    await stores.batches.sweep()
    late = await stores.batches.add_part(upload_id, "part_b", 1)

    assert late.status == end
    assert "part_b" not in late.parts
    assert await stores.blobs.list_keys("uploads/upload_1/") == []


async def test_unknown_upload_is_not_found(stores: Stores) -> None:
    with pytest.raises(NotFoundError):
        await stores.batches.get_upload("upload_x")
    with pytest.raises(NotFoundError):
        await stores.batches.cancel_upload("upload_x")
