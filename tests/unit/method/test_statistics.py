"""Statistics of rollouts: exact values, invariances, ties and missing scores."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mora_serve import statistics as stats
from mora_serve.calibration import calibrate_group
from tests.unit.method.method_builders import FAILED, Raw, identity, make_group

finite = st.floats(-1e3, 1e3, allow_nan=False).map(lambda x: round(x, 3))
samples = st.lists(finite, min_size=1, max_size=12)
tied = st.lists(st.integers(-2, 2).map(float), min_size=3, max_size=12)


def matrices(columns: int, max_rows: int = 7) -> st.SearchStrategy[np.ndarray]:
    row = st.lists(st.integers(-3, 3).map(float), min_size=columns, max_size=columns)
    return st.lists(row, min_size=1, max_size=max_rows).map(np.array)


@pytest.mark.parametrize(
    ("n", "expected"), [(1, 0.0), (2, 0.56419), (4, 1.02938), (8, 1.13791), (16, 1.20104)]
)
def test_ceiling_constant_has_the_documented_values(n: int, expected: float) -> None:
    assert stats.ceiling_constant(n) == pytest.approx(expected, abs=1e-5)


def test_ceiling_constant_agrees_with_simulation_at_large_n() -> None:
    rng = np.random.default_rng(0)
    draws = np.sort(rng.standard_normal((20_000, 24)), axis=1)[:, -6:].mean(axis=1)
    error = draws.std() / math.sqrt(draws.size)
    assert abs(stats.ceiling_constant(24) - draws.mean()) < 4 * error


def test_ceiling_constant_tends_to_the_mean_of_the_top_quarter() -> None:
    assert stats.ceiling_constant(1024) == pytest.approx(1.2711, abs=2e-3)


@pytest.mark.parametrize(("n", "count"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3), (24, 6)])
def test_ceiling_is_the_mean_of_the_best_quarter_rounded_up(n: int, count: int) -> None:
    values = list(range(n))
    assert stats.ceiling(values) == pytest.approx(np.mean(values[-count:]))


def test_spread_uses_ddof_one_and_needs_two_values() -> None:
    assert stats.spread([1.0, 3.0]) == pytest.approx(math.sqrt(2))
    assert stats.spread([1.0]) is None


def test_nothing_has_no_statistics() -> None:
    assert [f([]) for f in (stats.mean, stats.spread, stats.ceiling, stats.floor)] == [None] * 4


@given(samples, st.randoms(use_true_random=False))
def test_statistics_ignore_the_order_of_rollouts(values: list[float], random: object) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for statistic in (stats.mean, stats.spread, stats.ceiling, stats.floor):
        assert statistic(values) == pytest.approx(statistic(shuffled))


@given(samples, st.floats(0.1, 10), finite)
def test_ceiling_follows_affine_changes_of_scale(
    values: list[float], scale: float, shift: float
) -> None:
    before = stats.ceiling(values)
    assert before is not None
    after = stats.ceiling([value * scale + shift for value in values])
    assert after == pytest.approx(before * scale + shift, abs=1e-6)


@settings(max_examples=60)
@given(st.lists(finite, min_size=1, max_size=9), st.data())
def test_subset_ceiling_is_the_average_over_all_subsets(
    values: list[float], data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, len(values)))
    expected = np.mean([stats.ceiling(subset) for subset in combinations(values, size)])
    assert stats.subset_ceiling(values, size) == pytest.approx(expected, abs=1e-6)


def test_subset_ceiling_does_not_grow_with_the_number_of_rollouts() -> None:
    rng = np.random.default_rng(1)
    draws = rng.standard_normal((3000, 24))
    at_equal_n = float(np.mean([stats.subset_ceiling(row, 8) or 0.0 for row in draws]))
    assert at_equal_n == pytest.approx(stats.ceiling_constant(8), abs=0.03)
    assert np.mean([stats.ceiling(row) or 0.0 for row in draws]) > at_equal_n + 0.05


def test_subset_ceiling_of_more_values_than_there_are_is_none() -> None:
    assert stats.subset_ceiling([1.0, 2.0], 3) is None


@pytest.mark.parametrize(
    ("num_valid", "num_rollouts", "expected"),
    [(3, 4, False), (4, 4, True), (4, 8, True), (4, 9, False), (8, 16, True), (7, 16, False)],
)
def test_validity_needs_four_scores_and_half_of_the_rollouts(
    num_valid: int, num_rollouts: int, expected: bool
) -> None:
    assert stats.is_valid(num_valid, num_rollouts) is expected


def test_missing_scores_are_left_out_of_values_not_replaced() -> None:
    raw: dict[str, list[Raw]] = {
        "a": [1.0, FAILED, 3.0, "timeout", None, "truncated"],
        "b": [1.0] * 6,
    }
    group = calibrate_group(make_group(raw), identity("a", "b"))
    assert stats.valid_values(group, "a") == (1.0, 3.0)
    indices, joint = stats.joint_values(group, ["a", "b"])
    assert indices == (0, 2)
    assert joint.tolist() == [[1.0, 1.0], [3.0, 1.0]]


def test_all_rollouts_of_a_group_count() -> None:
    group = calibrate_group(make_group({"a": [float(i) for i in range(17)]}), identity("a"))
    assert len(stats.valid_values(group, "a")) == 17


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_rewards_are_refused_everywhere(bad: float) -> None:
    for statistic in (stats.mean, stats.spread, stats.ceiling, stats.floor, stats.ranks):
        with pytest.raises(ValueError, match="finite"):
            statistic([1.0, bad])
    with pytest.raises(ValueError, match="finite"):
        stats.pareto_front([[bad, 1.0], [0.0, 0.0]])
    with pytest.raises(ValueError, match="finite"):
        stats.hypervolume([[bad, 1.0]], [0.0, 0.0])


def test_ranks_average_ties() -> None:
    assert stats.ranks([10.0, 20.0, 10.0, 30.0]).tolist() == [1.5, 3.0, 1.5, 4.0]


@given(tied, st.data())
def test_spearman_is_symmetric_bounded_and_ignores_monotone_scales(
    left: list[float], data: st.DataObject
) -> None:
    size = len(left)
    right = data.draw(st.lists(st.integers(-2, 2).map(float), min_size=size, max_size=size))
    r = stats.spearman(left, right)
    assert r == stats.spearman(right, left)
    if r is None:
        assert len(set(left)) == 1 or len(set(right)) == 1
        return
    assert -1.0 <= r <= 1.0
    assert stats.spearman(np.exp(left), right) == pytest.approx(r)
    assert stats.spearman([-x for x in left], right) == pytest.approx(-r)


def test_spearman_is_undefined_for_a_constant_side_and_for_two_points() -> None:
    assert stats.spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert stats.spearman([1.0, 2.0], [1.0, 2.0]) is None
    assert stats.spearman_matrix([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]]) == [
        [pytest.approx(1.0), None],
        [None, None],
    ]


def test_fisher_bound_widens_with_the_number_of_pairs_and_narrows_with_n() -> None:
    one = stats.fisher_upper(-0.6, 16)
    assert one == pytest.approx(math.tanh(math.atanh(-0.6) + 1.644854 / math.sqrt(13)), abs=1e-6)
    assert stats.fisher_upper(-0.6, 16, num_pairs=3) > one > stats.fisher_upper(-0.6, 64)
    assert stats.fisher_upper(-1.0, 8) == -1.0
    assert stats.fisher_upper(-0.9, 3) == 1.0


def conflicts(rows: object, min_conflict: float) -> list[tuple[int, int]] | None:
    data = np.asarray(rows, dtype=np.float64)
    return stats.conflicting_pairs(stats.spearman_matrix(data), len(data), min_conflict)


def test_conflict_is_null_under_eight_joint_rollouts() -> None:
    opposed = [[float(i), -float(i)] for i in range(8)]
    assert conflicts(opposed[:7], 0.3) is None
    assert conflicts(opposed, 0.3) == [(0, 1)]


def test_conflict_needs_the_correlation_and_the_bound() -> None:
    rng = np.random.default_rng(3)
    weak = rng.multivariate_normal([0, 0], [[1, -0.2], [-0.2, 1]], size=1000)
    assert conflicts(weak, 0.3) == []
    assert conflicts(weak, 0.05) == [(0, 1)]


def test_independent_dimensions_conflict_rarely_where_a_bare_cut_is_often_wrong() -> None:
    rng = np.random.default_rng(4)
    bare = ours = 0
    trials = 1500
    for _ in range(trials):
        group = rng.standard_normal((8, 3))
        matrix = stats.spearman_matrix(group)
        bare += any((matrix[i][j] or 0.0) < -0.5 for i, j in combinations(range(3), 2))
        ours += bool(conflicts(group, 0.3))
    assert bare / trials == pytest.approx(0.28, abs=0.05)
    assert ours / trials < 0.08


@given(matrices(3))
def test_pareto_front_is_what_nothing_dominates(rows: np.ndarray) -> None:
    def dominated(row: np.ndarray) -> bool:
        return any((other >= row).all() and (other > row).any() for other in rows)

    assert stats.pareto_front(rows) == [i for i, row in enumerate(rows) if not dominated(row)]


def test_equal_best_rows_are_all_on_the_front() -> None:
    assert stats.pareto_front([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]]) == [0, 1]


@settings(max_examples=60)
@given(st.integers(1, 4).flatmap(matrices))
def test_hypervolume_equals_inclusion_exclusion(rows: np.ndarray) -> None:
    rows = np.maximum(rows[:6], -1.0)
    reference = np.full(rows.shape[1], -1.0)
    expected = 0.0
    for size in range(1, len(rows) + 1):
        for subset in combinations(rows, size):
            box = np.min(subset, axis=0) - reference
            expected += (-1) ** (size + 1) * float(np.prod(box))
    assert stats.hypervolume(rows, reference) == pytest.approx(expected, abs=1e-9)


def test_points_not_above_the_reference_add_no_volume() -> None:
    assert stats.hypervolume([[2.0, 0.0], [-1.0, 5.0]], [0.0, 0.0]) == 0.0
    assert stats.hypervolume([[2.0, 1.0], [9.0, 0.0]], [0.0, 0.0]) == pytest.approx(2.0)
    assert stats.hypervolume([[-3.0]], [0.0]) == 0.0
    assert stats.hypervolume([[1.0, 1.0, 1.0], [2.0, 2.0, -1.0]], [0.0] * 3) == pytest.approx(1.0)


def test_hypervolume_beyond_four_dimensions_is_null() -> None:
    assert stats.hypervolume(np.ones((2, 4)), np.zeros(4)) == pytest.approx(1.0)
    assert stats.hypervolume(np.ones((2, 5)), np.zeros(5)) is None
