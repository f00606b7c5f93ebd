"""Files, batches and the ledger over any :class:`~mora_serve.store.steps.LedgerSteps`.

Translates between the port (OpenAI-shaped objects, errors) and the steps (plain state). What writes
blobs is in :mod:`mora_serve.store.assembly`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from mora_serve.errors import StorageError
from mora_serve.identity import new_id
from mora_serve.ports import BlobStore, Lease, RowCommit, UploadState, ValidationClaim
from mora_serve.store import file_steps
from mora_serve.store.assembly import Assembly
from mora_serve.store.backlog import BacklogLimits, backlog_full, estimated_rows
from mora_serve.store.rate import recent_rate
from mora_serve.store.shapes import (
    batch_object,
    counts,
    lease_lost,
    no_such,
    usage_object,
)
from mora_serve.store.steps import (
    TERMINAL,
    Backlog,
    BatchState,
    LedgerSteps,
)

SWEEP_ENTRIES = 100
"""Blobs, or prefixes of blobs, that are asked for and deleted at a time."""


class LedgerBatches:
    """The :class:`~mora_serve.ports.BatchStore` port."""

    def __init__(
        self,
        steps: LedgerSteps,
        blobs: BlobStore,
        *,
        completion_window_s: float = 86_400.0,
        limits: BacklogLimits | None = None,
    ) -> None:
        self._steps = steps
        self._blobs = blobs
        self._assembly = Assembly(steps, blobs)
        self._window_s = completion_window_s
        self._limits = limits or BacklogLimits()

    async def ping(self) -> None:
        """Raises ``StorageError`` when the store does not answer."""
        await self._steps.ping()

    async def aclose(self) -> None:
        """Drop connections; the store must not be used afterwards."""
        await self._steps.aclose()

    # files

    async def reserve_blob(self, blob: str, lifetime_s: float) -> None:
        """A blob that is about to be written and registered; what nobody needs goes first."""
        await self._sweep_now()
        await self._steps.reserve_blob(blob, lifetime_s)

    async def put_file(self, file: Mapping[str, Any], blob: str) -> None:
        """Register a file whose bytes are in the blob store under ``blob``."""
        await self._steps.put_file(file, blob)

    async def get_file(self, file_id: str) -> tuple[dict[str, Any], str]:
        """The file object and its blob key."""
        found = await self._steps.get_file(file_id)
        if found is None:
            raise no_such("file", file_id, "file_id", "file_not_found")
        return found

    async def list_files(
        self, *, after: str | None, limit: int, purpose: str | None, order: str = "desc"
    ) -> tuple[list[dict[str, Any]], bool]:
        """A page of file objects; see the port."""
        files = await self._steps.list_files(
            after=after, limit=limit + 1, purpose=purpose, ascending=order == "asc"
        )
        return files[:limit], len(files) > limit

    async def delete_file(self, file_id: str) -> None:
        """Forget a file and delete its bytes. Registered URIs outside the store are left alone.

        The pairs of a batch go with its output file, once nobody reads them. Raises
        ``ConflictError`` while an unfinished batch reads the file.
        """
        blob = await self._steps.delete_file(file_id)
        if blob is None:
            raise no_such("file", file_id, "file_id", "file_not_found")
        if "://" not in blob:
            await self._remove([blob])
        await self._sweep_now()

    # uploads

    async def create_upload(self, upload: Mapping[str, Any], lifetime_s: float) -> UploadState:
        """Store a pending upload; it expires after ``lifetime_s``."""
        await self._sweep_now()
        return await self._steps.create_upload(upload, lifetime_s)

    async def get_upload(self, upload_id: str) -> UploadState:
        """The upload as it is now."""
        return _upload(upload_id, await self._steps.get_upload(upload_id))

    async def add_part(self, upload_id: str, part_id: str, num_bytes: int) -> UploadState:
        """Count a part whose bytes are stored; see whether it is among the ``parts``."""
        upload = await self.get_upload(upload_id)
        announced = int(upload.doc["bytes"])
        added = await self._steps.add_part(
            upload_id, part_id, num_bytes, announced, file_steps.MAX_PARTS
        )
        return _upload(upload_id, added)

    async def cancel_upload(self, upload_id: str) -> UploadState:
        """End a pending upload; one that is over is returned as it is."""
        upload = _upload(upload_id, await self._steps.cancel_upload(upload_id))
        await self._sweep_now()
        return upload

    async def complete_upload(
        self, upload_id: str, file: Mapping[str, Any], blob: str
    ) -> UploadState:
        """Make a pending upload the file ``file``; one that is over is returned as it is."""
        upload = _upload(upload_id, await self._steps.complete_upload(upload_id, file, blob))
        await self._sweep_now()
        return upload

    async def sweep(self) -> None:
        """Delete the bytes of files, uploads and finished batches that nothing needs any more."""
        while entries := await self._steps.collect(SWEEP_ENTRIES):
            await self._remove(entries)

    async def _sweep_now(self) -> None:
        with suppress(StorageError):  # it is done again before long
            await self.sweep()

    async def _remove(self, entries: Sequence[str]) -> None:
        """Raises the last failure once every entry was tried."""
        removed: list[str] = []
        failure: StorageError | None = None
        for entry in entries:
            try:
                if entry.endswith("/"):
                    await self._blobs.delete_all(entry)
                else:
                    await self._blobs.delete(entry)
                removed.append(entry)
            except StorageError as error:
                failure = error
        await self._steps.collected(removed)
        if failure is not None:
            raise failure

    # batches

    async def create_batch(
        self,
        batch: Mapping[str, Any],
        options: Mapping[str, Any],
        idempotency_key: str | None,
        body_hash: str,
    ) -> dict[str, Any]:
        """Store a batch; ``id``, timestamps and status are filled in where they are absent.

        ``options["completion_window_s"]`` overrides the configured window. Raises
        ``OverloadedError`` when other batches hold as much as may wait.
        """
        doc = {
            "id": batch.get("id") or new_id("batch"),
            "object": "batch",
            "endpoint": batch["endpoint"],
            "input_file_id": batch["input_file_id"],
            "completion_window": batch.get("completion_window", "24h"),
            "metadata": batch.get("metadata"),
            "model": batch.get("model"),
        }
        window_s = float(options.get("completion_window_s") or self._window_s)
        found = await self._steps.get_file(doc["input_file_id"])
        file = {} if found is None else found[0]
        input_bytes = int(file.get("bytes") or 0)
        created = await self._steps.create_batch(
            doc,
            options,
            idempotency_key,
            body_hash,
            window_s,
            input_bytes=input_bytes,
            input_rows=estimated_rows(str(file.get("filename")), input_bytes),
            max_rows=self._limits.max_rows,
            max_bytes=self._limits.max_bytes,
        )
        if isinstance(created, Backlog):
            raise backlog_full(created, input_bytes, self._limits)
        return await self.get_batch(created)

    async def known_batch(self, idempotency_key: str, body_hash: str) -> dict[str, Any] | None:
        """The batch that was created with this key, ``None`` when none was.

        Raises ``ConflictError`` when it was created with another body.
        """
        batch_id = await self._steps.known_batch(idempotency_key, body_hash)
        return None if batch_id is None else await self.get_batch(batch_id)

    async def batch_input(self, batch_id: str) -> tuple[dict[str, Any], str]:
        """The input file's object and the blob that holds the rows, even past the file's end."""
        state = await self._state(batch_id)
        file_id = state.doc["input_file_id"]
        found = await self._steps.get_file(file_id, even_expired=True)
        if found is None:
            raise no_such("file", file_id, "input_file_id", "file_not_found")
        return found[0], state.input_blob or found[1]

    async def get_batch(self, batch_id: str) -> dict[str, Any]:
        """The batch object with all of OpenAI's fields."""
        return batch_object(await self._state(batch_id))

    async def batch_options(self, batch_id: str) -> dict[str, Any]:
        """Options given at creation, unchanged."""
        return (await self._state(batch_id)).options

    async def list_batches(
        self, *, after: str | None, limit: int
    ) -> tuple[list[dict[str, Any]], bool]:
        """A page of batch objects, newest first."""
        states = await self._steps.list_batches(after=after, limit=limit + 1)
        return [batch_object(state) for state in states[:limit]], len(states) > limit

    async def cancel_batch(self, batch_id: str) -> dict[str, Any]:
        """Ask for cancellation; what is done is kept, a finished batch is returned unchanged."""
        if not await self._steps.cancel(batch_id):
            raise no_such("batch", batch_id, "batch_id", "batch_not_found")
        return await self.get_batch(batch_id)

    async def progress(self, batch_id: str) -> dict[str, Any]:
        """What progress displays need, as one consistent view; see the port."""
        found = await self._steps.progress(batch_id)
        if found is None:
            raise no_such("batch", batch_id, "batch_id", "batch_not_found")
        state, rate = found
        running = state.status not in TERMINAL
        return {
            "version": state.version,
            "status": state.status,
            "request_counts": counts(state),
            "classes": state.classes,
            "pairs": state.pairs,
            "usage": usage_object(state.usage),
            "started_at": state.stamps.get("in_progress_at"),
            "rate": recent_rate(rate.buckets, state.now, rate.working_since) if running else None,
        }

    async def backlog_rows(self) -> int:
        """Rows not committed yet; see :class:`~mora_serve.store.steps.Backlog`."""
        return (await self._steps.backlog()).rows

    # runner side

    async def claim_validation(self, worker: str, ttl_s: float) -> ValidationClaim | None:
        """A batch to validate within ``ttl_s``, or longer with ``renew_validation``."""
        claimed = await self._steps.claim_validation(worker, ttl_s)
        if claimed is None:
            return None
        batch_id, number, tries = claimed
        return ValidationClaim(await self.get_batch(batch_id), number, tries)

    async def renew_validation(self, batch_id: str, claim: int, ttl_s: float) -> bool:
        """Extend the claim; False when the batch left ``validating`` or was claimed again."""
        return await self._steps.renew_validation(batch_id, claim, ttl_s)

    async def postpone_validation(self, batch_id: str, claim: int) -> float:
        """Storage failed, not the validation: its try does not count.

        Returns for how many seconds storage has been failing it."""
        return await self._steps.postpone_validation(batch_id, claim)

    async def discard_validation(self, batch_id: str, blob: str | None) -> None:
        """Have deleted what a validator wrote that could not open its batch.

        If the batch is over, that is all of its input: it may have been written after the end. If
        another validator opened it, ``blob``. Else the batch's end does it."""
        state = await self._state(batch_id)
        if state.status in TERMINAL:
            for name in ("input", "duplicates"):
                await self._steps.reserve_blob(f"batches/{batch_id}/{name}/", 0.0)
        elif blob is not None and state.status != "validating" and state.input_blob != blob:
            await self._steps.reserve_blob(blob, 0.0)

    async def open_batch(
        self,
        batch_id: str,
        shards: Sequence[tuple[int, int, int, int]],
        total: int,
        input_blob: str | None = None,
    ) -> bool:
        """Start a validated batch. False, without effect, when it was cancelled or opened."""
        return await self._steps.open_batch(batch_id, shards, total, input_blob)

    async def fail_batch(
        self,
        batch_id: str,
        code: str,
        message: str,
        line: int | None = None,
        param: str | None = None,
    ) -> None:
        """End a batch whose file as a whole is at fault. ``line`` counts from 1."""
        error = {"code": code, "message": message, "param": param, "line": line}
        await self._steps.fail(batch_id, error)

    async def lease_shard(
        self, worker: str, ttl_s: float, exclude: Sequence[str] = ()
    ) -> Lease | None:
        """An unsealed shard of the running batch with the fewest leases, none of ``exclude``."""
        return await self._steps.lease_shard(worker, ttl_s, exclude)

    async def heartbeat(self, lease: Lease, ttl_s: float) -> bool:
        """Extend the lease; False asks the runner to stop."""
        answer = await self._steps.heartbeat(lease, ttl_s)
        if answer == "lost":
            raise lease_lost(lease)
        return answer == "ok"

    async def release(self, lease: Lease) -> None:
        """Hand the shard back; a lease that is lost already is no error."""
        await self._steps.release(lease)

    async def commit_row(self, lease: Lease, row: RowCommit) -> bool:
        """Record one row with its pairs in one atomic step."""
        if (row.output is None) == (row.error is None):
            raise ValueError("exactly one of output and error must be set")
        answer = await self._steps.commit_row(lease, row)
        if answer == "lost":
            raise lease_lost(lease)
        return answer == "committed"

    async def count_try(self, lease: Lease, line: int) -> int:
        """Note that work on a row begins; returns how often it has begun without an end."""
        return await self._steps.count_try(lease, line)

    async def forget_try(self, lease: Lease, line: int) -> None:
        """Take the last ``count_try`` back: work on the row was interrupted on purpose."""
        await self._steps.forget_try(lease, line)

    async def claim_quarantine(self, claim: str, ttl_s: float) -> bool:
        """Begin or extend the quarantine; see the port."""
        return await self._steps.claim_quarantine(claim, ttl_s)

    async def leave_quarantine(self, claim: str) -> None:
        """End the quarantine; harmless when it is another's."""
        await self._steps.leave_quarantine(claim)

    async def report_runner(self, worker: str, ttl_s: float, quiet_for: str | None) -> str | None:
        """Say that a runner lives; see the port."""
        return await self._steps.report_runner(worker, ttl_s, quiet_for)

    async def num_unquiet(self, worker: str, claim: str) -> int:
        """Living runners other than ``worker`` that are not quiet for ``claim``."""
        return await self._steps.num_unquiet(worker, claim)

    async def seal_shard(self, lease: Lease) -> None:
        """Write the shard's parts, then make them count in one atomic step."""
        await self._assembly.seal(lease)

    async def finalize_ready(self, worker: str, ttl_s: float) -> list[str]:
        """Finish every batch that is due; returns the ids that reached a terminal status."""
        finished = []
        while (batch_id := await self._steps.claim_finalize(worker, ttl_s)) is not None:
            try:
                await self._assembly.finalize(batch_id, worker, ttl_s)
            except StorageError:
                # Its parts are gone when another runner finished it after our claim had lapsed.
                if (await self._state(batch_id)).status not in TERMINAL:
                    raise
            finished.append(batch_id)
        return finished

    async def _state(self, batch_id: str) -> BatchState:
        state = await self._steps.get_state(batch_id)
        if state is None:
            raise no_such("batch", batch_id, "batch_id", "batch_not_found")
        return state


def _upload(upload_id: str, found: UploadState | None) -> UploadState:
    if found is None:
        raise no_such("upload", upload_id, "upload_id", "upload_not_found")
    return found
