"""Posterior, reach, and the gain on which acceptance decides."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.calibration import calibrate_group
from mora_serve.prompt_model import (
    Posterior,
    ceiling_bound,
    ceiling_estimate,
    expected_ceiling,
    expected_ceiling_gain,
    posterior,
    reach,
    student_cdf,
    student_quantile,
)
from mora_serve.types import ScoredGroup
from tests.unit.method.method_builders import FAILED, Raw, identity, make_group

CALIBRATOR = identity("a", "b", tau=0.5, sigma=1.0)
A = CALIBRATOR["a"]


def group(a: Sequence[Raw], b: Sequence[Raw] | None = None) -> ScoredGroup:
    columns = {"a": a} if b is None else {"a": a, "b": b}
    return calibrate_group(make_group(columns), CALIBRATOR)


def normal_group(rng: np.random.Generator, n: int, mu: float = 0.0, sd: float = 1.0) -> ScoredGroup:
    return group(list(mu + sd * rng.standard_normal(n)))


def test_posterior_is_the_conjugate_normal_one() -> None:
    estimate = posterior([1.0, 2.0, 3.0, 2.0], A)
    precision = 1 / 0.25 + 4 / 1.0
    assert estimate.mean == pytest.approx((4 * 2.0 / 1.0) / precision)
    assert estimate.sd == pytest.approx(math.sqrt(1 / precision))


def test_posterior_without_rollouts_is_the_pool() -> None:
    assert posterior([], A) == Posterior(0.0, 0.5)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30))
def test_posterior_lies_between_the_pool_and_the_measured_mean(values: list[float]) -> None:
    estimate = posterior(values, A)
    measured = float(np.mean(values))
    assert min(0.0, measured) - 1e-9 <= estimate.mean <= max(0.0, measured) + 1e-9
    assert estimate.sd < A.tau


def test_posterior_intervals_cover_the_true_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    means = rng.normal(0, A.tau, 4000)
    inside = 0
    for mu in means:
        estimate = posterior(mu + rng.standard_normal(8), A)
        inside += abs(mu - estimate.mean) < 1.2816 * estimate.sd
    assert inside / means.size == pytest.approx(0.8, abs=0.025)


def test_reach_is_calibrated_against_the_truth() -> None:
    rng = np.random.default_rng(1)
    bound = ceiling_bound(A, 8)
    told = []
    for mu in rng.normal(0, A.tau, 4000):
        p = reach(posterior(mu + rng.standard_normal(8), A), A, 8, bound)
        told.append((p, expected_ceiling(mu, A.sigma, 8) >= bound))
    sure = [truth for p, truth in told if p >= 0.8]
    assert 0.86 < np.mean(sure) < 0.94
    assert np.mean([p for p, _ in told if p >= 0.8]) == pytest.approx(np.mean(sure), abs=0.03)


def test_default_bound_splits_the_pool_in_halves_at_any_n() -> None:
    at_median = Posterior(A.median_mean, 0.3)
    for n in (4, 8, 24):
        assert reach(at_median, A, n, ceiling_bound(A, n)) == pytest.approx(0.5)


def test_an_absolute_bound_is_easier_to_meet_with_more_rollouts() -> None:
    estimate = Posterior(0.0, 0.3)
    assert reach(estimate, A, 16, 1.1) > reach(estimate, A, 4, 1.1)


def test_reach_without_between_prompt_variance_does_not_divide_by_zero() -> None:
    assert [reach(Posterior(mu, 0.0), A, 8, A.typical_ceiling(8)) for mu in (-1, 0, 1)] == [
        0.0,
        0.5,
        1.0,
    ]


def test_ceiling_estimate_refers_to_n_whatever_was_measured() -> None:
    rng = np.random.default_rng(2)
    estimate = ceiling_estimate(normal_group(rng, 400), "a", CALIBRATOR, 8)
    assert estimate is not None
    assert estimate.value == pytest.approx(1.138, abs=0.2)
    assert estimate.standard_error == pytest.approx(1 / 20, rel=0.1)
    assert (estimate.n, estimate.num_valid) == (8, 400)


def test_ceiling_estimate_of_too_few_scores_is_none() -> None:
    assert ceiling_estimate(group([1.0, 2.0, 3.0, *[FAILED] * 5]), "a", CALIBRATOR, 8) is None


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [(0.9, 30, 1.310415), (0.975, 4, 2.776445), (0.95, 1, 6.313752), (0.1, 10, -1.372184)],
)
def test_student_quantiles_match_the_tables(
    probability: float, freedom: float, expected: float
) -> None:
    assert student_quantile(probability, freedom) == pytest.approx(expected, abs=1e-5)
    assert student_cdf(expected, freedom) == pytest.approx(probability, abs=1e-6)


@pytest.mark.parametrize("own_spread", [0.4, 1.0, 2.5])
def test_an_unchanged_prompt_gains_above_zero_one_time_in_ten(own_spread: float) -> None:
    rng = np.random.default_rng(3)
    trials = 800
    accepted = 0
    for _ in range(trials):
        one, other = (normal_group(rng, 16, sd=own_spread) for _ in range(2))
        estimate = expected_ceiling_gain(one, other, ["a"], CALIBRATOR, n=8)
        assert estimate is not None
        accepted += estimate.lower_bound > 0
    assert accepted / trials == pytest.approx(0.10, abs=0.035)


def test_gain_is_unbiased_and_bounded_from_below() -> None:
    rng = np.random.default_rng(4)
    found = [
        expected_ceiling_gain(
            normal_group(rng, 16, 0.7), normal_group(rng, 16), ["a"], CALIBRATOR, n=8
        )
        for _ in range(600)
    ]
    gains = [item.gain for item in found if item]
    assert np.mean(gains) == pytest.approx(0.7, abs=0.05)
    assert np.mean([item.lower_bound <= 0.7 for item in found if item]) == pytest.approx(
        0.9, abs=0.04
    )


def test_gain_does_not_depend_on_how_many_rollouts_each_side_has() -> None:
    rng = np.random.default_rng(5)
    gains = [
        item.gain
        for _ in range(600)
        if (
            item := expected_ceiling_gain(
                normal_group(rng, 32), normal_group(rng, 8), ["a"], CALIBRATOR, n=8
            )
        )
    ]
    assert np.mean(gains) == pytest.approx(0.0, abs=0.06)


def test_gain_averages_the_target_dimensions() -> None:
    better = group([2.0, 3.0, 2.0, 3.0], [0.0, 1.0, 0.0, 1.0])
    before = group([0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0])
    estimate = expected_ceiling_gain(better, before, ["a", "b"], CALIBRATOR, n=8)
    assert estimate is not None
    assert estimate.per_dimension == pytest.approx({"a": 2.0, "b": 0.0})
    assert estimate.gain == pytest.approx(1.0)


def test_gain_uses_the_rollouts_that_are_valid_on_all_targets() -> None:
    after = group([1.0, 2.0, 1.0, 2.0, 900.0], [1.0, 2.0, 2.0, 1.0, FAILED])
    before = group([0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0])
    estimate = expected_ceiling_gain(after, before, ["a", "b"], CALIBRATOR, n=8)
    assert estimate is not None
    assert (estimate.num_candidate, estimate.num_original) == (4, 4)
    assert estimate.gain == pytest.approx(1.0)


def test_a_side_with_too_few_scores_has_no_gain() -> None:
    full = group([1.0, 2.0, 3.0, 4.0])
    failed = group([1.0, 2.0, 3.0, FAILED])
    assert expected_ceiling_gain(failed, full, ["a"], CALIBRATOR, n=8) is None
    assert expected_ceiling_gain(full, failed, ["a"], CALIBRATOR, n=8) is None
    assert expected_ceiling_gain(full, full, [], CALIBRATOR, n=8) is None


def test_sides_without_spread_still_state_an_uncertainty() -> None:
    estimate = expected_ceiling_gain(group([0.1] * 8), group([0.0] * 8), ["a"], CALIBRATOR, n=8)
    assert estimate is not None
    assert estimate.lower_bound < 0 < estimate.gain
