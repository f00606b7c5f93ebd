"""Children end with their parent, even when it is killed."""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil
import pytest

from actors.guard import ChildGuard, child_pids

PARENT = """
import subprocess, time
from actors.guard import ChildGuard
child = subprocess.Popen(["sleep", "60"], start_new_session=True, stdout=subprocess.DEVNULL)
guard = ChildGuard([child.pid])
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_parent_takes_its_children_along(end: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(end)
    parent.wait()
    assert child in psutil.wait_procs([child], timeout=10)[0]


def test_children_live_until_they_are_killed() -> None:
    before = child_pids()
    child = subprocess.Popen(["sleep", "60"])
    guard = ChildGuard([child.pid])
    assert child.poll() is None
    assert child_pids() > before | {child.pid}
    guard.kill()
    assert child.wait(timeout=10) == -signal.SIGKILL
    assert child_pids() == before


def test_children_that_are_gone_already_are_no_trouble() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    ChildGuard([child.pid]).kill()
