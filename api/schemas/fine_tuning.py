"""Fine-tuning jobs, their events and checkpoints, as OpenAI answers them."""

from __future__ import annotations

from typing import Any, Literal

from api.schemas.common import Wire


class FineTuningError(Wire):
    code: str
    message: str
    param: str | None = None


class FineTuningStage(Wire):
    """One stage of a sequential job that samples its pairs."""

    dimension: str
    model: str
    """Version that the stage samples, and trains further."""
    batch_id: str
    version: str | None
    """What the stage published."""
    steps: int
    trained_tokens: int
    status: Literal["running", "succeeded", "left_out"]
    """``left_out``: the batch had no pair of this dimension."""


class FineTuningJob(Wire):
    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    error: FineTuningError | None
    estimated_finish: int | None
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: dict[str, Any]
    integrations: list[Any] | None
    metadata: dict[str, str] | None
    method: dict[str, Any] | None
    model: str
    mora: dict[str, Any] | None
    organization_id: str
    result_files: list[str]
    seed: int
    stages: list[FineTuningStage] | None
    """Of a sequential job, those begun so far; null otherwise."""
    status: Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
    suffix: str | None
    trained_tokens: int | None
    training_file: str
    validation_file: str | None


class FineTuningEvent(Wire):
    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class FineTuningCheckpoint(Wire):
    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str | None
    fine_tuning_job_id: str
    metrics: dict[str, Any]
    step_number: int
