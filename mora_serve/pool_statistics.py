"""Statistics of a calibration pool: robust scale, variance components, slopes, quantile grids.

Pure numbers in, numbers out; what they mean belongs to :mod:`mora_serve.calibration`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mora_serve.errors import CalibrationError
from mora_serve.statistics import Floats

MAD_TO_SIGMA = 1.4826
"""Standard deviation of a normal over its median absolute deviation."""
IQR_TO_SIGMA = 1.349
"""Interquartile range of a normal over its standard deviation."""


def robust_scale(raw: Floats, name: str) -> tuple[float, float]:
    """Median, and ``1.4826 * MAD`` with ``IQR / 1.349`` where MAD is 0.

    Raises :class:`CalibrationError` naming ``name`` when both are 0.
    """
    center = float(np.median(raw))
    scale = MAD_TO_SIGMA * float(np.median(np.abs(raw - center)))
    if scale <= 0:
        low, high = np.quantile(raw, [0.25, 0.75])
        scale = float(high - low) / IQR_TO_SIGMA
    if scale <= 0:
        raise CalibrationError(
            f"rewards on {name} must vary, got MAD 0 and interquartile range 0; use another scorer "
            "or more varied prompts"
        )
    return center, scale


def variance_components(samples: Sequence[Floats]) -> tuple[float, float, float]:
    """``(m, tau, sigma)`` of the one-way random-effects model from unequal group sizes.

    ANOVA estimators (Searle, Casella and McCulloch, *Variance Components*, 1992, section 3.6):
    ``sigma^2 = MSW``, ``tau^2 = max(0, (MSB - MSW) / n0)`` with
    ``n0 = (N - sum n_i^2 / N) / (a - 1)``; ``m`` weights prompt means by
    ``1 / (tau^2 + sigma^2 / n_i)``. Needs two groups, one of them with two values.
    """
    sizes = np.array([len(sample) for sample in samples], dtype=np.float64)
    means = np.array([sample.mean() for sample in samples])
    total, num_groups = float(sizes.sum()), len(samples)
    within = sum(float(((sample - sample.mean()) ** 2).sum()) for sample in samples)
    msw = within / (total - num_groups)
    grand = float(sizes @ means / total)
    msb = float(sizes @ (means - grand) ** 2) / (num_groups - 1)
    n0 = (total - float(sizes @ sizes) / total) / (num_groups - 1)
    tau2 = max(0.0, (msb - msw) / n0)
    weights = 1.0 / np.maximum(tau2 + msw / sizes, 1e-12)
    return float(weights @ means / weights.sum()), math.sqrt(tau2), math.sqrt(msw)


def within_slope(x: Sequence[Floats], y: Sequence[Floats]) -> float:
    """Least-squares slope of ``y`` on ``x``, both centred per group; 0 where ``x`` never varies."""
    covariance = variance = 0.0
    for a, b in zip(x, y, strict=True):
        centred = a - a.mean()
        covariance += float(centred @ (b - b.mean()))
        variance += float(centred @ centred)
    return covariance / variance if variance > 1e-12 else 0.0


def grid_quantile(grid: Sequence[float], value: float) -> float:
    """Share of the pool below ``value`` by the stored grid, linear between points, ties halved."""
    points = np.asarray(grid, dtype=np.float64)
    low = int(np.searchsorted(points, value, side="left"))
    high = int(np.searchsorted(points, value, side="right"))
    last = points.size - 1
    if low < high:
        return (low + high - 1) / 2 / last
    if low == 0 or low > last:
        return float(low > last)
    below, above = points[low - 1], points[low]
    return float((low - 1 + (value - below) / (above - below)) / last)
