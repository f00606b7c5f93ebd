"""Is everything there, and once? What a batch left behind, held against what was asked for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Leavings:
    """All that can be read of a finished batch."""

    batch: Row
    """The batch object."""
    output: Sequence[Row]
    errors: Sequence[Row]
    """Lines of the error file."""
    pairs: Sequence[Row]
    """Pairs read at the end, in the order in which they came."""
    followed: Sequence[Row]
    """Pairs as a follower got them meanwhile, over all its connections."""
    table: Sequence[Row]
    """Pairs read as Parquet."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What is wrong, counted."""

    lost_rows: int
    repeated_rows: int
    lost_pairs: int
    repeated_pairs: int
    error_codes: Mapping[str, int]
    """Rows of the error file by code: not lost, but not wanted either."""
    problems: Sequence[str]
    """One sentence for everything that does not agree; empty when all is well."""


def audit(wanted: Sequence[str], left: Leavings) -> Findings:
    """Hold what a batch left against the ``custom_id`` values of its input."""
    ids = Counter(row["custom_id"] for row in (*left.output, *left.errors))
    lost = [name for name in wanted if ids[name] == 0]
    repeated = sum(count - 1 for count in ids.values() if count > 1)
    promised = Counter(_content(pair) for row in left.output for pair in _pairs_of(row))
    read = Counter(_content(pair) for pair in left.pairs)
    problems = [
        *_told(f"rows are lost, the first {lost[:3]}", len(lost)),
        *_told("rows appear twice", repeated),
        *_told("rows were never asked for", len(ids.keys() - set(wanted))),
        *_told("pairs of the output are not in the stream", (promised - read).total()),
        *_told("pairs of the stream are not in the output", (read - promised).total()),
        *_check_counts(wanted, left),
        *_check_order(left),
    ]
    return Findings(
        lost_rows=len(lost),
        repeated_rows=repeated,
        lost_pairs=(promised - read).total(),
        repeated_pairs=(read - promised).total(),
        error_codes=Counter(row["error"]["code"] for row in left.errors),
        problems=problems,
    )


def _check_counts(wanted: Sequence[str], left: Leavings) -> list[str]:
    counts = dict(left.batch["request_counts"])
    right = {"total": len(wanted), "completed": len(left.output), "failed": len(left.errors)}
    problems = []
    if left.batch["status"] != "completed":
        problems.append(f"the batch is {left.batch['status']}")
    if counts != right:
        problems.append(f"the counts say {counts}, the files {right}")
    return problems


def _check_order(left: Leavings) -> list[str]:
    problems = []
    if [pair["seq"] for pair in left.pairs] != list(range(len(left.pairs))):
        problems.append("seq has a hole, or does not ascend from 0")
    if list(left.followed) != list(left.pairs):
        problems.append(
            f"the follower got {len(left.followed)} pairs that are not the {len(left.pairs)} read"
        )
    if [_comparable(row) for row in left.table] != [_comparable(row) for row in left.pairs]:
        problems.append(f"Parquet has {len(left.table)} rows that are not the pairs read")
    return problems


def _told(what: str, count: int) -> list[str]:
    return [f"{count} {what}"] if count else []


def _pairs_of(row: Row) -> Sequence[Row]:
    pairs: Sequence[Row] = row["response"]["body"]["pairs"]
    return pairs


def _content(pair: Row) -> str:
    return json.dumps({k: v for k, v in pair.items() if k != "seq"}, sort_keys=True)


def _comparable(row: Row) -> tuple[Any, ...]:
    turns = (json.dumps([dict(t) for t in row[k]]) for k in ("prompt", "chosen", "rejected"))
    return row["seq"], row["prompt_id"], row["margin"], *turns
