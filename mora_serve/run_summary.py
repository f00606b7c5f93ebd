"""Figures of one run of the main job: from what the API returned to ``summary.json``.

Pure functions. A change between two versions is the mean over prompts of the difference of the
prompt's mean reward, with a bootstrap over prompts (which covers prompts and rollouts alike); a
change whose 95 % interval contains 0 is said to be within noise. Rewards are z, so a unit is one
robust standard deviation of the base policy's rewards in the calibration pool.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

from mora_serve import __version__
from mora_serve.bootstrap import CONFIDENCE, Bootstrap

Json = dict[str, Any]
MARGIN_KEYS = ("rewards/margins", "margin", "rewards_margins")
LOSS_KEYS = ("loss", "train_loss")


@dataclass(frozen=True, slots=True)
class Collected:
    """Everything a run read from the API."""

    rows: Sequence[Json]
    """Prompts with ``id``, ``kind`` and ``prompt``."""
    results: Mapping[str, Json]
    """``rewrite`` objects by row id."""
    failures: Mapping[str, Json]
    """Errors by row id."""
    batch: Json
    pairs: Sequence[Json]
    job: Json
    events: Sequence[Json]
    """The job's, oldest first."""
    overlapped: int
    """Training steps that were logged before the batch ended."""
    base: str
    tuned: str
    before: Sequence[Json]
    """Diagnostics of the rows in order, base version."""
    after: Sequence[Json]
    """The same with the tuned version."""
    seed: int
    n_eval: int
    timings: Mapping[str, float]
    configuration: Mapping[str, Any] | None
    started: float
    """Unix seconds."""


def summarise(run: Collected) -> Json:
    """All figures of the run, JSON-ready."""
    dimensions = _dimensions(run.results.values())
    prompts = [_prompt(row, run, dimensions) for row in run.rows]
    return {
        "version": __version__,
        "started": datetime.fromtimestamp(run.started, UTC).isoformat(timespec="seconds"),
        "seed": run.seed,
        "base": run.base,
        "tuned": run.tuned,
        "batch_id": run.batch["id"],
        "job_id": run.job["id"],
        "dimensions": dimensions,
        "bounds": _bounds(run.results.values(), dimensions),
        "classes": dict(Counter(p["class"] for p in prompts).most_common()),
        "classes_by_kind": _by_kind(prompts),
        "presampling": _presampling(run.results.values()),
        "rewriting": _rewriting(prompts, dimensions),
        "pairs": _pairs(run),
        "training": _training(run),
        "evaluation": {
            "n": run.n_eval,
            "num_prompts": len(run.rows),
            "confidence": CONFIDENCE,
            "dimensions": {k: change(run.before, run.after, k, run.seed) for k in dimensions},
        },
        "prompts": prompts,
        "usage": run.batch.get("usage"),
        "timings_s": {name: round(value, 1) for name, value in run.timings.items()},
        "configuration": run.configuration,
    }


def change(before: Sequence[Json], after: Sequence[Json], dimension: str, seed: int) -> Json:
    """Paired change of mean reward on ``dimension``; ``None`` figures when nothing is valid.

    Prompts count that have a mean under both versions. One prompt has no interval, so its change is
    within noise.
    """
    pairs = [(_mean(b, dimension), _mean(a, dimension)) for b, a in zip(before, after, strict=True)]
    kept = [(b, a) for b, a in pairs if b is not None and a is not None]
    found = Bootstrap(seed).mean([a - b for b, a in kept])
    within_noise = found.low is None or found.high is None or found.low <= 0 <= found.high
    return {
        "before": fmean(b for b, _ in kept) if kept else None,
        "after": fmean(a for _, a in kept) if kept else None,
        "change": found.value,
        "se": found.se,
        "low": found.low,
        "high": found.high,
        "within_noise": within_noise if kept else None,
        "num_prompts": len(kept),
    }


def _dimensions(results: Any) -> list[str]:
    return next(
        (list(r["original"]["dimensions"]) for r in results if r["original"]["dimensions"]), []
    )


def _bounds(results: Any, dimensions: Sequence[str]) -> Json:
    """The expected ceiling that each dimension's reach asks for."""
    for result in results:
        items = result["original"]["dimensions"]
        if items:
            return {k: items[k].get("bound") for k in dimensions}
    return dict.fromkeys(dimensions)


def _prompt(row: Json, run: Collected, dimensions: Sequence[str]) -> Json:
    entry: Json = {"id": row["id"], "kind": row["kind"], "prompt": row["prompt"]}
    result = run.results.get(str(row["id"]))
    if result is None:
        error = run.failures.get(str(row["id"]), {})
        return {**entry, "class": "failed", "error": error.get("code"), "dimensions": {}}
    original = result["original"]
    return {
        **entry,
        "class": original["class"] or "unknown",
        "class_probability": original["class_probability"],
        "conflicted": original["conflicted"],
        "num_rollouts": original.get("num_rollouts"),
        "dimensions": {k: _figures(original["dimensions"].get(k)) for k in dimensions},
        "num_candidates": len(result["candidates"]),
        "verdict": _verdict(result),
        "reasons": [c["reason"] for c in result["candidates"] if c["reason"]],
        "rewrite": _rewrite(result, dimensions),
        "num_pairs": len(result["pairs"]),
    }


def _figures(item: Json | None) -> Json:
    names = ("mean", "ceiling", "expected_ceiling", "reach", "state", "n_valid")
    return {name: None if item is None else item.get(name) for name in names}


def _verdict(result: Json) -> str:
    """What became of the prompt: ``accepted``, why not, or ``not rewritten``."""
    if result["accepted"] is not None:
        return "accepted"
    if not result["candidates"]:
        return "not rewritten"
    tried = [c for c in result["candidates"] if c["reason"] not in {"not_selected", None}]
    return str(tried[0]["reason"]) if tried else "not selected"


def _rewrite(result: Json, dimensions: Sequence[str]) -> Json | None:
    """The accepted candidate, with what the confirmation sample says of it."""
    if result["accepted"] is None:
        return None
    candidate = result["candidates"][result["accepted"]]
    confirmed = candidate.get("confirmation") or {}
    changes = {**(confirmed.get("kept") or {}), **(confirmed.get("gains") or {})}
    items = candidate["diagnostic"]["dimensions"]
    return {
        "prompt": candidate["prompt"],
        "strategy": candidate["strategy"],
        "targets": candidate["targets"],
        "gain": candidate["gain"],
        "gain_lower": confirmed.get("gain_lower"),
        "selection_gain": candidate["selection_gain"],
        "confirmed_change": {k: changes.get(k) for k in dimensions},
        "dimensions": {k: _figures(items.get(k)) for k in dimensions},
    }


def _by_kind(prompts: Sequence[Json]) -> Json:
    kinds: dict[str, Counter[str]] = {}
    for prompt in prompts:
        kinds.setdefault(prompt["kind"], Counter())[prompt["class"]] += 1
    return {kind: dict(counts.most_common()) for kind, counts in kinds.items()}


def _presampling(results: Any) -> Json:
    originals = [result["original"] for result in results]
    drawn = [item["num_rollouts"] for item in originals if item.get("num_rollouts")]
    cut = [item["share_cut"] for item in originals if item.get("share_cut") is not None]
    return {
        "num_rollouts": sum(drawn),
        "mean_rollouts": _average(drawn),
        "share_cut": _average(cut),
        "num_conflicted": sum(item["conflicted"] is True for item in originals),
    }


def _rewriting(prompts: Sequence[Json], dimensions: Sequence[str]) -> Json:
    tried = [p for p in prompts if p.get("num_candidates")]
    accepted = [p for p in tried if p["rewrite"]]
    return {
        "num_rewritten": len(tried),
        "num_candidates": sum(p["num_candidates"] for p in tried),
        "num_accepted": len(accepted),
        "verdicts": dict(Counter(p["verdict"] for p in tried).most_common()),
        "candidate_reasons": dict(Counter(r for p in tried for r in p["reasons"]).most_common()),
        "mean_gain": _average([p["rewrite"]["gain"] for p in accepted]),
        "dimensions": {k: _before_after(accepted, k) for k in dimensions},
    }


def _before_after(accepted: Sequence[Json], dimension: str) -> Json:
    """Means over the accepted rewrites, and the confirmed change of the expected ceiling.

    The values before come from the sample that chose the class, those after from fresh rollouts, so
    their difference flatters the rewrite; ``confirmed_change`` stands on fresh rollouts of both.
    """
    sides = [(p["dimensions"][dimension], p["rewrite"]["dimensions"][dimension]) for p in accepted]
    changes = [p["rewrite"]["confirmed_change"][dimension] for p in accepted]
    return {
        **{
            f"{name}_{side}": _average([pair[index][name] for pair in sides])
            for name in ("mean", "ceiling", "expected_ceiling")
            for index, side in enumerate(("before", "after"))
        },
        "confirmed_change": _average(changes),
        "num_confirmed": sum(value is not None for value in changes),
    }


def _pairs(run: Collected) -> Json:
    sources = Counter(
        str((p.get("provenance") or {}).get("strategy") or "original") for p in run.pairs
    )
    return {
        "count": len(run.pairs),
        "mean_margin": _average([p["margin"] for p in run.pairs]),
        "by_strategy": dict(sources.most_common()),
        "by_mode": dict(Counter(p["mode"] for p in run.pairs)),
    }


def _training(run: Collected) -> Json:
    curve = [point for event in run.events if (point := _curve_point(event)) is not None]
    losses = [p["loss"] for p in curve if p["loss"] is not None]
    margins = [p["margin"] for p in curve if p["margin"] is not None]
    return {
        "status": run.job["status"],
        "num_steps": max((p["step"] for p in curve), default=0),
        "steps_while_batch_ran": run.overlapped,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "margin_last": margins[-1] if margins else None,
        "hyperparameters": (run.job.get("method") or {}).get("dpo", {}).get("hyperparameters"),
        "curve": curve,
    }


def _curve_point(event: Json) -> Json | None:
    data = event.get("data") or {}
    if event.get("type") != "metrics" or "step" not in data:
        return None
    return {
        "step": data["step"],
        "loss": _first(data, LOSS_KEYS),
        "margin": _first(data, MARGIN_KEYS),
    }


def _first(data: Json, keys: Sequence[str]) -> float | None:
    return next((float(data[key]) for key in keys if data.get(key) is not None), None)


def _mean(diagnostic: Json, dimension: str) -> float | None:
    item = diagnostic["dimensions"].get(dimension)
    return None if item is None else item["mean"]


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
