"""The schedule of kills, and that a kill is seen through."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from benchmarks import kills


def test_a_plan_is_the_seeds_and_gives_every_kind_its_share_in_the_middle_of_the_batch() -> None:
    planned = kills.plan(24, seed=7)
    assert planned == kills.plan(24, seed=7) != kills.plan(24, seed=8)
    assert Counter(item.kind for item in planned) == dict.fromkeys(kills.KINDS, 4)
    shares = [item.share for item in planned]
    assert shares == sorted(shares)
    assert shares[0] > 0.0
    assert shares[-1] < 1.0


def test_a_short_plan_has_no_kind_twice() -> None:
    assert max(Counter(item.kind for item in kills.plan(5, seed=1)).values()) == 1


PARENT = """
import subprocess, sys
command = ["sleep-title", "600"]
while True:
    subprocess.run(command, executable=sys.argv[1], check=False)
"""


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> subprocess.Popen[bytes]:
    """A process that starts its child again whenever it dies."""
    monkeypatch.setattr(kills, "TITLES", {"child": "sleep-title"})
    return subprocess.Popen([sys.executable, "-c", PARENT, "/bin/sleep"])


def test_a_victim_is_really_killed_and_its_replacement_is_seen(
    family: subprocess.Popen[bytes],
) -> None:
    ready = threading.Event()
    killer = kills.Killer(
        family.pid, [kills.Planned(0.5, "child")], 0, lambda: float(ready.is_set())
    )
    try:
        killer.start()
        assert killer.is_alive()
        ready.set()
        killer.join(30)
        (killed,) = killer.finish()
        assert killed.back_s is not None
        assert killed.pid not in kills.find(family.pid, "child")
    finally:
        family.kill()
        for pid in kills.find(family.pid, "child"):
            psutil.Process(pid).kill()
        family.wait()


SPAWNING = """
import multiprocessing, os, pathlib, sys, time
import setproctitle

def worker():
    os.environ[next(iter(os.environ))] += "!"
    setproctitle.setproctitle("VLLM::Worker")
    pathlib.Path(sys.argv[1]).touch()
    time.sleep(600)

def engine():
    os.environ[next(iter(os.environ))] += "!"
    setproctitle.setproctitle("VLLM::EngineCore")
    multiprocessing.get_context("spawn").Process(target=worker).start()
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=engine).start()
"""


def test_an_engine_is_found_whose_title_could_not_be_set(tmp_path: Path) -> None:
    """Its environment begins with a variable that it set before its title; so does its worker's."""
    script = tmp_path / "spawning.py"
    script.write_text(SPAWNING)
    tried = tmp_path / "tried"
    parent = subprocess.Popen([sys.executable, script, tried], env={"FIRST": "1", **os.environ})
    try:
        deadline = time.monotonic() + 60
        while not tried.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        (pid,) = kills.find(parent.pid, "engine")
        engine = psutil.Process(pid)
        assert engine.ppid() == parent.pid
        (worker,) = (process for process in engine.children() if kills.SPAWNED in process.cmdline())
        for process in (engine, worker):
            assert not any(part.startswith("VLLM::") for part in process.cmdline())
    finally:
        for process in psutil.Process(parent.pid).children(recursive=True):
            process.kill()
        parent.kill()
        parent.wait()
