"""Pair selection: the rules of DESIGN section 2, and the traps it names."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.pairs import (
    NoPair,
    PairChoice,
    PairRules,
    select_pairs,
    select_sequential,
    select_simultaneous,
)
from mora_serve.types import Score, ScoredGroup
from tests.unit.act.act_builders import scored

AB = ("a", "b")
LOOSE = PairRules(min_margin=0.1, tolerance=10.0)
rewards = st.integers(-30, 30).map(lambda value: value / 10)
maybe = st.one_of(st.none(), rewards)


@st.composite
def groups(draw: st.DrawFn) -> ScoredGroup:
    count = draw(st.integers(1, 7))
    columns = {k: draw(st.lists(maybe, min_size=count, max_size=count)) for k in ("a", "b", "c")}
    texts = draw(
        st.lists(st.sampled_from(["x", " x", "y", "z  z"]), min_size=count, max_size=count)
    )
    tokens = draw(st.lists(st.integers(1, 60), min_size=count, max_size=count))
    return scored(columns, texts=texts, tokens=tokens)


def chosen(outcome: PairChoice | NoPair) -> tuple[int, int]:
    assert isinstance(outcome, PairChoice), outcome
    return outcome.chosen.index, outcome.rejected.index


def reason(outcome: PairChoice | NoPair) -> str:
    assert isinstance(outcome, NoPair), outcome
    return outcome.reason


def test_simultaneous_takes_the_highest_utility_against_its_largest_margin() -> None:
    group = scored({"a": [0.0, 2.0, 1.0, -1.0], "b": [0.0, 1.0, 1.5, -2.0]})
    outcome = select_simultaneous(group, AB, LOOSE)
    assert chosen(outcome) == (1, 3)
    assert isinstance(outcome, PairChoice)
    assert outcome.margin == pytest.approx(6.0)
    assert outcome.stage is None


def test_weights_decide_the_utility() -> None:
    group = scored({"a": [2.0, 0.0], "b": [0.0, 1.0]})
    assert chosen(select_simultaneous(group, AB, LOOSE)) == (0, 1)
    heavy_b = PairRules({"b": 4.0}, 0.1, 10.0)
    assert chosen(select_simultaneous(group, AB, heavy_b)) == (1, 0)


def test_a_rejected_answer_that_beats_chosen_too_far_somewhere_is_passed_over() -> None:
    group = scored({"a": [3.0, -3.0, 1.0], "b": [0.0, 2.0, 0.0]})
    assert chosen(select_simultaneous(group, AB, PairRules(min_margin=0.5, tolerance=0.5))) == (
        0,
        2,
    )
    only_trade_offs = scored({"a": [3.0, -3.0], "b": [0.0, 2.0]})
    assert reason(select_simultaneous(only_trade_offs, AB, PairRules())) == "tolerance"


def test_a_margin_below_the_minimum_gives_no_pair() -> None:
    group = scored({"a": [0.2, 0.0], "b": [0.2, 0.0]})
    assert chosen(select_simultaneous(group, AB, PairRules(min_margin=0.4))) == (0, 1)
    assert reason(select_simultaneous(group, AB, PairRules(min_margin=0.41))) == "margin"


def test_equal_rewards_never_emit_a_pair_even_without_a_minimum() -> None:
    group = scored({"a": [1.0, 1.0, 1.0], "b": [2.0, 2.0, 2.0]})
    rules = PairRules(min_margin=0.0)
    assert reason(select_simultaneous(group, AB, rules)) == "margin"
    assert reason(select_sequential(group, AB, "a", (), rules)) == "margin"


def test_texts_equal_after_whitespace_normalisation_are_never_a_pair() -> None:
    group = scored({"a": [2.0, 0.0], "b": [2.0, 0.0]}, texts=["one  two\n", " one two"])
    assert reason(select_simultaneous(group, AB, PairRules())) == "equal_texts"


def test_a_failed_score_is_not_read_as_a_low_reward() -> None:
    group = scored({"a": [2.0, 1.0, None], "b": [2.0, 1.0, -9.0]})
    assert chosen(select_simultaneous(group, AB, PairRules())) == (0, 1)
    alone = scored({"a": [2.0, None], "b": [2.0, -9.0]})
    assert reason(select_simultaneous(alone, AB, PairRules())) == "missing_scores"


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_value_that_is_not_finite_never_compares_as_best(broken: float) -> None:
    group = scored({"a": [0.0, 2.0, 1.0], "b": [0.0, 2.0, 1.0]})
    bad = {**group.rollouts[0].scores, "a": Score("ok", broken, broken, None, "model", "rev")}
    poisoned = replace(
        group, rollouts=(replace(group.rollouts[0], scores=bad), *group.rollouts[1:])
    )
    assert chosen(select_simultaneous(poisoned, AB, LOOSE)) == (1, 2)
    assert chosen(select_sequential(poisoned, AB, "a", (), LOOSE)) == (1, 2)


def test_rewards_of_equal_sum_but_different_dimensions_still_give_sequential_pairs() -> None:
    group = scored({"a": [2.0, 0.0], "b": [0.0, 2.0]})
    assert reason(select_simultaneous(group, AB, PairRules())) == "margin"
    first, second = select_pairs(group, AB, "sequential", PairRules(tolerance=3.0))
    assert chosen(first) == (0, 1)
    assert chosen(second) == (1, 0)


def test_a_stage_protects_the_dimensions_before_it_and_not_those_after() -> None:
    group = scored({"a": [2.0, 0.0], "b": [0.0, 2.0]})
    first, second = select_pairs(group, AB, "sequential", PairRules(tolerance=0.5))
    assert chosen(first) == (0, 1)
    assert reason(second) == "tolerance"


def test_a_sequential_stage_keeps_what_was_aligned_before() -> None:
    group = scored({"a": [0.0, -2.0, -0.2], "b": [0.0, 3.0, 1.0]})
    outcome = select_sequential(group, AB, "b", ("a",), PairRules())
    assert chosen(outcome) == (2, 0)
    assert isinstance(outcome, PairChoice)
    assert outcome.aligned == ("a",)
    assert outcome.stage == "b"
    assert chosen(select_sequential(group, AB, "b", (), PairRules())) == (1, 0)


def test_sequential_mode_has_one_outcome_per_dimension_in_order() -> None:
    group = scored({"a": [1.0, 0.0], "b": [1.0, 0.0]})
    stages = [outcome.stage for outcome in select_pairs(group, ("b", "a"), "sequential", LOOSE)]
    assert stages == ["b", "a"]


def test_ties_break_by_rollout_index() -> None:
    group = scored({"a": [1.0, 1.0, 0.0, 0.0], "b": [0.0] * 4})
    assert chosen(select_simultaneous(group, AB, LOOSE)) == (0, 2)
    assert chosen(select_sequential(group, AB, "a", (), LOOSE)) == (0, 2)
    backwards = replace(group, rollouts=group.rollouts[::-1])
    assert chosen(select_simultaneous(backwards, AB, LOOSE)) == (0, 2)


def test_a_length_only_win_is_dropped_and_a_real_one_is_kept() -> None:
    rules = PairRules(min_margin=0.5, length_slopes={"a": 1.0, "b": 0.0})
    longer = scored({"a": [1.0, 0.0], "b": [0.0, 0.0]}, tokens=[40, 10])
    assert reason(select_simultaneous(longer, AB, rules)) == "length"
    assert reason(select_sequential(longer, AB, "a", (), rules)) == "length"
    shorter = scored({"a": [1.0, 0.0], "b": [0.0, 0.0]}, tokens=[10, 40])
    assert chosen(select_simultaneous(shorter, AB, rules)) == (0, 1)
    assert chosen(select_simultaneous(longer, AB, replace(rules, length_slopes=None))) == (0, 1)


def test_weights_that_are_not_positive_are_refused() -> None:
    for weight in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="positive"):
            PairRules({"a": weight})


@given(groups(), st.permutations(range(7)))
def test_the_order_of_rollouts_does_not_matter(group: ScoredGroup, order: list[int]) -> None:
    dimensions = ("a", "b", "c")
    places = [place for place in order if place < len(group.rollouts)]
    shuffled = replace(group, rollouts=tuple(group.rollouts[place] for place in places))
    for mode in ("simultaneous", "sequential"):
        rules = PairRules(length_slopes={"a": 0.3})
        assert select_pairs(group, dimensions, mode, rules) == select_pairs(
            shuffled, dimensions, mode, rules
        )


@given(groups(), st.floats(0.01, 100.0))
def test_scaling_weights_and_margin_together_changes_nothing(
    group: ScoredGroup, factor: float
) -> None:
    dimensions = ("a", "b", "c")
    # Margins are multiples of 0.1: bounds between the steps keep rounding from deciding.
    plain = PairRules({"a": 1.0, "b": 2.0, "c": 1.0}, min_margin=0.55)
    scaled = PairRules({k: w * factor for k, w in plain.weights.items()}, 0.55 * factor)
    before = select_simultaneous(group, dimensions, plain)
    after = select_simultaneous(group, dimensions, scaled)
    if isinstance(before, PairChoice) and isinstance(after, PairChoice):
        assert after.margin == pytest.approx(before.margin * factor)
    else:
        assert isinstance(before, NoPair)
        assert isinstance(after, NoPair)


@given(groups(), st.sampled_from(["simultaneous", "sequential"]))
def test_every_pair_obeys_every_rule(group: ScoredGroup, mode: str) -> None:
    dimensions = ("a", "b", "c")
    rules = PairRules({"b": 2.0}, 0.5, 0.3, {"a": 0.2})
    for outcome in select_pairs(group, dimensions, mode, rules):  # type: ignore[arg-type]
        if isinstance(outcome, NoPair):
            continue
        up = {k: outcome.chosen.scores[k].value for k in dimensions}
        down = {k: outcome.rejected.scores[k].value for k in dimensions}
        gaps = {
            k: u - d for k in dimensions if (u := up[k]) is not None and (d := down[k]) is not None
        }
        assert set(gaps) == set(dimensions)
        assert outcome.chosen.completion.text.split() != outcome.rejected.completion.text.split()
        assert outcome.margin >= rules.min_margin - 1e-9
        protected = dimensions if outcome.stage is None else outcome.aligned
        assert all(gaps[k] >= -rules.tolerance - 1e-9 for k in protected)
        if outcome.stage is not None:
            assert outcome.margin == pytest.approx(gaps[outcome.stage])


@given(groups())
def test_simultaneous_chosen_is_on_the_pareto_front(group: ScoredGroup) -> None:
    dimensions = ("a", "b", "c")
    outcome = select_simultaneous(group, dimensions, LOOSE)
    if isinstance(outcome, NoPair):
        return
    best = [outcome.chosen.scores[k].value or 0.0 for k in dimensions]
    for rollout in group.rollouts:
        values = [rollout.scores[k].value for k in dimensions]
        if None in values:
            continue
        other = [value for value in values if value is not None]
        assert not (
            all(o >= b for o, b in zip(other, best, strict=True))
            and any(o > b for o, b in zip(other, best, strict=True))
        )
