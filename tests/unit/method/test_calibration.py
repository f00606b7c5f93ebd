"""Calibrators: scale, variance components, identity of the scorer, persistence."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mora_serve.calibration import (
    Calibrator,
    calibrate_group,
    fit_calibrator,
    percent_change,
)
from mora_serve.errors import CalibrationError
from mora_serve.pool_statistics import robust_scale, variance_components, within_slope
from mora_serve.types import ScoredGroup
from tests.unit.method.method_builders import FAILED, identity, make_group


def make_pool(
    rng: np.random.Generator, *, scale: float = 1.0, shift: float = 0.0, prompts: int = 40
) -> list[ScoredGroup]:
    means = rng.normal(0, 0.6, prompts)
    return [
        make_group({"a": list(shift + scale * (mu + rng.standard_normal(8)))}, name=f"p{i}")
        for i, mu in enumerate(means)
    ]


def values(group: ScoredGroup, dimension: str = "a") -> list[float | None]:
    return [rollout.scores[dimension].value for rollout in group.rollouts]


def test_robust_z_centres_on_the_median_and_scales_by_the_mad() -> None:
    raw = np.array([1.0, 2.0, 3.0, 4.0, 100.0])
    assert robust_scale(raw, "a") == pytest.approx((3.0, 1.4826))


def test_scale_falls_back_to_the_interquartile_range_when_mad_is_zero() -> None:
    raw = np.array([5.0] * 6 + [7.0] * 4)
    assert np.median(np.abs(raw - np.median(raw))) == 0
    assert robust_scale(raw, "a")[1] == pytest.approx(2.0 / 1.349)


def test_constant_rewards_are_refused() -> None:
    pool = [make_group({"a": [1.0] * 8}, name=f"p{i}") for i in range(6)]
    with pytest.raises(CalibrationError, match="rewards on a must vary"):
        fit_calibrator(pool, ["a"])


def test_rewards_that_never_vary_within_a_prompt_are_refused() -> None:
    pool = [make_group({"a": [float(i)] * 8}, name=f"p{i}") for i in range(9)]
    with pytest.raises(CalibrationError, match="vary within prompts"):
        fit_calibrator(pool, ["a"])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100), st.floats(-50, 50))
def test_calibrated_values_do_not_depend_on_the_scale_of_the_model(
    seed: int, scale: float, shift: float
) -> None:
    plain = make_pool(np.random.default_rng(seed), prompts=8)
    scaled = make_pool(np.random.default_rng(seed), prompts=8, scale=scale, shift=shift)
    for one, other in zip(plain, scaled, strict=True):
        a = calibrate_group(one, fit_calibrator(plain, ["a"]))
        b = calibrate_group(other, fit_calibrator(scaled, ["a"]))
        assert values(a) == pytest.approx(values(b), abs=1e-6)


def test_variance_components_are_recovered_with_unequal_group_sizes() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 20, size=3000)
    groups = [rng.normal(rng.normal(0.7, 0.5), 1.3, size) for size in sizes]
    m, tau, sigma = variance_components(groups)
    assert (m, tau, sigma) == pytest.approx((0.7, 0.5, 1.3), abs=0.03)


def test_prompts_that_do_not_differ_have_zero_reliability() -> None:
    groups = [np.array([-1.0, 1.0, 0.5, -0.5])] * 20
    _, tau, sigma = variance_components(groups)
    assert tau == 0.0
    assert sigma > 0
    calibration = replace(identity("a")["a"], tau=0.0)
    assert calibration.reliability(1000) == 0.0
    assert calibration.rollouts_for(0.5) is None


def test_reliability_is_the_retest_correlation_of_prompt_means() -> None:
    rng = np.random.default_rng(1)
    means = rng.normal(0, 0.5, 4000)
    first, second = (means + rng.standard_normal((8, 4000)).mean(axis=0) for _ in range(2))
    stated = identity("a", tau=0.5)["a"].reliability(8)
    assert np.corrcoef(first, second)[0, 1] == pytest.approx(stated, abs=0.03)


def test_rollouts_for_is_the_fewest_that_reach_a_reliability() -> None:
    calibration = identity("a", tau=0.38)["a"]
    needed = calibration.rollouts_for(0.7)
    assert needed is not None
    assert calibration.reliability(needed) >= 0.7 > calibration.reliability(needed - 1)


def test_failed_scores_count_neither_as_zero_nor_as_rollouts() -> None:
    rng = np.random.default_rng(2)
    clean = [make_group({"a": list(5 + rng.standard_normal(8))}, name=f"p{i}") for i in range(20)]
    holes = [
        make_group({"a": [*(r.scores["a"].raw for r in g.rollouts), FAILED, FAILED]}, name="p")
        for g in clean
    ]
    with_holes, without = fit_calibrator(holes, ["a"])["a"], fit_calibrator(clean, ["a"])["a"]
    assert with_holes == without
    assert with_holes.center > 4


def test_prompts_without_enough_valid_scores_leave_the_pool() -> None:
    rng = np.random.default_rng(3)
    pool = make_pool(rng, prompts=5)
    broken = make_group({"a": [1e6, 1e6, 1e6, *[FAILED] * 5]}, name="broken")
    assert fit_calibrator([*pool, broken], ["a"]) == fit_calibrator(pool, ["a"])
    with pytest.raises(CalibrationError, match="at least 4 prompts"):
        fit_calibrator([*pool[:3], broken], ["a"])


def test_pool_of_two_policies_or_two_scorer_revisions_is_refused() -> None:
    pool = make_pool(np.random.default_rng(4))
    with pytest.raises(CalibrationError, match="one policy"):
        fit_calibrator([*pool, replace(pool[0], policy_version="tuned")], ["a"])
    other = make_group({"a": [0.0, 1.0, 2.0, 3.0]}, revision="rev2")
    with pytest.raises(CalibrationError, match="one model revision"):
        fit_calibrator([*pool, other], ["a"])


def test_scores_of_another_revision_are_refused() -> None:
    group = make_group({"a": [0.0] * 4}, revision="rev2")
    with pytest.raises(CalibrationError, match="rev2"):
        calibrate_group(group, identity("a"))
    with pytest.raises(CalibrationError, match="fit a new one"):
        identity("a").check({"a": ("reward-model", "rev2")})


def test_an_unknown_dimension_is_refused() -> None:
    with pytest.raises(CalibrationError, match="'b'"):
        calibrate_group(make_group({"b": [0.0] * 4}), identity("a"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_reward_becomes_a_failed_score(bad: float) -> None:
    group = calibrate_group(make_group({"a": [bad, 1.0]}), identity("a"))
    score = group.rollouts[0].scores["a"]
    assert (score.status, score.raw, score.value) == ("failed", None, None)


def test_raw_rewards_are_kept_beside_calibrated_ones() -> None:
    pool = make_pool(np.random.default_rng(5), scale=7.0, shift=3.0)
    group = calibrate_group(pool[0], fit_calibrator(pool, ["a"]))
    raws = [rollout.scores["a"].raw for rollout in group.rollouts]
    assert raws == [rollout.scores["a"].raw for rollout in pool[0].rollouts]
    assert values(group) != raws


def test_quantile_calibration_makes_a_skewed_pool_normal_and_keeps_order() -> None:
    rng = np.random.default_rng(6)
    pool = [
        make_group({"a": list(rng.lognormal(rng.normal(0, 0.5), 1, 8))}, name=f"p{i}")
        for i in range(200)
    ]
    calibration = fit_calibrator(pool, ["a"], kind="quantile")["a"]
    raws = sorted(r.scores["a"].raw for g in pool for r in g.rollouts if r.scores["a"].raw)
    z = [calibration.z(raw) for raw in raws]
    assert z == sorted(z)
    assert np.mean(z) == pytest.approx(0, abs=0.02)
    assert np.std(z) == pytest.approx(1, abs=0.05)
    assert math.isfinite(calibration.z(1e12))
    assert math.isfinite(calibration.z(-1e12))


def test_identity_kind_leaves_rewards_as_they_are() -> None:
    pool = make_pool(np.random.default_rng(7), shift=2.0)
    calibrator = fit_calibrator(pool, ["a"], kind="identity")
    group = calibrate_group(pool[0], calibrator)
    assert values(group) == [rollout.scores["a"].raw for rollout in pool[0].rollouts]
    assert calibrator["a"].m == pytest.approx(2.0, abs=0.4)


def test_length_slope_is_measured_within_prompts() -> None:
    rng = np.random.default_rng(8)
    pool = []
    for i in range(60):
        tokens = [int(t) for t in rng.integers(5, 60, 8)]
        # Prompts with long answers score low, but within a prompt longer answers score high.
        level = -3 * (i % 2)
        raw = [level + 0.5 * math.log(t) + rng.normal(0, 0.3) for t in tokens]
        longer = [t * (1 + 3 * (i % 2)) for t in tokens]
        pool.append(make_group({"a": raw}, tokens=longer, name=f"p{i}"))
    calibration = fit_calibrator(pool, ["a"])["a"]
    assert calibration.length_slope * calibration.scale == pytest.approx(0.5, abs=0.08)


def test_slope_is_zero_when_lengths_never_vary() -> None:
    assert within_slope([np.ones(4)], [np.array([0.0, 1.0, 2.0, 3.0])]) == 0.0


def test_share_of_cut_answers_is_reported() -> None:
    rng = np.random.default_rng(9)
    pool = make_pool(rng, prompts=6)
    cut = [
        make_group({"a": list(rng.standard_normal(8))}, name=f"c{i}", finish="length")
        for i in range(2)
    ]
    assert fit_calibrator([*pool, *cut], ["a"])["a"].share_cut == pytest.approx(0.25)


def test_pool_quantile_runs_from_0_to_100_with_ties_in_the_middle() -> None:
    pool = [make_group({"a": [0.0, 1.0, 1.0, 1.0, 1.0, 2.0]}, name=f"p{i}") for i in range(6)]
    calibration = fit_calibrator(pool, ["a"], kind="identity")["a"]
    assert calibration.pool_quantile(-5.0) == 0.0
    assert calibration.pool_quantile(5.0) == 100.0
    assert calibration.pool_quantile(1.0) == pytest.approx(50.0)


def test_percent_change_is_the_change_of_the_mean_pool_quantile() -> None:
    calibrator = identity("a", tau=0.6, sigma=0.8)
    change = percent_change(calibrator, "a", [0.0, 0.0], [1.0, 1.0])
    assert change == pytest.approx(34.1, abs=0.3)
    assert percent_change(calibrator, "a", [], [1.0]) is None


def test_reference_is_the_five_percent_quantile() -> None:
    pool = make_pool(np.random.default_rng(10), prompts=100)
    calibrator = fit_calibrator(pool, ["a"])
    group_values = np.concatenate([values(calibrate_group(g, calibrator)) for g in pool])
    assert calibrator.reference(["a"])[0] == pytest.approx(np.quantile(group_values, 0.05))


def test_typical_ceiling_is_above_half_of_the_pool_at_any_n() -> None:
    calibration = fit_calibrator(make_pool(np.random.default_rng(11)), ["a"])["a"]
    gap = calibration.typical_ceiling(16) - calibration.typical_ceiling(4)
    assert gap == pytest.approx((1.20104 - 1.02938) * calibration.sigma, abs=1e-4)


def test_saved_calibrator_loads_equal_with_the_same_version(tmp_path: Path) -> None:
    calibrator = fit_calibrator(
        make_pool(np.random.default_rng(12)), ["a"], sampling={"temperature": 0.8}
    )
    calibrator.save(tmp_path / "c.json")
    loaded = Calibrator.load(tmp_path / "c.json")
    assert loaded == calibrator
    assert loaded.version == calibrator.version
    assert pickle.loads(pickle.dumps(loaded)) == calibrator


def test_version_changes_with_the_content() -> None:
    assert identity("a").version == identity("a").version
    assert identity("a").version != identity("a", tau=0.9).version


@pytest.mark.parametrize("damage", ["edit", "missing", "syntax", "list"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "c.json"
    data = identity("a").to_dict()
    if damage == "edit":
        data["dimensions"]["a"]["tau"] = 2.0
    if damage == "missing":
        del data["dimensions"]["a"]["sigma"]
    text = {"syntax": "{", "list": "[]"}.get(damage, json.dumps(data))
    path.write_text(text, "utf-8")
    with pytest.raises(CalibrationError):
        Calibrator.load(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="must be a JSON file"):
        Calibrator.load(tmp_path / "none.json")
