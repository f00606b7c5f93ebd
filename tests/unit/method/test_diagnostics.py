"""Diagnostics of one prompt and of a prompt set, with the known traps of measuring."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mora_serve.calibration import Calibrator, calibrate_group
from mora_serve.classification import FixedCutClassifier
from mora_serve.config import MethodSettings
from mora_serve.diagnostics import (
    Assessment,
    Diagnostic,
    aggregate,
    assess_group,
    diagnose_group,
    failed_diagnostic,
    needs_more,
)
from mora_serve.types import Failure
from tests.unit.method.method_builders import FAILED, Raw, identity, make_group

METHOD = MethodSettings()
NAMES = ("a", "b", "c")
CALIBRATOR = identity(*NAMES)
HIGH = [3.0, 2.9, 3.1, 3.2, 2.8, 3.0, 3.1, 2.9]
LOW = [-3.0, -2.9, -3.1, -3.2, -2.8, -3.0, -3.1, -2.9]
MIDDLE = [0.1, -0.1, 0.2, -0.2, 0.3, -0.3, 0.4, -0.4]


def diagnose(
    *columns: Sequence[Raw],
    calibrator: Calibrator = CALIBRATOR,
    method: MethodSettings = METHOD,
    n: int = 8,
) -> Diagnostic:
    raw = dict(zip(NAMES, columns, strict=False))
    group = calibrate_group(make_group(raw), calibrator)
    return diagnose_group(group, calibrator, method, list(raw), n)


def assess(*columns: Sequence[Raw], calibrator: Calibrator = CALIBRATOR) -> Assessment:
    raw = dict(zip(NAMES, columns, strict=False))
    return assess_group(
        calibrate_group(make_group(raw), calibrator), calibrator, METHOD, list(raw), 8
    )


def test_single_prompt_is_named_after_its_reachable_dimension() -> None:
    result = diagnose(HIGH, LOW, LOW)
    assert result.prompt_class == "single:a"
    assert result.class_probability is not None
    assert result.class_probability > 0.99
    states = {k: item.state for k, item in result.dimensions.items()}
    assert states == {"a": "reachable", "b": "unreachable", "c": "unreachable"}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ((LOW, LOW, LOW), "flat"),
        ((HIGH, HIGH, LOW), "multi"),
        ((HIGH, HIGH, MIDDLE), "multi"),
        ((HIGH, MIDDLE, LOW), "uncertain"),
        ((HIGH,), "single:a"),
        ((LOW,), "flat"),
    ],
)
def test_classes_of_clear_prompts(columns: tuple[Sequence[Raw], ...], expected: str) -> None:
    assert diagnose(*columns).prompt_class == expected


def test_statistics_of_a_dimension_are_reported_in_z() -> None:
    item = diagnose([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]).dimensions["a"]
    assert (item.mean, item.ceiling, item.floor, item.n_valid) == (3.5, 6.5, 0.0, 8)
    assert item.spread == pytest.approx(2.4495, abs=1e-4)
    assert item.posterior_mean == pytest.approx(3.5 * 8 / 9)
    assert item.reliability == pytest.approx(8 / 9)
    assert item.expected_ceiling == pytest.approx(3.5 * 8 / 9 + 1.13791, abs=1e-4)


@pytest.mark.parametrize("status", ["failed", "timeout", "truncated", None])
def test_missing_scores_are_unknown_neither_low_nor_inactive(status: str | None) -> None:
    column: list[Raw] = [*LOW[:3], *[status] * 5]
    result = diagnose(HIGH, column, LOW)
    item = result.dimensions["b"]
    assert result.prompt_class == "unknown"
    assert (item.reach, item.state, item.n_valid) == (None, None, 3)
    assert result.class_probability is None
    assert not needs_more(assess(MIDDLE, column, LOW), 24)


def test_a_few_failed_scores_do_not_move_the_statistics_towards_zero() -> None:
    whole = diagnose([9.0] * 6).dimensions["a"]
    holed = diagnose([*[9.0] * 6, FAILED, FAILED]).dimensions["a"]
    assert (holed.mean, holed.floor, holed.n_valid) == (whole.mean, whole.floor, 6)
    assert holed.state == "reachable"


def test_nan_never_wins() -> None:
    result = diagnose([*LOW[:7], float("nan")], LOW)
    item = result.dimensions["a"]
    assert item.n_valid == 7
    assert item.ceiling == pytest.approx(np.mean(sorted(LOW[:7])[-2:]))
    assert 7 not in result.pareto
    assert item.state == "unreachable"


def test_joint_statistics_stand_on_jointly_valid_rollouts() -> None:
    a: list[Raw] = [9.0, *[float(i) for i in range(8)]]
    b: list[Raw] = [FAILED, *[float(-i) for i in range(8)]]
    result = diagnose(a, b)
    assert result.n_joint == 8
    assert 0 not in result.pareto
    assert result.pareto == tuple(range(1, 9))
    assert result.correlation["a"]["b"] == pytest.approx(-1.0)
    assert result.conflicted is True
    assert result.conflicts == (("a", "b"),)


def test_conflict_is_null_when_too_few_rollouts_are_joint() -> None:
    a: list[Raw] = [FAILED, *[float(i) for i in range(7)]]
    b: list[Raw] = [0.0, *[float(-i) for i in range(7)]]
    assert diagnose(a, b).conflicted is None


def test_groups_whose_dimensions_differ_but_sum_equal_are_kept() -> None:
    a = [4.0, -4.0, 3.0, -3.0, 2.0, -2.0, 4.0, -4.0]
    result = diagnose(a, [-x for x in a])
    assert result.status == "ok"
    assert result.prompt_class != "flat"
    assert [item.spread for item in result.dimensions.values()] == [
        pytest.approx(np.std(a, ddof=1))
    ] * 2
    assert result.conflicted is True


def test_correlation_of_a_constant_dimension_is_null() -> None:
    result = diagnose(MIDDLE, [1.0] * 8)
    assert result.correlation["a"]["b"] is None
    assert result.correlation["b"]["b"] is None
    assert result.conflicted is False


def test_hypervolume_refers_to_the_pool_not_to_the_group() -> None:
    one, better = diagnose(MIDDLE, MIDDLE), diagnose(HIGH, HIGH)
    assert one.hypervolume is not None
    assert better.hypervolume is not None
    assert better.hypervolume > one.hypervolume > 0
    assert diagnose(LOW, HIGH).hypervolume == 0.0


def test_hypervolume_is_null_beyond_four_dimensions() -> None:
    names = "abcde"
    calibrator = identity(*names)
    group = calibrate_group(make_group(dict.fromkeys(names, HIGH)), calibrator)
    assert diagnose_group(group, calibrator, METHOD, names, 8).hypervolume is None


def test_ceiling_refers_to_the_configured_n_after_further_rounds() -> None:
    column: list[Raw] = [float(i) for i in range(24)]
    item = diagnose(column, n=8).dimensions["a"]
    assert item.ceiling_n == 8
    assert item.ceiling is not None
    assert item.ceiling < np.mean(column[-6:])  # type: ignore[arg-type]


def test_fewer_than_eight_rollouts_warn() -> None:
    assert "few_rollouts" in diagnose(HIGH[:5]).warnings
    assert diagnose(HIGH).warnings == ()


def test_an_absolute_bound_replaces_the_typical_prompt() -> None:
    strict = MethodSettings(min_ceiling={"a": 9.0})
    assert diagnose(HIGH, method=strict).prompt_class == "flat"
    assert diagnose(HIGH, method=strict).dimensions["a"].bound == 9.0


def test_a_classifier_may_be_given_instead_of_the_settings() -> None:
    group = calibrate_group(make_group({"a": MIDDLE}), CALIBRATOR)
    result = diagnose_group(group, CALIBRATOR, METHOD, ["a"], 8, classifier=FixedCutClassifier())
    assert result.prompt_class == "flat"
    assert result.class_probability is None


def test_undecided_prompts_get_rounds_until_n_max_and_decided_ones_get_none() -> None:
    undecided = assess(HIGH, MIDDLE)
    assert needs_more(undecided)
    assert needs_more(undecided, 24)
    assert not needs_more(undecided, 8)
    assert not needs_more(assess(HIGH, LOW), 24)


def test_an_unmeasurable_dimension_gets_rounds_only_if_they_can_cure_it() -> None:
    nearly, never = identity("a", tau=0.3), identity("a", tau=0.01)
    assert diagnose(MIDDLE, calibrator=nearly).dimensions["a"].state == "unmeasurable"
    assert needs_more(assess(MIDDLE, calibrator=nearly), 24)
    assert not needs_more(assess(MIDDLE, calibrator=never), 24)
    assert not needs_more(assess(MIDDLE, calibrator=identity("a", tau=0.0)))


@settings(max_examples=40, deadline=None)
@given(
    st.permutations(range(10)),
    st.lists(st.tuples(*[st.integers(-3, 3)] * 2), min_size=10, max_size=10),
)
def test_the_order_of_rollouts_changes_nothing(
    order: list[int], rows: list[tuple[int, int]]
) -> None:
    group = calibrate_group(
        make_group({"a": [float(r[0]) for r in rows], "b": [float(r[1]) for r in rows]}), CALIBRATOR
    )
    shuffled = replace(group, rollouts=tuple(group.rollouts[i] for i in order))
    one, other = (diagnose_group(g, CALIBRATOR, METHOD, ["a", "b"], 8) for g in (group, shuffled))
    assert one.prompt_class == other.prompt_class
    assert sorted(one.pareto) == sorted(other.pareto)
    assert one.conflicted == other.conflicted
    assert other.hypervolume == pytest.approx(one.hypervolume)
    for k in ("a", "b"):
        assert other.dimensions[k].ceiling == pytest.approx(one.dimensions[k].ceiling)
        assert other.dimensions[k].reach == pytest.approx(one.dimensions[k].reach)


def test_aggregate_counts_prompts_not_texts() -> None:
    items = [diagnose(HIGH, LOW), diagnose(HIGH, LOW), diagnose(LOW, LOW)]
    total = aggregate(items)
    assert total.classes == {"flat": 1, "single:a": 2}
    assert total.states["a"] == {"reachable": 2, "unreachable": 1}


def test_aggregate_says_what_adaptive_rounds_saved() -> None:
    total = aggregate([diagnose(HIGH), diagnose([*MIDDLE, *MIDDLE, *MIDDLE])], n_max=24)
    assert (total.num_rollouts, total.num_rollouts_fixed) == (32, 48)
    assert total.share_saved == pytest.approx(1 / 3)


def test_aggregate_keeps_failed_and_unknown_prompts_visible() -> None:
    failure = Failure("engine_gone", "The engine is gone.", True)
    unknown = diagnose([*HIGH[:2], *[FAILED] * 6])
    total = aggregate([failed_diagnostic("p", failure), unknown, diagnose(HIGH)])
    assert (total.num_prompts, total.num_failed) == (3, 1)
    assert total.classes == {"single:a": 1, "unknown": 1}
    assert total.states["a"] == {"reachable": 1, "unknown": 1}
    assert total.warnings == {"missing_scores": 1}
    assert total.reliability["a"] == pytest.approx(8 / 9)


def test_aggregate_shows_conflicts_by_pair() -> None:
    rising = [float(i) for i in range(8)]
    opposed = diagnose(rising, rising[::-1], rising)
    total = aggregate([opposed, diagnose(rising, rising, rising)])
    cell = total.conflict["a"]["b"]
    assert (cell.num_conflicted, cell.num_prompts) == (1, 2)
    assert cell.mean_correlation == pytest.approx(0.0)
    assert total.conflict["b"]["a"] == cell
    assert total.conflict["a"]["c"].num_conflicted == 0
    assert total.num_conflicted == 1


def test_aggregate_reports_the_share_of_cut_answers() -> None:
    cut = calibrate_group(make_group({"a": HIGH[:4]}, finish="length"), CALIBRATOR)
    diagnosed = diagnose_group(cut, CALIBRATOR, METHOD, ["a"], 8)
    assert diagnosed.share_cut == 1.0
    assert aggregate([diagnosed, diagnose([*HIGH, *HIGH[:4]])]).share_cut == pytest.approx(0.25)


def test_aggregate_of_nothing_is_empty_and_json_ready() -> None:
    assert aggregate([]).share_cut is None
    text = json.dumps(asdict(aggregate([diagnose(HIGH, LOW)], 24)), allow_nan=False)
    assert "single:a" in text
