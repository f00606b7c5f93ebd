"""What the method promises, shown on simulated policies."""

from __future__ import annotations

import numpy as np
import pytest

from mora_serve.calibration import calibrate_group, fit_calibrator
from mora_serve.classification import PosteriorClassifier
from mora_serve.config import MethodSettings
from mora_serve.diagnostics import aggregate, diagnose_group
from mora_serve.simulation import (
    Retest,
    SimulatedPolicy,
    compare_classifiers,
    presample,
    retest,
)


@pytest.fixture(scope="module")
def embedded_like() -> dict[str, Retest]:
    """A policy as noisy as the embedded one, 8 rollouts a round, 24 at most."""
    return compare_classifiers(SimulatedPolicy(), np.random.default_rng(0), num_prompts=120)


def test_posterior_classes_repeat_in_four_of_five_decided_prompts(
    embedded_like: dict[str, Retest],
) -> None:
    found = embedded_like["posterior"]
    assert found.num_both_decided >= 30
    assert found.agreement is not None
    assert found.agreement >= 0.8
    assert found.accuracy is not None
    assert found.accuracy >= 0.75


@pytest.mark.parametrize(("name", "at_most"), [("spread", 0.4), ("fixed", 0.6)])
def test_classes_cut_from_point_estimates_do_not_repeat(
    embedded_like: dict[str, Retest], name: str, at_most: float
) -> None:
    found = embedded_like[name]
    assert found.decided == 1.0
    assert found.agreement is not None
    assert found.agreement < at_most


def test_adaptive_rounds_save_rollouts_where_prompts_are_clear() -> None:
    policy = SimulatedPolicy(tau=(1.0, 1.0, 1.0))
    found = compare_classifiers(
        policy, np.random.default_rng(1), num_prompts=80, classifiers=[PosteriorClassifier()]
    )["posterior"]
    assert found.rollouts_per_prompt < 0.8 * 24
    assert found.decided > 0.7


def test_further_rounds_decide_more_prompts_than_one() -> None:
    policy, chosen = SimulatedPolicy(), [PosteriorClassifier()]
    one, three = (
        compare_classifiers(
            policy, np.random.default_rng(2), n_max=n_max, num_prompts=60, classifiers=chosen
        )["posterior"].decided
        for n_max in (8, 24)
    )
    assert three > one + 0.2


def test_classes_repeat_under_heavy_tails_and_correlated_dimensions() -> None:
    policy = SimulatedPolicy(
        tau=(0.6, 0.6, 0.6), freedom=4.0, correlation=-0.4, prompt_correlation=-0.3
    )
    found = compare_classifiers(
        policy, np.random.default_rng(3), num_prompts=120, classifiers=[PosteriorClassifier()]
    )["posterior"]
    assert found.agreement is not None
    assert found.agreement >= 0.75


def test_failing_scores_end_as_unknown_not_as_flat() -> None:
    policy = SimulatedPolicy(failure_rate=0.7)
    rng = np.random.default_rng(4)
    calibrator = fit_calibrator(SimulatedPolicy().pool(50, 8, rng), policy.dimensions)
    found = [
        diagnose_group(
            calibrate_group(g, calibrator), calibrator, MethodSettings(), policy.dimensions, 8
        )
        for g in policy.pool(60, 8, rng)
    ]
    classes = aggregate(found).classes
    assert classes["unknown"] > 50
    assert "flat" not in classes


def test_presampling_stops_at_n_max_with_unique_indices() -> None:
    policy, rng = SimulatedPolicy(), np.random.default_rng(5)
    calibrator = fit_calibrator(policy.pool(60, 8, rng), policy.dimensions)
    for row in policy.prompts(20, rng):
        found = presample(
            policy,
            row,
            calibrator,
            method=MethodSettings(),
            classifier=PosteriorClassifier(p_class=0.99),
            rng=rng,
            n=8,
            n_max=20,
        )
        assert found.group is not None
        indices = [rollout.index for rollout in found.group.rollouts]
        assert indices == list(range(len(indices)))
        assert len(indices) in (8, 16, 20)


def test_retest_agreement_counts_only_prompts_decided_both_times() -> None:
    rng = np.random.default_rng(6)
    policy = SimulatedPolicy(tau=(1.0, 1.0, 1.0))
    calibrator = fit_calibrator(policy.pool(60, 8, rng), policy.dimensions)
    means = policy.prompts(30, rng)
    once, twice = (
        [
            diagnose_group(
                calibrate_group(policy.group("p", row, 8, rng), calibrator),
                calibrator,
                MethodSettings(),
                policy.dimensions,
                8,
            )
            for row in means
        ]
        for _ in range(2)
    )
    found = retest(once, twice)
    open_classes = {"uncertain", "unknown"}
    both = [
        (a.prompt_class, b.prompt_class)
        for a, b in zip(once, twice, strict=True)
        if a.prompt_class not in open_classes and b.prompt_class not in open_classes
    ]
    assert found.num_both_decided == len(both) > 0
    assert found.agreement == pytest.approx(np.mean([a == b for a, b in both]))
    assert found.accuracy is None


def test_equal_seeds_give_equal_simulations() -> None:
    policy = SimulatedPolicy()
    one, other = (policy.pool(3, 8, np.random.default_rng(7)) for _ in range(2))
    assert one == other
