"""Blobs within one process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from mora_serve.errors import StorageError


class MemoryBlobs:
    """:class:`~mora_serve.ports.BlobStore` in a dictionary."""

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}

    async def put(self, key: str, chunks: AsyncIterator[bytes] | bytes) -> int:
        data = chunks if isinstance(chunks, bytes) else b"".join([part async for part in chunks])
        self._blobs[key] = data
        return len(data)

    async def open_read(
        self, key: str, start: int = 0, length: int | None = None
    ) -> AsyncIterator[bytes]:
        data = self._blobs.get(key)
        if data is None:
            raise StorageError(f"blob {key} must exist to be read")
        yield data[start : None if length is None else start + length]

    async def concat(self, key: str, parts: Sequence[str]) -> int:
        missing = [part for part in parts if part not in self._blobs]
        if missing:
            raise StorageError(f"blob {missing[0]} must exist to be read")
        self._blobs[key] = b"".join(self._blobs[part] for part in parts)
        return len(self._blobs[key])

    async def size(self, key: str) -> int:
        if key not in self._blobs:
            raise StorageError(f"blob {key} must exist to be read")
        return len(self._blobs[key])

    async def exists(self, key: str) -> bool:
        return key in self._blobs

    async def delete(self, key: str) -> None:
        self._blobs.pop(key, None)

    async def delete_all(self, prefix: str) -> None:
        for key in [key for key in self._blobs if key.startswith(prefix)]:
            del self._blobs[key]

    async def list_keys(self, prefix: str) -> list[str]:
        return sorted(key for key in self._blobs if key.startswith(prefix))

    def local_path(self, key: str) -> str | None:
        return None
