"""Killing parts of a running stack on a seeded schedule, and seeing that they come back.

Victims are processes that descend from ``mora-serve up``, known by the titles that Ray gives its
processes, so that killing needs nothing of Ray. A kill is due when the batch has come so far, not
at a time: a slower machine gets the same kills at the same rows.
"""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import psutil

REPLICA = "ray::ServeReplica:mora:"
TITLES: Mapping[str, str] = {
    "generator": f"{REPLICA}generator",
    "scorer": f"{REPLICA}scorer-",
    "runner": f"{REPLICA}runner",
    "gateway": f"{REPLICA}gateway",
    "controller": "ray::ServeController",
    "redis": "redis-server",
    "engine": "VLLM::EngineCore",
}
"""How the titles of the processes begin that can be killed."""
KINDS = ("generator", "scorer", "runner", "gateway", "controller", "redis")
"""Those of every stack; an ``engine`` is a generator's child, where vLLM is the backend."""
SPAWNED = "--multiprocessing-fork"
"""The last argument of a process of an engine that could not set its title: setproctitle changes
nothing when the first variable of the environment was set anew before it, and the order in which
Ray gives a worker its variables differs from run to run. Nothing else below us is spawned so."""
GONE_TIMEOUT_S = 10.0
BACK_TIMEOUT_S = 120.0
POLL_S = 0.1
FIRST, LAST = 0.03, 0.93
"""Shares of the batch between which kills fall: at its ends nothing is in flight."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A kill to come."""

    share: float
    """Share of the batch's rows that must be done."""
    kind: str


@dataclass(frozen=True, slots=True)
class Killed:
    """A kill that was made."""

    kind: str
    pid: int
    at_s: float
    """Seconds since the start of the batch."""
    back_s: float | None
    """Seconds until another process of the kind had started; ``None`` when none did."""


def plan(num_kills: int, seed: int, kinds: tuple[str, ...] = KINDS) -> list[Planned]:
    """Kills spread over the batch, every kind as often as the others up to one."""
    rng = random.Random(seed)
    whole, rest = divmod(num_kills, len(kinds))
    chosen = [*kinds * whole, *rng.sample(kinds, rest)]
    rng.shuffle(chosen)
    step = (LAST - FIRST) / max(1, num_kills)
    return [
        Planned(FIRST + step * (index + rng.random()), kind) for index, kind in enumerate(chosen)
    ]


def find(root: int, kind: str) -> dict[int, float]:
    """Living processes of a kind below ``root``: pid -> time of creation.

    A child of one of them is a part of it: the worker of an engine, spawned as the engine is.
    """
    found: dict[int, float] = {}
    parents: dict[int, int] = {}
    for process in psutil.Process(root).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if _is_kind(kind, command) and process.status() != psutil.STATUS_ZOMBIE:
                parents[process.pid] = process.ppid()
                found[process.pid] = process.create_time()
    return {pid: created for pid, created in found.items() if parents[pid] not in found}


def _is_kind(kind: str, command: list[str]) -> bool:
    title = (command or [""])[0].rpartition("/")[2]
    return title.startswith(TITLES[kind]) or (kind == "engine" and SPAWNED in command)


class Killer(threading.Thread):
    """Carries the plan out below ``root``. ``share`` tells how much of the batch is done."""

    def __init__(
        self, root: int, kills: list[Planned], seed: int, share: Callable[[], float]
    ) -> None:
        super().__init__(name="killer", daemon=True)
        self._root = root
        self._kills = kills
        self._rng = random.Random(seed)
        self._share = share
        self._over = threading.Event()
        self._since = time.monotonic()
        self._made: list[Future[Killed]] = []
        self._pool = ThreadPoolExecutor(max_workers=max(1, len(kills)))

    def run(self) -> None:
        for planned in self._kills:
            while self._share() < planned.share:
                if self._over.wait(POLL_S):
                    return
            if not self._kill(planned.kind):
                return

    def finish(self) -> list[Killed]:
        """Stop killing, and wait for what was killed to come back."""
        self._over.set()
        self.join()
        made = [future.result() for future in self._made]
        self._pool.shutdown()
        return made

    def _kill(self, kind: str) -> bool:
        while not (alive := find(self._root, kind)):
            if self._over.wait(POLL_S):
                return False
        pid = self._rng.choice(sorted(alive))
        at_s = time.monotonic() - self._since
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            process.send_signal(signal.SIGKILL)
            _wait_gone(process)
        print(f"{at_s:7.1f} s  SIGKILL {kind} {pid}", flush=True)
        self._made.append(self._pool.submit(self._watch, kind, pid, at_s, frozenset(alive)))
        return True

    def _watch(self, kind: str, pid: int, at_s: float, before: frozenset[int]) -> Killed:
        started = time.monotonic()
        while (waited_s := time.monotonic() - started) < BACK_TIMEOUT_S:
            if find(self._root, kind).keys() - before:
                return Killed(kind, pid, at_s, waited_s)
            time.sleep(POLL_S)
        return Killed(kind, pid, at_s, None)


def _wait_gone(process: psutil.Process) -> None:
    deadline = time.monotonic() + GONE_TIMEOUT_S
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            raise RuntimeError(f"process {process.pid} must end by SIGKILL")
        time.sleep(0.01)
