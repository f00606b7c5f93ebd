"""Scores, diagnostics and rewrites: the method's own responses."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from api.schemas.common import ErrorBody, Wire


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
