"""Diagnostics: everything that is said of one prompt's rollouts, and of a whole prompt set.

:func:`assess_group` judges a calibrated group dimension by dimension, which is all that
:func:`needs_more` has to know to tell adaptive pre-sampling whether another round can settle
something. :func:`diagnose_group` adds what the dimensions show together, :func:`aggregate` sums up.
All are pure; drawing rollouts, rounds and wire formats belong to the service.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import numpy as np

from mora_serve import statistics
from mora_serve.calibration import Calibrator
from mora_serve.classification import (
    UNKNOWN,
    Classification,
    Classifier,
    Evidence,
    PromptClass,
    State,
    build_classifier,
)
from mora_serve.config import MethodSettings
from mora_serve.prompt_model import ceiling_bound, expected_ceiling, posterior, reach
from mora_serve.statistics import Floats, joint_values, valid_values
from mora_serve.types import Dimension, Failure, ScoredGroup

RECOMMENDED_ROLLOUTS = 8
"""Under this many rollouts a diagnostic carries a warning."""


@dataclass(frozen=True, slots=True)
class DimensionDiagnostic:
    """Statistics of one prompt on one dimension, in z; ``None`` where too few scores are valid."""

    mean: float | None
    spread: float | None
    """Standard deviation over rollouts, ddof 1."""
    ceiling: float | None
    """Mean of the best quarter at ``ceiling_n`` rollouts, in expectation over subsets when more
    are valid."""
    floor: float | None
    n_valid: int
    posterior_mean: float | None
    posterior_sd: float | None
    reach: float | None
    """Probability that the expected ceiling meets the bound; ``None`` when invalid."""
    state: State | None
    """``None`` when the validity rule is broken."""
    ceiling_n: int
    """Rollouts that ``ceiling`` refers to: the configured n, or fewer when fewer are valid."""
    expected_ceiling: float | None
    """Posterior expectation of the ceiling at the configured n."""
    bound: float
    """Expected ceiling that ``reach`` asks for."""
    reliability: float
    """Expected retest correlation of this prompt's mean at ``n_valid`` rollouts, in [0, 1]."""
    n_measurable: int | None
    """Rollouts at which the dimension becomes measurable; ``None`` when no number suffices."""


@dataclass(frozen=True, slots=True)
class Assessment:
    """One group judged dimension by dimension, without the statistics that only a reader needs."""

    group: ScoredGroup
    evidence: Mapping[Dimension, Evidence]
    classification: Classification
    min_reliability: float

    def describe(self) -> dict[Dimension, DimensionDiagnostic]:
        """Statistics of every dimension."""
        states, needed = self.classification.states, self.min_reliability
        return {k: _describe(item, states[k], needed) for k, item in self.evidence.items()}


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """What one prompt's rollouts show. Rewards are in z."""

    prompt_id: str
    status: Literal["ok", "failed"]
    error: Failure | None
    """Why there are no rollouts; ``None`` when ok."""
    prompt_class: PromptClass | None
    """See :mod:`mora_serve.classification`; ``None`` when failed."""
    class_probability: float | None
    conflicted: bool | None
    """Two dimensions oppose each other within the prompt; ``None`` under 8 joint rollouts."""
    dimensions: Mapping[Dimension, DimensionDiagnostic]
    correlation: Mapping[Dimension, Mapping[Dimension, float | None]]
    """Spearman over the joint rollouts; ``None`` where undefined."""
    pareto: tuple[int, ...]
    """``Rollout.index`` of the joint rollouts that none dominates."""
    hypervolume: float | None
    policy_version: str | None
    group: ScoredGroup | None
    """The calibrated rollouts; ``None`` when failed."""
    conflicts: tuple[tuple[Dimension, Dimension], ...] = ()
    """The pairs behind ``conflicted``."""
    n_joint: int = 0
    """Rollouts valid on all dimensions: what the joint statistics stand on."""
    num_rollouts: int = 0
    share_cut: float | None = None
    """Share of answers cut by ``max_tokens``, in [0, 1]."""
    warnings: tuple[str, ...] = ()
    """Stable codes: ``few_rollouts`` (under 8), ``missing_scores``."""


@dataclass(frozen=True, slots=True)
class PairConflict:
    """One pair of dimensions over all prompts that could be judged on it."""

    num_conflicted: int
    num_prompts: int
    mean_correlation: float | None


@dataclass(frozen=True, slots=True)
class Aggregate:
    """What a prompt set shows as a whole. JSON-ready through ``dataclasses.asdict``."""

    num_prompts: int
    num_failed: int
    """Prompts without rollouts."""
    classes: dict[PromptClass, int]
    num_conflicted: int
    reliability: dict[Dimension, float | None]
    """Mean expected retest correlation over the prompts with valid scores."""
    states: dict[Dimension, dict[str, int]]
    """Prompts by state; ``unknown`` counts those without enough valid scores."""
    conflict: dict[Dimension, dict[Dimension, PairConflict]]
    """Conflict matrix, symmetric, without diagonal."""
    share_cut: float | None
    """Share of all answers that ``max_tokens`` cut."""
    num_rollouts: int
    num_rollouts_fixed: int | None
    """What a fixed ``n_max`` per prompt would have drawn; ``None`` without ``n_max``."""
    share_saved: float | None
    """``1 - num_rollouts / num_rollouts_fixed``."""
    warnings: dict[str, int] = field(default_factory=dict)


def assess_group(
    group: ScoredGroup,
    calibrator: Calibrator,
    method: MethodSettings,
    dimensions: Sequence[Dimension],
    n: int,
    *,
    classifier: Classifier | None = None,
) -> Assessment:
    """Judge one calibrated group (:func:`mora_serve.calibration.calibrate_group`).

    ``n`` is the number of rollouts that ceilings refer to, whatever the number drawn; prompts and
    rounds compare at it. ``classifier`` overrides the one the settings name. Raises
    :class:`~mora_serve.errors.CalibrationError` for a dimension without calibration.
    """
    policy = classifier or build_classifier(method)
    evidence = {k: gather_evidence(group, k, calibrator, method, n) for k in dimensions}
    return Assessment(group, evidence, policy.classify(evidence), method.min_reliability)


def diagnose_group(
    group: ScoredGroup,
    calibrator: Calibrator,
    method: MethodSettings,
    dimensions: Sequence[Dimension],
    n: int,
    *,
    classifier: Classifier | None = None,
) -> Diagnostic:
    """All that one calibrated group shows; arguments as for :func:`assess_group`."""
    found = assess_group(group, calibrator, method, dimensions, n, classifier=classifier)
    return diagnose(found, calibrator, method)


def diagnose(found: Assessment, calibrator: Calibrator, method: MethodSettings) -> Diagnostic:
    """The assessment with the statistics of its dimensions together."""
    group, result = found.group, found.classification
    dimensions = tuple(found.evidence)
    indices, joint = joint_values(group, dimensions)
    correlation = statistics.spearman_matrix(joint)
    pairs = statistics.conflicting_pairs(correlation, len(indices), method.min_conflict)
    cut = [rollout.completion.finish_reason == "length" for rollout in group.rollouts]
    return Diagnostic(
        prompt_id=group.prompt_id,
        status="ok",
        error=None,
        prompt_class=result.prompt_class,
        class_probability=result.probability,
        conflicted=None if pairs is None else bool(pairs),
        dimensions=found.describe(),
        correlation=_named_matrix(correlation, dimensions),
        pareto=tuple(indices[row] for row in statistics.pareto_front(joint)),
        hypervolume=_hypervolume(joint, calibrator, dimensions),
        policy_version=group.policy_version,
        group=group,
        conflicts=tuple((dimensions[i], dimensions[j]) for i, j in pairs or ()),
        n_joint=len(indices),
        num_rollouts=len(group.rollouts),
        share_cut=sum(cut) / len(cut) if cut else None,
        warnings=_warnings(group, found.evidence),
    )


def failed_diagnostic(prompt_id: str, failure: Failure) -> Diagnostic:
    """Diagnostic of a prompt that has no rollouts because generation failed."""
    return Diagnostic(
        prompt_id=prompt_id, status="failed", error=failure, prompt_class=None,
        class_probability=None, conflicted=None, dimensions={}, correlation={}, pareto=(),
        hypervolume=None, policy_version=None, group=None,
    )  # fmt: skip


def needs_more(found: Assessment, n_max: int | None = None) -> bool:
    """Whether adaptive pre-sampling should draw another round for this prompt.

    True while a dimension is undecided, and while one is unmeasurable now but would be measurable
    within ``n_max`` rollouts (``None``: the caller bounds the rounds). False once ``n_max``
    rollouts are drawn, and for ``unknown`` prompts: missing scores are not cured by more rollouts.
    """
    if found.classification.prompt_class == UNKNOWN:
        return False
    if n_max is not None and len(found.group.rollouts) >= n_max:
        return False
    return any(_is_open(found, k, n_max) for k in found.evidence)


def gather_evidence(
    group: ScoredGroup,
    dimension: Dimension,
    calibrator: Calibrator,
    method: MethodSettings,
    n: int,
) -> Evidence:
    """Valid rewards, posterior and reach of one dimension, for a classifier."""
    calibration = calibrator[dimension]
    values = valid_values(group, dimension)
    estimate = posterior(values, calibration)
    bound = ceiling_bound(calibration, n, method.min_ceiling.get(dimension))
    return Evidence(
        values=values,
        num_rollouts=len(group.rollouts),
        n=n,
        bound=bound,
        posterior=estimate,
        reach=reach(estimate, calibration, n, bound),
        calibration=calibration,
    )


def aggregate(diagnostics: Sequence[Diagnostic], n_max: int | None = None) -> Aggregate:
    """Sum up a prompt set. ``n_max`` is what a fixed number of rollouts would have been."""
    ok = [item for item in diagnostics if item.status == "ok"]
    names = list(dict.fromkeys(k for item in ok for k in item.dimensions))
    drawn = sum(item.num_rollouts for item in ok)
    cut = sum((item.share_cut or 0.0) * item.num_rollouts for item in ok)
    fixed = None if n_max is None else n_max * len(ok)
    return Aggregate(
        num_prompts=len(diagnostics),
        num_failed=len(diagnostics) - len(ok),
        classes=dict(sorted(Counter(item.prompt_class or UNKNOWN for item in ok).items())),
        num_conflicted=sum(item.conflicted is True for item in ok),
        reliability={k: _mean_reliability(ok, k) for k in names},
        states={k: _count_states(ok, k) for k in names},
        conflict=_conflict_matrix(ok, names),
        share_cut=cut / drawn if drawn else None,
        num_rollouts=drawn,
        num_rollouts_fixed=fixed,
        share_saved=1 - drawn / fixed if fixed else None,
        warnings=dict(sorted(Counter(code for item in ok for code in item.warnings).items())),
    )


def _describe(item: Evidence, state: State | None, min_reliability: float) -> DimensionDiagnostic:
    values, calibration = item.values, item.calibration
    num_valid = len(values)
    size = min(item.n, num_valid)
    expected = expected_ceiling(item.posterior.mean, calibration.sigma, item.n)
    return DimensionDiagnostic(
        mean=statistics.mean(values),
        spread=statistics.spread(values),
        ceiling=statistics.subset_ceiling(values, size) if size else None,
        floor=statistics.floor(values),
        n_valid=num_valid,
        posterior_mean=item.posterior.mean if item.valid else None,
        posterior_sd=item.posterior.sd if item.valid else None,
        reach=item.reach if item.valid else None,
        state=state,
        ceiling_n=size,
        expected_ceiling=expected if item.valid else None,
        bound=item.bound,
        reliability=calibration.reliability(num_valid),
        n_measurable=calibration.rollouts_for(min_reliability),
    )


def _hypervolume(
    joint: Floats, calibrator: Calibrator, dimensions: Sequence[Dimension]
) -> float | None:
    if not len(joint):
        return None
    return statistics.hypervolume(joint, calibrator.reference(dimensions))


def _named_matrix(
    matrix: Sequence[Sequence[float | None]], names: Sequence[Dimension]
) -> dict[Dimension, dict[Dimension, float | None]]:
    return {a: dict(zip(names, row, strict=True)) for a, row in zip(names, matrix, strict=True)}


def _warnings(group: ScoredGroup, evidence: Mapping[Dimension, Evidence]) -> tuple[str, ...]:
    found = []
    if len(group.rollouts) < RECOMMENDED_ROLLOUTS:
        found.append("few_rollouts")
    if any(len(item.values) < len(group.rollouts) for item in evidence.values()):
        found.append("missing_scores")
    return tuple(found)


def _is_open(found: Assessment, dimension: Dimension, n_max: int | None) -> bool:
    state = found.classification.states[dimension]
    if state == "unmeasurable":
        needed = found.evidence[dimension].calibration.rollouts_for(found.min_reliability)
        return needed is not None and (n_max is None or needed <= n_max)
    return state == "undecided"


def _mean_reliability(items: Sequence[Diagnostic], dimension: Dimension) -> float | None:
    found = [
        item.dimensions[dimension].reliability
        for item in items
        if dimension in item.dimensions and item.dimensions[dimension].state is not None
    ]
    return float(np.mean(found)) if found else None


def _count_states(items: Sequence[Diagnostic], dimension: Dimension) -> dict[str, int]:
    present = [item.dimensions[dimension] for item in items if dimension in item.dimensions]
    return dict(sorted(Counter(item.state or UNKNOWN for item in present).items()))


def _conflict_matrix(
    items: Sequence[Diagnostic], names: Sequence[Dimension]
) -> dict[Dimension, dict[Dimension, PairConflict]]:
    matrix: dict[Dimension, dict[Dimension, PairConflict]] = {k: {} for k in names}
    for a, b in combinations(names, 2):
        judged = [
            item
            for item in items
            if item.conflicted is not None and a in item.correlation and b in item.correlation
        ]
        values = [r for item in judged if (r := item.correlation[a][b]) is not None]
        opposed = sum((a, b) in item.conflicts or (b, a) in item.conflicts for item in judged)
        cell = PairConflict(opposed, len(judged), float(np.mean(values)) if values else None)
        matrix[a][b] = matrix[b][a] = cell
    return matrix
