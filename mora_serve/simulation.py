"""Simulated prompts and rollouts, to try a classifier or a setting before spending a GPU on it.

:class:`SimulatedPolicy` draws scored groups under the prompt model, optionally with correlated
dimensions, heavier tails than the model assumes, and failing scores. :func:`compare_classifiers`
fits a calibrator on one simulated pool and measures, on other prompts diagnosed twice from fresh
rollouts, how often each classification policy agrees with its own repetition. Figures from here
hold for simulated rewards; a real policy is measured by diagnosing the same prompts twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mora_serve.calibration import Calibrator, calibrate_group, fit_calibrator
from mora_serve.classification import (
    UNCERTAIN,
    UNKNOWN,
    Classifier,
    FixedCutClassifier,
    PosteriorClassifier,
    PromptClass,
    SpreadClassifier,
    class_of,
)
from mora_serve.config import MethodSettings
from mora_serve.diagnostics import Diagnostic, assess_group, diagnose, needs_more
from mora_serve.statistics import Floats
from mora_serve.types import Completion, Dimension, Message, Rollout, Score, ScoredGroup

MODEL, REVISION = "simulated", "1"


@dataclass(frozen=True, slots=True)
class SimulatedPolicy:
    """A policy whose rewards follow the prompt model."""

    dimensions: tuple[Dimension, ...] = ("helpful", "harmless", "truthful")
    tau: tuple[float, ...] = (0.38, 0.47, 0.73)
    """Standard deviation between prompts. The defaults give retest correlations of the mean of
    .54 / .64 / .81 at n=8 with ``sigma`` 1, as measured on the embedded policy."""
    sigma: float = 1.0
    """Standard deviation of a rollout around its prompt's mean."""
    correlation: float = 0.0
    """Between any two dimensions, of rollouts within a prompt."""
    prompt_correlation: float = 0.0
    """Between any two dimensions, of the prompts' means."""
    freedom: float | None = None
    """Degrees of freedom of t-distributed rollout noise, above 2; ``None`` is normal noise."""
    failure_rate: float = 0.0
    """Probability that one score fails."""

    def prompts(self, num_prompts: int, rng: np.random.Generator) -> Floats:
        """True prompt means ``[num_prompts, K]``."""
        scale: Floats = np.array(self.tau, dtype=np.float64)
        means: Floats = self._correlated(self.prompt_correlation, num_prompts, rng) * scale
        return means

    def rollouts(
        self, means: Floats, n: int, rng: np.random.Generator, start: int = 0
    ) -> list[Rollout]:
        """``n`` rollouts of a prompt with true ``means`` ``[K]``, indexed from ``start``."""
        noise = self._correlated(self.correlation, n, rng)
        if self.freedom is not None:
            chi = rng.chisquare(self.freedom, size=(n, 1))
            noise *= np.sqrt((self.freedom - 2) / chi)
        rewards = means + self.sigma * noise
        failed = rng.random(rewards.shape) < self.failure_rate
        return [
            Rollout(
                index=start + row,
                completion=Completion(f"answer {start + row}", "stop", 32),
                scores={
                    k: _score(None if failed[row, i] else float(rewards[row, i]))
                    for i, k in enumerate(self.dimensions)
                },
            )
            for row in range(n)
        ]

    def group(self, name: str, means: Floats, n: int, rng: np.random.Generator) -> ScoredGroup:
        """A raw scored group of ``n`` fresh rollouts."""
        rollouts = tuple(self.rollouts(means, n, rng))
        return ScoredGroup(name, (Message("user", name),), MODEL, rollouts)

    def pool(self, num_prompts: int, n: int, rng: np.random.Generator) -> list[ScoredGroup]:
        """Raw scored groups of ``num_prompts`` fresh prompts."""
        means = self.prompts(num_prompts, rng)
        return [self.group(f"prompt {i}", row, n, rng) for i, row in enumerate(means)]

    def _correlated(self, r: float, rows: int, rng: np.random.Generator) -> Floats:
        size = len(self.dimensions)
        covariance = np.full((size, size), r) + (1 - r) * np.eye(size)
        factor = np.linalg.cholesky(covariance)
        return np.asarray(rng.standard_normal((rows, size)) @ factor.T, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Retest:
    """How a classification policy does against its own repetition and against the truth."""

    num_prompts: int
    decided: float
    """Share of diagnoses with a class other than ``uncertain`` and ``unknown``."""
    agreement: float | None
    """Share with equal class among the prompts decided both times; ``None`` when there are none."""
    num_both_decided: int
    accuracy: float | None
    """Share of decided diagnoses whose class is that of the prompt's true means."""
    rollouts_per_prompt: float


def presample(
    policy: SimulatedPolicy,
    means: Floats,
    calibrator: Calibrator,
    *,
    method: MethodSettings,
    classifier: Classifier,
    rng: np.random.Generator,
    n: int,
    n_max: int,
) -> Diagnostic:
    """Diagnose one prompt in rounds of ``n`` until it is decided or ``n_max`` is reached."""
    group = policy.group("prompt", means, n, rng)
    while True:
        found = assess_group(
            calibrate_group(group, calibrator),
            calibrator,
            method,
            policy.dimensions,
            n,
            classifier=classifier,
        )
        drawn = len(group.rollouts)
        if not needs_more(found, n_max):
            return diagnose(found, calibrator, method)
        fresh = policy.rollouts(means, min(n, n_max - drawn), rng, start=drawn)
        group = replace(group, rollouts=(*group.rollouts, *fresh))


def compare_classifiers(
    policy: SimulatedPolicy,
    rng: np.random.Generator,
    *,
    n: int = 8,
    n_max: int = 24,
    num_pool: int = 200,
    num_prompts: int = 200,
    method: MethodSettings | None = None,
    classifiers: Sequence[Classifier] | None = None,
) -> dict[str, Retest]:
    """Retest figures by classifier name, all on the same calibrator and prompts.

    The pool has ``num_pool`` prompts of ``n`` rollouts. Point-estimate classifiers leave nothing
    undecided and therefore stop after one round.
    """
    settings = method or MethodSettings()
    chosen = classifiers or (
        PosteriorClassifier(settings.p_class, settings.min_reliability),
        SpreadClassifier(),
        FixedCutClassifier(),
    )
    calibrator = fit_calibrator(policy.pool(num_pool, n, rng), policy.dimensions)
    prompts = policy.prompts(num_prompts, rng)
    truth = [true_class(policy, row) for row in prompts]

    def diagnose(classifier: Classifier) -> list[Diagnostic]:
        return [
            presample(
                policy,
                row,
                calibrator,
                method=settings,
                classifier=classifier,
                rng=rng,
                n=n,
                n_max=n_max,
            )
            for row in prompts
        ]

    return {c.name: retest(diagnose(c), diagnose(c), truth) for c in chosen}


def true_class(policy: SimulatedPolicy, means: Floats) -> PromptClass:
    """Class of true means under the default bound: reachable above the typical prompt's mean, 0."""
    pairs = zip(policy.dimensions, means, strict=True)
    return class_of({k: "reachable" if mu >= 0 else "unreachable" for k, mu in pairs})


def retest(
    first: Sequence[Diagnostic],
    second: Sequence[Diagnostic],
    truth: Sequence[PromptClass] | None = None,
) -> Retest:
    """Compare two independent diagnoses of the same prompts, in the same order.

    Works on real diagnostics as well: this is the figure to quote for a policy.
    """
    both = [(a.prompt_class, b.prompt_class) for a, b in zip(first, second, strict=True)]
    agreeing = [a == b for a, b in both if _decided(a) and _decided(b)]
    everything = [*first, *second]
    right = [
        item.prompt_class == label
        for item, label in zip(everything, [*truth, *truth] if truth else [], strict=bool(truth))
        if _decided(item.prompt_class)
    ]
    count = max(1, len(everything))
    return Retest(
        num_prompts=len(first),
        decided=sum(_decided(item.prompt_class) for item in everything) / count,
        agreement=sum(agreeing) / len(agreeing) if agreeing else None,
        num_both_decided=len(agreeing),
        accuracy=sum(right) / len(right) if right else None,
        rollouts_per_prompt=sum(item.num_rollouts for item in everything) / count,
    )


def _decided(label: PromptClass | None) -> bool:
    return label not in (None, UNCERTAIN, UNKNOWN)


def _score(raw: float | None) -> Score:
    if raw is None:
        return Score("failed", None, None, "simulated failure", MODEL, REVISION)
    return Score("ok", raw, None, None, MODEL, REVISION)
