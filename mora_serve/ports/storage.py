"""Ports of batches and their ledger, pairs, jobs and blobs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import IO, Any, Protocol


@dataclass(frozen=True, slots=True)
class ValidationClaim:
    """The right of one runner to validate ``batch``."""

    batch: dict[str, Any]
    number: int
    """Of the claims on this batch, from 1: no two have the same."""
    tries: int
    """Claims with this one that ended, or may end, in nothing."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right of one runner to work on one shard until ``expires_at``."""

    batch_id: str
    shard: int
    token: int
    """Fencing token: strictly increasing per shard; a commit with an older one is refused."""
    worker: str
    expires_at: float
    """Unix seconds by the store's clock."""
    first_line: int
    """First input line of the shard, from 0."""
    num_rows: int
    offset_bytes: int
    """Where the shard starts in the (decompressed) input file."""
    num_bytes: int
    done: frozenset[int] = frozenset()
    """Input lines of this shard that are already committed."""
    tries: Mapping[int, int] = field(default_factory=dict)
    """Input line -> how often work on it has begun without an end, see ``count_try``."""


@dataclass(frozen=True, slots=True)
class RowCommit:
    """Outcome of one input line, committed exactly once."""

    line: int
    """Input line number, from 0; the key within the batch."""
    output: bytes | None
    """Result line (JSON, no newline) for the output file, or ``None``."""
    error: bytes | None
    """Result line for the error file, or ``None``. Exactly one of the two is set."""
    pairs: tuple[bytes, ...] = ()
    """Preference rows (JSON objects without ``seq``), in order; the store numbers them."""
    usage: Mapping[str, int] = field(default_factory=dict)
    """Counters to add to the batch's usage, for example ``{"output_tokens": 512}``."""
    classes: Mapping[str, int] = field(default_factory=dict)
    """Class counts to add to the batch's progress, for example ``{"multi": 1}``."""


@dataclass(frozen=True, slots=True)
class UploadState:
    """An upload in parts, as stored."""

    doc: dict[str, Any]
    """Fields fixed at creation, ``created_at`` and ``expires_at`` among them."""
    status: str
    """``pending``, ``completed``, ``cancelled`` or ``expired``."""
    received_bytes: int
    parts: dict[str, int]
    """Part id -> bytes."""
    file: dict[str, Any] | None
    """The file's object once the upload is completed."""
    now: float
    """The store's clock, Unix seconds."""


class BatchStore(Protocol):
    """Files, batches and the ledger. Objects are OpenAI-shaped dicts, keys as in DESIGN section 4.

    Timestamps are Unix seconds. Lists are newest first: ``list_*`` return ``(items, has_more)``,
    and ``after`` is the id of the last item of the previous page. An unknown id raises
    :class:`~mora_serve.errors.NotFoundError`.
    """

    async def ping(self) -> None: ...
    async def aclose(self) -> None: ...

    # files (metadata; the bytes are in the blob store under ``blob``)
    async def reserve_blob(self, blob: str, lifetime_s: float) -> None:
        """Announce a blob that ``put_file`` will name; ``sweep`` removes it where none did."""
        ...

    async def put_file(self, file: Mapping[str, Any], blob: str) -> None: ...
    async def get_file(self, file_id: str) -> tuple[dict[str, Any], str]: ...
    async def list_files(
        self, *, after: str | None, limit: int, purpose: str | None, order: str = "desc"
    ) -> tuple[list[dict[str, Any]], bool]: ...
    async def delete_file(self, file_id: str) -> None: ...

    # uploads in parts
    async def create_upload(self, upload: Mapping[str, Any], lifetime_s: float) -> UploadState:
        """Store a pending upload whose end is ``lifetime_s`` from now."""
        ...

    async def get_upload(self, upload_id: str) -> UploadState: ...
    async def add_part(self, upload_id: str, part_id: str, num_bytes: int) -> UploadState:
        """Count a stored part; without effect when the upload is over, or would be too large."""
        ...

    async def cancel_upload(self, upload_id: str) -> UploadState: ...
    async def complete_upload(
        self, upload_id: str, file: Mapping[str, Any], blob: str
    ) -> UploadState:
        """Turn a pending upload into a file; without effect when it is over."""
        ...

    async def sweep(self) -> None:
        """Delete bytes that nothing needs any more: of expired files, uploads, finished batches."""
        ...

    # batches
    async def create_batch(
        self,
        batch: Mapping[str, Any],
        options: Mapping[str, Any],
        idempotency_key: str | None,
        body_hash: str,
    ) -> dict[str, Any]:
        """Store a batch in ``validating``; the same key and hash return the first one again.

        Raises ``ConflictError`` for the same key with another hash, ``OverloadedError`` when other
        batches hold as much as may wait.
        """
        ...

    async def known_batch(self, idempotency_key: str, body_hash: str) -> dict[str, Any] | None:
        """The batch created with this key; ``ConflictError`` when its body was another one."""
        ...

    async def batch_input(self, batch_id: str) -> tuple[dict[str, Any], str]:
        """The input file's object, and the blob that holds the rows as JSON lines.

        Before validation that is the file's own blob. A file past its end is still found."""
        ...

    async def get_batch(self, batch_id: str) -> dict[str, Any]: ...
    async def batch_options(self, batch_id: str) -> dict[str, Any]: ...
    async def list_batches(
        self, *, after: str | None, limit: int
    ) -> tuple[list[dict[str, Any]], bool]: ...
    async def cancel_batch(self, batch_id: str) -> dict[str, Any]:
        """Ask for cancellation; a finished batch is returned unchanged."""
        ...

    async def progress(self, batch_id: str) -> dict[str, Any]:
        """``{"version", "status", "request_counts", "classes", "pairs", "usage", "started_at",
        "rate"}``: ``version`` grows with every change, ``rate`` is rows per second over the last
        minute, ``None`` when nothing was finished in it or the batch is over."""
        ...

    async def backlog_rows(self) -> int:
        """Rows of unfinished batches that are not committed yet (0 when idle)."""
        ...

    # runner side
    async def claim_validation(self, worker: str, ttl_s: float) -> ValidationClaim | None:
        """A ``validating`` batch that nobody is validating now, or ``None``."""
        ...

    async def renew_validation(self, batch_id: str, claim: int, ttl_s: float) -> bool:
        """Extend the claim; False when the batch left ``validating`` or was claimed again."""
        ...

    async def postpone_validation(self, batch_id: str, claim: int) -> float:
        """Storage failed, so the try does not count; seconds since that first happened."""
        ...

    async def discard_validation(self, batch_id: str, blob: str | None) -> None:
        """Have deleted what a validator wrote that could not open its batch."""
        ...

    async def open_batch(
        self,
        batch_id: str,
        shards: Sequence[tuple[int, int, int, int]],
        total: int,
        input_blob: str | None = None,
    ) -> bool:
        """``(first_line, num_rows, offset_bytes, num_bytes)`` per shard; goes ``in_progress``,
        or returns False when it is not ``validating`` any more.

        ``input_blob`` is what the shards cut up, where it is not the input file itself."""
        ...

    async def fail_batch(
        self,
        batch_id: str,
        code: str,
        message: str,
        line: int | None = None,
        param: str | None = None,
    ) -> None: ...
    async def lease_shard(
        self, worker: str, ttl_s: float, exclude: Sequence[str] = ()
    ) -> Lease | None:
        """A shard of some running batch, fair between batches; ``None`` when nothing is open.

        Batches whose id is in ``exclude`` are passed over."""
        ...

    async def heartbeat(self, lease: Lease, ttl_s: float) -> bool:
        """Extend the lease. Returns False when the batch is being cancelled.

        Raises ``LeaseLostError`` when another runner holds the shard."""
        ...

    async def release(self, lease: Lease) -> None:
        """Hand an unfinished shard back at once; committed rows stay."""
        ...

    async def commit_row(self, lease: Lease, row: RowCommit) -> bool:
        """Atomically record one row with its pairs. False when the row was committed before.

        Raises ``LeaseLostError`` when the lease is no longer ours."""
        ...

    async def count_try(self, lease: Lease, line: int) -> int:
        """Note that work on a row begins; returns how often it has begun without an end."""
        ...

    async def forget_try(self, lease: Lease, line: int) -> None:
        """Take the last ``count_try`` back: work on the row was interrupted on purpose."""
        ...

    async def claim_quarantine(self, claim: str, ttl_s: float) -> bool:
        """Begin or extend the quarantine, in which one runner has the engines for itself; False
        while there is another claim to it. No two quarantines have the same claim."""
        ...

    async def leave_quarantine(self, claim: str) -> None:
        """End the quarantine; harmless when it is another's."""
        ...

    async def report_runner(self, worker: str, ttl_s: float, quiet_for: str | None) -> str | None:
        """Say that a runner lives for ``ttl_s`` (0: it ends), and for which claim it has
        nothing in flight. Returns the claim there is now."""
        ...

    async def num_unquiet(self, worker: str, claim: str) -> int:
        """Living runners other than ``worker`` that are not quiet for ``claim``."""
        ...

    async def seal_shard(self, lease: Lease) -> None:
        """Write a complete shard's rows and pairs as immutable parts, then drop its open state."""
        ...

    async def finalize_ready(self, worker: str, ttl_s: float) -> list[str]:
        """Finish batches whose shards are all sealed (assemble files, set terminal status)."""
        ...


class PairStream(Protocol):
    """Ordered preference pairs of one batch: sealed parts first, then the live tail."""

    async def read(self, batch_id: str, after: int = -1, limit: int = 256) -> list[dict[str, Any]]:
        """Pairs with ``seq > after`` in ascending order, at most ``limit``; [] when none yet."""
        ...

    async def is_finished(self, batch_id: str) -> bool:
        """True when no further pair can appear."""
        ...

    def follow(self, batch_id: str, after: int = -1) -> AsyncIterator[dict[str, Any]]:
        """All pairs after ``after``, waiting for new ones until the batch is finished."""
        ...

    async def register_reader(self, batch_id: str, reader: str, position: int) -> None:
        """The tail is trimmed only behind every registered reader's position."""
        ...

    async def unregister_reader(self, batch_id: str, reader: str) -> None: ...


class JobStore(Protocol):
    """Fine-tuning jobs, their events and checkpoints, and policy versions."""

    async def create_job(self, job: Mapping[str, Any]) -> dict[str, Any]: ...
    async def get_job(self, job_id: str) -> dict[str, Any]: ...
    async def update_job(self, job_id: str, **fields: Any) -> dict[str, Any]: ...
    async def list_jobs(
        self, *, after: str | None, limit: int
    ) -> tuple[list[dict[str, Any]], bool]: ...
    async def cancel_job(self, job_id: str) -> dict[str, Any]: ...
    async def claim_job(self, worker: str, ttl_s: float) -> dict[str, Any] | None:
        """A queued (or orphaned running) job for this launcher, or ``None``."""
        ...

    async def heartbeat_job(self, job_id: str, worker: str, ttl_s: float) -> bool: ...
    async def add_event(self, job_id: str, event: Mapping[str, Any]) -> None: ...
    async def list_events(
        self, job_id: str, *, after: str | None, limit: int
    ) -> tuple[list[dict[str, Any]], bool]: ...
    async def add_checkpoint(self, job_id: str, checkpoint: Mapping[str, Any]) -> None: ...
    async def list_checkpoints(
        self, job_id: str, *, after: str | None, limit: int
    ) -> tuple[list[dict[str, Any]], bool]: ...

    async def publish_policy(self, version: Mapping[str, Any], *, make_current: bool) -> None:
        """``{"id", "created", "kind": "base|lora|merged", "uri", "parent", "job_id"}``."""
        ...

    async def list_policies(self) -> list[dict[str, Any]]: ...
    async def current_policy(self) -> tuple[str, int]:
        """``(version id, epoch)``; the epoch grows by one with every change."""
        ...

    async def set_current_policy(self, version_id: str) -> int: ...


class BlobStore(Protocol):
    """Immutable blobs by key under one root (fsspec). Writes are atomic: all or nothing."""

    async def put(self, key: str, chunks: AsyncIterator[bytes] | bytes) -> int: ...
    def open_read(
        self, key: str, start: int = 0, length: int | None = None
    ) -> AsyncIterator[bytes]: ...
    def open_file(self, key: str) -> AbstractContextManager[IO[bytes]]:
        """The blob as a file that can be read and sought in; blocking."""
        ...

    async def tree(self, key: str) -> dict[str, int] | None:
        """Files under a registered directory: path below it -> bytes; ``None`` for a file."""
        ...

    async def concat(self, key: str, parts: Sequence[str]) -> int: ...
    async def size(self, key: str) -> int: ...
    async def exists(self, key: str) -> bool: ...
    async def delete(self, key: str) -> None: ...
    async def delete_all(self, prefix: str) -> None:
        """Remove every blob under ``prefix``, which ends in ``/``; none is no error."""
        ...

    async def list_keys(self, prefix: str) -> list[str]:
        """Keys of the blobs under ``prefix``, which ends in ``/``; in order."""
        ...

    def local_path(self, key: str) -> str | None:
        """A filesystem path for the blob when the store is local, else ``None``."""
        ...
