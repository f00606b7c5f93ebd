"""`mora-serve up` as a process: start, wait for a line, stop, look for what it left behind."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 120.0
CONFIG = """\
policy: {fake_delay_ms: 100}
runner: {max_in_flight_rows: 2, shard_rows: 8}
"""


class Up:
    """A running ``mora-serve up --profile fake`` and the lines it prints."""

    def __init__(self, data_dir: Path, port: int, *arguments: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.lines: list[str] = []
        self._children: dict[int, str] = {}
        self._fresh: queue.Queue[str | None] = queue.Queue()
        # The marker finds every descendant, whatever process group or parent it has by then.
        self.marker = f"MORA_E2E_{os.getpid()}_{time.monotonic_ns()}"
        command = [sys.executable, "-m", "mora_serve", "up", "--profile", "fake"]
        where = ["--port", str(port), "--data-dir", str(data_dir)]
        self.process = subprocess.Popen(
            [*command, *where, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "_E2E_MARKER": self.marker},
        )
        assert self.process.stdout is not None
        threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True).start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._fresh.put(line.rstrip("\n"))
        self._fresh.put(None)

    def wait_for(self, start: str, timeout_s: float = START_TIMEOUT_S) -> str:
        """The next line that begins with ``start``."""
        deadline = time.monotonic() + timeout_s
        while True:
            line = self._fresh.get(timeout=max(0.1, deadline - time.monotonic()))
            assert line is not None, f"ended before {start!r}: {self.output}"
            self.lines.append(line)
            if line.startswith(start):
                return line

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal it, wait for its end and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(STOP_TIMEOUT_S)

    def kill_all(self) -> None:
        """For clean-up after a failed test: nothing that it started stays."""
        for pid in self.family():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def family(self) -> list[int]:
        """Living processes that descend from it, itself included.

        Redis writes its title over its environment, so direct children are remembered as well.
        """
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            pid, name, parent, state = _stat(entry)
            if parent == self.process.pid:
                self._children[pid] = name
            marked = self.marker.encode() in _read_bytes(entry / "environ")
            if state != "Z" and (marked or self._children.get(pid) == name):
                found.append(pid)
        return found

    def named(self, name: str) -> list[int]:
        """Those of the family that run a program called ``name``."""
        return [pid for pid in self.family() if _stat(Path(f"/proc/{pid}"))[1] == name]


def _stat(entry: Path) -> tuple[int, str, int, str]:
    """pid, program, parent pid and state of a process; blanks when it is gone."""
    head, _, tail = _read_bytes(entry / "stat").decode(errors="replace").rpartition(")")
    state, parent, *_ = [*tail.split(), "", "0"]
    return int(entry.name), head.partition("(")[2], int(parent or 0), state


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def eventually(check: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Poll until ``check`` holds; fails the test when it never does."""
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s"
        time.sleep(0.1)
