"""Values that cross a port: prompts, sampling parameters, completions, scores, rollouts.

These are records without behaviour. They are frozen, picklable across Ray and free of engine types.
What is computed from them (statistics, classes, gains, pairs) lives with the module that computes
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal, TypeVar

Dimension = str
"""Name of a reward dimension, for example ``"helpful"``."""

FinishReason = Literal["stop", "length"]
"""``length`` marks an answer cut by ``max_tokens``; such answers score wrongly and are reported."""

ScoreStatus = Literal["ok", "failed", "timeout", "truncated"]
"""Only ``ok`` carries a value. ``truncated`` means that the answer does not fit the scorer."""

T = TypeVar("T")


def compact(cls: type[T]) -> type[T]:
    """Pickle a slotted dataclass by position, in a third of the time that the state which
    dataclasses generate takes: lists of these records cross processes for every batch row."""
    state = attrgetter(*cls.__slots__)  # type: ignore[attr-defined]

    def reduce(self: T) -> tuple[type[T], tuple[Any, ...]]:
        return cls, state(self)

    cls.__reduce__ = reduce  # type: ignore[assignment]
    return cls


@compact
@dataclass(frozen=True, slots=True)
class Message:
    """One chat turn, for example ``Message("user", "Why is the sky blue?")``."""

    role: Literal["system", "user", "assistant"]
    content: str


Messages = tuple[Message, ...]
"""A conversation; the last turn is the user's."""


@compact
@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn, for example ``Sampling(n=8, temperature=0.7)``."""

    n: int = 8
    """Completions per prompt, at least 1."""
    temperature: float = 1.0
    """0 is greedy; at most 2."""
    top_p: float = 1.0
    """Nucleus mass in (0, 1]."""
    max_tokens: int = 64
    """Completion length limit in tokens."""
    seed: int | None = None
    """Real engines promise the distribution only; the fakes promise equal bytes for equal seeds."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; not part of the returned text."""


@compact
@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt with its sampling, for one call of a generator."""

    prompt: Messages
    sampling: Sampling
    model: str | None = None
    """Policy version to sample; ``None`` is the version that is current when generation starts."""


@compact
@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer."""

    text: str
    finish_reason: FinishReason
    num_tokens: int
    """Completion tokens, the end-of-sequence token included when it was drawn."""


@compact
@dataclass(frozen=True, slots=True)
class Generation:
    """Answers to one request: exactly ``sampling.n`` of them, all from one policy version."""

    completions: tuple[Completion, ...]
    policy_version: str
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    """Prompt tokens that came from the engine's prefix cache."""


@compact
@dataclass(frozen=True, slots=True)
class Failure:
    """Why one item of a list call has no result, while its neighbours may have one."""

    code: str
    """Stable machine-readable code, for example ``context_length_exceeded``."""
    message: str
    """One sentence for the user. Never contains prompt text."""
    retryable: bool
    """True for infrastructure failures; False when the item itself is at fault."""


@compact
@dataclass(frozen=True, slots=True)
class ScoreGroup:
    """A prompt with answers to it. Scorers encode the prompt once for all of them."""

    prompt: Messages
    responses: tuple[str, ...]


@compact
@dataclass(frozen=True, slots=True)
class Score:
    """What one scorer says of one answer on one dimension."""

    status: ScoreStatus
    raw: float | None
    """The model's reward with its sign applied (larger is better); ``None`` unless ``ok``."""
    value: float | None
    """Calibrated reward ``z``; ``None`` unless ``ok`` and calibrated."""
    reason: str | None
    """Why the status is not ``ok``, or what is unusual about an ``ok`` score."""
    model: str
    revision: str


@compact
@dataclass(frozen=True, slots=True)
class Rollout:
    """A completion with its scores by dimension."""

    index: int
    """Position within the scored group, from 0, unique across rounds."""
    completion: Completion
    scores: Mapping[Dimension, Score]


@compact
@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """All rollouts of one prompt under one policy version: the unit of every statistic."""

    prompt_id: str
    """sha256 of the prompt messages, see :func:`mora_serve.identity.prompt_id`."""
    prompt: Messages
    policy_version: str
    rollouts: tuple[Rollout, ...]
    seeds: tuple[int | None, ...] = ()
    """The seed of each round that contributed rollouts."""
    num_prompt_tokens: int = 0
    extra: Mapping[str, str] = field(default_factory=dict)
    """Free provenance for callers, kept verbatim."""
