"""Launcher: claims, restarts within the budget, cancels, hands back; with cheap child processes."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from actors.launcher import TrainerLauncher
from mora_serve.config import Settings
from mora_serve.ports import BatchStore
from mora_serve.store import Stores
from mora_serve.store.memory_jobs import MemoryJobs

JOB = {"id": "ftjob-1", "model": "base", "training_file": "batch_1", "status": "queued"}
ENDLESS = "import time; time.sleep(600)"


def settings(data_dir: Path, max_restarts: int = 2) -> Settings:
    return Settings.model_validate(
        {"data_dir": str(data_dir), "trainer": {"max_restarts": max_restarts}}
    )


@asynccontextmanager
async def launched(
    jobs: MemoryJobs,
    code: str,
    config: Settings,
    address: str | None = None,
    batches: BatchStore | None = None,
    cancel_grace_s: float = 0.1,
) -> AsyncIterator[TrainerLauncher]:
    """A running launcher whose trainers execute ``code`` with the job's id as ``sys.argv[1]``."""
    launcher = TrainerLauncher(
        jobs,
        batches or Stores.memory().batches,
        config,
        command=(sys.executable, "-c", code),
        ray_address=lambda: address,
        poll_interval_s=0.02,
        cancel_grace_s=cancel_grace_s,
    )
    running = asyncio.create_task(launcher.run())
    try:
        yield launcher
    finally:
        await launcher.stop()
        await running


async def until(condition: Callable[[], Any], timeout_s: float = 30.0) -> None:
    """Wait for something that another process brings about."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)


async def job_reaches(jobs: MemoryJobs, status: str) -> dict[str, Any]:
    async with asyncio.timeout(30.0):
        while (job := await jobs.get_job("ftjob-1"))["status"] != status:
            await asyncio.sleep(0.02)
    return job


def starts(data_dir: Path) -> int:
    log = data_dir / "logs" / "train-ftjob-1.log"
    return log.read_text().count("started\n") if log.exists() else 0


async def test_a_failing_trainer_is_restarted_within_the_budget_then_fails(tmp_path: Path) -> None:
    jobs = MemoryJobs()
    await jobs.create_job(JOB)
    code = "print('started', flush=True); raise SystemExit(3)"
    async with launched(jobs, code, settings(tmp_path)):
        job = await job_reaches(jobs, "failed")
    assert starts(tmp_path) == 3
    assert job["error"]["code"] == "trainer_failed"
    assert "status 3" in job["error"]["message"]
    events, _ = await jobs.list_events("ftjob-1", after=None, limit=9)
    messages = [event["message"] for event in events]
    assert sum("started again" in message for message in messages) == 2


async def test_a_job_that_fails_cancels_the_batch_of_its_stage(tmp_path: Path) -> None:
    stores = Stores.memory()
    batch = await stores.batches.create_batch(
        {"endpoint": "/v1/rewrites", "input_file_id": "file-1"}, {}, None, "hash"
    )
    stage = {"batch_id": batch["id"], "status": "running"}
    jobs = MemoryJobs()
    await jobs.create_job({**JOB, "stages": [stage], "restarts": 2, "started": True})
    code = "raise SystemExit(3)"
    async with launched(jobs, code, settings(tmp_path), batches=stores.batches):
        await job_reaches(jobs, "failed")
    assert (await stores.batches.get_batch(batch["id"]))["status"] == "cancelling"


async def test_the_restart_budget_outlives_the_launcher(tmp_path: Path) -> None:
    jobs = MemoryJobs()
    await jobs.create_job({**JOB, "started": True, "restarts": 2})
    code = "print('started', flush=True); raise SystemExit(3)"
    async with launched(jobs, code, settings(tmp_path)):
        job = await job_reaches(jobs, "failed")
    assert starts(tmp_path) == 0
    assert "vanished" in job["error"]["message"]


async def test_a_launcher_that_lost_its_job_ends_its_trainer_and_changes_nothing(
    tmp_path: Path,
) -> None:
    now = [0.0]
    jobs = MemoryJobs(clock=lambda: now[0])
    await jobs.create_job(JOB)
    pid_file = tmp_path / "pid"
    code = f"import os; open({str(pid_file)!r}, 'w').write(str(os.getpid())); {ENDLESS}"
    async with launched(jobs, code, settings(tmp_path), cancel_grace_s=600.0):
        await until(lambda: pid_file.exists() and pid_file.read_text())
        now[0] += 1000.0
        taken = await jobs.claim_job("another", 1000.0)
        assert taken is not None
        pid = int(pid_file.read_text())
        await until(lambda: not _alive(pid))
    job = await jobs.get_job("ftjob-1")
    assert (job["started"], job.get("restarts")) == (True, None)
    assert await jobs.heartbeat_job("ftjob-1", "another", 30.0)


async def test_cancelling_ends_the_trainer(tmp_path: Path) -> None:
    jobs = MemoryJobs()
    await jobs.create_job(JOB)
    pid_file = tmp_path / "pid"
    code = f"import os; open({str(pid_file)!r}, 'w').write(str(os.getpid())); {ENDLESS}"
    async with launched(jobs, code, settings(tmp_path)):
        await until(lambda: pid_file.exists() and pid_file.read_text())
        await jobs.cancel_job("ftjob-1")
        pid = int(pid_file.read_text())
        await until(lambda: not _alive(pid))
        assert (await jobs.get_job("ftjob-1"))["status"] == "cancelled"


async def test_stopping_hands_the_job_to_the_next_launcher(tmp_path: Path) -> None:
    jobs = MemoryJobs()
    await jobs.create_job(JOB)
    pid_file = tmp_path / "pid"
    code = f"import os; open({str(pid_file)!r}, 'w').write(str(os.getpid())); {ENDLESS}"
    async with launched(jobs, code, settings(tmp_path)):
        await until(lambda: pid_file.exists() and pid_file.read_text())
    assert not _alive(int(pid_file.read_text()))
    async with asyncio.timeout(5.0):
        while await jobs.claim_job("another", 30.0) is None:
            await asyncio.sleep(0.01)


async def test_the_trainer_gets_settings_and_cluster_but_not_rays_own_variables(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("RAY_JOB_ID", "of the replica")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    jobs = MemoryJobs()
    await jobs.create_job(JOB)
    target = tmp_path / "environment"
    code = (
        "import json, os, sys; "
        f"open({str(target)!r}, 'w').write(json.dumps([sys.argv[1], dict(os.environ)])); {ENDLESS}"
    )
    async with launched(jobs, code, settings(tmp_path), address="10.0.0.1:6379"):
        await until(lambda: target.exists() and target.read_text())
    job_id, environment = json.loads(target.read_text())
    assert job_id == "ftjob-1"
    assert environment["RAY_ADDRESS"] == "10.0.0.1:6379"
    assert "RAY_JOB_ID" not in environment
    assert environment["RAY_AUTH_MODE"] == "token"
    assert json.loads(environment["MORA_CONFIG_JSON"])["data_dir"] == str(tmp_path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
