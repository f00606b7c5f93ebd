"""OpenAI-shaped objects and the errors that several stores raise."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mora_serve.errors import ConflictError, LeaseLostError, NotFoundError
from mora_serve.ports import Lease
from mora_serve.store.steps import BatchState
from mora_serve.validation import shown

STAMPS = (
    "in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at",
    "cancelling_at", "cancelled_at",
)  # fmt: skip


def batch_object(state: BatchState) -> dict[str, Any]:
    """OpenAI's Batch object: every field present, unused ones null, ``request_counts`` never."""
    errors = {"object": "list", "data": state.errors} if state.errors else None
    return {
        **state.doc,
        "errors": errors,
        "status": state.status,
        "output_file_id": state.output_file_id,
        "error_file_id": state.error_file_id,
        **{stamp: state.stamps.get(stamp) for stamp in STAMPS},
        "request_counts": counts(state),
        "usage": usage_object(state.usage),
    }


def file_object(
    file_id: str,
    num_bytes: int,
    filename: str,
    *,
    purpose: str,
    created_at: int,
    lifetime_s: int | None = None,
) -> dict[str, Any]:
    """OpenAI's File object; it ends ``lifetime_s`` after its creation, or never."""
    return {
        "id": file_id,
        "object": "file",
        "bytes": num_bytes,
        "created_at": created_at,
        "filename": filename,
        "purpose": purpose,
        "status": "processed",
        "expires_at": None if lifetime_s is None else created_at + lifetime_s,
        "status_details": None,
    }


def counts(state: BatchState) -> dict[str, int]:
    """OpenAI's ``request_counts``."""
    return {"total": state.total, "completed": state.completed, "failed": state.failed}


def usage_object(usage: Mapping[str, int]) -> dict[str, Any]:
    """OpenAI's batch ``usage`` from flat counters; further counters are appended as they are."""
    read, written = usage.get("input_tokens", 0), usage.get("output_tokens", 0)
    known = ("input_tokens", "output_tokens", "cached_tokens", "total_tokens")
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": usage.get("cached_tokens", 0)},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + written,
        **{name: number for name, number in sorted(usage.items()) if name not in known},
    }


def json_lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """JSON Lines with a newline after every row."""
    return b"".join(
        json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n" for row in rows
    )


def no_such(kind: str, object_id: str, param: str, code: str) -> NotFoundError:
    """The error for an id that is not stored; ``kind`` is the noun its message uses."""
    return NotFoundError(f"No {kind} found with id '{shown(object_id)}'.", param, code)


def file_in_use(file_id: str, batch_id: str) -> ConflictError:
    """The error for deleting the input of an unfinished batch."""
    return ConflictError(
        f"file {file_id} must not be deleted while batch {batch_id} reads it; cancel the batch "
        "first",
        "file_id",
        "file_in_use",
    )


def pairs_removed(batch_id: str) -> NotFoundError:
    """The error for pairs that went with the output file of their batch."""
    return NotFoundError(
        f"The pairs of batch {batch_id} were removed with its output file.",
        "batch_id",
        "pairs_removed",
    )


def lease_lost(lease: Lease) -> LeaseLostError:
    """The error for work that came too late."""
    return LeaseLostError(
        f"the lease on shard {lease.shard} of {lease.batch_id} must be held by {lease.worker} "
        f"(token {lease.token}), but the shard was taken over or closed"
    )


def bad_cursor(after: str) -> NotFoundError:
    """The error for a page cursor that names nothing."""
    return NotFoundError(f"after must be the id of a listed object, got '{shown(after)}'", "after")


def idempotency_conflict() -> ConflictError:
    """The error for an idempotency key that was used for another request."""
    return ConflictError(
        "Idempotency-Key must not be reused for a different request.",
        "Idempotency-Key",
        "idempotency_key_reused",
    )
