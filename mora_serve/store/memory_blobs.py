"""Blobs within one process."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from mora_serve.errors import BlobNotFoundError


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
            raise BlobNotFoundError(f"blob {key} must exist to be read")
        yield data[start : None if length is None else start + length]

    @contextmanager
    def open_file(self, key: str) -> Iterator[IO[bytes]]:
        if key not in self._blobs:
            raise BlobNotFoundError(f"blob {key} must exist to be read")
        with io.BytesIO(self._blobs[key]) as file:
            yield file

    async def tree(self, key: str) -> dict[str, int] | None:
        return None

    async def concat(self, key: str, parts: Sequence[str]) -> int:
        missing = [part for part in parts if part not in self._blobs]
        if missing:
            raise BlobNotFoundError(f"blob {missing[0]} must exist to be read")
        self._blobs[key] = b"".join(self._blobs[part] for part in parts)
        return len(self._blobs[key])

    async def size(self, key: str) -> int:
        if key not in self._blobs:
            raise BlobNotFoundError(f"blob {key} must exist to be read")
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
