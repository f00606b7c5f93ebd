"""Files and uploads within one process; :mod:`mora_serve.store.memory` has the batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from mora_serve.ports import UploadState
from mora_serve.store.shapes import bad_cursor, file_in_use

T = TypeVar("T")


class MemoryFiles(ABC):
    """:class:`~mora_serve.store.file_steps.FileSteps` in dictionaries.

    What files have to know of batches is the ledger's to say.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._files: dict[str, tuple[dict[str, Any], str]] = {}
        self._uploads: dict[str, UploadState] = {}
        self._litter: dict[str, float] = {}
        """Blob or prefix of blobs -> when it may be deleted, Unix seconds."""

    async def put_file(self, file: Mapping[str, Any], blob: str) -> None:
        doc = dict(file)
        if doc.get("created_at") is None:
            doc["created_at"] = int(self._clock())
        self._files[doc["id"]] = (doc, blob)
        self._litter.pop(blob, None)

    async def reserve_blob(self, blob: str, lifetime_s: float) -> None:
        self._litter[blob] = self._clock() + lifetime_s

    async def get_file(
        self, file_id: str, *, even_expired: bool = False
    ) -> tuple[dict[str, Any], str] | None:
        found = self._files.get(file_id)
        if found is None or (self._expired(found[0]) and not even_expired):
            return None
        return dict(found[0]), found[1]

    async def list_files(
        self, *, after: str | None, limit: int, purpose: str | None, ascending: bool
    ) -> list[dict[str, Any]]:
        docs = [dict(doc) for doc, _ in self._files.values()]
        docs = docs if ascending else docs[::-1]
        return [
            doc
            for doc in page(docs, lambda doc: str(doc["id"]), after, len(docs))
            if not self._expired(doc) and (purpose is None or doc["purpose"] == purpose)
        ][:limit]

    async def delete_file(self, file_id: str) -> str | None:
        batch_id = self._files_being_read().get(file_id)
        if batch_id is not None:
            raise file_in_use(file_id, batch_id)
        return self._remove_file(file_id)

    async def collect(self, limit: int) -> list[str]:
        for upload_id in list(self._uploads):
            self._upload(upload_id)
        read = self._files_being_read()
        for file_id, (doc, _) in list(self._files.items()):
            if self._expired(doc) and file_id not in read:
                self._remove_file(file_id)
        self._collect_pairs()
        now = self._clock()
        return [entry for entry, due in self._litter.items() if due <= now][:limit]

    async def collected(self, entries: Sequence[str]) -> None:
        for entry in entries:
            self._litter.pop(entry, None)

    async def create_upload(self, doc: Mapping[str, Any], lifetime_s: float) -> UploadState:
        now = self._clock()
        stamps = {"created_at": int(now), "expires_at": int(now) + int(lifetime_s)}
        upload = UploadState({**doc, **stamps}, "pending", 0, {}, None, now)
        self._uploads[str(doc["id"])] = upload
        return upload

    async def get_upload(self, upload_id: str) -> UploadState | None:
        return self._upload(upload_id)

    async def add_part(
        self, upload_id: str, part_id: str, num_bytes: int, announced: int, max_parts: int
    ) -> UploadState | None:
        upload = self._upload(upload_id)
        if upload is None or upload.status != "pending" or part_id in upload.parts:
            return upload
        if upload.received_bytes + num_bytes > announced or len(upload.parts) >= max_parts:
            return upload
        upload = replace(
            upload,
            received_bytes=upload.received_bytes + num_bytes,
            parts={**upload.parts, part_id: num_bytes},
        )
        self._uploads[upload_id] = upload
        return upload

    async def cancel_upload(self, upload_id: str) -> UploadState | None:
        upload = self._upload(upload_id)
        if upload is not None and upload.status == "pending":
            self._end_upload(upload, "cancelled")
        return self._upload(upload_id)

    async def complete_upload(
        self, upload_id: str, file: Mapping[str, Any], blob: str
    ) -> UploadState | None:
        upload = self._upload(upload_id)
        if upload is not None and upload.status == "pending":
            await self.put_file(file, blob)
            self._end_upload(replace(upload, file=dict(file)), "completed")
        return self._upload(upload_id)

    @abstractmethod
    def _files_being_read(self) -> dict[str, str]:
        """Input files of unfinished batches -> the batch."""

    @abstractmethod
    def _collect_pairs(self) -> None:
        """Discard the pairs that nobody reads, of batches whose output file is gone."""

    def _remove_file(self, file_id: str) -> str | None:
        found = self._files.pop(file_id, None)
        if found is None:
            return None
        if "://" not in found[1]:
            self._discard(found[1])
        return found[1]

    def _discard(self, blob: str) -> None:
        self._litter[blob] = self._clock()

    def _expired(self, doc: Mapping[str, Any]) -> bool:
        return doc.get("expires_at") is not None and bool(doc["expires_at"] <= self._clock())

    def _upload(self, upload_id: str) -> UploadState | None:
        upload = self._uploads.get(upload_id)
        if upload is None:
            return None
        if upload.status == "pending" and self._expired(upload.doc):
            self._end_upload(upload, "expired")
        return replace(self._uploads[upload_id], now=self._clock())

    def _end_upload(self, upload: UploadState, status: str) -> None:
        upload_id = str(upload.doc["id"])
        self._uploads[upload_id] = replace(upload, status=status)
        self._discard(f"uploads/{upload_id}/")


def page(items: list[T], key: Callable[[T], str], after: str | None, limit: int) -> list[T]:
    """Up to ``limit`` items behind the one named by ``after``; raises ``NotFoundError``."""
    if after is None:
        return items[:limit]
    for index, item in enumerate(items):
        if key(item) == after:
            return items[index + 1 : index + 1 + limit]
    raise bad_cursor(after)
