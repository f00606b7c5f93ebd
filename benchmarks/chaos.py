"""Does a batch survive anything? ``make chaos``.

Starts the real stack on the ``fake`` backend (Ray, Redis with its append-only file, two generators,
three scorers, two runners, a gateway), submits a batch of ``/v1/rewrites``, and while it runs sends
SIGKILL to parts of the stack on a seeded schedule: generators, scorers, runners, the gateway, the
Serve controller and Redis. In the end everything that was asked for has to be there, once. The
batch is run without kills first (``--clean``), so that what the kills cost is known.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import kills, machine
from benchmarks.audit import Findings, audit
from benchmarks.chaos_batch import custom_ids, submitted
from benchmarks.up import running

BODY = {"n": 4, "candidates": 1}
AIM = 1.5
"""Wall time over that of the clean run."""


def stack_settings(delay_ms: float) -> dict[str, Any]:
    """Two of everything that may be two; a call takes ``delay_ms``, a scoring half of it."""
    two = {"min_replicas": 2, "max_replicas": 2}
    dimensions = ("helpful", "harmless", "truthful")
    return {
        "policy": {"fake_delay_ms": delay_ms, "replica": two},
        "scorers": [
            {
                "name": f"fake-{name}",
                "backend": "fake",
                "dimensions": [name],
                "fake_delay_ms": delay_ms / 2,
            }
            for name in dimensions
        ],
        "runner": {
            "shard_rows": 64,
            "lease_ttl_s": 10,
            "max_in_flight_rows": 8,
            "replica": two,
        },
    }


@dataclass(frozen=True, slots=True)
class Outcome:
    """One batch, run to its end."""

    wall_s: float
    killed: Sequence[kills.Killed]
    findings: Findings
    num_pairs: int
    num_connections: int
    """Of the follower."""


def run(
    num_rows: int, planned: list[kills.Planned], seed: int, settings: dict[str, Any]
) -> Outcome:
    """Start a stack, run the batch under the planned kills, and read all that it left."""
    data_dir = Path(tempfile.mkdtemp(prefix="mora-chaos-"))
    print(f"data directory {data_dir}, kept when something is wrong", flush=True)
    with running(settings, data_dir=data_dir) as up:
        started = time.monotonic()
        with submitted(up.url, num_rows, BODY) as batch:
            killer = kills.Killer(up.pid, planned, seed, batch.share)
            killer.start()
            batch.wait()
            wall_s = time.monotonic() - started
            killed = killer.finish()
            left = batch.leavings()
            findings = audit(custom_ids(num_rows), left)
            connections = batch.follower.num_connections
    if not findings.problems:
        shutil.rmtree(data_dir, ignore_errors=True)
    return Outcome(wall_s, killed, findings, len(left.pairs), connections)


def report(outcome: Outcome, planned: Sequence[kills.Planned], num_rows: int) -> list[str]:
    """Print one outcome; returns what is wrong with it."""
    found, killed = outcome.findings, outcome.killed
    problems = [*found.problems]
    if len(killed) < len(planned):
        problems.append(f"{len(killed)} kills were made of {len(planned)} that were planned")
    print(f"rows {num_rows}, pairs {outcome.num_pairs}, wall {outcome.wall_s:.1f} s")
    if planned:
        backs: dict[str, list[float]] = {}
        for item in killed:
            if item.back_s is None:
                problems.append(f"no {item.kind} came back after {item.pid} was killed")
            else:
                backs.setdefault(item.kind, []).append(item.back_s)
        counts = Counter(item.kind for item in killed)
        for kind, count in sorted(counts.items()):
            back = ", ".join(f"{seconds:.1f}" for seconds in backs.get(kind, []))
            print(f"  {kind:10} killed {count}, replaced after {back} s")
        print(f"  follower connected {outcome.num_connections} times")
    print(
        f"  lost: {found.lost_rows} rows, {found.lost_pairs} pairs; "
        f"duplicated: {found.repeated_rows} rows, {found.repeated_pairs} pairs; "
        f"error lines: {dict(found.error_codes) or 0}"
    )
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 for any loss, repeat, disagreement or kill that was not made."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--delay", type=float, default=180.0, metavar="MS")
    parser.add_argument("--clean", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    args = parser.parse_args(arguments)
    settings = stack_settings(args.delay)
    print(machine.describe())
    print(f"settings {json.dumps(settings)}, body {json.dumps(BODY)}, seed {args.seed}", flush=True)
    figures: dict[str, Any] = {"rows": args.rows, "kills": args.kills, "seed": args.seed}
    problems = []
    if args.clean:
        clean = run(args.rows, [], args.seed, settings)
        problems += [f"without kills: {text}" for text in report(clean, [], args.rows)]
        figures["clean_s"] = clean.wall_s
    planned = kills.plan(args.kills, args.seed)
    outcome = run(args.rows, planned, args.seed, settings)
    problems += report(outcome, planned, args.rows)
    figures["wall_s"] = outcome.wall_s
    if args.clean:
        ratio = outcome.wall_s / clean.wall_s
        figures["ratio"] = ratio
        print(f"wall time over the clean run: {ratio:.2f} (aim {AIM:g})")
    for text in problems:
        print(f"WRONG: {text}")
    if args.out is not None:
        args.out.write_text(json.dumps({**figures, "problems": problems}, indent=1))
    print("failed" if problems else "passed")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
