"""Immutable blobs over any fsspec URL: a local directory, S3, or whatever fsspec speaks.

The only module that imports fsspec. A write becomes visible as a whole or not at all: locally by
writing beside the target and renaming, elsewhere by uploading a finished local file. Blocking file
system calls run in threads, and no blob is ever held in memory as a whole.

Keys are relative paths of plain segments, so that no key leaves the root. A key that is a URL
(``s3://...``) names a registered file or directory outside the root; it can be read, as long as it
is under an allowed prefix when it is opened, but not written.
"""

from __future__ import annotations

import asyncio
import io
import os
import re
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mora_serve.errors import BlobNotFoundError, ConfigError, InvalidRequestError, StorageError
from mora_serve.uris import open_within, resolve_uri

CHUNK_BYTES = 2**20
_KEY = re.compile(r"(?!\.)[A-Za-z0-9._=-]+(/(?!\.)[A-Za-z0-9._=-]+)*")
T = TypeVar("T")


class FsspecBlobs:
    """The :class:`~mora_serve.ports.BlobStore` port under one root URL or directory.

    ``uri_prefixes`` are where registered files may lie, see :mod:`mora_serve.uris`.
    """

    def __init__(
        self,
        root: str,
        options: Mapping[str, Any] | None = None,
        uri_prefixes: Sequence[str] = (),
    ) -> None:
        try:
            fs, path = fsspec.core.url_to_fs(root, **dict(options or {}))
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"blobs.url must be a usable fsspec URL, got {root}: {error}"
            ) from None
        self._fs = fs
        self._root = path.rstrip("/")
        self._local = isinstance(fs, LocalFileSystem)
        self._uri_prefixes = uri_prefixes

    async def put(self, key: str, chunks: AsyncIterator[bytes] | bytes) -> int:
        """Write a blob; returns its size in bytes. Replaces an older one of the same key."""
        path = self._path(key)
        temp = await _thread(self._new_temp, path)
        try:
            with await _thread(open, temp, "wb") as file:
                if isinstance(chunks, bytes):
                    await _thread(file.write, chunks)
                else:
                    async for chunk in chunks:
                        await _thread(file.write, chunk)
                size = await _thread(_flush, file)
            await _thread(self._publish, temp, path)
        finally:
            await _thread(_discard, temp)
        return size

    async def open_read(
        self, key: str, start: int = 0, length: int | None = None
    ) -> AsyncIterator[bytes]:
        """Chunks of the blob from byte ``start``, ``length`` bytes or to the end."""
        file = await _thread(self._open, key)
        try:
            if start:
                await _thread(file.seek, start)
            left = length
            while left is None or left > 0:
                size = CHUNK_BYTES if left is None else min(CHUNK_BYTES, left)
                chunk = await _thread(_mapped(file.read, key), size)
                if not chunk:
                    return
                left = None if left is None else left - len(chunk)
                yield chunk
        finally:
            await _thread(file.close)

    @contextmanager
    def open_file(self, key: str) -> Iterator[IO[bytes]]:
        """The blob as a file that can be read and sought in. Blocking: use it in a thread.

        What storage fails with while it is read is a ``StorageError`` too.
        """
        with io.BufferedReader(_Mapped(self._open(key), key), CHUNK_BYTES) as file:
            yield file

    async def tree(self, key: str) -> dict[str, int] | None:
        """Files under a registered directory: path below it -> bytes; ``None`` for a file."""
        fs, path = await _thread(self._locate, key)

        def find() -> dict[str, int] | None:
            if not fs.isdir(path):
                return None
            root = fs.info(path)["name"].rstrip("/")
            found = fs.find(path, detail=True)
            return {
                name.removeprefix(f"{root}/"): self._size_in(name, info)
                for name, info in sorted(found.items())
            }

        return await _thread(_mapped(find, key))

    async def concat(self, key: str, parts: Sequence[str]) -> int:
        """Write the parts one after the other as one blob; returns its size in bytes."""
        return await self.put(key, self._chain(parts))

    async def size(self, key: str) -> int:
        """Size in bytes."""
        fs, path = await _thread(self._locate, key)
        return int(await _thread(_mapped(fs.size, key), path))

    async def exists(self, key: str) -> bool:
        """True when the blob can be read."""
        fs, path = await _thread(self._locate, key)
        return bool(await _thread(_mapped(fs.isfile, key), path))

    async def delete(self, key: str) -> None:
        """Remove a blob; one that is gone already is no error."""
        path = self._path(key)

        def remove() -> None:
            if self._fs.exists(path):
                with suppress(FileNotFoundError):
                    self._fs.rm_file(path)

        await _thread(_mapped(remove, key))

    async def delete_all(self, prefix: str) -> None:
        """Remove every blob whose key begins with ``prefix``, which ends in ``/``."""
        path = self._path(prefix.rstrip("/"))

        def remove() -> None:
            # Another process may be removing the same blobs.
            while self._fs.exists(path):
                with suppress(FileNotFoundError):
                    self._fs.rm(path, recursive=True)

        await _thread(_mapped(remove, prefix))

    async def list_keys(self, prefix: str) -> list[str]:
        """Keys under ``prefix``, which ends in ``/``; in order."""
        path = self._path(prefix.rstrip("/"))

        def find() -> list[str]:
            found = self._fs.find(path) if self._fs.exists(path) else []
            return sorted(name.removeprefix(f"{self._root}/") for name in found)

        return await _thread(_mapped(find, prefix))

    def local_path(self, key: str) -> str | None:
        """A filesystem path for the blob when the store is local, else ``None``."""
        return self._path(key) if self._local else None

    async def _chain(self, parts: Sequence[str]) -> AsyncIterator[bytes]:
        for part in parts:
            async for chunk in self.open_read(part):
                yield chunk

    def _path(self, key: str) -> str:
        if not _KEY.fullmatch(key):
            raise StorageError(
                "a blob key must be plain path segments (letters, digits, '.', '_', '-', '=')"
            )
        return f"{self._root}/{key}"

    def _locate(self, key: str) -> tuple[Any, str]:
        if "://" not in key:
            return self._fs, self._path(key)
        resolved = resolve_uri(key, self._uri_prefixes)
        with _errors(key):
            fs, path = fsspec.core.url_to_fs(resolved)
            # What others write there is not ours to remember.
            fs.invalidate_cache()
        return fs, path

    def _size_in(self, name: str, info: Mapping[str, Any]) -> int:
        """Bytes of a file in a registered directory; of a link only where it may be followed."""
        if info.get("islink"):
            try:
                resolve_uri(f"file://{name}", self._uri_prefixes)
            except InvalidRequestError:
                return 0
        return int(info["size"] or 0)

    def _open(self, key: str) -> IO[bytes]:
        fs, path = self._locate(key)
        with _errors(key):
            if "://" in key and isinstance(fs, LocalFileSystem):
                return open_within(path, self._uri_prefixes)
            file: IO[bytes] = fs.open(path, "rb")
            return file

    def _new_temp(self, path: str) -> str:
        if not self._local:
            descriptor, temp = tempfile.mkstemp(prefix="mora-blob-")
        else:
            folder = Path(path).parent
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, temp = tempfile.mkstemp(prefix=".writing-", dir=folder)
        os.close(descriptor)
        return temp

    def _publish(self, temp: str, path: str) -> None:
        with _errors(path.removeprefix(self._root + "/")):
            if not self._local:
                self._fs.put_file(temp, path)
                return
            os.replace(temp, path)
            _sync_folder(Path(path).parent)


class _Mapped(io.RawIOBase):
    """A file whose failures to be read are ours, apart from those of whatever parses it."""

    def __init__(self, file: IO[bytes], key: str) -> None:
        self._file = file
        self._key = key

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _errors(self._key):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        with _errors(self._key):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def _flush(file: IO[bytes]) -> int:
    file.flush()
    os.fsync(file.fileno())
    return file.tell()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(temp: str) -> None:
    Path(temp).unlink(missing_ok=True)


@contextmanager
def _errors(key: str) -> Iterator[None]:
    """Translate what file systems raise into ``StorageError``, naming the key."""
    try:
        yield
    except FileNotFoundError:
        raise BlobNotFoundError(f"blob {key} must exist to be read") from None
    except (OSError, ValueError, ImportError) as error:
        raise StorageError(f"blob {key} could not be accessed: {type(error).__name__}") from error


def _mapped(call: Callable[..., T], key: str) -> Callable[..., T]:
    def run(*args: Any) -> T:
        with _errors(key):
            return call(*args)

    return run


async def _thread(call: Callable[..., T], *args: Any) -> T:
    return await asyncio.to_thread(call, *args)
