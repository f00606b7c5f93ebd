"""Groups built from plain numbers, for tests of the method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mora_serve.calibration import Calibrator
from mora_serve.types import Completion, FinishReason, Message, Rollout, Score, ScoredGroup

MODEL, REVISION = "reward-model", "rev1"
FAILED = "failed"
Raw = float | str | None
"""A raw reward; a status name for a score without value; None for no score at all."""


def make_score(raw: Raw, model: str = MODEL, revision: str = REVISION) -> Score:
    if isinstance(raw, str):
        return Score(raw, None, None, "no value", model, revision)  # type: ignore[arg-type]
    return Score("ok", raw, None, None, model, revision)


def make_group(
    columns: Mapping[str, Sequence[Raw]],
    *,
    name: str = "prompt",
    tokens: Sequence[int] | None = None,
    finish: FinishReason = "stop",
    policy: str = "base",
    revision: str = REVISION,
) -> ScoredGroup:
    """A raw group; ``columns[dimension][r]`` is the reward of rollout ``r``."""
    count = len(next(iter(columns.values())))
    rollouts = tuple(
        Rollout(
            index,
            Completion(f"answer {index}", finish, tokens[index] if tokens else 10),
            {
                k: make_score(raw, revision=revision)
                for k, column in columns.items()
                if (raw := column[index]) is not None
            },
        )
        for index in range(count)
    )
    return ScoredGroup(name, (Message("user", name),), policy, rollouts)


def identity(*dimensions: str, tau: float = 1.0, sigma: float = 1.0) -> Calibrator:
    scorers = dict.fromkeys(dimensions, (MODEL, REVISION))
    return Calibrator.identity(scorers, tau=tau, sigma=sigma)
