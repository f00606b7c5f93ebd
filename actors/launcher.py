"""Starts trainers for fine-tuning jobs and looks after them.

A launcher claims one job at a time with a lease that it keeps alive while the trainer runs, so that
a job whose launcher died is claimed again. The trainer is a process of its own
(``python -m trainer --job ID``) that dies with the launcher; it resumes from its checkpoint. This
module owns starting, restarting within a budget and stopping; what a run does is the trainer's.

Loops: :meth:`TrainerLauncher.run` waits for a claimable job, for the child to end, for the job to
become terminal (cancelled over REST), or for :meth:`TrainerLauncher.stop`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mora_serve.config import ENV_CONFIG, Settings, dump_settings
from mora_serve.errors import StorageError
from mora_serve.identity import new_id
from mora_serve.policies import cancel_stage_batches
from mora_serve.ports import BatchStore, JobStore
from mora_serve.processes import Child

logger = logging.getLogger(__name__)

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
LEASE_TTL_S = 30.0
CANCEL_GRACE_S = 20.0
"""A cancelled trainer ends by itself after the running step; then it is terminated."""
STOP_GRACE_S = 5.0
RELEASE_TTL_S = 0.001
"""Lease of a job that is handed back: another launcher may claim it at once."""
REPLICA_VARIABLES = frozenset({"RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_ADDRESS", "OMP_NUM_THREADS"})
"""Ray sets these per worker process; in a driver they would claim to be this worker."""


def running_ray_address() -> str | None:
    """Address of the Ray cluster this process belongs to, ``None`` outside of one."""
    import ray

    return ray.get_runtime_context().gcs_address if ray.is_initialized() else None


class TrainerLauncher:
    """Runs claimed jobs one after another until it is stopped."""

    def __init__(
        self,
        jobs: JobStore,
        batches: BatchStore,
        settings: Settings,
        *,
        command: Sequence[str] = (sys.executable, "-m", "trainer", "--job"),
        ray_address: Callable[[], str | None] = running_ray_address,
        lease_ttl_s: float = LEASE_TTL_S,
        poll_interval_s: float = 0.5,
        cancel_grace_s: float = CANCEL_GRACE_S,
    ) -> None:
        """``command`` gets the job's id appended; tests start something cheaper."""
        self._jobs = jobs
        self._batches = batches
        self._settings = settings
        self._command = tuple(command)
        self._ray_address = ray_address
        self._ttl_s = lease_ttl_s
        self._poll_s = poll_interval_s
        self._cancel_grace_s = cancel_grace_s
        self._worker = new_id("launcher")
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Claim and run jobs until :meth:`stop`; storage that is away is asked again."""
        while not self._stopping.is_set():
            try:
                job = await self._jobs.claim_job(self._worker, self._ttl_s)
                if job is not None:
                    await self._run_job(job)
                    continue
            except StorageError as error:
                logger.warning("launcher waits for storage: %s", error)
            await self._pause(self._poll_s)

    async def stop(self) -> None:
        """End the running trainer, hand its job back, and let :meth:`run` return."""
        self._stopping.set()

    async def _run_job(self, job: Mapping[str, Any]) -> None:
        """One job to a terminal state, or until we are stopped or lose it.

        ``restarts`` on the job counts trainers that ended or vanished, over all launchers; a job
        that was handed back in order is not charged.
        """
        job_id = str(job["id"])
        if job.get("started"):
            if self._is_spent(job):
                await self._fail(job_id, "vanished with its launcher")
                return
            await self._count_restart(job)
        while not self._stopping.is_set():
            await self._jobs.update_job(job_id, started=True)
            status = await self._supervise(job_id)
            current = await self._jobs.get_job(job_id)
            if current["status"] in TERMINAL:
                return
            if status is None:
                await self._hand_back(job_id)
                return
            if self._is_spent(current):
                await self._fail(job_id, f"ended with status {status}")
                return
            await self._count_restart(current)
            await self._pause(self._poll_s)

    async def _supervise(self, job_id: str) -> int | None:
        """Exit status of one trainer process; ``None`` when we ended it or lost the job."""
        child = self._start(job_id)
        logger.info("job %s: trainer started as process %d", job_id, child.pid)
        try:
            while not self._stopping.is_set():
                if (status := child.poll()) is not None:
                    return status
                if not await self._holds(job_id):
                    if (await self._jobs.get_job(job_id))["status"] in TERMINAL:
                        await self._wait_for_end(child)
                    # Otherwise another launcher has the job, whose trainer must be the only one.
                    return None
                await self._pause(min(self._poll_s, self._ttl_s / 3))
            return None
        finally:
            await asyncio.shield(asyncio.to_thread(child.stop, STOP_GRACE_S))

    async def _holds(self, job_id: str) -> bool:
        """Renew the lease; storage that is briefly away does not end a run."""
        try:
            return await self._jobs.heartbeat_job(job_id, self._worker, self._ttl_s)
        except StorageError as error:
            logger.warning("job %s: lease not renewed: %s", job_id, error)
            return True

    async def _hand_back(self, job_id: str) -> None:
        """Let another launcher have the job; of one that another has already nothing is ours."""
        if await self._holds(job_id):
            await self._jobs.update_job(job_id, started=False)
            await self._jobs.heartbeat_job(job_id, self._worker, RELEASE_TTL_S)

    async def _wait_for_end(self, child: Child) -> None:
        for _ in range(int(self._cancel_grace_s / self._poll_s)):
            if child.poll() is not None or self._stopping.is_set():
                return
            await self._pause(self._poll_s)

    def _start(self, job_id: str) -> Child:
        folder = self._settings.data_dir / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"train-{job_id}.log", "ab") as log:
            return Child([*self._command, job_id], env=self._environment(), output=log)

    def _environment(self) -> dict[str, str]:
        """Our own, without what Ray told this replica about itself, plus settings and cluster."""
        kept = {name: text for name, text in os.environ.items() if name not in REPLICA_VARIABLES}
        spec = importlib.util.find_spec("trainer")
        if spec is not None and spec.origin is not None:
            root = str(Path(spec.origin).parent.parent)
            kept["PYTHONPATH"] = os.pathsep.join(filter(None, [root, kept.get("PYTHONPATH")]))
        kept[ENV_CONFIG] = json.dumps(dump_settings(self._settings, reveal=True))
        address = self._ray_address()
        if address is not None:
            kept["RAY_ADDRESS"] = address
        return kept

    async def _count_restart(self, job: Mapping[str, Any]) -> None:
        number = int(job.get("restarts") or 0) + 1
        await self._jobs.update_job(str(job["id"]), restarts=number)
        message = f"Trainer started again, {number} of {self._settings.trainer.max_restarts}"
        await self._jobs.add_event(str(job["id"]), {"level": "warn", "message": message})

    def _is_spent(self, job: Mapping[str, Any]) -> bool:
        return int(job.get("restarts") or 0) >= self._settings.trainer.max_restarts

    async def _fail(self, job_id: str, what: str) -> None:
        message = (
            f"the trainer {what} and its restarts are used up; "
            f"see logs/train-{job_id}.log in the data directory"
        )
        await cancel_stage_batches(self._batches, await self._jobs.get_job(job_id))
        await self._jobs.add_event(job_id, {"level": "error", "message": message})
        error = {"code": "trainer_failed", "message": message, "param": None}
        await self._jobs.update_job(job_id, status="failed", error=error)

    async def _pause(self, timeout_s: float) -> None:
        """Sleep, or return early when stopped."""
        try:
            await asyncio.wait_for(self._stopping.wait(), timeout_s)
        except TimeoutError:
            return
