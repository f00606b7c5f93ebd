"""Percentile bootstrap intervals of figures that are functions of sums over units.

Efron and Tibshirani 1993, chapter 13. A resample of the units, here prompts, is one vector of
counts, so that one product with the columns gives every resample's sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mora_serve.statistics import Floats

NUM_RESAMPLES = 4000
CONFIDENCE = 0.95
RESAMPLES_AT_A_TIME = 500

Statistic = Callable[[Floats], Floats]
"""Sums of the columns ``[B, C]`` to the figure ``[B]``; NaN where it is undefined."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval; all ``None`` of nothing, no interval of one prompt."""

    value: float | None
    low: float | None
    high: float | None
    se: float | None
    num_prompts: int
    """Prompts it stands on."""


class Bootstrap:
    """Intervals of figures that are functions of sums over prompts; equal seeds, equal bounds."""

    def __init__(self, seed: int, num_resamples: int = NUM_RESAMPLES) -> None:
        self._seed = seed
        self._num = num_resamples

    def mean(self, values: Sequence[float | None]) -> Estimate:
        """Mean of the values that are there, one a prompt."""
        kept = [[value, 1.0] for value in values if value is not None]
        return self.estimate(kept, lambda sums: sums[:, 0] / sums[:, 1])

    def estimate(self, columns: Sequence[Sequence[float]], statistic: Statistic) -> Estimate:
        """``statistic`` of the sums of ``columns`` ``[P, C]``, prompts resampled.

        A resample in which the figure is undefined is left out. One prompt has no interval.
        """
        num = len(columns)
        nothing = Estimate(None, None, None, None, num)
        if num == 0:
            return nothing
        data = np.asarray(columns, dtype=np.float64)
        # Undefined figures (0 / 0) are NaN by construction and dropped below.
        with np.errstate(invalid="ignore", divide="ignore"):
            value = float(statistic(data.sum(axis=0, keepdims=True))[0])
            drawn = np.concatenate([statistic(sums) for sums in self._resampled(data)])
        drawn = drawn[np.isfinite(drawn)]
        if not math.isfinite(value):
            return nothing
        if num < 2 or drawn.size == 0:
            return replace(nothing, value=value)
        tail = 100 * (1 - CONFIDENCE) / 2
        low, high = (float(bound) for bound in np.percentile(drawn, [tail, 100 - tail]))
        return Estimate(value, min(low, value), max(high, value), float(drawn.std()), num)

    def _resampled(self, data: Floats) -> list[Floats]:
        rng = np.random.default_rng(self._seed)
        num = len(data)
        even = np.full(num, 1.0 / num)
        starts = range(0, self._num, RESAMPLES_AT_A_TIME)
        sizes = [min(RESAMPLES_AT_A_TIME, self._num - start) for start in starts]
        return [rng.multinomial(num, even, size) @ data for size in sizes]
