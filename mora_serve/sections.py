"""What the sections of the settings have in common: their base class, and replicas."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    """Base of every section: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ReplicaSettings(Section):
    """Ray Serve placement and scale of one deployment."""

    min_replicas: int = Field(default=1, ge=0)
    """Replicas while nothing is to be done; 0 starts from none, which the first calls wait for."""
    max_replicas: int = Field(default=1, ge=1)
    target_ongoing_requests: Positive | None = None
    """Calls under way per replica above which another one starts; ``None`` is half of
    ``max_ongoing_requests``. A call of a batch runner carries the prompts of many rows, so that a
    few of them fill an engine. Batch runners themselves go by their backlog instead."""
    upscale_delay_s: float = Field(default=10.0, ge=0.0)
    """How long more replicas must be wanted; the first one after none starts at once."""
    downscale_delay_s: float = Field(default=300.0, ge=0.0)
    """How long fewer replicas must be wanted."""
    downscale_to_zero_delay_s: float | None = Field(default=None, ge=0.0)
    """The same for the last replica; ``None`` is ``downscale_delay_s``."""
    look_back_period_s: Positive = 30.0
    """Calls under way are averaged over this time."""
    num_cpus: float = Field(default=0.0, ge=0.0)
    num_gpus: float = Field(default=0.0, ge=0.0)
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources, for example one that only the nodes of one worker group have."""
    bundles: tuple[dict[str, float], ...] = ()
    """Placement group of a replica whose engine starts Ray actors of its own, on several nodes: one
    bundle with one GPU per rank. The replica itself takes what the fields above say of the first
    bundle. Empty: no placement group."""
    bundle_strategy: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"
    max_surge_percent: int = Field(default=0, ge=0, le=100)
    """How many replicas more than wanted a change of settings may start before it stops old ones. 0
    stops old ones first, so that a single replica is away while its successor loads."""
    max_ongoing_requests: int = Field(default=64, ge=1)
    health_check_period_s: Positive = 5.0
    health_check_timeout_s: Positive = 30.0
    graceful_shutdown_timeout_s: Positive = 20.0
