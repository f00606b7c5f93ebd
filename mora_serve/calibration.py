"""Calibration: what puts rewards of different models on one scale, and what a pool teaches.

A :class:`Calibrator` is fitted once on rollouts of the base policy to training prompts, then
frozen for a job, all its stages and its evaluation. Per dimension it turns raw rewards into ``z``
and keeps the parameters of the prompt model ``z ~ N(mu_x, sigma^2)``, ``mu_x ~ N(m, tau^2)``
(estimated by the method of moments, see :mod:`mora_serve.pool_statistics`). It belongs to exactly
one scorer revision per dimension and refuses scores of any other. Judging whether a policy has
drifted away from the pool is not done here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from mora_serve.errors import CalibrationError
from mora_serve.identity import content_hash
from mora_serve.pool_statistics import (
    grid_quantile,
    robust_scale,
    variance_components,
    within_slope,
)
from mora_serve.statistics import Floats, ceiling_constant, is_valid
from mora_serve.types import Dimension, Rollout, Score, ScoredGroup

CalibrationKind = Literal["robust_z", "quantile", "identity"]

ANY_REVISION = "any"
"""Revision of an assumed calibration that belongs to no scorer: raw rewards pass for z."""
NUM_QUANTILES = 201
"""Points of the stored quantile grid: every half percent, both ends included."""
REFERENCE_QUANTILE = 5.0
"""Percent of the pool below the hypervolume's reference point."""
MIN_PROMPTS = 4
"""Fewest valid prompts from which variance components are estimated."""

_STANDARD_NORMAL = NormalDist()


@dataclass(frozen=True)
class DimensionCalibration:
    """Scale and prompt model of one dimension under one scorer revision."""

    model: str
    revision: str
    kind: CalibrationKind
    center: float
    """Raw units; median of the pool (0 for ``identity``)."""
    scale: float
    """Raw units per z, above 0 (1 for ``identity``; unused by ``quantile``)."""
    quantiles: tuple[float, ...]
    """Raw rewards of the pool at equally spaced probabilities from 0 to 1, ascending."""
    m: float
    """Mean of the prompts' means, in z."""
    tau: float
    """Standard deviation between prompts, in z; 0 when prompts cannot be told apart."""
    sigma: float
    """Standard deviation of one rollout around its prompt's mean, in z."""
    sigma_within: float
    """Median within-prompt standard deviation (ddof 1), in z."""
    median_mean: float
    """Median of the pool prompts' means, in z: what a typical prompt reaches on average."""
    length_slope: float
    """Change of z per unit of log completion tokens, within prompts."""
    share_cut: float | None
    """Share of the pool's scored answers that ``max_tokens`` cut, in [0, 1]; ``None``: unknown."""
    num_prompts: int
    """Prompts of the pool with enough valid scores; 0 for an assumed calibration."""
    num_rollouts: int
    """Valid scores of those prompts."""

    def z(self, raw: float) -> float:
        """Calibrated value of a finite raw reward."""
        if self.kind == "quantile":
            margin = 0.5 / max(2, self.num_rollouts)
            share = grid_quantile(self.quantiles, raw)
            return _STANDARD_NORMAL.inv_cdf(min(max(share, margin), 1 - margin))
        return (raw - self.center) / self.scale

    def pool_quantile(self, z: float) -> float:
        """Position of a calibrated value in the pool, 0 to 100; ties count half."""
        if self.kind == "quantile":
            return 100 * _STANDARD_NORMAL.cdf(z)
        return 100 * grid_quantile(self.quantiles, z * self.scale + self.center)

    def at_quantile(self, percent: float) -> float:
        """Calibrated value below which ``percent`` (0 to 100) of the pool lies."""
        grid = np.linspace(0, 100, len(self.quantiles))
        return self.z(float(np.interp(percent, grid, self.quantiles)))

    @cached_property
    def low(self) -> float:
        """The calibrated value that ``REFERENCE_QUANTILE`` percent of the pool lie below."""
        return self.at_quantile(REFERENCE_QUANTILE)

    def reliability(self, n: int) -> float:
        """``tau^2 / (tau^2 + sigma^2 / n)``: retest correlation of a prompt's mean of ``n``."""
        if n < 1 or self.tau == 0:
            return 0.0
        return self.tau**2 / (self.tau**2 + self.sigma**2 / n)

    def rollouts_for(self, reliability: float) -> int | None:
        """Fewest rollouts that reach ``reliability``; ``None`` when no number does."""
        if self.tau == 0 or reliability >= 1:
            return None
        ratio = (self.sigma / self.tau) ** 2 * reliability / (1 - reliability)
        return max(1, math.ceil(ratio - 1e-9))

    def typical_ceiling(self, n: int) -> float:
        """Expected ceiling of the pool's median prompt at ``n`` rollouts: the default bound."""
        return self.median_mean + ceiling_constant(n) * self.sigma


@dataclass(frozen=True)
class Calibrator:
    """Calibrations by dimension, and where they come from. Frozen for a job."""

    dimensions: Mapping[Dimension, DimensionCalibration]
    policy: str
    """Policy version whose rollouts make up the pool."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """How the pool was sampled, JSON values, for example ``{"temperature": 0.8}``."""

    @cached_property
    def version(self) -> str:
        """Content hash (sha256, hex): equal content has an equal version."""
        return content_hash(self._content())

    @classmethod
    def identity(
        cls,
        scorers: Mapping[Dimension, tuple[str, str]],
        *,
        m: float = 0.0,
        tau: float = 1.0,
        sigma: float = 1.0,
    ) -> Calibrator:
        """An assumed calibrator: ``z = raw``, prompt model given instead of fitted.

        ``scorers`` maps each dimension to (model, revision). For scorers that are calibrated
        already, and for the fakes.
        """
        if tau < 0 or sigma <= 0:
            raise CalibrationError(f"tau must be >= 0 and sigma > 0, got {tau} and {sigma}")
        pool = NormalDist(m, math.hypot(tau, sigma))
        shares = np.linspace(0, 1, NUM_QUANTILES).clip(0.001, 0.999)
        grid = tuple(pool.inv_cdf(float(share)) for share in shares)
        return cls(
            dimensions={
                dimension: DimensionCalibration(
                    model=model, revision=revision, kind="identity", center=0.0, scale=1.0,
                    quantiles=grid, m=m, tau=tau, sigma=sigma, sigma_within=sigma,
                    median_mean=m, length_slope=0.0, share_cut=0.0, num_prompts=0, num_rollouts=0,
                )
                for dimension, (model, revision) in scorers.items()
            },
            policy="assumed",
        )  # fmt: skip

    def __getitem__(self, dimension: Dimension) -> DimensionCalibration:
        """Calibration of ``dimension``; raises :class:`CalibrationError` when it has none."""
        try:
            return self.dimensions[dimension]
        except KeyError:
            known = ", ".join(self.dimensions)
            raise CalibrationError(
                f"calibrator must cover every dimension, got none for {dimension!r} (has {known}); "
                "fit it again with all dimensions"
            ) from None

    def reference(self, dimensions: Sequence[Dimension]) -> Floats:
        """Reference point of the hypervolume: the pool's 5 % quantile per dimension, in z."""
        return np.array([self[k].low for k in dimensions])

    def check(self, scorers: Mapping[Dimension, tuple[str, str]]) -> None:
        """Raise :class:`CalibrationError` unless it was fitted on these (model, revision)s."""
        for dimension, (model, revision) in scorers.items():
            _check_scorer(self[dimension], dimension, model, revision)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready content together with its version."""
        return {**self._content(), "version": self.version}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibrator:
        """Inverse of :meth:`to_dict`; refuses content that does not match its version."""
        try:
            calibrator = cls(
                dimensions={
                    name: DimensionCalibration(**{**item, "quantiles": tuple(item["quantiles"])})
                    for name, item in data["dimensions"].items()
                },
                policy=data["policy"],
                sampling=dict(data["sampling"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise CalibrationError(f"calibrator must have all its fields: {error}") from None
        if data.get("version") != calibrator.version:
            raise CalibrationError(
                "calibrator.version must be the hash of its content, got another; fit it again"
            )
        return calibrator

    def save(self, path: Path) -> None:
        """Write the calibrator as JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", "utf-8")

    @classmethod
    def load(cls, path: Path) -> Calibrator:
        """Read a calibrator; :class:`CalibrationError` when it is missing or not one."""
        try:
            data = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise CalibrationError(f"calibrator {path} must be a JSON file: {error}") from None
        if not isinstance(data, dict):
            raise CalibrationError(f"calibrator {path} must hold an object")
        return cls.from_dict(data)

    def _content(self) -> dict[str, Any]:
        return {
            "dimensions": {
                name: {**asdict(item), "quantiles": list(item.quantiles)}
                for name, item in self.dimensions.items()
            },
            "policy": self.policy,
            "sampling": dict(self.sampling),
        }


def calibrate_group(group: ScoredGroup, calibrator: Calibrator) -> ScoredGroup:
    """The group with ``Score.value`` filled for ok scores, and ``None`` for all others.

    An ok score whose raw reward is missing or not finite becomes ``failed``. Raises
    :class:`CalibrationError` for a dimension or a scorer revision the calibrator does not know.
    """
    rollouts = tuple(
        Rollout(
            rollout.index,
            rollout.completion,
            {k: calibrate_score(score, k, calibrator) for k, score in rollout.scores.items()},
        )
        for rollout in group.rollouts
    )
    return replace(group, rollouts=rollouts)


def calibrate_score(score: Score, dimension: Dimension, calibrator: Calibrator) -> Score:
    """One score with its value; see :func:`calibrate_group`."""
    if score.status != "ok":
        return replace(score, value=None)
    calibration = calibrator[dimension]
    _check_scorer(calibration, dimension, score.model, score.revision)
    if score.raw is None or not math.isfinite(score.raw):
        return replace(score, status="failed", raw=None, value=None, reason="reward not finite")
    value = calibration.z(score.raw)
    return Score(score.status, score.raw, value, score.reason, score.model, score.revision)


def percent_change(
    calibrator: Calibrator, dimension: Dimension, before: ArrayLike, after: ArrayLike
) -> float | None:
    """Change in mean pool quantile (0 to 100) from ``before`` to ``after``, both in z.

    ``None`` when a side is empty. This is a position in the calibrator's pool, not the scale of
    the MORA paper.
    """
    sides = [np.asarray(side, dtype=np.float64) for side in (before, after)]
    if not all(side.size for side in sides):
        return None
    calibration = calibrator[dimension]
    low, high = (np.mean([calibration.pool_quantile(float(z)) for z in side]) for side in sides)
    return float(high - low)


def fit_calibrator(
    groups: Sequence[ScoredGroup],
    dimensions: Sequence[Dimension],
    *,
    kind: CalibrationKind = "robust_z",
    sampling: Mapping[str, Any] | None = None,
    cut_known: bool = True,
) -> Calibrator:
    """Fit on scored rollouts of one policy, raw rewards.

    ``cut_known`` is false for answers that were given: whether they were cut is unknown. Prompts
    that break the validity rule on a dimension do not count for it. Raises
    :class:`CalibrationError` when groups come from several policies or scorer revisions, when under
    four prompts are valid, or when the rewards have no spread.
    """
    if not dimensions:
        raise CalibrationError("calibration pool must hold scored answers, got none")
    policies = sorted({group.policy_version for group in groups})
    if len(policies) != 1:
        raise CalibrationError(f"calibration pool must come from one policy, got {policies}")
    return Calibrator(
        dimensions={k: _fit_dimension(groups, k, kind, cut_known) for k in dimensions},
        policy=policies[0],
        sampling=dict(sampling or {}),
    )


def _fit_dimension(
    groups: Sequence[ScoredGroup], dimension: Dimension, kind: CalibrationKind, cut_known: bool
) -> DimensionCalibration:
    pool = [scored for group in groups if (scored := _scored(group, dimension))]
    if len(pool) < MIN_PROMPTS:
        raise CalibrationError(
            f"calibration pool must hold at least {MIN_PROMPTS} prompts with valid scores on "
            f"{dimension}, got {len(pool)}; add prompts"
        )
    model, revision = _one_scorer(pool, dimension)
    raws = [np.array([raw for raw, _ in scored], dtype=np.float64) for scored in pool]
    flat = np.concatenate(raws)
    center, scale = (0.0, 1.0) if kind == "identity" else robust_scale(flat, dimension)
    grid = np.quantile(flat, np.linspace(0, 1, NUM_QUANTILES))
    draft = DimensionCalibration(
        model=model, revision=revision, kind=kind, center=center, scale=scale,
        quantiles=tuple(float(value) for value in grid), m=0.0, tau=0.0, sigma=1.0,
        sigma_within=1.0, median_mean=0.0, length_slope=0.0, share_cut=0.0,
        num_prompts=len(pool), num_rollouts=int(flat.size),
    )  # fmt: skip
    samples = [np.array([draft.z(float(value)) for value in raw]) for raw in raws]
    m, tau, sigma = variance_components(samples)
    if sigma == 0:
        raise CalibrationError(f"rewards on {dimension} must vary within prompts, got none that do")
    cut = [r.completion.finish_reason == "length" for scored in pool for _, r in scored]
    return replace(
        draft, m=m, tau=tau, sigma=sigma,
        sigma_within=float(np.median([sample.std(ddof=1) for sample in samples])),
        median_mean=float(np.median([sample.mean() for sample in samples])),
        length_slope=_length_slope(pool, samples),
        share_cut=sum(cut) / len(cut) if cut_known else None,
    )  # fmt: skip


def _scored(group: ScoredGroup, dimension: Dimension) -> list[tuple[float, Rollout]]:
    """(raw reward, rollout) of the valid scores; empty when the validity rule is broken."""
    found = []
    for rollout in group.rollouts:
        score = rollout.scores.get(dimension)
        if score is None or score.status != "ok" or score.raw is None:
            continue
        if math.isfinite(score.raw):
            found.append((score.raw, rollout))
    return found if is_valid(len(found), len(group.rollouts)) else []


def _one_scorer(
    pool: Sequence[Sequence[tuple[float, Rollout]]], dimension: Dimension
) -> tuple[str, str]:
    scores = (rollout.scores[dimension] for scored in pool for _, rollout in scored)
    found = sorted({(score.model, score.revision) for score in scores})
    if len(found) != 1:
        raise CalibrationError(
            f"calibration pool must be scored by one model revision on {dimension}, got {found}"
        )
    return found[0]


def _length_slope(
    pool: Sequence[Sequence[tuple[float, Rollout]]], samples: Sequence[Floats]
) -> float:
    """Slope of z on log completion tokens within prompts."""
    logs = [np.log([max(1, r.completion.num_tokens) for _, r in scored]) for scored in pool]
    return within_slope(logs, samples)


def _check_scorer(
    calibration: DimensionCalibration, dimension: Dimension, model: str, revision: str
) -> None:
    if calibration.revision == ANY_REVISION:
        return
    if (calibration.model, calibration.revision) != (model, revision):
        raise CalibrationError(
            f"calibrator must belong to the scorer of {dimension}: fitted on {calibration.model} "
            f"at {calibration.revision}, got {model} at {revision}; fit a new one with "
            "'mora-serve scorers calibrate' on a server whose method.calibrator is identity"
        )
