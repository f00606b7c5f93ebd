"""The atomic steps on files, on uploads in parts, and on blobs that nothing needs any more.

Files and uploads may have an end. What reads them sees it at once; :meth:`FileSteps.collect` later
forgets them and names the blobs to delete. A blob is named again until its deletion was reported,
so that a process that dies in between leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mora_serve.ports import UploadState

MAX_PARTS = 10_000
"""Parts of one upload. Every step on it tells them all."""


class FileSteps(Protocol):
    """Implemented by the ledgers, see :mod:`mora_serve.store.steps`. All steps may be repeated."""

    async def reserve_blob(self, blob: str, lifetime_s: float) -> None:
        """The blob is about to be written; unless a file claims it until then, it is collected."""
        ...

    async def put_file(self, file: Mapping[str, Any], blob: str) -> None: ...
    async def get_file(
        self, file_id: str, *, even_expired: bool = False
    ) -> tuple[dict[str, Any], str] | None:
        """The file and its blob; ``None`` once ``expires_at`` has come, unless asked for."""
        ...

    async def list_files(
        self, *, after: str | None, limit: int, purpose: str | None, ascending: bool
    ) -> list[dict[str, Any]]:
        """At most ``limit`` files; ``NotFoundError`` when ``after`` is not a file."""
        ...

    async def delete_file(self, file_id: str) -> str | None:
        """Forget the file; returns its blob key, ``None`` when there is no such file.

        The blob is to be collected, unless it is a registered URI. Raises ``ConflictError`` while
        an unfinished batch reads the file."""
        ...

    async def collect(self, limit: int) -> list[str]:
        """End uploads and forget files whose time is over; blobs to delete, at most ``limit``.

        An entry that ends in ``/`` is a prefix of keys. Entries come again until they were reported
        with ``collected``. A file that an unfinished batch reads is kept until that has ended.
        The pairs of a batch whose output file is gone go once no registered reader and no active
        fine-tuning job reads them."""
        ...

    async def collected(self, entries: Sequence[str]) -> None: ...

    async def create_upload(self, doc: Mapping[str, Any], lifetime_s: float) -> UploadState:
        """Store an upload; ``created_at`` and ``expires_at`` are by the store's clock."""
        ...

    async def get_upload(self, upload_id: str) -> UploadState | None: ...
    async def add_part(
        self, upload_id: str, part_id: str, num_bytes: int, announced: int, max_parts: int
    ) -> UploadState | None:
        """Record a part; without effect when the upload is over, or gets more than ``announced``
        bytes or ``max_parts``."""
        ...

    async def cancel_upload(self, upload_id: str) -> UploadState | None: ...
    async def complete_upload(
        self, upload_id: str, file: Mapping[str, Any], blob: str
    ) -> UploadState | None:
        """Register the file and end the upload; without effect when the upload is over."""
        ...
