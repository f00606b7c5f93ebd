"""Blob storage over fsspec: atomic, streamed, and confined to its root."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mora_serve.errors import ConfigError, StorageError
from mora_serve.identity import new_id
from mora_serve.ports import BlobStore
from mora_serve.store.blobs import CHUNK_BYTES, FsspecBlobs
from mora_serve.store.memory_blobs import MemoryBlobs


@pytest.fixture(params=["local", "fsspec memory", "s3", "dictionary"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "local":
        return FsspecBlobs(str(tmp_path / "blobs"))
    if request.param == "fsspec memory":
        return FsspecBlobs(f"memory://{new_id('root')}")
    if request.param == "s3":
        return FsspecBlobs(f"s3://{request.getfixturevalue('s3_bucket')}/root")
    return MemoryBlobs()


async def _read(blobs: BlobStore, key: str, start: int = 0, length: int | None = None) -> bytes:
    return b"".join([chunk async for chunk in blobs.open_read(key, start, length)])


async def _chunks(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def test_what_was_put_is_read_back(blobs: BlobStore) -> None:
    assert await blobs.put("a/b.bin", b"data") == 4
    assert await blobs.put("a/c.bin", _chunks(b"one ", b"", b"two")) == 7
    assert await _read(blobs, "a/b.bin") == b"data"
    assert await _read(blobs, "a/c.bin") == b"one two"
    assert await blobs.size("a/c.bin") == 7


async def test_ranges_are_read_across_chunks(blobs: BlobStore) -> None:
    data = bytes(range(256)) * (CHUNK_BYTES // 256) + b"tail"
    await blobs.put("big", data)
    assert await _read(blobs, "big", CHUNK_BYTES - 2, 4) == data[CHUNK_BYTES - 2 : CHUNK_BYTES + 2]
    assert await _read(blobs, "big", CHUNK_BYTES) == b"tail"
    assert await _read(blobs, "big", 5, 0) == b""


async def test_parts_are_joined_in_order(blobs: BlobStore) -> None:
    for number in range(3):
        await blobs.put(f"part{number}", f"{number}\n".encode())
    assert await blobs.concat("all", ["part2", "part0", "part1"]) == 6
    assert await _read(blobs, "all") == b"2\n0\n1\n"


async def test_blobs_under_a_prefix_are_listed_and_removed_together(blobs: BlobStore) -> None:
    for key in ("a/b/1", "a/b/c/2", "a/bc", "d"):
        await blobs.put(key, b"data")
    assert await blobs.list_keys("a/b/") == ["a/b/1", "a/b/c/2"]

    await asyncio.gather(*(blobs.delete_all("a/b/") for _ in range(3)))
    await blobs.delete_all("nothing/")

    assert await blobs.list_keys("a/b/") == []
    assert [await blobs.exists(key) for key in ("a/b/1", "a/bc", "d")] == [False, True, True]


async def test_a_blob_can_be_sought_in(blobs: BlobStore) -> None:
    await blobs.put("a/b", b"0123456789")

    with blobs.open_file("a/b") as file:
        file.seek(-3, 2)
        assert file.read() == b"789"
        file.seek(2)
        assert file.read(2) == b"23"
    assert await blobs.tree("a/b") is None


async def test_a_put_that_fails_leaves_nothing(blobs: BlobStore, tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"half"
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await blobs.put("broken", broken())
    assert not await blobs.exists("broken")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


async def test_a_failed_replacement_keeps_the_old_blob(blobs: BlobStore) -> None:
    await blobs.put("kept", b"old")
    with pytest.raises(StorageError):
        await blobs.concat("kept", ["absent"])
    assert await _read(blobs, "kept") == b"old"


async def test_a_second_put_replaces_the_first(blobs: BlobStore) -> None:
    await blobs.put("key", b"old and long")
    await blobs.put("key", b"new")
    assert await _read(blobs, "key") == b"new"


async def test_a_missing_blob_is_a_storage_error(blobs: BlobStore) -> None:
    with pytest.raises(StorageError):
        await _read(blobs, "absent")
    with pytest.raises(StorageError):
        await blobs.size("absent")
    assert not await blobs.exists("absent")
    await blobs.delete("absent")


async def test_a_deleted_blob_is_gone(blobs: BlobStore) -> None:
    await blobs.put("a", b"data")
    await blobs.delete("a")
    assert not await blobs.exists("a")


@pytest.mark.parametrize(
    "key",
    ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", ".hidden", "a/.b", "a\x00b", "a b"],
)
async def test_no_key_leaves_the_root(tmp_path: Path, key: str) -> None:
    blobs = FsspecBlobs(str(tmp_path / "root"))
    with pytest.raises(StorageError, match="plain path segments"):
        await blobs.put(key, b"x")
    with pytest.raises(StorageError, match="plain path segments"):
        await _read(blobs, key)


async def test_a_url_key_is_read_but_never_written(tmp_path: Path) -> None:
    outside = tmp_path / "input.jsonl"
    outside.write_bytes(b"row\n")
    blobs = FsspecBlobs(str(tmp_path / "root"), uri_prefixes=[str(tmp_path)])
    assert await _read(blobs, f"file://{outside}") == b"row\n"
    with pytest.raises(StorageError):
        await blobs.put(f"file://{outside}", b"x")
    with pytest.raises(StorageError):
        await blobs.delete(f"file://{outside}")
    assert outside.exists()


async def test_only_local_stores_have_paths(tmp_path: Path) -> None:
    blobs = FsspecBlobs(str(tmp_path))
    await blobs.put("a/b", b"data")
    path = blobs.local_path("a/b")
    assert path is not None
    assert Path(path).read_bytes() == b"data"
    assert FsspecBlobs("memory://x").local_path("a") is None


def test_an_unknown_scheme_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"blobs\.url"):
        FsspecBlobs("nosuchscheme://x")
