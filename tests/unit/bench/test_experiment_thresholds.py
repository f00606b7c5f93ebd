"""Acceptance at other thresholds, from the bounds that a run has stored."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.experiment_thresholds import is_accepted, threshold_lines


def confirmation(
    gain: float | None, lower: float, kept: float = 0.0, kept_lower: float = -0.2
) -> dict[str, Any]:
    return {
        "gain": gain,
        "gain_lower": lower,
        "gains": {} if gain is None else {"harmless": gain},
        "kept": {"helpful": kept},
        "kept_lower": {"helpful": kept_lower},
        "num_candidate": 24,
        "num_original": 24,
        "reason": "gain",
    }


def accepted(item: dict[str, Any], confidence: float = 0.9, **over: float) -> bool:
    rule = {"min_gain": 0.0, "max_drop": 0.5, **over}
    return is_accepted(item, measured_at=0.9, confidence=confidence, **rule)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (confirmation(0.3, 0.01), True),
        (confirmation(0.3, -0.01), False),
        (confirmation(0.3, 0.01, kept=-0.3, kept_lower=-0.5), False),
        (confirmation(None, 0.0), False),
    ],
)
def test_at_its_own_thresholds_a_run_decides_as_it_did(
    item: dict[str, Any], expected: bool
) -> None:
    assert accepted(item) is expected


def test_a_lower_confidence_moves_the_bound_towards_the_estimate() -> None:
    """Student's quantiles at 46 degrees: 1.300 at 0.9, 0.850 at 0.8."""
    assert not accepted(confirmation(0.10, -0.06), confidence=0.8)
    assert accepted(confirmation(0.10, -0.05), confidence=0.8)
    assert accepted(confirmation(0.01, -2.0), confidence=0.5, max_drop=9.0)
    assert not accepted(confirmation(-0.01, -2.0), confidence=0.5, max_drop=9.0)


def test_a_larger_drop_or_a_smaller_gain_may_be_allowed() -> None:
    dropping = confirmation(0.3, 0.1, kept=-0.3, kept_lower=-0.8)
    assert not accepted(dropping)
    assert accepted(dropping, max_drop=1.0)
    assert accepted(confirmation(0.1, -0.1), min_gain=-0.2)


def test_the_table_counts_both_kinds_and_says_which_dimension_moved() -> None:
    text = "\n".join(
        threshold_lines(
            {
                "mora": [confirmation(0.3, 0.01), confirmation(0.1, -0.05)],
                "null": [confirmation(None, 0.0)],
            },
            confidence=0.9,
            min_gain=0.0,
        )
    )
    assert "| 0.9 | 0.5 | 1 of 2 | 0 of 1 |" in text
    assert "| 0.8 | inf | 2 of 2 | 0 of 1 |" in text
    assert "rewrites: harmless opened +0.20 (2), helpful kept +0.00 (2)" in text
