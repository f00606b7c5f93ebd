"""Versions compared: equal ones do not differ, better ones do, length and missing scores count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mora_serve.bootstrap import Bootstrap
from mora_serve.errors import MoraError
from mora_serve.evaluation import (
    NO_DIFFERENCE,
    OVERALL,
    Answer,
    Evaluation,
    PromptSample,
    VersionSample,
    evaluate_versions,
)
from mora_serve.evaluation_tables import interval, share

SCORERS = {"helpful": ("m", "r1"), "harmless": ("m", "r1")}

values = st.floats(-5, 5, allow_nan=False)
answers = st.builds(
    lambda a, b, tokens: Answer({"helpful": a, "harmless": b}, {}, tokens, False),
    values,
    values,
    st.integers(1, 200),
)
prompts = st.lists(st.lists(answers, min_size=4, max_size=4), min_size=2, max_size=6)


def version(name: str, rows: Sequence[Sequence[Answer]]) -> VersionSample:
    return VersionSample(
        name,
        tuple(PromptSample(f"p{i}", tuple(row), "multi") for i, row in enumerate(rows)),
        SCORERS,
    )


def drawn(seed: int, *, shift: float = 0.0, num: int = 60, longer: float = 0.0) -> VersionSample:
    """Prompts of unequal level; reward grows by 0.5 with every unit of log tokens."""
    rng = np.random.default_rng(seed)
    levels = np.random.default_rng(0).normal(size=num)
    rows = []
    for level in levels:
        logs = 3 + longer + 0.4 * rng.normal(size=8)
        z = level + shift + 0.5 * logs + 0.5 * rng.normal(size=8)
        rows.append(
            [
                Answer({"helpful": float(a), "harmless": float(a)}, {}, round(math.exp(b)), False)
                for a, b in zip(z, logs, strict=True)
            ]
        )
    return version("v", rows)


def evaluate(*samples: VersionSample) -> Evaluation:
    return evaluate_versions(samples, n=8, seed=1)


@given(prompts)
@settings(max_examples=15, deadline=None)
def test_equal_answers_do_not_differ_in_anything(rows: list[list[Answer]]) -> None:
    found = evaluate(version("a", rows), version("b", rows)).comparisons[0]
    for change in found.changes.values():
        assert change.verdict == NO_DIFFERENCE
        assert (change.change.value, change.change.low, change.change.high) == (0, 0, 0)
        assert change.win_rate.value == pytest.approx(0.5)
    assert found.num_tokens.value == 0


@given(prompts, prompts.filter(lambda rows: len(rows) == 3))
@settings(max_examples=15, deadline=None)
def test_swapping_two_versions_turns_every_change_round(
    rows: list[list[Answer]], others: list[list[Answer]]
) -> None:
    num = min(len(rows), len(others))
    a, b = version("a", rows[:num]), version("b", others[:num])
    there, back = (evaluate(*order).comparisons[0].changes for order in ((a, b), (b, a)))
    for name in SCORERS:
        change, win_rate = back[name].change.value, back[name].win_rate.value
        assert change is not None
        assert win_rate is not None
        assert there[name].change.value == pytest.approx(-change)
        assert there[name].win_rate.value == pytest.approx(1 - win_rate)
        assert there[name].length_slope == pytest.approx(back[name].length_slope)


@given(prompts, st.floats(0.1, 3))
@settings(max_examples=15, deadline=None)
def test_a_shift_of_every_reward_is_the_change_and_the_adjusted_change(
    rows: list[list[Answer]], shift: float
) -> None:
    moved = [
        [replace(a, values={k: v + shift for k, v in a.values.items()}) for a in row]
        for row in rows
    ]
    found = evaluate(version("a", rows), version("b", moved)).comparisons[0].changes
    for item in found.values():
        assert item.change.value == pytest.approx(shift)
        assert item.verdict == "higher"
        if item.adjusted.value is not None:
            assert item.adjusted.value == pytest.approx(shift)


@given(prompts, st.randoms(use_true_random=False))
@settings(max_examples=10, deadline=None)
def test_the_order_of_answers_says_nothing(rows: list[list[Answer]], random: object) -> None:
    mixed = [random.sample(row, len(row)) for row in rows]  # type: ignore[attr-defined]
    plain, other = (evaluate(version("a", item)).versions[0] for item in (rows, mixed))
    for name in (*SCORERS, OVERALL):
        assert plain.rewards[name].value == pytest.approx(other.rewards[name].value)
    for name in SCORERS:
        assert plain.ceilings[name].value == pytest.approx(other.ceilings[name].value)


def test_a_version_that_is_longer_and_better_keeps_what_length_does_not_explain() -> None:
    item = evaluate(drawn(1), drawn(2, shift=0.4, longer=0.8)).comparisons[0].changes["helpful"]
    assert item.change.value == pytest.approx(0.4 + 0.5 * 0.8, abs=0.1)
    assert item.adjusted.value == pytest.approx(0.4, abs=0.1)


def test_a_prompt_counts_while_half_of_its_answers_have_a_score() -> None:
    def row(num_missing: int) -> list[Answer]:
        scored = [Answer({"helpful": 1.0, "harmless": 1.0}, {}, 9, False)] * (4 - num_missing)
        return [*scored, *[Answer({}, {}, 9, False)] * num_missing]

    for num_missing, value in ((2, 1.0), (3, None)):
        found = evaluate(version("a", [row(num_missing)])).versions[0]
        assert found.rewards["helpful"].value == value


def test_two_draws_of_one_version_show_no_difference_and_a_better_version_does() -> None:
    found = evaluate(drawn(1), drawn(2), drawn(3, shift=0.3))
    same, better = (item.changes["helpful"] for item in found.comparisons)
    assert same.verdict == NO_DIFFERENCE
    assert better.verdict == "higher"
    assert better.win_rate.low is not None
    assert better.win_rate.low > 0.5


def test_a_longer_answer_does_not_pass_for_a_better_one() -> None:
    found = evaluate(drawn(1), drawn(2, longer=0.8)).comparisons[0]
    item = found.changes["helpful"]
    assert item.verdict == "higher"
    assert found.num_tokens.low is not None
    assert found.num_tokens.low > 0
    assert item.length_slope == pytest.approx(0.5, abs=0.1)
    assert item.adjusted.low is not None
    assert item.adjusted.high is not None
    assert item.adjusted.low < 0 < item.adjusted.high


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    covered = 0
    for seed in range(100):
        sample = np.random.default_rng(seed).normal(0.7, 1.0, size=60)
        found = Bootstrap(seed, num_resamples=500).mean([float(v) for v in sample])
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.7 <= found.high
    assert 88 <= covered <= 99


def test_missing_scores_are_left_out_and_counted_and_never_numbers() -> None:
    rows = [[Answer({"helpful": 1.0, "harmless": 2.0}, {}, 9, False)] * 4 for _ in range(2)]
    rows[0] = [Answer({"helpful": 1.0}, {}, 9, True)] * 3 + rows[0][:1]
    alone = evaluate(version("a", rows)).versions[0]
    assert alone.rewards["harmless"].value == 2.0
    assert alone.rewards["harmless"].num_prompts == 1
    assert alone.rewards["helpful"].num_prompts == 2
    assert alone.num_invalid == {"helpful": 0, "harmless": 3}
    assert alone.share_cut.value == pytest.approx(3 / 8)


def test_a_prompt_that_failed_counts_for_neither_version() -> None:
    rows = [[Answer({"helpful": float(i), "harmless": 0.0}, {}, 9, False)] * 4 for i in range(3)]
    failed = version("b", [rows[0], [], rows[2]])
    found = evaluate(version("a", rows), failed)
    assert found.versions[1].num_failed == 1
    assert found.comparisons[0].changes["helpful"].change.num_prompts == 2
    assert found.comparisons[0].changes["helpful"].change.value == 0


def test_ceilings_are_compared_at_the_number_of_scores_that_both_have() -> None:
    def row(count: int) -> list[Answer]:
        return [
            Answer({"helpful": float(i % 4), "harmless": 0.0}, {}, 9, False) for i in range(count)
        ]

    eight = evaluate(version("a", [row(8)])).versions[0]
    both = evaluate(version("a", [row(8)]), version("b", [row(4)]))
    assert eight.ceilings["helpful"].value == 3.0
    assert both.versions[0].ceilings["helpful"].value is not None
    assert both.versions[0].ceilings["helpful"].value < 3.0
    assert both.versions[1].ceilings["helpful"].value == 3.0


def test_one_prompt_has_a_figure_but_no_interval_and_no_verdict() -> None:
    rows = [[Answer({"helpful": 1.0, "harmless": 0.0}, {}, 9, False)] * 4]
    found = evaluate(version("a", rows), version("b", rows)).comparisons[0].changes["helpful"]
    assert (found.change.value, found.change.low, found.change.se) == (0, None, None)
    assert found.verdict == "not measured"
    assert interval(asdict(found.change)) == "0.00"
    assert share(asdict(found.win_rate)) == "50 %"


def test_without_any_valid_score_there_is_no_figure() -> None:
    rows = [[Answer({"helpful": 1.0}, {}, 9, False)] * 4]
    found = evaluate(version("a", rows), version("b", rows))
    change = found.comparisons[0].changes["harmless"]
    assert (change.change.value, change.adjusted.value, change.win_rate.value) == (None,) * 3
    assert change.verdict == "not measured"
    assert found.comparisons[0].changes[OVERALL].change.value is None


def test_percent_is_the_change_of_the_place_in_the_pool() -> None:
    def at(percent: float) -> list[list[Answer]]:
        values = {"helpful": 0.0, "harmless": 0.0}
        return [[Answer(values, dict.fromkeys(values, percent), 9, False)] * 4] * 2

    found = evaluate(version("a", at(50.0)), version("b", at(54.6))).comparisons[0]
    assert found.changes["helpful"].percent.value == pytest.approx(4.6)
    assert found.changes[OVERALL].percent.value == pytest.approx(4.6)


def test_unequal_prompts_or_scorers_are_not_compared() -> None:
    rows = [[Answer({"helpful": 1.0, "harmless": 2.0}, {}, 9, False)] * 4 for _ in range(2)]
    whole = version("a", rows)
    with pytest.raises(MoraError, match="same prompts in the same order"):
        evaluate(whole, version("b", rows[:1]))
    with pytest.raises(MoraError, match="same prompts in the same order"):
        evaluate(whole, replace(whole, prompts=whole.prompts[::-1]))
    with pytest.raises(MoraError, match="same revisions"):
        evaluate(whole, replace(whole, scorers={**SCORERS, "harmless": ("m", "r2")}))
    with pytest.raises(MoraError, match="at least one version"):
        evaluate()


def test_equal_seeds_give_equal_intervals_which_narrow_with_more_prompts() -> None:
    widths = []
    for num in (10, 40, 160):
        found = [evaluate(drawn(1, num=num), drawn(2, num=num)) for _ in range(2)]
        assert found[0] == found[1]
        change = found[0].comparisons[0].changes["helpful"].change
        assert change.low is not None
        assert change.high is not None
        widths.append(change.high - change.low)
    assert all(wide > narrow for wide, narrow in pairwise(widths))
