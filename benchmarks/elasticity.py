"""Do the pools follow the work? ``make elasticity``.

Starts the real stack on the ``fake`` backend with every pool at none, waits until nothing runs,
submits a batch, and watches the processes: generators, scorers and runners have to reach their
maximum while there is a backlog, and none again when there is not, and every row has to arrive.
Half way through the Serve controller, which decides all this, is killed. Prints replicas and
backlog over time.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import kills, machine
from benchmarks.audit import audit
from benchmarks.chaos_batch import custom_ids, submitted
from benchmarks.up import Up, running
from mora_serve.client import Client

POOLS: Mapping[str, int] = {"generator": 3, "scorer": 2, "runner": 2}
"""Largest number of replicas of each pool."""
BODY = {"n": 4, "candidates": 1}
TARGET_CALLS = 0.5
"""Calls under way per replica; a call of a runner carries the prompts of many rows."""
PERIOD_S = 1.0
QUIET_S = 10.0
"""How often the backlog is printed while no replica comes or goes."""
IDLE_TIMEOUT_S = 180.0
RECOVERY_S = 30.0
"""How long ``/readyz`` may say no after the controller was killed."""


def stack_settings(delay_ms: float) -> dict[str, Any]:
    """Every pool from none to its maximum, with delays short enough to be watched."""

    def replica(pool: str, **options: Any) -> dict[str, Any]:
        return {
            "min_replicas": 0,
            "max_replicas": POOLS[pool],
            "target_ongoing_requests": TARGET_CALLS,
            "upscale_delay_s": 2,
            "downscale_delay_s": 10,
            "look_back_period_s": 6,
            **options,
        }

    return {
        "policy": {"fake_delay_ms": delay_ms, "replica": replica("generator")},
        "scorers": [
            {
                "name": "fake",
                "backend": "fake",
                "dimensions": ["helpful", "harmless", "truthful"],
                "fake_delay_ms": delay_ms,
                "replica": replica("scorer"),
            }
        ],
        "runner": {"shard_rows": 64, "max_in_flight_rows": 8, "replica": replica("runner")},
    }


@dataclass(frozen=True, slots=True)
class Look:
    """One row of the table."""

    at_s: float
    replicas: Mapping[str, int]
    backlog: int
    """Rows not done."""
    ready: bool
    """What ``/readyz`` says."""

    def line(self) -> str:
        counts = "".join(f"{self.replicas[pool]:11d}" for pool in POOLS)
        return f"{self.at_s:7.1f}{counts}{self.backlog:9d}  {'yes' if self.ready else 'NO'}"


class Watch(threading.Thread):
    """Looks at the stack every ``PERIOD_S``; prints when replicas change."""

    def __init__(self, root: int, url: str) -> None:
        super().__init__(name="watch", daemon=True)
        self._root = root
        self._client = Client(url, timeout_s=10.0)
        self._backlog = 0
        self._over = threading.Event()
        self._since = time.monotonic()
        self._printed_s = 0.0
        self.looks: list[Look] = []

    def run(self) -> None:
        print("seconds" + "".join(f"{pool:>11}" for pool in POOLS) + "  backlog  ready", flush=True)
        while not self._over.wait(PERIOD_S):
            look = self.look()
            if not self.looks or self._is_news(look):
                print(look.line(), flush=True)
                self._printed_s = look.at_s
            self.looks.append(look)

    def _is_news(self, look: Look) -> bool:
        last = self.looks[-1]
        moved = (look.replicas, look.ready) != (last.replicas, last.ready)
        return moved or look.at_s - self._printed_s >= QUIET_S

    def look(self) -> Look:
        replicas = {pool: len(kills.find(self._root, pool)) for pool in POOLS}
        ready, _ = self._client.ready()
        return Look(self.elapsed_s(), replicas, self._backlog, ready)

    def finish(self) -> None:
        self._over.set()
        self.join()

    def tell(self, backlog: int) -> None:
        """How many rows are not done."""
        self._backlog = backlog

    def elapsed_s(self) -> float:
        return time.monotonic() - self._since

    def wait_for_none(self) -> bool:
        """Whether all pools come to have no replica within ``IDLE_TIMEOUT_S``."""
        deadline = time.monotonic() + IDLE_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.looks and not any(self.looks[-1].replicas.values()):
                return True
            time.sleep(PERIOD_S)
        return False


def run(num_rows: int, delay_ms: float) -> list[str]:
    """The whole run; returns what went wrong."""
    data_dir = Path(tempfile.mkdtemp(prefix="mora-elastic-"))
    with running(stack_settings(delay_ms), data_dir=data_dir) as up:
        watch = Watch(up.pid, up.url)
        watch.start()
        problems = [] if watch.wait_for_none() else ["an idle stack must have no replica"]
        killed_s, found = run_batch(up, watch, num_rows)
        problems += found
        if not watch.wait_for_none():
            problems.append("pools must go back to no replica when the batch is done")
        watch.finish()
    problems += check(watch.looks, killed_s)
    if problems:
        return [*problems, f"logs are in {data_dir}"]
    shutil.rmtree(data_dir, ignore_errors=True)
    return []


def run_batch(up: Up, watch: Watch, num_rows: int) -> tuple[float, list[str]]:
    """When the controller was killed, in the watch's time, and what is wrong with the batch."""
    with submitted(up.url, num_rows, BODY) as batch:
        began_s = watch.elapsed_s()
        killer = kills.Killer(up.pid, [kills.Planned(0.5, "controller")], 0, batch.share)
        killer.start()
        batch.wait(lambda done: watch.tell(num_rows - done))
        killed = killer.finish()
        findings = audit(custom_ids(num_rows), batch.leavings())
    problems = [*findings.problems]
    problems += [f"{n} rows ended as {code}" for code, n in findings.error_codes.items()]
    if not killed or killed[0].back_s is None:
        problems.append("the Serve controller must be killed once, and come back")
        return began_s, problems
    return began_s + killed[0].at_s, problems


def check(looks: Sequence[Look], killed_s: float) -> list[str]:
    """What the looks show that must not be. The controller was killed at ``killed_s``."""
    problems = []
    for pool, most in POOLS.items():
        reached = max(look.replicas[pool] for look in looks)
        if reached != most:
            problems.append(f"{pool} must reach {most} replicas, got {reached}")
    unready = [look.at_s for look in looks if not look.ready]
    if any(not killed_s - PERIOD_S <= at_s <= killed_s + RECOVERY_S for at_s in unready):
        problems.append(f"/readyz must stay true while pools start from none, was not at {unready}")
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 when a bound was not reached or a row is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.elasticity", description=__doc__)
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--delay", type=float, default=200.0, metavar="MS")
    args = parser.parse_args(arguments)
    print(machine.describe())
    print(f"rows {args.rows}, pools from 0 to {dict(POOLS)}, {args.delay:g} ms a call", flush=True)
    problems = run(args.rows, args.delay)
    for text in problems:
        print(f"WRONG: {text}")
    print("failed" if problems else "passed: every row arrived once")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
