"""Confirmed acceptance: chance is accepted at the stated rate, one measurement accepts far more."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mora_serve.acceptance import choose, decide, selection_gain
from mora_serve.calibration import Calibrator
from mora_serve.config import MethodSettings
from mora_serve.types import ScoredGroup
from tests.unit.act.act_builders import scored

K = ("helpful", "harmless", "truthful")
TARGETS = ("harmless", "truthful")
CALIBRATOR = Calibrator.identity(dict.fromkeys(K, ("model", "rev")))
METHOD = MethodSettings()


def sampled(
    rng: np.random.Generator, n: int, means: tuple[float, float, float] = (0.0, 0.0, 0.0)
) -> ScoredGroup:
    """``n`` rollouts with unit variance around ``means``."""
    z = rng.normal(size=(n, 3)) + np.array(means)
    return scored({k: [float(v) for v in z[:, i]] for i, k in enumerate(K)})


def decided(candidate: ScoredGroup, original: ScoredGroup, reachable: tuple[str, ...] = ()):  # type: ignore[no-untyped-def]
    return decide(
        candidate, original, TARGETS, reachable, calibrator=CALIBRATOR, method=METHOD, n=8
    )


def test_unchanged_prompts_are_accepted_at_one_minus_the_confidence() -> None:
    rng = np.random.default_rng(0)
    trials = 800
    accepted = sum(decided(sampled(rng, 16), sampled(rng, 16)).accepted for _ in range(trials))
    # Binomial with p = 0.1: 0.1 +- 4 standard errors.
    assert accepted / trials == pytest.approx(0.10, abs=4 * math.sqrt(0.09 / trials))


def test_confirmation_takes_the_selection_bias_away() -> None:
    """The null strategy, end to end: the best of three unchanged prompts, then fresh rollouts.

    A rule that took the selection gain at its word would accept about 31 % at a bound of 0.3 z,
    with a mean "gain" of those accepted near 0.47 z where there is none.
    """
    rng = np.random.default_rng(1)
    trials, accepted = 600, 0
    biased: list[float] = []
    honest: list[float] = []
    for _ in range(trials):
        original = sampled(rng, 8)
        gains = [selection_gain(sampled(rng, 8), original, K, CALIBRATOR, 8) for _ in range(3)]
        best = choose(gains)
        assert best is not None
        biased.append(gains[best] or 0.0)
        decision = decided(sampled(rng, 16), sampled(rng, 16))
        accepted += decision.accepted
        honest.append(decision.gain or 0.0)
    naive = [gain for gain in biased if gain > 0.3]
    assert len(naive) / trials == pytest.approx(0.31, abs=4 * math.sqrt(0.31 * 0.69 / trials))
    assert float(np.mean(naive)) == pytest.approx(0.47, abs=0.06)
    assert accepted / trials == pytest.approx(0.10, abs=4 * math.sqrt(0.09 / trials))
    assert float(np.mean(honest)) == pytest.approx(0.0, abs=0.05)


def test_a_real_gain_is_accepted_and_reported_without_bias() -> None:
    rng = np.random.default_rng(4)
    decisions = [
        decided(sampled(rng, 16, (0.0, 1.5, 1.5)), sampled(rng, 16), ("helpful",))
        for _ in range(100)
    ]
    assert np.mean([d.gain for d in decisions]) == pytest.approx(1.5, abs=0.1)
    assert sum(d.gain_lower > 0 for d in decisions) > 95


def test_a_drop_on_what_the_original_reaches_is_a_rejection() -> None:
    rng = np.random.default_rng(5)
    decision = decided(
        sampled(rng, 64, (-1.5, 1.5, 1.5)), sampled(rng, 64, (0.0, 0.0, 0.0)), ("helpful",)
    )
    assert not decision.accepted
    assert decision.reason == "ceiling_drop"
    assert decision.kept["helpful"] == pytest.approx(-1.5, abs=0.5)
    assert decision.kept_lower["helpful"] < decision.kept["helpful"]


def test_no_gain_is_the_first_reason() -> None:
    rng = np.random.default_rng(6)
    decision = decided(sampled(rng, 32, (-2.0, -2.0, -2.0)), sampled(rng, 32), ("helpful",))
    assert decision.reason == "gain"


def test_missing_scores_decide_nothing() -> None:
    rng = np.random.default_rng(7)
    full = sampled(rng, 16)
    empty = scored({k: [None] * 13 + [9.0] * 3 for k in K})
    decision = decided(empty, full)
    assert not decision.accepted
    assert decision.reason == "missing_scores"
    assert decision.gain is None
    assert selection_gain(empty, full, TARGETS, CALIBRATOR, 8) is None


def test_missing_scores_on_what_the_original_reaches_decide_nothing() -> None:
    rng = np.random.default_rng(8)
    better = [9.0 + 0.1 * i for i in range(16)]
    unproven = scored({"helpful": [None] * 16, "harmless": better, "truthful": better})
    decision = decided(unproven, sampled(rng, 16), ("helpful",))
    assert (decision.accepted, decision.reason) == (False, "missing_scores")


def test_choice_takes_the_largest_gain_and_the_first_of_equals() -> None:
    assert choose([0.1, 0.5, None, 0.5]) == 1
    assert choose([None, -1.0]) == 1
    assert choose([None, None]) is None
    assert choose([]) is None


def test_min_gain_and_max_drop_are_bounds_on_the_lower_bounds() -> None:
    flat = scored({k: [0.0, 0.1] * 8 for k in K})
    lifted = scored({k: [1.0, 1.1] * 8 for k in K})
    result = decided(lifted, flat)
    assert result.gain == pytest.approx(1.0)
    assert result.gain_lower is not None
    for bound, accepted in ((result.gain_lower - 1e-6, True), (result.gain_lower, False)):
        method = MethodSettings(min_gain=bound)
        outcome = decide(lifted, flat, TARGETS, (), calibrator=CALIBRATOR, method=method, n=8)
        assert outcome.accepted is accepted
