"""The prompt model: what noisy rollouts say of a prompt, and of the change between two prompts.

Per dimension ``z ~ N(mu_x, sigma^2)``, ``mu_x ~ N(m, tau^2)`` with parameters from the calibrator's
pool (empirical Bayes; their own uncertainty is not carried on). The expected ceiling of a prompt
at ``n`` rollouts is ``mu_x + c_n * sigma``, so ceilings of groups of any size compare at one ``n``.

Diagnosis shrinks (:func:`posterior`, :func:`reach`). Acceptance does not: it compares two prompts
by :func:`expected_ceiling_gain` on fresh rollouts, unshrunk, with a Student interval, so that an
unchanged prompt is accepted at the stated error rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from mora_serve import statistics
from mora_serve.calibration import Calibrator, DimensionCalibration
from mora_serve.statistics import Floats, ceiling_constant, is_valid, joint_values, valid_values
from mora_serve.types import Dimension, ScoredGroup

_STANDARD_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Posterior:
    """Normal posterior of a prompt's mean reward ``mu_x`` on one dimension, in z."""

    mean: float
    sd: float
    """0 when the pool cannot tell prompts apart (``tau`` is 0)."""


@dataclass(frozen=True, slots=True)
class CeilingEstimate:
    """Expected ceiling of one prompt on one dimension at ``n`` rollouts, in z, unshrunk."""

    value: float
    standard_error: float
    n: int
    """Rollouts the ceiling refers to, not the number measured."""
    num_valid: int


@dataclass(frozen=True, slots=True)
class GainEstimate:
    """Change of the expected ceiling from an original to a candidate, at equal ``n``, in z."""

    gain: float
    """Mean over the dimensions asked for."""
    lower_bound: float
    """One-sided bound at the confidence asked for."""
    standard_error: float
    per_dimension: Mapping[Dimension, float]
    num_candidate: int
    """Rollouts of the candidate that are valid on all of the dimensions."""
    num_original: int


def posterior(values: Sequence[float], calibration: DimensionCalibration) -> Posterior:
    """Posterior of ``mu_x`` given valid rewards of its rollouts; the prior when there are none."""
    prior, noise = calibration.tau**2, calibration.sigma**2
    average = statistics.mean(values)
    if average is None or prior == 0:
        return Posterior(calibration.m, calibration.tau)
    shrink = prior / (prior + noise / len(values))
    mean = calibration.m + shrink * (average - calibration.m)
    return Posterior(mean, math.sqrt(shrink * noise / len(values)))


def expected_ceiling(mean: float, sigma: float, n: int) -> float:
    """``mean + c_n * sigma``: expected mean of the best ``ceil(n/4)`` of ``n`` rollouts."""
    return mean + ceiling_constant(n) * sigma


def reach(estimate: Posterior, calibration: DimensionCalibration, n: int, bound: float) -> float:
    """Posterior probability that the expected ceiling at ``n`` is at least ``bound``, in [0, 1]."""
    distance = expected_ceiling(estimate.mean, calibration.sigma, n) - bound
    if estimate.sd == 0:
        return 0.5 if distance == 0 else float(distance > 0)
    return _STANDARD_NORMAL.cdf(distance / estimate.sd)


def ceiling_bound(
    calibration: DimensionCalibration, n: int, min_ceiling: float | None = None
) -> float:
    """The bound a reachable dimension meets: the setting, or the pool's typical ceiling at n."""
    return calibration.typical_ceiling(n) if min_ceiling is None else min_ceiling


def ceiling_estimate(
    group: ScoredGroup, dimension: Dimension, calibrator: Calibrator, n: int
) -> CeilingEstimate | None:
    """Unshrunk expected ceiling of a calibrated group; ``None`` when the validity rule is broken.

    ``mean + c_n * sigma`` with the pool's ``sigma``; the standard error is that of the mean, from
    the group's own spread (the pool's when all values are equal).
    """
    values = valid_values(group, dimension)
    average, own = statistics.mean(values), statistics.spread(values)
    if not is_valid(len(values), len(group.rollouts)) or average is None:
        return None
    sigma = calibrator[dimension].sigma
    value = expected_ceiling(average, sigma, n)
    return CeilingEstimate(value, (own or sigma) / math.sqrt(len(values)), n, len(values))


def expected_ceiling_gain(
    candidate: ScoredGroup,
    original: ScoredGroup,
    dimensions: Sequence[Dimension],
    calibrator: Calibrator,
    *,
    n: int,
    confidence: float = 0.9,
) -> GainEstimate | None:
    """Change of the expected ceiling, averaged over ``dimensions``, with its lower bound.

    Both groups are calibrated. Stands on the rollouts that are valid on all of ``dimensions``;
    ``None`` when either side breaks the validity rule. Since both ceilings refer to the same ``n``
    and ``sigma``, the gain is a difference of means; its bound uses Welch's standard error and
    degrees of freedom (Welch 1947), which keeps an unchanged prompt's acceptance near
    ``1 - confidence`` whatever the prompt's own spread. Two sides without any spread (greedy
    sampling) fall back on the pool's ``sigma``.
    """
    _, after = joint_values(candidate, dimensions)
    _, before = joint_values(original, dimensions)
    sides = ((after, candidate), (before, original))
    if not dimensions or not all(is_valid(len(x), len(group.rollouts)) for x, group in sides):
        return None
    sigma = {k: calibrator[k].sigma for k in dimensions}
    per_dimension = {
        k: expected_ceiling(float(after[:, i].mean()), sigma[k], n)
        - expected_ceiling(float(before[:, i].mean()), sigma[k], n)
        for i, k in enumerate(dimensions)
    }
    gain = float(np.mean(list(per_dimension.values())))
    pooled = math.sqrt(sum(s * s for s in sigma.values())) / len(dimensions)
    error, freedom = _welch(after.mean(axis=1), before.mean(axis=1), pooled)
    lower = gain - student_quantile(confidence, freedom) * error
    return GainEstimate(gain, lower, error, per_dimension, len(after), len(before))


def _welch(a: Floats, b: Floats, fallback_sigma: float) -> tuple[float, float]:
    """Standard error of ``mean(a) - mean(b)`` and its degrees of freedom."""
    va, vb = float(a.var(ddof=1)) / a.size, float(b.var(ddof=1)) / b.size
    if va + vb == 0:
        return fallback_sigma * math.sqrt(1 / a.size + 1 / b.size), float(a.size + b.size - 2)
    freedom = (va + vb) ** 2 / (va**2 / (a.size - 1) + vb**2 / (b.size - 1))
    return math.sqrt(va + vb), freedom


@lru_cache(maxsize=4096)
def student_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t for ``probability`` in (0, 1) and ``freedom`` of at least 1.

    Newton's method from the first two terms of Fisher's expansion around the normal quantile
    (Abramowitz and Stegun, 26.7.5). Above the median the cumulative distribution is concave, so a
    step never ends above the root.
    """
    if not 0 < probability < 1 or freedom < 1:
        raise ValueError(f"need 0 < probability < 1 and freedom >= 1, got {probability}, {freedom}")
    if probability < 0.5:
        return -student_quantile(1 - probability, freedom)
    z = _STANDARD_NORMAL.inv_cdf(probability)
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    for _ in range(100):
        density = _student_constant(freedom) * (1 + t * t / freedom) ** (-(freedom + 1) / 2)
        step = (probability - student_cdf(t, freedom)) * math.sqrt(freedom) / density
        t += step
        if abs(step) < 1e-10 * (1 + t):
            break
    return t


def student_cdf(t: float, freedom: float) -> float:
    """P(T <= t) for Student's t: Simpson's rule over its density, accurate to about 1e-9.

    With ``x = sqrt(freedom) * tan(angle)`` the density becomes ``cos(angle)^(freedom - 1)`` up to a
    constant, which is smooth on the finite interval.
    """
    end = math.atan(abs(t) / math.sqrt(freedom))
    angles = np.linspace(0.0, end, 401)
    heights = np.cos(angles) ** (freedom - 1)
    step = end / 400
    inner = 4 * heights[1:-1:2].sum() + 2 * heights[2:-1:2].sum()
    area = _student_constant(freedom) * step / 3 * float(heights[0] + inner + heights[-1])
    return 0.5 + math.copysign(area, t)


def _student_constant(freedom: float) -> float:
    """Density of Student's t at 0, times ``sqrt(freedom)``."""
    log_ratio = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    return math.exp(log_ratio) / math.sqrt(math.pi)
