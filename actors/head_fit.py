"""Bradley-Terry fits of linear heads, and how well they order held-out pairs.

A head scores ``w . x`` and prefers the answer with the larger score. ``w`` minimises the mean over
groups of ``log(1 + exp(-w . (x_better - x_worse)))`` plus ``decay * |w|^2 / 2`` (Bradley and Terry
1952, with a ridge penalty); every group weighs the same however many pairs it has. Features are
divided by a scale first, see :func:`feature_scale`. Arrays are float64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from actors.head_data import Group

NUM_FOLDS = 10
NUM_BINS = 5


@dataclass(frozen=True, slots=True)
class Pairs:
    """Preference pairs as feature differences."""

    differences: np.ndarray
    """``[pairs, features]``: better minus worse."""
    weights: np.ndarray
    """``[pairs]``: 1 over the number of pairs of that kind in the pair's group."""
    group: np.ndarray
    """``[pairs]``: index of the pair's group."""
    cluster: np.ndarray
    """``[pairs]``: cluster name, the unit of folds and of errors."""
    kind: np.ndarray
    """``[pairs]``: name of the pair's set."""

    def where(self, chosen: np.ndarray) -> Pairs:
        """The pairs at which ``chosen`` is true."""
        return Pairs(
            self.differences[chosen],
            self.weights[chosen],
            self.group[chosen],
            self.cluster[chosen],
            self.kind[chosen],
        )


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Share of pairs in the right order, each group counting once; ties count one half."""

    value: float
    error: float
    """Standard error over groups."""
    num_groups: int
    num_pairs: int


@dataclass(frozen=True, slots=True)
class ConfidenceBin:
    """Pairs whose preferred answer the fit gave a probability within one range."""

    confidence: float
    """Mean stated probability that the preferred answer is the better one, in [0.5, 1]."""
    accuracy: float
    """Share of them in which it is, each group counting once over all its pairs."""
    num_pairs: int


@dataclass(frozen=True, slots=True)
class Confidence:
    """How far stated probabilities of pairs can be believed."""

    error: float
    """Expected calibration error: mean distance of confidence and accuracy over the bins."""
    bins: tuple[ConfidenceBin, ...]


@dataclass(frozen=True, slots=True)
class Validation:
    """What cross-validation found for one kind of pair."""

    accuracy: Accuracy
    confidence: Confidence


def make_pairs(groups: Sequence[Group], features: Mapping[str, np.ndarray]) -> Pairs:
    """All pairs of all groups, in order."""
    rows: list[np.ndarray] = []
    meta: list[tuple[float, int, str, str]] = []
    for index, group in enumerate(groups):
        table = features[group.key]
        for pair_set in group.sets:
            for better, worse in pair_set.pairs:
                rows.append(table[better] - table[worse])
                meta.append((1 / len(pair_set.pairs), index, group.cluster, pair_set.kind))
    weights, indices, clusters, kinds = zip(*meta, strict=True)
    return Pairs(
        np.array(rows, dtype=np.float64),
        np.array(weights),
        np.array(indices),
        np.array(clusters),
        np.array(kinds),
    )


def feature_scale(answers: np.ndarray) -> np.ndarray:
    """Divisors ``[features]``: the geometric mean of each standard deviation and their median.

    Halfway between raw and standardised features: the few dimensions of very large variance do not
    rule the penalty, and those of hardly any do not become noise of unit size.
    """
    deviation = answers.std(axis=0) + 1e-6
    scale: np.ndarray = np.sqrt(deviation * np.median(deviation))
    return scale


def fit(pairs: Pairs, scale: np.ndarray, decay: float) -> np.ndarray:
    """Weights ``[features]`` for unscaled features; ``scale`` divides them within the fit."""
    x = torch.from_numpy(pairs.differences / scale)
    share = torch.from_numpy(pairs.weights / pairs.weights.sum())
    w = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [w], max_iter=200, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = (share * torch.nn.functional.softplus(-(x @ w))).sum() + decay / 2 * (w @ w)
        value.backward()
        return value

    optimizer.step(loss)
    weights: np.ndarray = w.detach().numpy() / scale
    return weights


def accuracy(margins: np.ndarray, pairs: Pairs) -> Accuracy:
    """How many of ``pairs`` the margins ``[pairs]`` (better minus worse) order rightly."""
    right = np.where(margins == 0, 0.5, margins > 0)
    by_group = [right[pairs.group == group].mean() for group in np.unique(pairs.group)]
    values = np.array(by_group)
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
    return Accuracy(float(values.mean()), error, len(values), len(margins))


def confidence(margins: np.ndarray, pairs: Pairs) -> Confidence:
    """Calibration of ``sigmoid(|margin|)``, margins in the log-odds of :func:`fit`.

    Bins of equal width (Guo et al. 2017, arXiv 1706.04599, equation 5), pairs by their weights.
    """
    stated = 1 / (1 + np.exp(-np.abs(margins)))
    right = np.where(margins == 0, 0.5, margins > 0)
    place = np.minimum(((stated - 0.5) / 0.5 * NUM_BINS).astype(int), NUM_BINS - 1)
    share = pairs.weights / pairs.weights.sum()
    bins, error = [], 0.0
    for index in range(NUM_BINS):
        inside = place == index
        if not inside.any():
            continue
        weights = share[inside]
        said = float(np.average(stated[inside], weights=weights))
        found = float(np.average(right[inside], weights=weights))
        bins.append(ConfidenceBin(said, found, int(inside.sum())))
        error += float(weights.sum()) * abs(said - found)
    return Confidence(error, tuple(bins))


def folds(clusters: Iterable[str], num_folds: int = NUM_FOLDS) -> np.ndarray:
    """Fold of each cluster by its hash: equal clusters share a fold, whatever the order."""
    digests = (hashlib.sha256(f"mora-fold:{name}".encode()).digest() for name in clusters)
    return np.array([int.from_bytes(digest[:8], "big") % num_folds for digest in digests])


def cross_validate(
    pairs: Pairs, scale: np.ndarray, decay: float, *, test_kinds: Sequence[str]
) -> dict[str, Validation]:
    """What every kind of pair shows, each pair scored by a fit that has not seen its cluster.

    All kinds train; only ``test_kinds`` are scored. ``scale`` may come from all training features,
    since it uses no label.
    """
    fold = folds(pairs.cluster)
    margins = np.zeros(len(pairs.weights))
    for index in range(NUM_FOLDS):
        held = fold == index
        if held.any() and not held.all():
            weights = fit(pairs.where(~held), scale, decay)
            margins[held] = pairs.differences[held] @ weights
    result = {}
    for kind in test_kinds:
        chosen = pairs.kind == kind
        part = pairs.where(chosen)
        result[kind] = Validation(
            accuracy(margins[chosen], part), confidence(margins[chosen], part)
        )
    return result
