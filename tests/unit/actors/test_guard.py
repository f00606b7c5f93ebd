"""Children end with their parent, even when it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil  # type: ignore[import-untyped]
import pytest

from actors.guard import ChildGuard, child_pids

PARENT = """
import subprocess, sys, time
from actors.guard import ChildGuard
child = subprocess.Popen(["sleep", "60"], start_new_session=True, stdout=subprocess.DEVNULL)
guard = ChildGuard([child.pid])
if sys.argv[1] == "release":
    guard.release()
print(child.pid, flush=True)
time.sleep(60)
"""


def start(mode: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, mode], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    return parent, psutil.Process(int(parent.stdout.readline()))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_parent_takes_its_children_along(end: signal.Signals) -> None:
    parent, child = start("guard")
    parent.send_signal(end)
    parent.wait()
    assert child in psutil.wait_procs([child], timeout=10)[0]


def test_a_released_guard_leaves_the_children_alone() -> None:
    parent, child = start("release")
    parent.kill()
    parent.wait()
    assert child in psutil.wait_procs([child], timeout=0.2)[1]
    os.kill(child.pid, signal.SIGKILL)


def test_release_ends_the_guard_itself() -> None:
    before = child_pids()
    guard = ChildGuard([])
    assert child_pids() != before
    guard.release()
    assert child_pids() == before
