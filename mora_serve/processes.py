"""Child processes that never outlive us: parent-death signal, orderly stop, search for strays.

Everything here is Linux. A child is started in a session of its own, so that Ctrl-C in a terminal
reaches only the parent, which then stops its children in order. Processes that left their process
group (Ray's do) are found in two ways: a child's descendants are looked up by their parents, and a
marker in the environment, which is inherited, tells whose an orphan was. A process that sets its
title can write over that environment (Ray's agents do), so neither way is enough alone. The module
owns no policy about what is started.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Self

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_MARKER = "_MORA_FAMILY"
_PARENT_POLL_S = 0.25
_REAP_PERIOD_S = 10.0
# Runs in the child before the command: Python between fork and exec is unsafe beside threads.
_TRAMPOLINE = (
    "import ctypes, os, sys\n"
    f"ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGTERM)}, 0, 0, 0)\n"
    "if os.getppid() != int(sys.argv[1]): sys.exit(1)\n"
    "os.execvp(sys.argv[2], sys.argv[2:])\n"
)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies, so that they can be reaped."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class Child:
    """One child process with all that descends from it.

    Must be started from a thread that lives as long as the child should: the kernel sends the
    parent-death signal when the starting *thread* ends.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        output: IO[bytes] | int | None = None,
    ) -> None:
        self._family = secrets.token_hex(12)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _TRAMPOLINE, str(os.getpid()), *command],
            env={**env, _MARKER: self._family},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """Exit status, negative for a signal; ``None`` while it runs."""
        return self._process.poll()

    def stop(self, grace_s: float, hurry: Callable[[], bool] = lambda: False) -> None:
        """TERM the child, wait up to ``grace_s``, then KILL what is left of its family.

        ``hurry`` is asked meanwhile; once it says so, the wait ends at once.
        """
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        _wait_until(lambda: self._process.poll() is not None, grace_s, hurry)
        _wait_until(lambda: not self.family(), 2.0, hurry)
        _kill_all(self.family)
        self._process.wait()

    def family(self) -> list[int]:
        """Processes that run and descend from the child, itself included; not zombies."""
        below = _descendants(self.pid) if self.poll() is None else []
        return sorted({*_marked(self._family), *below})


class ParentWatch:
    """In a process that was started as a :class:`Child`: end our family when the parent dies.

    The parent-death signal asks us to stop in order, which can take long; ``grace_s`` after it all
    that descends from us is killed, and we exit. While the context is open; leaving it ends what is
    left at once. We adopt the orphans among our descendants, so that none is missed, and collect
    those that ended: a child that nobody waited for within ``reap_period_s`` counts as adopted.
    Does nothing in a process that is no child of ours.
    """

    def __init__(self, grace_s: float, reap_period_s: float = _REAP_PERIOD_S) -> None:
        self._grace_s, self._reap_period_s = grace_s, reap_period_s
        self._parent = os.getppid()
        self._marker = os.environ.get(_MARKER)
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="parent-watch", daemon=True)

    def __enter__(self) -> Self:
        if self._marker is not None:
            adopt_orphans()
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()
        if self._marker is not None:
            self._end_family()

    def _parent_died(self) -> bool:
        return self._marker is not None and os.getppid() != self._parent

    def _watch(self) -> None:
        ended: set[int] = set()
        due = time.monotonic() + self._reap_period_s
        while not self._left.wait(_PARENT_POLL_S):
            if time.monotonic() >= due:
                ended = _reap_unclaimed(ended)
                due = time.monotonic() + self._reap_period_s
            if self._parent_died():
                if not self._left.wait(self._grace_s):
                    self._end_family()
                    os._exit(1)
                return

    def _end_family(self) -> None:
        marker, own = str(self._marker), os.getpid()
        _kill_all(lambda: list({*_marked(marker), *_descendants(own)} - {own}))


def _marked(marker: str) -> list[int]:
    """Running processes that carry the marker of one child; not zombies."""
    wanted = f"{_MARKER}={marker}".encode()
    alive = []
    for pid in _pids():
        with contextlib.suppress(OSError):
            if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                alive.append(pid)
    return alive


def _processes() -> Iterator[tuple[int, int, bool]]:
    """Process, its parent, and whether it runs (or is a zombie)."""
    for pid in _pids():
        with contextlib.suppress(OSError):
            # The program's name, in brackets, may hold anything.
            text = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2]
            state, parent, *_ = text.split()
            yield pid, int(parent), state not in (b"Z", b"X")


def _descendants(root: int) -> list[int]:
    """Running processes that descend from ``root``, itself included; not zombies."""
    children: dict[int, list[int]] = {}
    running = set()
    for pid, parent, runs in _processes():
        children.setdefault(parent, []).append(pid)
        if runs:
            running.add(pid)
    found, waiting = [], [root]
    while waiting:
        found.append(pid := waiting.pop())
        waiting += children.get(pid, [])
    return [pid for pid in found if pid in running]


def _pids() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())


def _kill_all(find: Callable[[], list[int]]) -> None:
    """Kill what ``find`` finds until it finds nothing that may be killed by us."""
    others: set[int] = set()
    while found := set(find()) - others:
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            except PermissionError:
                others.add(pid)
        _wait_until(lambda: not set(find()) - others, 5.0, lambda: False)


def _reap_unclaimed(before: set[int]) -> set[int]:
    """Collect our children that had ended ``before`` and still are zombies; the other zombies.

    Who starts a child waits for it, so that its status is not ours to take; an adopted one has
    nobody else.
    """
    own = os.getpid()
    ended = {pid for pid, parent, runs in _processes() if parent == own and not runs}
    for pid in ended & before:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    return ended - before


def reap_adopted() -> None:
    """Collect adopted processes that have ended, once every child of our own was waited for."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _wait_until(done: Callable[[], bool], timeout_s: float, hurry: Callable[[], bool]) -> None:
    deadline = time.monotonic() + timeout_s
    while not done() and time.monotonic() < deadline and not hurry():
        time.sleep(0.05)


class StopSignals:
    """SIGINT and SIGTERM as a flag that waits wake up for, while the context is open.

    The handlers only count and write to a pipe, so that nothing is interrupted half way. Inside
    :meth:`raising` they also raise ``KeyboardInterrupt``, for code that blocks in a system call.
    """

    def __init__(self) -> None:
        self.count = 0
        """Signals received so far; a second one means that the user is in a hurry."""
        self._raising = False
        self._previous: dict[int, Any] = {}
        self._read_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        os.close(self._read_fd)
        os.close(self._write_fd)

    @property
    def stopped(self) -> bool:
        return self.count > 0

    def hurry(self) -> bool:
        return self.count > 1

    def wait(self, timeout_s: float) -> bool:
        """Sleep for ``timeout_s`` or until a signal arrives; whether one has arrived."""
        if not self.stopped:
            select.select([self._read_fd], [], [], timeout_s)
        return self.stopped

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Within, a signal raises ``KeyboardInterrupt`` in the main thread."""
        self._raising = True
        try:
            if self.stopped:
                raise KeyboardInterrupt
            yield
        finally:
            self._raising = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        with contextlib.suppress(BlockingIOError):
            os.write(self._write_fd, b"x")
        if self._raising:
            self._raising = False
            raise KeyboardInterrupt
