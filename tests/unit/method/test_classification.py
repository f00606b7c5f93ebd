"""Classes: states, probabilities, and what may not decide them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.classification import (
    Evidence,
    FixedCutClassifier,
    PosteriorClassifier,
    SpreadClassifier,
    State,
    build_classifier,
    class_of,
    class_probabilities,
)
from mora_serve.config import MethodSettings
from mora_serve.prompt_model import Posterior
from tests.unit.method.method_builders import identity

CALIBRATION = identity("a")["a"]


def evidence(reach: float, *, valid: int = 8, rollouts: int = 8, tau: float = 1.0) -> Evidence:
    return Evidence(
        values=np.linspace(-1, 1, valid).tolist(),
        num_rollouts=rollouts,
        n=8,
        bound=CALIBRATION.typical_ceiling(8),
        posterior=Posterior(0.0, 0.3),
        reach=reach,
        calibration=replace(CALIBRATION, tau=tau),
    )


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (["unreachable"] * 3, "flat"),
        (["reachable", "unreachable", "unreachable"], "single:a"),
        (["unreachable", "unreachable", "reachable"], "single:c"),
        (["reachable", "reachable", "unreachable"], "multi"),
        (["reachable", "reachable", "undecided"], "multi"),
        (["reachable", "unmeasurable", "reachable"], "multi"),
        (["reachable", "undecided", "unreachable"], "uncertain"),
        (["unreachable", "undecided", "unreachable"], "uncertain"),
        (["unreachable", "unmeasurable", "unreachable"], "uncertain"),
        (["reachable", "reachable", None], "unknown"),
        (["unreachable", "unreachable", None], "unknown"),
        ([], "unknown"),
    ],
)
def test_class_follows_from_the_states(states: list[State | None], expected: str) -> None:
    assert class_of(dict(zip("abc", states, strict=False))) == expected


@pytest.mark.parametrize(
    ("reach", "state"),
    [
        (0.8, "reachable"),
        (0.79, "undecided"),
        (0.5, "undecided"),
        (0.21, "undecided"),
        (0.2, "unreachable"),
        (0.0, "unreachable"),
    ],
)
def test_a_dimension_is_decided_at_p_class_on_either_side(reach: float, state: str) -> None:
    result = PosteriorClassifier(p_class=0.8).classify({"a": evidence(reach)})
    assert result.states == {"a": state}


def test_an_unreliable_dimension_is_unmeasurable_even_when_its_reach_is_clear() -> None:
    weak = evidence(0.99, tau=0.1)
    result = PosteriorClassifier().classify({"a": weak, "b": evidence(0.01)})
    assert result.states == {"a": "unmeasurable", "b": "unreachable"}
    assert result.prompt_class == "uncertain"


def test_missing_scores_make_the_class_unknown_not_flat() -> None:
    scores = {"a": evidence(0.01), "b": evidence(0.01), "c": evidence(0.01, valid=3)}
    result = PosteriorClassifier().classify(scores)
    assert result.prompt_class == "unknown"
    assert result.probability is None
    assert result.states["c"] is None


@pytest.mark.parametrize("classifier", [SpreadClassifier(), FixedCutClassifier()])
def test_point_estimates_also_leave_missing_scores_unknown(
    classifier: SpreadClassifier | FixedCutClassifier,
) -> None:
    result = classifier.classify({"a": evidence(0.9), "b": evidence(0.9, valid=0)})
    assert result.prompt_class == "unknown"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_class_probabilities_sum_to_one(reach: list[float]) -> None:
    probabilities = class_probabilities({f"k{i}": p for i, p in enumerate(reach)})
    assert sum(probabilities.values()) == pytest.approx(1.0)
    assert all(-1e-12 <= p <= 1 + 1e-12 for p in probabilities.values())
    assert ("multi" in probabilities) == (len(reach) >= 2)


def test_class_states_its_own_probability() -> None:
    scores = {"a": evidence(0.9), "b": evidence(0.1), "c": evidence(0.2)}
    result = PosteriorClassifier().classify(scores)
    assert result.prompt_class == "single:a"
    assert result.probability == pytest.approx(0.9 * 0.9 * 0.8)


def test_an_uncertain_class_states_the_likeliest_one() -> None:
    scores = {"a": evidence(0.9), "b": evidence(0.5)}
    result = PosteriorClassifier().classify(scores)
    assert result.prompt_class == "uncertain"
    assert result.probability == pytest.approx(0.45)


@given(st.permutations(["a", "b", "c"]), st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_the_order_of_dimensions_does_not_matter(order: list[str], reach: list[float]) -> None:
    scores = {k: evidence(p) for k, p in zip("abc", reach, strict=True)}
    straight = PosteriorClassifier().classify(scores)
    permuted = PosteriorClassifier().classify({k: scores[k] for k in order})
    assert permuted.prompt_class == straight.prompt_class
    assert permuted.states == straight.states


def test_spread_cut_needs_spread_and_ceiling() -> None:
    base = evidence(0.5)
    wide = replace(base, values=[-3.0] * 4 + [3.0] * 4)
    high_but_narrow = replace(base, values=np.linspace(3.0, 3.1, 8).tolist())
    low_but_wide = replace(base, values=[value - 9 for value in wide.values])
    scores = {"a": wide, "b": high_but_narrow, "c": low_but_wide}
    states = SpreadClassifier().classify(scores).states
    assert states == {"a": "reachable", "b": "unreachable", "c": "unreachable"}
    assert FixedCutClassifier().classify(scores).states["b"] == "reachable"


def test_fixed_cut_compares_ceilings_at_the_configured_n() -> None:
    rng = np.random.default_rng(0)
    bound = CALIBRATION.typical_ceiling(8) + 0.06
    many = [
        replace(evidence(0.5), values=rng.standard_normal(200).tolist(), bound=bound)
        for _ in range(300)
    ]
    met = np.mean(
        [FixedCutClassifier().classify({"a": e}).prompt_class == "single:a" for e in many]
    )
    assert met < 0.4


@pytest.mark.parametrize("name", ["posterior", "spread", "fixed"])
def test_settings_choose_the_classifier(name: str) -> None:
    method = MethodSettings.model_validate({"classifier": name, "p_class": 0.9})
    classifier = build_classifier(method)
    assert classifier.name == name
    if isinstance(classifier, PosteriorClassifier):
        assert classifier.p_class == 0.9
