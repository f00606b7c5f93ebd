"""Trainers under test: a Ray that they join, the launcher that starts them, ways to kill them."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from actors.launcher import TrainerLauncher
from mora_serve.config import Settings, load_settings
from mora_serve.identity import new_id
from mora_serve.store import Stores, open_stores

TIMEOUT_S = 240.0


@pytest.fixture
def ray_address(ray_local: None) -> str:
    """The Ray of the test's own process, which drivers join as they join a stack's."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def settings(data_dir: Path, url: str, **trainer: Any) -> Settings:
    return load_settings(
        "fake",
        overrides={
            "data_dir": str(data_dir),
            "redis": {"url": url, "key_prefix": new_id("test")},
            "runner": {"poll_interval_s": 0.05},
            "trainer": {
                "batch_size": 2, "checkpoint_steps": 1, "max_length": 512, "learning_rate": 1e-2,
                "num_threads": 1, **trainer,
            },
        },
        environ={},
    )  # fmt: skip


@asynccontextmanager
async def opened(config: Settings) -> AsyncIterator[Stores]:
    stores = open_stores(config)
    try:
        yield stores
    finally:
        await stores.aclose()


@asynccontextmanager
async def launcher(
    stores: Stores, config: Settings, address: str | None
) -> AsyncIterator[TrainerLauncher]:
    started = TrainerLauncher(
        stores.jobs, stores.batches, config, ray_address=lambda: address, poll_interval_s=0.1
    )
    running = asyncio.create_task(started.run())
    try:
        yield started
    finally:
        await started.stop()
        await running


async def eventually(condition: Callable[[], Awaitable[Any]], log: Path) -> Any:
    """The first true answer; what other processes bring about cannot be waited for by an event."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while not (answer := await condition()):
                await asyncio.sleep(0.05)
            return answer
    except TimeoutError:
        told = log.read_text()[-4000:] if log.exists() else "no log"
        pytest.fail(f"not within {TIMEOUT_S} s: {told}")


async def metrics(stores: Stores, job_id: str) -> list[dict[str, Any]]:
    """Data of the steps that were reported, in the order in which they happened."""
    events, _ = await stores.jobs.list_events(job_id, after=None, limit=1000)
    return [event["data"] for event in events[::-1] if event["type"] == "metrics"]


def kill_driver(job_id: str) -> None:
    """SIGKILL for the process that runs the job, found by its command line."""
    wanted = [b"-m", b"trainer", b"--job", job_id.encode()]
    (pid,) = [pid for pid, command in _commands() if command[1:5] == wanted]
    os.kill(pid, signal.SIGKILL)


def kill_worker(num_workers: int = 1) -> None:
    """SIGKILL for the newest of the training workers that run in this process's Ray."""
    pids = [pid for pid, command in _commands() if b"RayTrainWorker" in command[0]]
    own = [pid for pid in pids if _descends(pid, os.getpid())]
    assert len(own) == num_workers
    os.kill(max(own), signal.SIGKILL)


def _commands() -> Iterator[tuple[int, list[bytes]]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                yield int(entry.name), (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue


def _descends(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return False
        pid = int(stat.rpartition(")")[2].split()[1])
    return False
