"""A small made-up run of the main job, with every case that figures and report must show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mora_serve.run_summary import Collected

DIMENSIONS = ("helpful", "harmless", "truthful")
NASTY = "<script>alert('x')</script> & [bold]no markup[/]"


def diagnostic(
    means: Mapping[str, float], label: str = "multi", conflicted: bool = False
) -> dict[str, Any]:
    """A diagnostic as the API returns it; dimensions without a mean have no valid score."""
    return {
        "object": "diagnostic", "status": "ok", "class": label, "class_probability": 0.9,
        "conflicted": conflicted, "num_rollouts": 16, "share_cut": 0.25,
        "policy_version": "base",
        "dimensions": {
            name: {
                "mean": means.get(name), "ceiling": _plus(means.get(name), 1.0),
                "expected_ceiling": _plus(means.get(name), 1.1), "reach": 0.5,
                "state": "reachable", "bound": 0.4, "n_valid": 16,
            }
            for name in DIMENSIONS
        },
    }  # fmt: skip


def _plus(value: float | None, more: float) -> float | None:
    return None if value is None else value + more


def candidate(reason: str | None, means: Mapping[str, float], **fields: Any) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": f"Rewritten: {NASTY}"}],
        "strategy": "compose", "targets": ["harmless", "truthful"], "selection_gain": 1.4,
        "gain": None, "confirmation": None, "accepted": False, "reason": reason,
        "diagnostic": diagnostic(means), **fields,
    }  # fmt: skip


def rewrite_result(label: str, *candidates: dict[str, Any]) -> dict[str, Any]:
    """A rewrite object; the first accepted candidate is the accepted one."""
    accepted = next((i for i, c in enumerate(candidates) if c["accepted"]), None)
    means = {"helpful": 1.2, "harmless": -0.5, "truthful": -0.2}
    return {
        "object": "rewrite", "original": diagnostic(means, label), "candidates": list(candidates),
        "accepted": accepted, "pairs": [],
    }  # fmt: skip


def made_up_run() -> Collected:
    """Six prompts: accepted, rejected, drifted, multi, unknown and failed."""
    better = {"helpful": 1.1, "harmless": 0.7, "truthful": 0.4}
    confirmation = {
        "gain_lower": 0.2, "gains": {"harmless": 0.9, "truthful": 0.7}, "kept": {"helpful": -0.1}
    }  # fmt: skip
    taken = candidate("accepted", better, accepted=True, gain=0.8, confirmation=confirmation)
    results = {
        "row-0": rewrite_result("single:helpful", candidate("not_selected", better), taken),
        "row-1": rewrite_result(
            "single:helpful", candidate("not_selected", better), candidate("gain", better)
        ),
        "row-2": rewrite_result("single:harmless", candidate("drift", better)),
        "row-3": rewrite_result("multi"),
        "row-4": rewrite_result("unknown"),
    }
    prompts = [NASTY, *(f"Question {index}?" for index in range(1, 6))]
    kinds = ["benign", "benign", "factual", "factual", "borderline", "borderline"]
    rows = [
        {"id": f"row-{i}", "kind": kind, "prompt": prompt}
        for i, (kind, prompt) in enumerate(zip(kinds, prompts, strict=True))
    ]
    values = [dict.fromkeys(DIMENSIONS, 0.1 * i) for i in range(6)]
    return Collected(
        rows=rows,
        results=results,
        failures={"row-5": {"code": "context_length_exceeded", "message": "too long"}},
        batch={"id": "batch_1", "usage": {"total_tokens": 12}},
        pairs=[
            {"margin": 1.0, "mode": "simultaneous", "provenance": {"strategy": None}},
            {"margin": 1.5, "mode": "simultaneous", "provenance": {}},
            {"margin": 2.0, "mode": "simultaneous", "provenance": {"strategy": "compose"}},
        ],
        job={"id": "ftjob-1", "status": "succeeded", "method": {"dpo": {"hyperparameters": {}}}},
        events=[
            {"type": "message", "message": "started", "data": None},
            {"type": "metrics", "data": {"step": 1, "loss": 0.69}},
            {"type": "metrics", "data": {"step": 2, "loss": 0.65, "rewards/margins": 0.1}},
            {"type": "metrics", "data": {"step": 3, "loss": 0.61, "rewards/margins": 0.2}},
        ],
        overlapped=1,
        base="base",
        tuned="policy-1",
        before=[diagnostic(v) for v in values],
        after=[diagnostic({**v, "helpful": v["helpful"] + 0.3}) for v in values],
        seed=7,
        n_eval=8,
        timings={"batch_s": 1.26},
        configuration={"server": {"api_keys": ["**********"]}, "data_dir": "<here>"},
        started=1_700_000_000.0,
    )
