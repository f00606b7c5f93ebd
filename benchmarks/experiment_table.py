"""What the experiment's cells say: a table per scorer, control rates, and the paper's figures.

Answers of all seeds to one held-out prompt form its sample, so that the intervals of
:mod:`mora_serve.evaluation` cover prompts and answers. They do not cover what differs from seed to
seed, the rollouts that pairs are drawn from above all: the change of every seed stands beside them,
and the standard error over seeds beside the differences between arms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from statistics import fmean, stdev
from typing import Any

from mora_serve.bootstrap import Estimate
from mora_serve.evaluation import (
    OVERALL,
    DimensionChange,
    Evaluation,
    VersionSample,
    evaluate_versions,
)

Json = dict[str, Any]
Samples = Mapping[str, Sequence[VersionSample]]
"""Arm -> its sample of every seed; the first arm is the base."""
PAPER = (
    "Paper (arXiv 2605.11679; larger models, other data, another scale of percent): +4.6 % overall "
    "reward in simultaneous alignment, +5 to +12.4 % per preference in sequential alignment."
)
ALTERNATIVES, OURS = ("plain", "more", "unmeasured"), ("simultaneous", "sequential")
OPEN_CLASSES = frozenset({"uncertain", "unknown", None})


def pooled(samples: Sequence[VersionSample], name: str) -> VersionSample:
    """One sample of an arm: every prompt with its answers of all seeds."""
    prompts = tuple(
        replace(each[0], answers=tuple(a for prompt in each for a in prompt.answers))
        for each in zip(*(sample.prompts for sample in samples), strict=True)
    )
    return VersionSample(name, prompts, samples[0].scorers)


def compare_arms(samples: Samples, n: int, seed: int = 0) -> tuple[Evaluation, Json]:
    """All arms against the base over all seeds, and the changes of every seed."""
    arms = list(samples)
    found = evaluate_versions([pooled(samples[arm], arm) for arm in arms], n, seed)
    by_seed: Json = {arm: {} for arm in arms[1:]}
    for place in range(len(samples[arms[0]])):
        renamed = [replace(samples[arm][place], name=arm) for arm in arms]
        for item in evaluate_versions(renamed, n, seed).comparisons:
            for k, change in item.changes.items():
                by_seed[item.name].setdefault(k, []).append(change.change.value)
    return found, by_seed


def compare_with_alternatives(samples: Samples, n: int, seed: int = 0) -> dict[str, Evaluation]:
    """MORA's arms against each arm that is not MORA: the intervals of their paired differences."""
    rivals = [arm for arm in samples if arm in ALTERNATIVES]
    ours = [pooled(samples[arm], arm) for arm in samples if arm in OURS]
    if not ours:
        return {}
    return {
        rival: evaluate_versions([pooled(samples[rival], rival), *ours], n, seed)
        for rival in rivals
    }


def alternative_lines(found: Mapping[str, Evaluation], by_seed: Json) -> list[str]:
    """One Markdown table: change of mean reward of MORA's arms over each alternative."""
    if not found:
        return []
    names = [*next(iter(found.values())).dimensions, OVERALL]
    head = [*names, f"{OVERALL} ± standard error over seeds"]
    lines = [
        "MORA against its alternatives, change of mean reward on the same prompts, z:",
        "",
        _row("arm", head),
        _row("---", ["---:"] * len(head)),
    ]
    for rival, each in found.items():
        for item in each.comparisons:
            cells = [_cell(item.changes[k].change, 2) for k in names]
            differences = [
                ours - theirs
                for ours, theirs in zip(
                    by_seed[item.name][OVERALL], by_seed[rival][OVERALL], strict=True
                )
            ]
            lines.append(_row(f"{item.name} − {rival}", [*cells, _over_seeds(differences)]))
    return [*lines, ""]


def table_lines(found: Evaluation, by_seed: Json, title: str) -> list[str]:
    """A Markdown table per figure: arms by dimensions and overall."""
    names = [*found.dimensions, OVERALL]
    figures: list[tuple[str, Callable[[DimensionChange], Estimate], int, bool]] = [
        ("change of mean reward, z", lambda change: change.change, 2, True),
        ("the same at equal length, z", lambda change: change.adjusted, 2, True),
        ("change of mean pool quantile, percent", lambda change: change.percent, 1, True),
        ("win rate against the base", lambda change: change.win_rate, 2, False),
    ]
    lines = [f"### {title}", ""]
    for label, pick, digits, signed in figures:
        if all(pick(c.changes[k]).value is None for c in found.comparisons for k in names):
            continue
        lines += [f"{label}:", "", _row("arm", names), _row("---", ["---:"] * len(names))]
        for item in found.comparisons:
            cells = [_cell(pick(item.changes[k]), digits, signed=signed) for k in names]
            lines.append(_row(item.name, cells))
        lines.append("")
    lines += ["per seed, z:", "", _row("arm", names), _row("---", ["---:"] * len(names))]
    for arm, changes in by_seed.items():
        cells = [" / ".join(_number(v, 2) for v in changes[k]) for k in names]
        lines.append(_row(arm, cells))
    lines += ["", _row("arm", ["tokens", "cut"]), _row("---", ["---:", "---:"])]
    for version in found.versions:
        cells = [
            _cell(version.num_tokens, 1, signed=False),
            _cell(version.share_cut, 2, signed=False),
        ]
        lines.append(_row(version.name, cells))
    return [*lines, ""]


def control_rates(batches: Mapping[int, Mapping[str, Json]]) -> Json:
    """Acceptance of the null strategy and of rewriting, and how often classes repeat.

    Classes of two seeds are two diagnoses of the same prompts under the same version.
    """
    rates: Json = {}
    for kind in ("null", "mora"):
        found = confirmations(batches, kind)
        accepted = sum(item["reason"] == "accepted" for item in found)
        rates[f"{kind}_acceptance"] = _rate(accepted, len(found))
    same = both = total = 0
    for a, b in combinations([each["mora"]["classes"] for each in batches.values()], 2):
        for name in a.keys() & b.keys():
            total += 1
            if a[name] not in OPEN_CLASSES and b[name] not in OPEN_CLASSES:
                both += 1
                same += a[name] == b[name]
    return {
        **rates,
        "class_agreement": _rate(same, both),
        "decided_twice": _rate(both, total),
        "rollouts": {
            kind: sum(each[kind]["rollouts"] for each in batches.values())
            for kind in next(iter(batches.values()))
        },
        "rewritten_pairs": {
            kind: _rate(
                sum(
                    _is_rewritten(pair) for each in batches.values() for pair in each[kind]["pairs"]
                ),
                sum(len(each[kind]["pairs"]) for each in batches.values()),
            )
            for kind in next(iter(batches.values()))
        },
    }


def pair_lines(
    batches: Mapping[int, Mapping[str, Json]],
    trained_on: Mapping[str, Sequence[int]],
    dimensions: Sequence[str],
) -> list[str]:
    """What the pairs of every kind of batch teach, all seeds, and how many each arm trained on."""
    lines = [
        "What pairs teach, chosen minus rejected, mean of all seeds, z:",
        "",
        _row("batch", ["pairs", *dimensions, "margin"]),
        _row("---", ["---:"] * (len(dimensions) + 2)),
    ]
    for kind in next(iter(batches.values())):
        pairs = [pair for each in batches.values() for pair in each[kind]["pairs"]]
        if not pairs:
            continue
        taught = [
            fmean(
                pair["chosen_scores"][k]["value"] - pair["rejected_scores"][k]["value"]
                for pair in pairs
            )
            for k in dimensions
        ]
        margin = fmean(pair["margin"] for pair in pairs)
        cells = [str(len(pairs)), *(_number(value, 2) for value in (*taught, margin))]
        lines.append(_row(kind, cells))
    counts = ", ".join(
        f"{arm} {' / '.join(map(str, numbers))}" for arm, numbers in trained_on.items()
    )
    return [*lines, "", f"Pairs trained on, per seed: {counts}.", ""]


def confirmations(batches: Mapping[int, Mapping[str, Json]], kind: str) -> list[Json]:
    """Every confirmation of a kind of batch, over all seeds."""
    return [item for each in batches.values() for item in each[kind]["confirmations"]]


def kl_lines(divergences: Mapping[str, Sequence[Json]]) -> list[str]:
    """KL to the base of every arm and seed, in nats; nothing where it was not measured."""
    if not divergences:
        return ["KL to the base was not measured.", ""]
    head = ["per token, per seed", "per answer, per seed"]
    lines = ["KL to the base, nats (k3):", "", _row("arm", head), _row("---", ["---:"] * 2)]
    for arm, measured in divergences.items():
        cells = [
            " / ".join(_number(item[name]["value"], digits, signed=False) for item in measured)
            for name, digits in (("per_token", 4), ("per_answer", 3))
        ]
        lines.append(_row(arm, cells))
    return [*lines, ""]


def rate_lines(rates: Json) -> list[str]:
    """The control rates in words."""
    names = {
        "null_acceptance": "null strategy accepted (should be near 10 %)",
        "mora_acceptance": "rewrites accepted on confirmation",
        "class_agreement": "class repeats, of prompts decided twice",
        "decided_twice": "prompts decided twice",
    }
    lines = []
    for name, label in names.items():
        rate = rates[name]
        share = "none" if rate["share"] is None else f"{100 * rate['share']:.0f} %"
        lines.append(f"- {label}: {share} ({rate['count']} of {rate['of']})")
    drawn = ", ".join(f"{kind} {count}" for kind, count in rates["rollouts"].items())
    pairs = ", ".join(
        f"{kind} {rate['count']} of {rate['of']}" for kind, rate in rates["rewritten_pairs"].items()
    )
    return [
        *lines,
        f"- rollouts, all seeds: {drawn}",
        f"- pairs on rewritten prompts, all seeds: {pairs}",
        "",
    ]


def _is_rewritten(pair: Json) -> bool:
    return pair["provenance"]["strategy"] is not None


def _rate(count: int, total: int) -> Json:
    return {"count": count, "of": total, "share": count / total if total else None}


def _row(head: str, cells: Sequence[str]) -> str:
    return f"| {head} | {' | '.join(cells)} |"


def _cell(estimate: Estimate, digits: int, *, signed: bool = True) -> str:
    if estimate.value is None:
        return "·"
    values = (estimate.value, estimate.low, estimate.high)
    value, low, high = (_number(v, digits, signed=signed) for v in values)
    return f"{value} ({low} … {high})"


def _over_seeds(values: Sequence[float]) -> str:
    """Mean and its standard error, which one seed does not have."""
    if len(values) < 2:
        return _number(fmean(values), 2)
    error = stdev(values) / len(values) ** 0.5
    return f"{_number(fmean(values), 2)} ± {_number(error, 2, signed=False)}"


def _number(value: float | None, digits: int, *, signed: bool = True) -> str:
    if value is None:
        return "·"
    return f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
