"""Children that never outlive us, and signals that wake waits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mora_serve import processes
from mora_serve.processes import Child, ParentWatch, StopSignals

SLEEP = "import time; print('up', flush=True); time.sleep(60)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('up', flush=True); time.sleep(60)"
)
PARENT_OF_A_STRAY = (
    "import subprocess, sys; "
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], "
    "start_new_session=True); print('up', flush=True)"
)


def start(code: str, log: Path) -> Child:
    with log.open("wb") as file:
        child = Child([sys.executable, "-c", code], env=dict(os.environ), output=file)
    until(lambda: "up" in log.read_text())
    return child


def until(check: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_stop_ends_a_child_with_term(tmp_path: Path) -> None:
    child = start(SLEEP, tmp_path / "log")
    assert child.poll() is None
    child.stop(20.0)
    assert child.poll() == -signal.SIGTERM
    assert child.family() == []


def test_child_that_ignores_term_is_killed_after_the_grace(tmp_path: Path) -> None:
    child = start(STUBBORN, tmp_path / "log")
    child.stop(0.2)
    assert child.poll() == -signal.SIGKILL


def test_hurry_ends_the_grace_at_once(tmp_path: Path) -> None:
    child = start(STUBBORN, tmp_path / "log")
    started = time.monotonic()
    child.stop(60.0, hurry=lambda: True)
    assert time.monotonic() - started < 20.0
    assert child.poll() == -signal.SIGKILL


def test_stray_in_a_session_of_its_own_is_found_and_ended(tmp_path: Path) -> None:
    child = start(PARENT_OF_A_STRAY, tmp_path / "log")
    until(lambda: child.poll() == 0)
    assert len(child.family()) == 1
    child.stop(1.0)
    assert child.family() == []


def test_descendant_that_lost_its_environment_is_found_and_ended(tmp_path: Path) -> None:
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "stray = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], env={}, "
        "start_new_session=True); print('up', flush=True); time.sleep(60)"
    )
    child = start(code, tmp_path / "log")
    (stray,) = set(child.family()) - {child.pid}
    child.stop(0.2)
    until(lambda: not _runs(stray))


def test_terminal_signals_do_not_reach_the_child(tmp_path: Path) -> None:
    child = start(SLEEP, tmp_path / "log")
    assert os.getsid(child.pid) != os.getsid(0)
    child.stop(20.0)


def test_child_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = (
        "import os, sys, time; from mora_serve.processes import Child\n"
        f"child = Child([sys.executable, '-c', {SLEEP!r}], env=dict(os.environ), "
        f"output=open({str(log)!r}, 'wb'))\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    until(lambda: log.exists() and "up" in log.read_text())
    parent.kill()
    parent.wait()
    until(lambda: not _runs(pid))
    parent.stdout.close()


def test_family_of_an_orphan_that_does_not_stop_is_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    orphan = (
        "import signal, subprocess, sys, time; from mora_serve.processes import ParentWatch\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "with ParentWatch(0.2):\n"
        "    wait = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "    stray = subprocess.Popen(wait, start_new_session=True, env={})\n"
        "    print(stray.pid, 'up', flush=True); time.sleep(60)"
    )
    code = (
        "import os, sys, time; from mora_serve.processes import Child\n"
        f"child = Child([sys.executable, '-c', {orphan!r}], env=dict(os.environ), "
        f"output=open({str(log)!r}, 'wb'))\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    until(lambda: log.exists() and "up" in log.read_text())
    stray = int(log.read_text().split()[0])
    assert _runs(pid)
    assert _runs(stray)
    parent.kill()
    parent.wait()
    until(lambda: not _runs(pid) and not _runs(stray))
    parent.stdout.close()


def test_watch_collects_adopted_zombies_and_leaves_statuses_to_who_waits(tmp_path: Path) -> None:
    log = tmp_path / "log"
    # The child of the child prints its own child, which it leaves behind, and ends.
    leaving = (
        "import subprocess, sys; "
        "print(subprocess.Popen([sys.executable, '-c', 'pass']).pid, flush=True)"
    )
    code = (
        "import subprocess, sys, time; from mora_serve.processes import ParentWatch\n"
        "with ParentWatch(0.2, reap_period_s=0.3):\n"
        f"    subprocess.run([sys.executable, '-c', {leaving!r}], check=True)\n"
        "    own = subprocess.Popen([sys.executable, '-c', 'raise SystemExit(3)'])\n"
        "    print(own.wait(), 'up', flush=True); time.sleep(60)"
    )
    child = start(code, log)
    orphan, status, _ = log.read_text().split()
    until(lambda: not Path(f"/proc/{orphan}").exists())
    assert status == "3"
    child.stop(20.0)


def test_a_child_keeps_its_status_until_nobody_has_asked_for_a_period() -> None:
    waited, left = (
        subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(3)"]) for _ in range(2)
    )
    for child in (waited, left):
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    ended = processes._reap_unclaimed(set())
    assert {waited.pid, left.pid} <= ended
    assert waited.wait() == 3
    assert left.pid not in processes._reap_unclaimed({left.pid})
    assert not Path(f"/proc/{left.pid}").exists()
    left.wait()


def test_watch_does_nothing_in_a_process_that_nobody_supervises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("_MORA_FAMILY", raising=False)
    monkeypatch.setattr(os, "getppid", iter(range(2, 100)).__next__)
    with ParentWatch(0.0):
        pass


def test_environment_of_a_child_is_what_was_given(tmp_path: Path) -> None:
    log = tmp_path / "log"
    env = {"PATH": os.environ["PATH"], "GIVEN": "yes"}
    with log.open("wb") as file:
        command = [
            sys.executable,
            "-c",
            "import os; print(os.environ['GIVEN'], 'HOME' in os.environ)",
        ]
        child = Child(command, env=env, output=file)
    until(lambda: child.poll() is not None)
    assert log.read_text().split() == ["yes", "False"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_wakes_a_wait_and_is_remembered(number: int) -> None:
    with StopSignals() as signals:
        assert signals.wait(0.0) is False
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        started = time.monotonic()
        assert signals.wait(60.0) is True
        assert time.monotonic() - started < 30.0
        assert signals.wait(60.0) is True
        assert signals.hurry() is False
        os.kill(os.getpid(), number)
        assert signals.hurry() is True


def test_signal_raises_only_where_it_may() -> None:
    with StopSignals() as signals:
        with pytest.raises(KeyboardInterrupt), signals.raising():
            signal.raise_signal(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.count == 2


def test_signal_that_came_earlier_raises_on_entry() -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt), signals.raising():
            pytest.fail("must not start")


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_process_that_may_not_be_killed_does_not_keep_us(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    processes._kill_all(lambda: [2, 3])
