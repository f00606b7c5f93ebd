"""Files, uploads and batches, as OpenAI answers them, and a batch's events."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from api.schemas.common import Wire


class FileObject(Wire):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output", "fine-tune", "fine-tune-results"]
    status: Literal["uploaded", "processed", "error"]
    expires_at: int | None
    status_details: str | None


class FileDeleted(Wire):
    id: str
    object: Literal["file"]
    deleted: bool


class Upload(Wire):
    """A file that comes in parts."""

    id: str
    object: Literal["upload"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["batch", "fine-tune"]
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileObject | None


class UploadPart(Wire):
    id: str
    object: Literal["upload.part"]
    created_at: int
    upload_id: str


class RequestCounts(Wire):
    total: int
    completed: int
    failed: int


class BatchErrorOut(Wire):
    code: str | None
    message: str | None
    param: str | None
    line: int | None


class BatchErrors(Wire):
    object: Literal["list"]
    data: list[BatchErrorOut]


class InputTokensDetails(Wire):
    cached_tokens: int


class OutputTokensDetails(Wire):
    reasoning_tokens: int


class BatchUsage(BaseModel):
    """Tokens, and further counters of the work under their own names."""

    model_config = ConfigDict(extra="allow")

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class Batch(Wire):
    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired",
        "cancelling", "cancelled",
    ]  # fmt: skip
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None
    usage: BatchUsage | None
    model: str | None
    """Policy version that was asked for by rows without one of their own; null for scores."""


class BatchEvent(Wire):
    """One server-sent progress event of a batch."""

    object: Literal["batch.event"]
    batch_id: str
    status: str
    request_counts: RequestCounts
    classes: dict[str, int]
    pairs: int
    rate: float | None
    """Rows per second over the last minute; null when none ended in it, or the batch is over."""
    eta_s: float | None
    """Seconds until all rows are done at this rate."""
