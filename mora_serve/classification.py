"""Classes of prompts: which reward dimensions a prompt can reach, and how sure that is.

A :class:`Classifier` is one pure function from the evidence per dimension to a
:class:`Classification`. The default, :class:`PosteriorClassifier`, decides on posterior
probabilities and leaves open what the rollouts do not tell. :class:`SpreadClassifier` and
:class:`FixedCutClassifier` cut point estimates; they exist to be compared by retest agreement
(:func:`mora_serve.simulation.compare_classifiers`).

Classes: ``flat`` (every dimension unreachable), ``single:<k>`` (exactly ``k`` reachable, all others
unreachable), ``multi`` (two or more reachable), ``uncertain`` (something undecided could change
it), ``unknown`` (a dimension lacks valid scores).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from mora_serve.calibration import DimensionCalibration
from mora_serve.config import MethodSettings
from mora_serve.prompt_model import Posterior
from mora_serve.statistics import is_valid, spread, subset_ceiling
from mora_serve.types import Dimension

State = Literal["reachable", "unreachable", "undecided", "unmeasurable"]
PromptClass = str
"""``flat``, ``single:<dimension>``, ``multi``, ``uncertain`` or ``unknown``."""

FLAT, MULTI, UNCERTAIN, UNKNOWN = "flat", "multi", "uncertain", "unknown"
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of one prompt on one dimension."""

    values: Sequence[float]
    """Valid calibrated rewards ``[n_valid]``."""
    num_rollouts: int
    """Rollouts drawn, valid or not."""
    n: int
    """Rollouts that ceilings refer to."""
    bound: float
    """Expected ceiling at ``n`` that a reachable dimension meets, in z."""
    posterior: Posterior
    reach: float
    """Posterior probability that the expected ceiling meets ``bound``."""
    calibration: DimensionCalibration

    @property
    def valid(self) -> bool:
        """Whether the validity rule holds."""
        return is_valid(len(self.values), self.num_rollouts)


@dataclass(frozen=True, slots=True)
class Classification:
    """A class with its probability, and the states it follows from."""

    prompt_class: PromptClass
    probability: float | None
    """Probability of the class; of the likeliest one when ``uncertain``; ``None`` when ``unknown``
    or when the classifier states none."""
    states: Mapping[Dimension, State | None]
    """``None`` for a dimension without enough valid scores."""


class Classifier(Protocol):
    """A classification policy."""

    @property
    def name(self) -> str:
        """Name in the settings and in reports."""
        ...

    def classify(self, evidence: Mapping[Dimension, Evidence]) -> Classification:
        """Class of one prompt; deterministic in ``evidence``."""
        ...


@dataclass(frozen=True, slots=True)
class PosteriorClassifier:
    """Decides a dimension when the posterior does: the default."""

    p_class: float = 0.8
    """Probability at which a dimension is decided, in (0.5, 1)."""
    min_reliability: float = 0.5
    """Reliability of the prompt's mean below which a dimension is not classified."""
    name: str = "posterior"

    def classify(self, evidence: Mapping[Dimension, Evidence]) -> Classification:
        """See :class:`Classifier`."""
        states = {k: self._state(item) for k, item in evidence.items()}
        label = class_of(states)
        if label == UNKNOWN:
            return Classification(label, None, states)
        probabilities = class_probabilities({k: item.reach for k, item in evidence.items()})
        best = max(probabilities.values())
        return Classification(label, probabilities.get(label, best), states)

    def _state(self, item: Evidence) -> State | None:
        if not item.valid:
            return None
        if item.calibration.reliability(len(item.values)) < self.min_reliability:
            return "unmeasurable"
        if item.reach >= self.p_class:
            return "reachable"
        # 1 - 0.8 is not 0.2 in binary: without the rounding term the two sides would differ.
        return "unreachable" if item.reach <= 1 - self.p_class + _ROUNDING else "undecided"


@dataclass(frozen=True, slots=True)
class SpreadClassifier:
    """Point estimate: reachable when spread exceeds the pool's and the ceiling meets the bound."""

    name: str = "spread"

    def classify(self, evidence: Mapping[Dimension, Evidence]) -> Classification:
        """See :class:`Classifier`; states no probability."""
        return _cut(evidence, {k: self._reachable(item) for k, item in evidence.items()})

    def _reachable(self, item: Evidence) -> bool:
        varies = (spread(item.values) or 0.0) > item.calibration.sigma_within
        return varies and _meets_bound(item)


@dataclass(frozen=True, slots=True)
class FixedCutClassifier:
    """Point estimate: reachable when the measured ceiling meets the bound."""

    name: str = "fixed"

    def classify(self, evidence: Mapping[Dimension, Evidence]) -> Classification:
        """See :class:`Classifier`; states no probability."""
        return _cut(evidence, {k: _meets_bound(item) for k, item in evidence.items()})


def build_classifier(method: MethodSettings) -> Classifier:
    """The classifier that the settings name."""
    if method.classifier == "spread":
        return SpreadClassifier()
    if method.classifier == "fixed":
        return FixedCutClassifier()
    return PosteriorClassifier(method.p_class, method.min_reliability)


def class_of(states: Mapping[Dimension, State | None]) -> PromptClass:
    """The class that follows from the states of all dimensions.

    Two reachable dimensions make ``multi`` whatever the others turn out to be; in every other case
    an undecided or unmeasurable dimension could change the class, which is then ``uncertain``.
    """
    if not states or any(state is None for state in states.values()):
        return UNKNOWN
    reachable = [k for k, state in states.items() if state == "reachable"]
    if len(reachable) >= 2:
        return MULTI
    if any(state in ("undecided", "unmeasurable") for state in states.values()):
        return UNCERTAIN
    return single(reachable[0]) if reachable else FLAT


def single(dimension: Dimension) -> PromptClass:
    """Class name of a prompt that reaches only ``dimension``."""
    return f"single:{dimension}"


def class_probabilities(reach: Mapping[Dimension, float]) -> dict[PromptClass, float]:
    """Probability of ``flat``, each ``single:<k>`` and ``multi`` from those of the dimensions.

    Dimensions count as independent given the rollouts, as in the prompt model.
    """
    result = {FLAT: math.prod(1 - p for p in reach.values())}
    for k, p in reach.items():
        others = math.prod(1 - q for j, q in reach.items() if j != k)
        result[single(k)] = p * others
    if len(reach) >= 2:
        result[MULTI] = max(0.0, 1.0 - sum(result.values()))
    return result


def _meets_bound(item: Evidence) -> bool:
    size = min(item.n, len(item.values))
    measured = subset_ceiling(item.values, size) if size else None
    return measured is not None and measured >= item.bound


def _cut(
    evidence: Mapping[Dimension, Evidence], reachable: Mapping[Dimension, bool]
) -> Classification:
    states: dict[Dimension, State | None] = {}
    for k, item in evidence.items():
        state: State = "reachable" if reachable[k] else "unreachable"
        states[k] = state if item.valid else None
    return Classification(class_of(states), None, states)
