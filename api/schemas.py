"""Wire schemas of every response: OpenAI's objects, and ours in their manner.

They document the API (``openapi.json``) and tests check every response against them; responses are
built by the core and sent without a second validation pass. A field that may be ``null`` says so.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

ItemT = TypeVar("ItemT")


class Wire(BaseModel):
    """Base: a response with a field we did not document is a bug."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorBody(Wire):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Wire):
    """OpenAI's error envelope; the body of every response that is not a success."""

    error: ErrorBody


class Page(Wire, Generic[ItemT]):
    """A page of a list, newest first; pass ``last_id`` as ``after`` for the next one."""

    object: Literal["list"]
    data: list[ItemT]
    first_id: str | None
    last_id: str | None
    has_more: bool


# --- chat and models ----------------------------------------------------------------------------


class ChatMessageOut(Wire):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(Wire):
    index: int
    message: ChatMessageOut
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class PromptTokensDetails(Wire):
    cached_tokens: int


class ChatUsage(Wire):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class ChatCompletion(Wire):
    """``model`` is the policy version that answered."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage
    system_fingerprint: None = None


class ChatDelta(Wire):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Wire):
    index: int
    delta: ChatDelta
    finish_reason: Literal["stop", "length"] | None
    logprobs: None = None


class ChatChunk(Wire):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: ChatUsage | None = None
    system_fingerprint: None = None


class Model(Wire):
    """A policy version that can be sampled."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    current: bool
    """Whether requests without a model sample it."""
    kind: str
    parent: str | None
    job_id: str | None


class ModelList(Wire):
    object: Literal["list"]
    data: list[Model]


# --- method -------------------------------------------------------------------------------------


class ScoreOut(Wire):
    value: float | None
    raw: float | None
    status: Literal["ok", "failed", "timeout", "truncated"]
    reason: str | None
    model: str
    revision: str


class ScoreRowOut(Wire):
    object: Literal["score"]
    index: int
    scores: dict[str, ScoreOut]


class ScoresResponse(Wire):
    object: Literal["list"]
    data: list[ScoreRowOut]


class GetRewardResponse(Wire):
    """OpenRLHF's shape. An entry is null only where ``server.reward_on_failure`` is null."""

    rewards: list[float | None]
    """Weighted sum of the calibrated rewards."""
    scores: list[float | None]
    """The same values, by which OpenRLHF filters groups."""
    extra_logs: dict[str, list[float | None]]
    """``<dimension>_z`` and ``<dimension>_raw``, one value a row."""


class PromptError(ErrorBody):
    """Why one prompt has no result while its neighbours may have one."""


class RolloutOut(Wire):
    """``finish_reason`` and ``num_tokens`` are null for an answer that was given, not sampled."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    num_tokens: int | None
    scores: dict[str, ScoreOut]


class DimensionOut(Wire):
    """``state`` is null where too few scores are valid for a statement."""

    mean: float | None
    spread: float | None
    ceiling: float | None
    ceiling_n: int | None
    floor: float | None
    n_valid: int
    posterior_mean: float | None
    posterior_sd: float | None
    expected_ceiling: float | None
    bound: float | None
    reach: float | None
    state: Literal["reachable", "unreachable", "undecided", "unmeasurable"] | None
    reliability: float | None


class DiagnosticOut(Wire):
    model_config = ConfigDict(
        extra="forbid", protected_namespaces=(), serialize_by_alias=True, validate_by_name=True
    )

    object: Literal["diagnostic"]
    index: int
    prompt_id: str
    status: Literal["ok", "failed"]
    error: PromptError | None
    prompt_class: str | None = Field(alias="class")
    class_probability: float | None
    conflicted: bool | None
    conflicts: list[list[str]]
    dimensions: dict[str, DimensionOut]
    correlation: dict[str, Any] | None
    pareto: list[int]
    hypervolume: float | None
    n_joint: int
    num_rollouts: int
    share_cut: float | None
    warnings: list[str]
    policy_version: str | None
    prompt: list[Turn] | None
    """The conversation that was sampled; null without ``include_rollouts``."""
    rollouts: list[RolloutOut] | None


class WorkUsage(Wire):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    rollouts: int
    discarded_rollouts: int


class DiagnosticsResponse(Wire):
    object: Literal["list"]
    data: list[DiagnosticOut]
    aggregate: dict[str, Any]
    usage: WorkUsage


class Turn(Wire):
    role: Literal["system", "user", "assistant"]
    content: str


class RewardOut(Wire):
    value: float | None
    raw: float | None


class Pair(Wire):
    """One preference row; ``seq`` is null outside a batch's stream."""

    seq: int | None
    prompt_id: str
    prompt: list[Turn]
    chosen: list[Turn]
    rejected: list[Turn]
    margin: float
    mode: Literal["simultaneous", "sequential"]
    stage: str | None
    chosen_scores: dict[str, RewardOut]
    rejected_scores: dict[str, RewardOut]
    policy_version: str
    provenance: dict[str, Any]


class Confirmation(Wire):
    """What fresh rollouts of candidate and original say; acceptance is decided on it alone."""

    gain_lower: float | None
    gains: dict[str, float | None]
    kept: dict[str, float | None]
    kept_lower: dict[str, float | None]
    num_candidate: int | None
    num_original: int | None


class CandidateOut(Wire):
    prompt: list[Turn]
    strategy: str
    template_hash: str
    targets: list[str]
    diagnostic: DiagnosticOut | None
    selection_gain: float | None
    """Biased upwards: the best of several is chosen by it."""
    gain: float | None
    """Confirmed on fresh rollouts; null for candidates that were not chosen."""
    confirmation: Confirmation | None
    accepted: bool
    reason: str | None


class RewriteResponse(Wire):
    object: Literal["rewrite"]
    original: DiagnosticOut
    candidates: list[CandidateOut]
    accepted: int | None
    pairs: list[Pair]
    pairs_from: str | None
    no_pairs: dict[str, int]
    usage: WorkUsage


# --- files and batches --------------------------------------------------------------------------


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


# --- fine-tuning --------------------------------------------------------------------------------


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


# --- health -------------------------------------------------------------------------------------


class Alive(Wire):
    status: Literal["ok"]


class Ready(Wire):
    status: Literal["ok", "not_ready"]
    reasons: list[str]
    """Why requests cannot be served yet, one per part; empty when they can."""
    pools: dict[str, str]
    """Each pool's state, for people."""
