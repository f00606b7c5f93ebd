"""The ledger's atomic steps: what a storage engine must do indivisibly for batches to be durable.

:class:`LedgerSteps` is implemented twice, by :mod:`mora_serve.store.memory` (one process, whose
event loop makes each step atomic) and by :mod:`mora_serve.store.redis_store` (one Lua script or one
command per step). Everything that needs no atomicity of its own (object shapes, writing parts,
assembling files) lives above, in :mod:`mora_serve.store.batches` and
:mod:`mora_serve.store.pair_stream`, and is shared.

Life of a batch::

    validating --open--> in_progress --all shards sealed--> finalizing --finish--> completed
        | fail               |  '--window over--> finalizing ------------finish--> expired
        v                    v
      failed             cancelling --no live lease--> (closed) ---------finish--> cancelled

A *closed* batch takes no further row: it is ``finalizing``, terminal, or ``cancelling`` without
live leases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from mora_serve.ports import Lease, RowCommit
from mora_serve.store.file_steps import FileSteps
from mora_serve.store.rate import Bucket

TERMINAL = frozenset({"completed", "failed", "expired", "cancelled"})
ShardSpec = tuple[int, int, int, int]
"""``(first_line, num_rows, offset_bytes, num_bytes)``."""

READER_TTL_S = 900.0
"""A reader that has not reported for this long no longer holds the tail back. Nothing is lost by
it: what is trimmed is sealed, and reads fall back to the sealed parts."""


@dataclass(slots=True)
class BatchState:
    """Everything stored about a batch, apart from its shards and rows."""

    doc: dict[str, Any]
    """Fields fixed at creation: ``id``, ``endpoint``, ``input_file_id``, ``metadata`` ..."""
    options: dict[str, Any]
    status: str
    closed: bool = False
    total: int = 0
    completed: int = 0
    failed: int = 0
    pairs: int = 0
    """Pairs so far; the next ``seq``."""
    pairs_sealed: int = 0
    """Pairs with ``seq`` below this are in sealed parts."""
    stamps: dict[str, int] = field(default_factory=dict)
    """``in_progress_at`` and its siblings, Unix seconds."""
    errors: list[dict[str, Any]] = field(default_factory=list)
    output_file_id: str | None = None
    error_file_id: str | None = None
    usage: dict[str, int] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    version: int = 1
    """Grows with every change of what a reader of the batch can see."""
    input_blob: str | None = None
    """Blob that the shards cut up; ``None`` where it is the input file's own."""
    pairs_removed: bool = False
    """True once the pairs are gone, as the output file is."""
    now: float = 0.0
    """The store's clock when the state was read, Unix seconds."""


@dataclass(frozen=True, slots=True)
class RateState:
    """How fast the rows of a batch are committed, see :mod:`mora_serve.store.rate`."""

    working_since: float
    """When a shard was leased while none was, last; Unix seconds."""
    buckets: tuple[Bucket, ...]


@dataclass(frozen=True, slots=True)
class Backlog:
    """What unfinished batches have left to do."""

    rows: int
    """Rows not committed. A batch that is not validated yet counts by its estimate, one that is
    only to be assembled counts 1."""
    num_bytes: int
    """Input bytes of those rows."""
    rate: float
    """Rows per second over the last minute, all batches together."""


@dataclass(frozen=True, slots=True)
class StoredRow:
    """One committed row of an open shard."""

    line: int
    is_error: bool
    data: bytes


@dataclass(frozen=True, slots=True)
class SealedShard:
    """Where the rows of a sealed shard are. A key is ``None`` when the part would be empty."""

    shard: int
    output: str | None
    error: str | None


@dataclass(frozen=True, slots=True)
class PairPart:
    """Pairs ``first`` to ``last`` (both included) as one JSONL blob."""

    first: int
    last: int
    key: str


class LedgerSteps(FileSteps, Protocol):
    """Atomic steps on batches, shards and the pair tail. All of them are safe to repeat."""

    async def ping(self) -> None: ...
    async def aclose(self) -> None: ...

    async def create_batch(
        self,
        doc: Mapping[str, Any],
        options: Mapping[str, Any],
        idempotency_key: str | None,
        body_hash: str,
        window_s: float,
        *,
        input_bytes: int,
        input_rows: int,
        max_rows: int,
        max_bytes: int,
    ) -> str | Backlog:
        """Returns the id of the stored batch: the first one for a repeated key.

        ``input_rows`` is what the batch counts as until it is validated. ``created_at`` and
        ``expires_at`` are stamped by the store's clock. Raises ``ConflictError``
        for a repeated key with another hash. Where other batches are unfinished and hold
        ``max_rows`` rows, or more than ``max_bytes`` together with this one, nothing is stored and
        what they hold is returned."""
        ...

    async def known_batch(self, idempotency_key: str, body_hash: str) -> str | None:
        """The batch created with this key; ``ConflictError`` when the hash is another one."""
        ...

    async def get_state(self, batch_id: str) -> BatchState | None: ...
    async def list_batches(self, *, after: str | None, limit: int) -> list[BatchState]: ...
    async def cancel(self, batch_id: str) -> bool:
        """Ask for cancellation; False when there is no such batch."""
        ...

    async def backlog(self) -> Backlog: ...
    async def progress(self, batch_id: str) -> tuple[BatchState, RateState] | None: ...
    async def unfinished(self) -> list[BatchState]:
        """Batches that are not in a terminal status."""
        ...

    async def claim_validation(self, worker: str, ttl_s: float) -> tuple[str, int, int] | None:
        """Id of a batch, number of this claim on it, and tries to validate it with this one."""
        ...

    async def renew_validation(self, batch_id: str, claim: int, ttl_s: float) -> bool:
        """False when there is a later claim, or the batch is no longer ``validating``."""
        ...

    async def postpone_validation(self, batch_id: str, claim: int) -> float:
        """Take the try of this claim back; returns seconds since that was first done."""
        ...

    async def renew_claim(self, batch_id: str, worker: str, ttl_s: float) -> bool:
        """Extend a claim on assembly; False when it is someone else's or over."""
        ...

    async def open_batch(
        self, batch_id: str, shards: Sequence[ShardSpec], total: int, input_blob: str | None
    ) -> bool:
        """False when the batch is no longer ``validating``; nothing changes then."""
        ...

    async def fail(self, batch_id: str, error: Mapping[str, Any]) -> bool: ...
    async def lease_shard(
        self, worker: str, ttl_s: float, exclude: Sequence[str] = ()
    ) -> Lease | None: ...
    async def lease_leftover(self, batch_id: str, worker: str, ttl_s: float) -> Lease | None:
        """Take any unsealed shard of a closed batch, fencing off whoever held it."""
        ...

    async def heartbeat(self, lease: Lease, ttl_s: float) -> Literal["ok", "stop", "lost"]: ...
    async def release(self, lease: Lease) -> None: ...
    async def commit_row(
        self, lease: Lease, row: RowCommit
    ) -> Literal["committed", "repeated", "lost"]: ...
    async def shard_rows(self, lease: Lease) -> list[StoredRow]:
        """Committed rows of an unsealed shard, by line."""
        ...

    async def count_try(self, lease: Lease, line: int) -> int:
        """Tries of the row, this lease's included; 0 when the lease is lost."""
        ...

    async def forget_try(self, lease: Lease, line: int) -> None:
        """Take this lease's ``count_try`` back, also when the lease was lost since."""
        ...

    async def claim_quarantine(self, claim: str, ttl_s: float) -> bool:
        """Begin or extend the one quarantine; False while there is another claim to it."""
        ...

    async def leave_quarantine(self, claim: str) -> None: ...
    async def report_runner(self, worker: str, ttl_s: float, quiet_for: str | None) -> str | None:
        """The runner lives for ``ttl_s`` (0: it ends), and has nothing in flight because of
        the claim ``quiet_for``. Returns the claim there is now."""
        ...

    async def num_unquiet(self, worker: str, claim: str) -> int:
        """Living runners other than ``worker`` that are not quiet for ``claim``."""
        ...

    async def seal_shard(
        self, lease: Lease, sealed: SealedShard, num_rows: int, num_extra: int
    ) -> Literal["sealed", "changed", "lost"]:
        """Record the parts and drop the rows; ``changed`` when the shard does not hold
        ``num_rows`` rows or is not complete while its batch still takes rows.

        ``num_extra`` failed rows are in the parts without having been committed."""
        ...

    async def sealed_shards(self, batch_id: str) -> list[SealedShard]:
        """In shard order."""
        ...

    async def claim_finalize(self, worker: str, ttl_s: float) -> str | None:
        """Close batches that are due (sealed, expired, cancelled without leases); claim one."""
        ...

    async def finish(
        self,
        batch_id: str,
        output: tuple[dict[str, Any], str] | None,
        error: tuple[dict[str, Any], str] | None,
    ) -> str:
        """Register the files and enter the terminal status, which is returned."""
        ...

    async def tail(self, batch_id: str, after: int, limit: int) -> list[dict[str, Any]]:
        """Pairs of the tail with ``seq > after``, ascending; may start later than ``after + 1``."""
        ...

    async def tail_length(self, batch_id: str) -> int: ...
    async def add_pair_part(self, batch_id: str, part: PairPart) -> bool:
        """Record a part that starts where the sealed pairs end, then trim; False otherwise."""
        ...

    async def pair_part(self, batch_id: str, seq: int) -> PairPart | None:
        """The part that holds ``seq``."""
        ...

    async def set_reader(self, batch_id: str, reader: str, position: int | None) -> None:
        """Register, move or (``None``) remove a reader of the tail."""
        ...
