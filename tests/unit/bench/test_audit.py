"""The audit of a finished batch finds whatever is missing, doubled or out of order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.audit import Leavings, audit

WANTED = ["a", "b", "c"]


def pair(name: str, seq: int | None) -> dict[str, Any]:
    turns = {key: [{"role": "user", "content": name}] for key in ("prompt", "chosen", "rejected")}
    return {"seq": seq, "prompt_id": name, "margin": 1.0, **turns}


def row(name: str) -> dict[str, Any]:
    return {"custom_id": name, "response": {"body": {"pairs": [pair(name, None)]}}}


def sound() -> Leavings:
    pairs = [pair(name, seq) for seq, name in enumerate(["b", "a"])]
    return Leavings(
        batch={"status": "completed", "request_counts": counts(3, 2, 1)},
        output=[row("a"), row("b")],
        errors=[{"custom_id": "c", "error": {"code": "empty_prompt"}}],
        pairs=pairs,
        followed=list(pairs),
        table=[dict(item) for item in pairs],
    )


def counts(total: int, completed: int, failed: int) -> dict[str, int]:
    return {"total": total, "completed": completed, "failed": failed}


def test_a_sound_batch_has_no_problem_and_its_error_codes_are_counted() -> None:
    found = audit(WANTED, sound())
    assert found.problems == []
    assert found.error_codes == {"empty_prompt": 1}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"output": [row("a")]}, "rows are lost, the first ['b']"),
        ({"output": [row("a"), row("b"), row("b")]}, "rows appear twice"),
        ({"output": [row("a"), row("b"), row("x")]}, "rows were never asked for"),
        ({"batch": {"status": "expired", "request_counts": counts(3, 2, 1)}}, "is expired"),
        ({"batch": {"status": "completed", "request_counts": counts(3, 3, 0)}}, "counts say"),
        ({"pairs": [pair("b", 0)]}, "pairs of the output are not in the stream"),
        ({"pairs": [pair("b", 0), pair("a", 1), pair("a", 2)]}, "are not in the output"),
        ({"pairs": [pair("b", 0), pair("a", 2)]}, "seq has a hole"),
        ({"followed": [pair("b", 0)]}, "the follower got 1 pairs"),
        ({"table": [pair("b", 0), pair("b", 1)]}, "Parquet has 2 rows"),
    ],
)
def test_every_disagreement_is_told(change: dict[str, Any], told: str) -> None:
    problems = audit(WANTED, replace(sound(), **change)).problems
    assert any(told in problem for problem in problems), problems
