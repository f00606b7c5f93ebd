"""Ends child processes when this process dies, however it dies.

vLLM's engine processes notice neither a killed nor an exited parent: they would keep their memory
and cores. A guard is a shell that waits for its standard input to end, which only this process
holds open, and then kills the children it was given.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable

import psutil

_SCRIPT = 'cat >/dev/null; kill -9 "$@" 2>/dev/null'


def child_pids() -> frozenset[int]:
    """Every process that descends from this one."""
    return frozenset(child.pid for child in psutil.Process().children(recursive=True))


class ChildGuard:
    """Kills ``pids`` when this process ends, or when :meth:`kill` is called."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _SCRIPT, "guard", *map(str, pids)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def kill(self) -> None:
        """Kill the children that are left, and end the guard."""
        assert self._shell.stdin is not None
        self._shell.stdin.close()
        self._shell.wait()
