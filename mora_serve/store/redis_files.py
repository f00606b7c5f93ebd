"""Files and uploads on Redis: the base of :class:`~mora_serve.store.redis_store.RedisLedger`.

Each step is one call of ``ledger.lua``. How values are written for it is defined here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mora_serve.ports import UploadState
from mora_serve.store.redis_client import RedisClient
from mora_serve.store.shapes import bad_cursor, file_in_use


class RedisFiles:
    """:class:`~mora_serve.store.file_steps.FileSteps` under one key prefix."""

    def __init__(self, client: RedisClient, prefix: str) -> None:
        self._client = client
        self._prefix = prefix

    async def put_file(self, file: Mapping[str, Any], blob: str) -> None:
        stored = {**file, "created_at": file.get("created_at") or await self._now()}
        await self._step("put_file", *file_arguments(stored, blob), blob)

    async def reserve_blob(self, blob: str, lifetime_s: float) -> None:
        await self._step("reserve_blob", blob, int(lifetime_s))

    async def get_file(
        self, file_id: str, *, even_expired: bool = False
    ) -> tuple[dict[str, Any], str] | None:
        found = await self._step("get_file", file_id, int(even_expired))
        return None if found is None else _file(found)

    async def list_files(
        self, *, after: str | None, limit: int, purpose: str | None, ascending: bool
    ) -> list[dict[str, Any]]:
        files: list[dict[str, Any]] = []
        now = await self._now()
        while len(files) < limit:
            docs = await self._step("page", "files", after or "", limit, int(ascending))
            if docs is None:
                raise bad_cursor(str(after))
            page = [_file(doc)[0] for doc in docs]
            files += [
                file
                for file in page
                if (purpose is None or file["purpose"] == purpose)
                and (file.get("expires_at") or now + 1) > now
            ]
            if len(page) < limit:
                break
            after = page[-1]["id"]
        return files[:limit]

    async def delete_file(self, file_id: str) -> str | None:
        reply = await self._step("delete_file", file_id)
        if reply is None:
            return None
        if reply[0] == b"read":
            raise file_in_use(file_id, reply[1].decode())
        return text(reply[1])

    async def collect(self, limit: int) -> list[str]:
        return [entry.decode() for entry in await self._step("collect", limit)]

    async def collected(self, entries: Sequence[str]) -> None:
        if entries:
            await self._step("collected", *entries)

    async def create_upload(self, doc: Mapping[str, Any], lifetime_s: float) -> UploadState:
        upload = _upload(await self._step("create_upload", doc["id"], dump(doc), int(lifetime_s)))
        assert upload is not None
        return upload

    async def get_upload(self, upload_id: str) -> UploadState | None:
        return _upload(await self._step("get_upload", upload_id))

    async def add_part(
        self, upload_id: str, part_id: str, num_bytes: int, announced: int, max_parts: int
    ) -> UploadState | None:
        arguments = (upload_id, part_id, num_bytes, announced, max_parts)
        return _upload(await self._step("add_part", *arguments))

    async def cancel_upload(self, upload_id: str) -> UploadState | None:
        return _upload(await self._step("cancel_upload", upload_id))

    async def complete_upload(
        self, upload_id: str, file: Mapping[str, Any], blob: str
    ) -> UploadState | None:
        arguments = file_arguments(file, blob)
        return _upload(await self._step("complete_upload", upload_id, *arguments, blob))

    async def _now(self) -> int:
        return int((await self._client.command("TIME"))[0])

    async def _step(self, name: str, *args: Any) -> Any:
        return await self._client.script(self._prefix, name, *args)


def file_arguments(file: Mapping[str, Any], blob: str) -> tuple[str, str, Any]:
    """Id, document and end (or ``""``) of a file, as the script's steps take them."""
    expires_at = file.get("expires_at")
    doc = dump({"file": dict(file), "blob": blob})
    return file["id"], doc, "" if expires_at is None else expires_at


def dump(value: Any) -> str:
    """Compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def text(reply: bytes | None) -> str | None:
    """A reply that is text or nothing."""
    return None if reply is None else reply.decode()


def pairs(flat: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """A hash as Redis lists it: name, value, name, value ..."""
    return list(zip(flat[::2], flat[1::2], strict=True))


def _file(doc: bytes) -> tuple[dict[str, Any], str]:
    found = json.loads(doc)
    return found["file"], found["blob"]


def _upload(reply: Any) -> UploadState | None:
    if reply is None:
        return None
    fields = {name.decode(): value for name, value in pairs(reply[0])}
    stamps = {"created_at": int(fields["created"]), "expires_at": int(fields["expires"])}
    return UploadState(
        doc={**json.loads(fields["doc"]), **stamps},
        status=fields["status"].decode(),
        received_bytes=int(fields["received"]),
        parts={part.decode(): int(size) for part, size in pairs(reply[1])},
        file=_file(fields["file"])[0] if "file" in fields else None,
        now=float(reply[2]),
    )
