"""Comparing policy versions on the same held-out prompts: what is better, by how much, how surely.

Pure functions over scored answers; drawing them is :mod:`mora_serve.version_sampling`'s. All
intervals are 95 % percentile bootstraps over *prompts* (Efron and Tibshirani 1993, chapter 13): the
answers to one prompt are not independent, and other prompts are what a figure is meant for. With
per-prompt columns ``c_x`` every figure here is a function of their sums, so that one resample is
one vector of counts::

    reward         mean over prompts of the prompt's mean z
    change         mean over prompts of mean_B - mean_A
    win rate       mean over prompts of P(z_B > z_A) + P(z_B = z_A) / 2 over all n x n pairs
    ceiling        mean over prompts of the expected ceiling at the prompt's common number of scores
    adjusted       change - b * (mean over prompts of the change in mean log tokens),
                   b = sum Sxy / sum Sxx of z on log tokens, centred per prompt and version
    percent        change of the mean pool quantile, 0 to 100 (DESIGN section 2)

The slope ``b`` of the length adjustment comes from the compared answers, not from the calibrator:
centred per prompt and version it contains nothing of the versions' difference, it is about answers
as long as those compared, and its own uncertainty is in the interval. The calibrator's belongs to
the base policy on training prompts. *Overall* is the mean over dimensions of an answer that is
valid on all of them. A missing score is left out, never a number; a prompt counts for a figure when
at least half of its answers are valid there. Where nothing is measured a figure is ``None``. With
few prompts (under about 20) percentile intervals are too narrow, as bootstraps are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mora_serve.bootstrap import Bootstrap, Estimate
from mora_serve.errors import MoraError
from mora_serve.statistics import Floats, subset_ceiling
from mora_serve.types import Dimension

OVERALL = "overall"
"""Name of the mean over dimensions among the figures by dimension."""
NO_DIFFERENCE = "no difference"


@dataclass(frozen=True, slots=True)
class Answer:
    """One scored answer, for example ``Answer({"helpful": 0.4}, {"helpful": 61.0}, 23, False)``."""

    values: Mapping[Dimension, float]
    """Calibrated rewards of the valid scores; a dimension without one is absent."""
    percents: Mapping[Dimension, float]
    """Their places in the calibrator's pool, 0 to 100; empty without a calibrator."""
    num_tokens: int
    is_cut: bool
    """Whether ``max_tokens`` ended it."""


@dataclass(frozen=True, slots=True)
class PromptSample:
    """One version's answers to one prompt; none of a prompt that failed."""

    prompt_id: str
    answers: tuple[Answer, ...]
    prompt_class: str


@dataclass(frozen=True, slots=True)
class VersionSample:
    """One version's answers to all prompts, in their order."""

    name: str
    """What the figures call it; a version evaluated twice has two names."""
    prompts: tuple[PromptSample, ...]
    scorers: Mapping[Dimension, tuple[str, str]]
    """(model, revision) of what scored it."""


@dataclass(frozen=True, slots=True)
class VersionEval:
    """One version on its own."""

    name: str
    rewards: Mapping[Dimension, Estimate]
    """Mean calibrated reward by dimension and overall."""
    ceilings: Mapping[Dimension, Estimate]
    """By dimension, at the number of scores that all versions have of a prompt."""
    num_tokens: Estimate
    """Mean length of an answer in tokens."""
    share_cut: Estimate
    """Share of answers cut by ``max_tokens``."""
    classes: Mapping[str, int]
    num_answers: int
    num_invalid: Mapping[Dimension, int]
    """Scores without a value."""
    num_failed: int
    """Prompts without answers."""


@dataclass(frozen=True, slots=True)
class DimensionChange:
    """A version against the first one, on one dimension or overall. Rewards in z."""

    change: Estimate
    adjusted: Estimate
    """The change at equal length."""
    length_slope: float | None
    """z per unit of log tokens, within prompts and versions."""
    win_rate: Estimate
    percent: Estimate
    """Change of the mean pool quantile; not the scale of the MORA paper."""
    ceiling: Estimate | None
    """``None`` for overall."""

    @property
    def verdict(self) -> str:
        """``higher`` or ``lower`` when the interval of the change leaves out 0."""
        return verdict(self.change)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A version against the first one."""

    name: str
    first: str
    changes: Mapping[Dimension, DimensionChange]
    num_tokens: Estimate
    """Change of the mean length."""
    share_cut: Estimate


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The whole comparison."""

    dimensions: tuple[Dimension, ...]
    num_prompts: int
    n: int
    """Answers per prompt and version that were asked for."""
    versions: tuple[VersionEval, ...]
    comparisons: tuple[Comparison, ...]


def verdict(estimate: Estimate) -> str:
    """What a difference says: ``higher``, ``lower``, ``no difference`` or ``not measured``."""
    if estimate.low is None or estimate.high is None:
        return "not measured"
    if estimate.low <= 0 <= estimate.high:
        return NO_DIFFERENCE
    return "higher" if estimate.low > 0 else "lower"


def evaluate_versions(samples: Sequence[VersionSample], n: int, seed: int) -> Evaluation:
    """Compare every sample with the first.

    Raises :class:`MoraError` unless all have the same prompts in the same order, scored by the same
    revisions.
    """
    require_comparable(samples)
    first = samples[0]
    dimensions = tuple(first.scorers)
    bootstrap = Bootstrap(seed)
    sizes = [_common_sizes(samples, k) for k in dimensions]
    common = dict(zip(dimensions, sizes, strict=True))
    return Evaluation(
        dimensions=dimensions,
        num_prompts=len(first.prompts),
        n=n,
        versions=tuple(_version(item, dimensions, common, bootstrap) for item in samples),
        comparisons=tuple(
            _compare(item, first, dimensions, common, bootstrap) for item in samples[1:]
        ),
    )


def require_comparable(samples: Sequence[VersionSample]) -> None:
    """Raise :class:`MoraError` for samples whose difference would be one of prompts or scorers."""
    if not samples or not samples[0].prompts:
        raise MoraError("an evaluation must have at least one version and one prompt, got none")
    first = samples[0]
    for other in samples[1:]:
        ids = [[p.prompt_id for p in item.prompts] for item in (first, other)]
        if ids[0] != ids[1]:
            raise MoraError(
                f"versions must answer the same prompts in the same order, got {len(ids[0])} of "
                f"{first.name} and {len(ids[1])} of {other.name} which differ; sample them again"
            )
        if dict(first.scorers) != dict(other.scorers):
            raise MoraError(
                f"versions must be scored by the same revisions, got {dict(first.scorers)} for "
                f"{first.name} and {dict(other.scorers)} for {other.name}; sample them again"
            )


# --- one version --------------------------------------------------------------------------------


def _version(
    sample: VersionSample,
    dimensions: Sequence[Dimension],
    common: Mapping[Dimension, Sequence[int]],
    bootstrap: Bootstrap,
) -> VersionEval:
    answers = [answer for prompt in sample.prompts for answer in prompt.answers]
    return VersionEval(
        name=sample.name,
        rewards={
            k: bootstrap.mean([_mean(p, k, dimensions) for p in sample.prompts])
            for k in (*dimensions, OVERALL)
        },
        ceilings={k: bootstrap.mean(_ceilings(sample, k, common[k])) for k in dimensions},
        num_tokens=bootstrap.mean([_mean_tokens(p) for p in sample.prompts]),
        share_cut=bootstrap.mean([_share_cut(p) for p in sample.prompts]),
        classes=dict(Counter(p.prompt_class for p in sample.prompts).most_common()),
        num_answers=len(answers),
        num_invalid={k: sum(k not in answer.values for answer in answers) for k in dimensions},
        num_failed=sum(not p.answers for p in sample.prompts),
    )


def _rewards(
    prompt: PromptSample, name: Dimension, dimensions: Sequence[Dimension], *, percent: bool = False
) -> list[tuple[float, int]]:
    """(value, tokens) of the valid answers on a dimension or overall; none under half of them."""
    wanted = dimensions if name == OVERALL else (name,)
    found = []
    for answer in prompt.answers:
        given = answer.percents if percent else answer.values
        values = [given[k] for k in wanted if k in given]
        if len(values) == len(wanted):
            found.append((math.fsum(values) / len(values), max(1, answer.num_tokens)))
    return found if 2 * len(found) >= len(prompt.answers) else []


def _mean(
    prompt: PromptSample, name: Dimension, dimensions: Sequence[Dimension], *, percent: bool = False
) -> float | None:
    found = _rewards(prompt, name, dimensions, percent=percent)
    return math.fsum(value for value, _ in found) / len(found) if found else None


def _mean_tokens(prompt: PromptSample) -> float | None:
    count = len(prompt.answers)
    return sum(answer.num_tokens for answer in prompt.answers) / count if count else None


def _share_cut(prompt: PromptSample) -> float | None:
    count = len(prompt.answers)
    return sum(answer.is_cut for answer in prompt.answers) / count if count else None


def _common_sizes(samples: Sequence[VersionSample], name: Dimension) -> list[int]:
    """Per prompt the number of valid answers that every version has; ceilings grow with it."""
    counts = [[len(_rewards(p, name, ())) for p in sample.prompts] for sample in samples]
    return [min(column) for column in zip(*counts, strict=True)]


def _ceilings(sample: VersionSample, name: Dimension, sizes: Sequence[int]) -> list[float | None]:
    return [
        subset_ceiling([value for value, _ in _rewards(prompt, name, ())], size) if size else None
        for prompt, size in zip(sample.prompts, sizes, strict=True)
    ]


# --- two versions -------------------------------------------------------------------------------


def _compare(
    sample: VersionSample,
    first: VersionSample,
    dimensions: Sequence[Dimension],
    common: Mapping[Dimension, Sequence[int]],
    bootstrap: Bootstrap,
) -> Comparison:
    pairs = list(zip(first.prompts, sample.prompts, strict=True))
    changes = {}
    for name in (*dimensions, OVERALL):
        ceilings = None
        if name != OVERALL:
            sides = (_ceilings(item, name, common[name]) for item in (first, sample))
            ceilings = bootstrap.mean([_minus(b, a) for a, b in zip(*sides, strict=True)])
        changes[name] = _change(pairs, name, dimensions, ceilings, bootstrap)
    return Comparison(
        name=sample.name,
        first=first.name,
        changes=changes,
        num_tokens=bootstrap.mean([_minus(_mean_tokens(b), _mean_tokens(a)) for a, b in pairs]),
        share_cut=bootstrap.mean([_minus(_share_cut(b), _share_cut(a)) for a, b in pairs]),
    )


def _change(
    pairs: Sequence[tuple[PromptSample, PromptSample]],
    name: Dimension,
    dimensions: Sequence[Dimension],
    ceiling: Estimate | None,
    bootstrap: Bootstrap,
) -> DimensionChange:
    columns, wins, percents = [], [], []
    for before, after in pairs:
        sides = [_rewards(side, name, dimensions) for side in (before, after)]
        if all(sides):
            columns.append(_length_columns(*sides))
            wins.append(_win_rate(*sides))
        places = [_mean(side, name, dimensions, percent=True) for side in (before, after)]
        percents.append(_minus(places[1], places[0]))
    return DimensionChange(
        change=bootstrap.estimate(columns, lambda sums: sums[:, 0] / sums[:, 4]),
        adjusted=bootstrap.estimate(columns, _at_equal_length),
        length_slope=_slope(columns),
        win_rate=bootstrap.mean(wins),
        percent=bootstrap.mean(percents),
        ceiling=ceiling,
    )


def _length_columns(
    before: Sequence[tuple[float, int]], after: Sequence[tuple[float, int]]
) -> list[float]:
    """``[change, change of mean log tokens, Sxy, Sxx, 1]`` of one prompt."""
    z = [np.array([value for value, _ in side]) for side in (before, after)]
    logs = [np.log([tokens for _, tokens in side]) for side in (before, after)]
    centred = [(x - x.mean(), y - y.mean()) for x, y in zip(logs, z, strict=True)]
    return [
        float(z[1].mean() - z[0].mean()),
        float(logs[1].mean() - logs[0].mean()),
        float(sum(x @ y for x, y in centred)),
        float(sum(x @ x for x, _ in centred)),
        1.0,
    ]


def _at_equal_length(sums: Floats) -> Floats:
    """The adjusted change; without any variation of length within prompts it is undefined."""
    change, longer, sxy, sxx, count = sums.T
    adjusted: Floats = (change - sxy / np.where(sxx > 1e-12, sxx, np.nan) * longer) / count
    return adjusted


def _slope(columns: Sequence[Sequence[float]]) -> float | None:
    sxy, sxx = (math.fsum(row[i] for row in columns) for i in (2, 3))
    return sxy / sxx if sxx > 1e-12 else None


def _win_rate(before: Sequence[tuple[float, int]], after: Sequence[tuple[float, int]]) -> float:
    a = np.array([value for value, _ in before])
    b = np.array([value for value, _ in after])
    higher = (b[:, None] > a[None, :]).mean()
    equal = (b[:, None] == a[None, :]).mean()
    return float(higher + equal / 2)


def _minus(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right
