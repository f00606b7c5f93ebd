"""Drift of simulated batches whose truth is known, and figures computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mora_serve.calibration import Calibrator, fit_calibrator
from mora_serve.drift import DimensionDrift, DriftLimits, effective_size, measure_drift
from mora_serve.errors import CalibrationError
from mora_serve.types import FinishReason, ScoredGroup
from tests.unit.method.method_builders import Raw, identity, make_group

TAU, SIGMA = 0.6, 0.8


def batch(
    seed: int,
    num_prompts: int = 400,
    n: int = 8,
    *,
    shift: float = 0.0,
    scale: float = 1.0,
    slope: float = 0.0,
    share_cut: float = 0.0,
    failed: float = 0.0,
    policy: str = "base",
) -> list[ScoredGroup]:
    """Groups with raw rewards ``10 + 3 * N(mu_x, SIGMA)`` on ``a``, moved as the arguments say."""
    rng = np.random.default_rng(seed)
    groups = []
    for index in range(num_prompts):
        mean = rng.normal(0, TAU)
        tokens = rng.integers(5, 60, n)
        z = shift + scale * rng.normal(mean, SIGMA, n) + slope * np.log(tokens / 20)
        column: list[Raw] = [
            "failed" if rng.random() < failed else 10 + 3 * float(value) for value in z
        ]
        finish: FinishReason = "length" if rng.random() < share_cut else "stop"
        made = make_group(
            {"a": column}, name=f"{seed}/{index}", tokens=[int(t) for t in tokens],
            finish=finish, policy=policy,
        )  # fmt: skip
        groups.append(made)
    return groups


@pytest.fixture(scope="module")
def calibrator() -> Calibrator:
    return fit_calibrator(batch(0, 600), ["a"])


def drift(groups: list[ScoredGroup], calibrator: Calibrator, **kwargs: float) -> DimensionDrift:
    return measure_drift(groups, calibrator, DriftLimits(**kwargs))["a"]


def test_fresh_rollouts_of_the_same_policy_are_stable(calibrator: Calibrator) -> None:
    found = drift(batch(1), calibrator)
    assert found.verdict == "stable"
    assert (found.num_prompts, found.num_scores) == (400, 3200)
    assert found.checks["scale_ratio"].value == pytest.approx(1, abs=0.1)
    assert found.invalid == {}


def test_another_policy_is_compared_not_refused(calibrator: Calibrator) -> None:
    assert drift(batch(1, policy="tuned"), calibrator).verdict == "stable"


@pytest.mark.parametrize(
    ("changes", "check", "expected"),
    [
        ({"shift": 0.6}, "median_shift", 0.6),
        ({"scale": 2.0}, "scale_ratio", 2.0),
        ({"share_cut": 0.4}, "share_cut", 0.4),
        ({"failed": 0.15}, "share_invalid", 0.15),
        ({"slope": 0.6}, "length_slope", 0.6),
    ],
)
def test_what_moved_is_named_with_its_size(
    calibrator: Calibrator, changes: dict[str, float], check: str, expected: float
) -> None:
    found = drift(batch(2, **changes), calibrator)  # type: ignore[arg-type]
    assert found.verdict == "drifted"
    drifted = found.checks[check]
    assert drifted.verdict == "drifted"
    assert drifted.low is not None
    assert drifted.high is not None
    assert drifted.value == pytest.approx(expected, abs=0.15)
    assert drifted.low < expected < drifted.high


def test_a_small_batch_is_undecided_not_stable(calibrator: Calibrator) -> None:
    found = drift(batch(3, 12), calibrator)
    assert found.verdict == "undecided"


def test_intervals_cover_no_shift_about_as_often_as_they_say() -> None:
    """Pool and batch are drawn anew each time: the pool's own error counts."""
    covered = 0
    for seed in range(30):
        fitted = fit_calibrator(batch(100 + seed, 40), ["a"])
        check = drift(batch(200 + seed, 40), fitted).checks["median_shift"]
        covered += (check.low or 0) <= 0 <= (check.high or 0)
    # Binomial(30, 0.95): fewer than 25 happens once in 300.
    assert covered >= 25


def test_more_rollouts_of_the_same_prompts_do_not_pass_for_more_evidence(
    calibrator: Calibrator,
) -> None:
    def width(groups: list[ScoredGroup]) -> float:
        check = drift(groups, calibrator).checks["median_shift"]
        return (check.high or 0) - (check.low or 0)

    flat = [
        make_group({"a": [10 + 3 * value] * 8}, name=str(value)) for value in np.linspace(-2, 2, 60)
    ]
    few = [
        make_group({"a": [10 + 3 * value] * 4}, name=str(value)) for value in np.linspace(-2, 2, 60)
    ]
    assert width(flat) == pytest.approx(width(few), rel=0.01)


def test_index_of_a_batch_in_the_pools_upper_half_by_hand() -> None:
    """The assumed pool is N(0, 1) with rho = 0: only the batch's own size is subtracted."""
    assumed = identity("a", tau=0.0, sigma=1.0)
    values = [0.01, 0.3, 0.6, 1.0, 2.0] * 8
    groups = [make_group({"a": values[i : i + 4]}, name=str(i)) for i in range(0, 40, 4)]
    check = drift(groups, assumed).checks["psi"]
    empty, full = 0.5 / 45, 8.5 / 45
    # 201 grid points, the ends counting half: the first bin holds 19.5 of 200, the last 20.5.
    expected = [0.0975, *[0.1] * 8, 0.1025]
    actual = [empty] * 5 + [full] * 5
    index = sum((a - e) * math.log(a / e) for a, e in zip(actual, expected, strict=True))
    assert check.value == pytest.approx(index - 9 / 40)
    assert check.verdict == "drifted"


def test_effective_size_by_hand() -> None:
    assert effective_size(800, 100, 0.0) == 800
    assert effective_size(800, 100, 1.0) == pytest.approx(100)
    assert effective_size(800, 100, 0.25) == pytest.approx(800 / 2.75)


def test_scores_of_another_revision_are_refused(calibrator: Calibrator) -> None:
    other = [make_group({"a": [10.0] * 8}, revision="rev2", name=str(i)) for i in range(20)]
    with pytest.raises(CalibrationError, match="rev1, got reward-model at rev2"):
        measure_drift(other, calibrator)


def test_too_few_valid_prompts_are_refused_with_their_number(calibrator: Calibrator) -> None:
    with pytest.raises(CalibrationError, match=r"at least 8 prompts .* on a, got 0 of 20"):
        measure_drift(batch(4, 20, failed=1.0), calibrator)


def test_a_constant_batch_has_no_scale_left(calibrator: Calibrator) -> None:
    groups = [make_group({"a": [10.0] * 8}, name=str(i)) for i in range(20)]
    assert drift(groups, calibrator).checks["scale_ratio"].verdict == "drifted"


def test_rewards_that_repeat_are_compared_bin_by_bin() -> None:
    """Half of the pool has one and the same reward, so that several deciles coincide."""
    rng = np.random.default_rng(5)

    def draw(seed: int) -> list[ScoredGroup]:
        rows = np.maximum(0, np.random.default_rng(seed).normal(size=(300, 8)))
        return [make_group({"a": row.tolist()}, name=str(i)) for i, row in enumerate(rows)]

    fitted = fit_calibrator(draw(int(rng.integers(100))), ["a"])
    check = drift(draw(101), fitted).checks["psi"]
    assert check.value == pytest.approx(0, abs=0.02)
    assert check.verdict == "stable"


def test_whether_answers_were_cut_is_not_guessed(calibrator: Calibrator) -> None:
    found = measure_drift(batch(6), calibrator, cut_known=False)["a"]
    assert found.share_cut is None
    assert found.checks["share_cut"].verdict is None
    assert found.verdict == "stable"


def test_equal_seeds_give_equal_reports(calibrator: Calibrator) -> None:
    groups = batch(7, 50)
    assert measure_drift(groups, calibrator) == measure_drift(groups, calibrator)
