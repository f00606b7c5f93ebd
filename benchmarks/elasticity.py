"""Do the pools follow the work? ``make elasticity``.

Starts the real stack on the ``fake`` backend with every pool at none, waits until nothing runs,
submits a batch, and watches the processes: generators, scorers and runners have to reach their
maximum while there is a backlog, and none again when there is not, and every row has to arrive.
Prints replicas and backlog over time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import kills, machine
from benchmarks.audit import audit
from benchmarks.chaos_batch import custom_ids, submitted
from benchmarks.up import running
from mora_serve.client import Client

POOLS: Mapping[str, int] = {"generator": 3, "scorer": 2, "runner": 2}
"""Largest number of replicas of each pool."""
BODY = {"n": 4, "candidates": 1}
PERIOD_S = 1.0
QUIET_S = 10.0
"""How often the backlog is printed while no replica comes or goes."""
IDLE_TIMEOUT_S = 180.0


def stack_settings(delay_ms: float) -> dict[str, Any]:
    """Every pool from none to its maximum, with delays short enough to be watched."""

    def replica(pool: str, **options: Any) -> dict[str, Any]:
        return {
            "min_replicas": 0,
            "max_replicas": POOLS[pool],
            "target_ongoing_requests": 2,
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

    def __init__(self, root: int, url: str, backlog: Callable[[], int]) -> None:
        super().__init__(name="watch", daemon=True)
        self._root = root
        self._client = Client(url, timeout_s=10.0)
        self._backlog = backlog
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
        return Look(time.monotonic() - self._since, replicas, self._backlog(), ready)

    def finish(self) -> None:
        self._over.set()
        self.join()

    def wait_for_none(self, timeout_s: float) -> bool:
        """Whether all pools have no replica within ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.looks and not any(self.looks[-1].replicas.values()):
                return True
            time.sleep(PERIOD_S)
        return False


def run(num_rows: int, delay_ms: float) -> list[str]:
    """The whole run; returns what went wrong."""
    problems: list[str] = []
    data_dir = Path(tempfile.mkdtemp(prefix="mora-elastic-"))
    left = [0]
    with running(stack_settings(delay_ms), data_dir=data_dir) as up:
        watch = Watch(up.pid, up.url, lambda: left[0])
        watch.start()
        if not watch.wait_for_none(IDLE_TIMEOUT_S):
            problems.append("an idle stack must have no replica before the batch")
        with submitted(up.url, num_rows, BODY) as batch:
            left[0] = num_rows

            def tell(done: int) -> None:
                left[0] = num_rows - done

            batch.wait(tell)
            findings = audit(custom_ids(num_rows), batch.leavings())
        problems += findings.problems
        problems += [
            f"{count} rows ended as {code}" for code, count in findings.error_codes.items()
        ]
        if not watch.wait_for_none(IDLE_TIMEOUT_S):
            problems.append("an idle stack must have no replica after the batch")
        watch.finish()
    for pool, most in POOLS.items():
        reached = max(look.replicas[pool] for look in watch.looks)
        if reached != most:
            problems.append(f"{pool} must reach {most} replicas, got {reached}")
    if not all(look.ready for look in watch.looks):
        problems.append("/readyz must stay true while pools start from none")
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
