"""Preference pairs from a scored group, one per group and stage (DESIGN section 2).

*Simultaneous*: with utility ``u = sum_k w_k z_k`` chosen has the highest ``u`` (so it is on the
Pareto front), rejected is the one with the largest margin in ``u``. *Sequential*, stage ``k``: the
two rollouts with the largest gap in ``z_k``. In both the margin is at least ``min_margin`` and
chosen loses no more than ``tolerance`` on any dimension (sequential: on those already aligned).

Only rollouts with a valid score on every dimension take part, and never two whose texts are equal
after whitespace normalisation. Ties break by rollout index, so the order of the rollouts does not
matter. A group without such a pair gives a :class:`NoPair` with the rule that left none, which
callers count. Groups are never filtered by the variance of a scalar reward: rollouts whose rewards
differ but sum to the same are told apart by the stages of the sequential mode.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mora_serve.types import Dimension, Rollout, ScoredGroup

Mode = Literal["simultaneous", "sequential"]
NoPairReason = Literal["missing_scores", "equal_texts", "margin", "tolerance", "length"]


@dataclass(frozen=True, slots=True)
class PairRules:
    """What makes two rollouts a preference pair, for example ``PairRules(min_margin=0.5)``."""

    weights: Mapping[Dimension, float] = field(default_factory=dict)
    """Utility weights, positive; an absent dimension weighs 1."""
    min_margin: float = 0.5
    """Least margin in z (simultaneous: in utility)."""
    tolerance: float = 0.5
    """How much chosen may lose on a protected dimension, in z."""
    length_slopes: Mapping[Dimension, float] | None = None
    """Slope of z on log tokens by dimension; ``None`` turns length control off. With it, a pair
    whose margin falls below ``min_margin`` once the slope is subtracted is a length-only win: no
    pair."""

    def __post_init__(self) -> None:
        if any(not weight > 0 or math.isinf(weight) for weight in self.weights.values()):
            raise ValueError("weights must be positive and finite")


@dataclass(frozen=True, slots=True)
class PairChoice:
    """Two rollouts of one group, ``chosen`` being preferred."""

    chosen: Rollout
    rejected: Rollout
    margin: float
    """Difference in utility (simultaneous) or in ``z`` of the stage's dimension (sequential)."""
    mode: Mode
    stage: Dimension | None
    """The dimension aligned by this stage; ``None`` in simultaneous mode."""
    aligned: tuple[Dimension, ...] = ()
    """Dimensions that earlier stages aligned."""


@dataclass(frozen=True, slots=True)
class NoPair:
    """Why a group gives no pair: the first rule that no two rollouts passed."""

    reason: NoPairReason
    mode: Mode
    stage: Dimension | None


def select_pairs(
    group: ScoredGroup, dimensions: Sequence[Dimension], mode: Mode, rules: PairRules
) -> list[PairChoice | NoPair]:
    """One outcome in simultaneous mode, one per dimension, in order, in sequential mode."""
    if mode == "simultaneous":
        return [select_simultaneous(group, dimensions, rules)]
    return [
        select_sequential(group, dimensions, stage, dimensions[:position], rules)
        for position, stage in enumerate(dimensions)
    ]


def select_simultaneous(
    group: ScoredGroup, dimensions: Sequence[Dimension], rules: PairRules
) -> PairChoice | NoPair:
    """The rollout of highest utility against the one it beats by most within the rules."""
    table = _Table.of(group, dimensions)
    weights = np.array([rules.weights.get(k, 1.0) for k in dimensions])
    if len(table.rollouts) < 2:
        return NoPair("missing_scores", "simultaneous", None)
    utility = table.z @ weights
    best = int(np.argmax(utility))
    margins = np.full((len(utility), len(utility)), -np.inf)
    margins[best] = utility[best] - utility
    slope = sum(w * _slope(rules, k) for w, k in zip(weights, dimensions, strict=True))
    found = _best_pair(table, margins, range(len(dimensions)), float(slope), rules)
    if isinstance(found, str):
        return NoPair(found, "simultaneous", None)
    chosen, rejected = (table.rollouts[i] for i in found)
    return PairChoice(chosen, rejected, float(margins[found]), "simultaneous", None)


def select_sequential(
    group: ScoredGroup,
    dimensions: Sequence[Dimension],
    stage: Dimension,
    aligned: Sequence[Dimension],
    rules: PairRules,
) -> PairChoice | NoPair:
    """The largest gap on ``stage`` that gives up no more than the tolerance on ``aligned``."""
    table = _Table.of(group, dimensions)
    if len(table.rollouts) < 2:
        return NoPair("missing_scores", "sequential", stage)
    position = {k: i for i, k in enumerate(dimensions)}
    column = table.z[:, position[stage]]
    margins = column[:, None] - column[None, :]
    protected = [position[k] for k in aligned]
    found = _best_pair(table, margins, protected, _slope(rules, stage), rules)
    if isinstance(found, str):
        return NoPair(found, "sequential", stage)
    chosen, rejected = (table.rollouts[i] for i in found)
    return PairChoice(chosen, rejected, float(margins[found]), "sequential", stage, tuple(aligned))


def valid_rollouts(group: ScoredGroup, dimensions: Sequence[Dimension]) -> list[Rollout]:
    """Rollouts with a usable score on every dimension, by ascending index."""
    valid = [r for r in group.rollouts if all(_usable(r, dimension) for dimension in dimensions)]
    return sorted(valid, key=lambda rollout: rollout.index)


def normalised(text: str) -> str:
    """The text with every run of whitespace made one space, and none at its ends."""
    return " ".join(text.split())


@dataclass(frozen=True, slots=True)
class _Table:
    rollouts: list[Rollout]
    """Valid rollouts by ascending index, ``[J]``."""
    z: NDArray[np.float64]
    """Calibrated rewards ``[J, K]``."""
    distinct: NDArray[np.bool_]
    """``[J, J]``: the two texts differ."""
    log_tokens: NDArray[np.float64]

    @classmethod
    def of(cls, group: ScoredGroup, dimensions: Sequence[Dimension]) -> _Table:
        rollouts = valid_rollouts(group, dimensions)
        z = np.array([[r.scores[k].value for k in dimensions] for r in rollouts], dtype=np.float64)
        names: dict[str, int] = {}
        texts = [names.setdefault(normalised(r.completion.text), len(names)) for r in rollouts]
        ids = np.array(texts, dtype=np.int64)
        tokens = [max(1, r.completion.num_tokens) for r in rollouts]
        return cls(
            rollouts,
            z.reshape(len(rollouts), len(dimensions)),
            ids[:, None] != ids[None, :],
            np.log(np.array(tokens, dtype=np.float64)),
        )


def _best_pair(
    table: _Table,
    margins: NDArray[np.float64],
    protected: Sequence[int],
    slope: float,
    rules: PairRules,
) -> tuple[int, int] | NoPairReason:
    """Row (chosen) and column (rejected) of the largest allowed margin, else the rule that failed.

    ``argmax`` takes the first of equal margins in row-major order: the lower indices.
    """
    allowed = table.distinct & np.isfinite(margins)
    if not allowed.any():
        return "equal_texts"
    allowed &= (margins >= rules.min_margin) & (margins > 0)
    if not allowed.any():
        return "margin"
    for column in protected:
        z = table.z[:, column]
        allowed &= z[:, None] >= z[None, :] - rules.tolerance
    if not allowed.any():
        return "tolerance"
    if rules.length_slopes is not None:
        longer = table.log_tokens[:, None] - table.log_tokens[None, :]
        allowed &= margins - slope * longer >= rules.min_margin
        if not allowed.any():
            return "length"
    flat = int(np.argmax(np.where(allowed, margins, -np.inf)))
    row, column = divmod(flat, int(margins.shape[1]))
    return row, column


def _slope(rules: PairRules, dimension: Dimension) -> float:
    return 0.0 if rules.length_slopes is None else rules.length_slopes.get(dimension, 0.0)


def _usable(rollout: Rollout, dimension: Dimension) -> bool:
    score = rollout.scores.get(dimension)
    return (
        score is not None
        and score.status == "ok"
        and score.value is not None
        and math.isfinite(score.value)
    )
