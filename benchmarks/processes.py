"""Memory and processor time of a served stack's processes, read from /proc while something runs."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
REPLICA_TITLE = "ray::ServeReplica:"
"""How Ray names the process of a Serve replica; application and deployment follow."""
OTHERS: Mapping[str, str] = {
    "ray::ServeController": "serve controller",
    "ray::HAProxyManager": "proxy",
    "ray::ProxyActor": "proxy",
    "haproxy": "proxy",
    "redis-server": "redis",
    "raylet": "ray",
    "gcs_server": "ray",
}
"""Start of a command's last path segment -> what it is; everything else is ``rest``."""

Pids = dict[str, list[int]]


def replica_pids() -> Pids:
    """Deployment -> pids of its replicas, among the descendants of this process."""
    found = defaultdict(list)
    for pid in _descendants(os.getpid()):
        if (name := _deployment(_title(pid))) is not None:
            found[name].append(pid)
    return dict(found)


def stack_pids() -> Pids:
    """Every descendant of this process by what it is: deployments, proxy, redis, ray, rest."""
    found = defaultdict(list)
    for pid in _descendants(os.getpid()):
        title = _title(pid)
        program = title.split(" ")[0].rpartition("/")[2]
        other = next((name for start, name in OTHERS.items() if program.startswith(start)), "rest")
        found[_deployment(title) or other].append(pid)
    return dict(found)


def resident_bytes(pid: int) -> int:
    """Resident memory of a process; 0 when it is gone."""
    fields = _read(f"/proc/{pid}/statm").split()
    return int(fields[1]) * PAGE_BYTES if fields else 0


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far, in seconds; 0 when it is gone."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S if len(fields) > 12 else 0.0


def total(measure: Callable[[int], float], pids: Pids) -> dict[str, float]:
    """Sum of ``measure`` over the processes of each group."""
    return {name: sum(map(measure, members)) for name, members in pids.items()}


class Peaks:
    """Largest resident memory of each deployment since the last :meth:`take`."""

    def __init__(self, pids: Pids) -> None:
        self._pids = pids
        self._peaks: dict[str, int] = {}
        self._lock = threading.Lock()

    def look(self) -> None:
        for name, pids in self._pids.items():
            now = sum(map(resident_bytes, pids))
            with self._lock:
                self._peaks[name] = max(now, self._peaks.get(name, 0))

    def take(self) -> dict[str, int]:
        """Bytes by deployment; starts anew."""
        self.look()
        with self._lock:
            peaks, self._peaks = self._peaks, {}
        return peaks


@contextmanager
def watching(pids: Pids, period_s: float = 0.02) -> Iterator[Peaks]:
    """Look at the processes' memory every ``period_s`` in a thread."""
    peaks, ended = Peaks(pids), threading.Event()

    def watch() -> None:
        while not ended.wait(period_s):
            peaks.look()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()


def _title(pid: int) -> str:
    return _read(f"/proc/{pid}/cmdline").split("\0")[0]


def _deployment(title: str) -> str | None:
    if not title.startswith(REPLICA_TITLE):
        return None
    return title.removeprefix(REPLICA_TITLE).split(":")[1].split()[0]


def _descendants(root: int) -> list[int]:
    children = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            tail = _read(f"/proc/{entry.name}/stat").rpartition(")")[2].split()
            if len(tail) > 1:
                children[int(tail[1])].append(int(entry.name))
    found, open_pids = [], [root]
    while open_pids:
        fresh = children[open_pids.pop()]
        found += fresh
        open_pids += fresh
    return found


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", "replace")
    except OSError:
        return ""
