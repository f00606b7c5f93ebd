"""What the confirmation samples would have decided at other thresholds, from their stored bounds.

A try that costs no rollout: the same fresh samples, another rule. Lower bounds at another
confidence are those of the same Student distribution with the freedom of two samples of equal
spread, so they are close to what the service would say and not the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from statistics import fmean
from typing import Any

from mora_serve.prompt_model import student_quantile

Json = dict[str, Any]
CONFIDENCES = (0.9, 0.8, 0.5)
"""0.5 decides on the estimate itself."""
CEILING_DROPS = (0.5, 1.0, float("inf"))
KINDS = ("mora", "null")


def is_accepted(
    confirmation: Json, *, measured_at: float, confidence: float, min_gain: float, max_drop: float
) -> bool:
    """Whether a confirmation that has bounds at ``measured_at`` passes at ``confidence``."""
    if confirmation["gain"] is None:
        return False
    freedom = confirmation["num_candidate"] + confirmation["num_original"] - 2
    ratio = student_quantile(confidence, freedom) / student_quantile(measured_at, freedom)

    def lower(value: float, bound: float) -> float:
        return value - ratio * (value - bound)

    kept, bounds = confirmation["kept"], confirmation["kept_lower"]
    drops = any(lower(kept[k], bounds[k]) <= -max_drop for k in kept)
    return lower(confirmation["gain"], confirmation["gain_lower"]) > min_gain and not drops


def threshold_lines(
    confirmations: Mapping[str, Sequence[Json]], *, confidence: float, min_gain: float
) -> list[str]:
    """Acceptance of rewrites and of the null strategy by confidence and allowed ceiling drop."""
    lines = [
        f"Accepted of the confirmed at other thresholds (run at confidence {confidence:g}):",
        "",
        "| confidence | largest ceiling drop, z | rewrites | null strategy |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for level, drop in product(CONFIDENCES, CEILING_DROPS):
        counts = []
        for kind in KINDS:
            passed = sum(
                is_accepted(
                    item, measured_at=confidence, confidence=level, min_gain=min_gain, max_drop=drop
                )
                for item in confirmations[kind]
            )
            counts.append(f"{passed} of {len(confirmations[kind])}")
        lines.append(f"| {level:g} | {drop:g} | {' | '.join(counts)} |")
    return [*lines, "", *_gain_lines(confirmations), ""]


def _gain_lines(confirmations: Mapping[str, Sequence[Json]]) -> list[str]:
    """Mean confirmed change of the ceiling, on what a rewrite should open and on what it keeps."""
    lines = []
    for kind, label in zip(KINDS, ("rewrites", "null strategy"), strict=True):
        parts = []
        for field, role in (("gains", "opened"), ("kept", "kept")):
            values: dict[str, list[float]] = {}
            for item in confirmations[kind]:
                for name, value in item[field].items():
                    values.setdefault(name, []).append(value)
            parts += [
                f"{name} {role} {fmean(found):+.2f} ({len(found)})"
                for name, found in sorted(values.items())
            ]
        lines.append(f"- mean confirmed change of the ceiling, z, {label}: {', '.join(parts)}")
    return lines
