"""Whether a rewrite is accepted: chosen on one sample, decided on another (DESIGN section 2).

The gain of a candidate is the change of the expected ceiling from the original, at equal ``n``,
in z, averaged over the dimensions the rewrite is meant to open. The largest *selection gain* picks
one candidate; it is biased upwards by the picking and never decides. :func:`decide` stands on fresh
rollouts of that candidate and of the original alone: it accepts when the one-sided lower bound of
the gain is above ``min_gain`` and that of the change on what the original already reaches is above
``-max_ceiling_drop``. An unchanged prompt is then accepted with probability ``1 - confidence`` at
most. Pure functions over calibrated groups; drawing the rollouts is the flow's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mora_serve.calibration import Calibrator
from mora_serve.config import MethodSettings
from mora_serve.prompt_model import expected_ceiling_gain
from mora_serve.types import Dimension, ScoredGroup

Reason = Literal["accepted", "gain", "ceiling_drop", "missing_scores"]


@dataclass(frozen=True, slots=True)
class Decision:
    """Outcome of the confirmation sample. Gains are in z."""

    accepted: bool
    reason: Reason
    """``gain``: its lower bound is too low; ``ceiling_drop``: a reachable dimension may have lost
    too much; ``missing_scores``: too few valid scores to decide."""
    gain: float | None
    """Mean over the targets; ``None`` only for ``missing_scores``."""
    gain_lower: float | None
    gains: Mapping[Dimension, float] = field(default_factory=dict)
    """By target dimension."""
    kept: Mapping[Dimension, float] = field(default_factory=dict)
    """Change of the expected ceiling by dimension the original reaches."""
    kept_lower: Mapping[Dimension, float] = field(default_factory=dict)
    num_candidate: int = 0
    """Rollouts of the candidate the gain stands on."""
    num_original: int = 0


def selection_gain(
    candidate: ScoredGroup,
    original: ScoredGroup,
    targets: Sequence[Dimension],
    calibrator: Calibrator,
    n: int,
) -> float | None:
    """Gain measured on the sample candidates are picked by; ``None`` for too few valid scores."""
    estimate = expected_ceiling_gain(candidate, original, targets, calibrator, n=n)
    return None if estimate is None else estimate.gain


def choose(gains: Sequence[float | None]) -> int | None:
    """Index of the largest selection gain, the first of equals; ``None`` when none was measured."""
    measured = [(gain, -index) for index, gain in enumerate(gains) if gain is not None]
    return -max(measured)[1] if measured else None


def decide(
    candidate: ScoredGroup,
    original: ScoredGroup,
    targets: Sequence[Dimension],
    reachable: Sequence[Dimension],
    *,
    calibrator: Calibrator,
    method: MethodSettings,
    n: int,
) -> Decision:
    """Accept or reject on confirmation samples, which must be drawn after the choice.

    ``targets`` is what the rewrite should open (not empty), ``reachable`` what the original
    reaches (empty for a ``flat`` prompt). ``n`` is what ceilings refer to.
    """
    level = method.confidence
    gain = expected_ceiling_gain(candidate, original, targets, calibrator, n=n, confidence=level)
    kept = {
        k: expected_ceiling_gain(candidate, original, [k], calibrator, n=n, confidence=level)
        for k in reachable
    }
    changes = {k: item for k, item in kept.items() if item is not None}
    if gain is None or len(changes) < len(kept):
        return Decision(False, "missing_scores", None, None)
    drops = any(item.lower_bound <= -method.max_ceiling_drop for item in changes.values())
    reason: Reason = "accepted"
    if gain.lower_bound <= method.min_gain:
        reason = "gain"
    elif drops:
        reason = "ceiling_drop"
    return Decision(
        accepted=reason == "accepted",
        reason=reason,
        gain=gain.gain,
        gain_lower=gain.lower_bound,
        gains=gain.per_dimension,
        kept={k: item.gain for k, item in changes.items()},
        kept_lower={k: item.lower_bound for k, item in changes.items()},
        num_candidate=gain.num_candidate,
        num_original=gain.num_original,
    )
