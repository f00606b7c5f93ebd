"""How many batch runners the backlog needs: the policy that Serve's controller evaluates.

Runner replicas report the store's backlog as a custom metric; every replica sees the same store, so
the largest report counts. Serve applies the bounds and delays of the autoscaling configuration.
"""

from __future__ import annotations

import math
from typing import Any

from ray.serve.config import AutoscalingContext

BACKLOG = "backlog_rows"
"""Name of the metric that runner replicas report."""


class BacklogPolicy:
    """One replica per ``rows_per_replica`` rows of backlog, and at least one."""

    def __init__(self, rows_per_replica: int) -> None:
        self._rows_per_replica = rows_per_replica

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        reports = (context.aggregated_metrics or {}).get(BACKLOG) or {}
        backlog = max(reports.values(), default=0.0)
        return max(1, math.ceil(backlog / self._rows_per_replica)), {}
