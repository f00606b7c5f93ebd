"""Fine-tuning jobs, policy versions and replica metrics within one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from mora_serve.errors import ConflictError, NotFoundError
from mora_serve.identity import new_id
from mora_serve.store.shapes import bad_cursor, no_such

JOB_TERMINAL = frozenset({"succeeded", "failed", "cancelled"})


class MemoryJobs:
    """The :class:`~mora_serve.ports.JobStore` port in dictionaries."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._jobs: dict[str, dict[str, Any]] = {}
        self._claims: dict[str, tuple[str, float]] = {}
        self._events: dict[str, list[dict[str, Any]]] = {}
        self._checkpoints: dict[str, list[dict[str, Any]]] = {}
        self._policies: dict[str, dict[str, Any]] = {}
        self._current: tuple[str, int] | None = None

    async def create_job(self, job: Mapping[str, Any]) -> dict[str, Any]:
        stored = new_job(job, int(self._clock()))
        self._jobs[stored["id"]] = stored
        return dict(stored)

    async def get_job(self, job_id: str) -> dict[str, Any]:
        return dict(self._job(job_id))

    def files_trained_on(self) -> set[str]:
        """Files and batches that jobs which are not over train on."""
        active = (job for job in self._jobs.values() if job["status"] not in JOB_TERMINAL)
        return {str(job["training_file"]) for job in active}

    async def update_job(self, job_id: str, **fields: Any) -> dict[str, Any]:
        job = self._job(job_id)
        job.update(allowed_changes(job["status"], fields, int(self._clock())))
        return dict(job)

    async def list_jobs(
        self, *, after: str | None, limit: int
    ) -> tuple[list[dict[str, Any]], bool]:
        return _page(list(reversed(self._jobs.values())), after, limit)

    async def cancel_job(self, job_id: str) -> dict[str, Any]:
        return await self.update_job(job_id, status="cancelled")

    async def claim_job(self, worker: str, ttl_s: float) -> dict[str, Any] | None:
        now = self._clock()
        for job_id, job in self._jobs.items():
            claimed = self._claims.get(job_id, ("", 0.0))[1] > now
            if job["status"] not in JOB_TERMINAL and not claimed:
                self._claims[job_id] = (worker, now + ttl_s)
                return dict(job)
        return None

    async def heartbeat_job(self, job_id: str, worker: str, ttl_s: float) -> bool:
        if self._job(job_id)["status"] in JOB_TERMINAL:
            return False
        holder, until = self._claims.get(job_id, ("", 0.0))
        now = self._clock()
        if holder != worker and until > now:
            return False
        self._claims[job_id] = (worker, now + ttl_s)
        return True

    async def add_event(self, job_id: str, event: Mapping[str, Any]) -> None:
        self._job(job_id)
        stored = new_event(event, int(self._clock()))
        events = self._events.setdefault(job_id, [])
        if all(known["id"] != stored["id"] for known in events):
            events.append(stored)

    async def list_events(
        self, job_id: str, *, after: str | None, limit: int
    ) -> tuple[list[dict[str, Any]], bool]:
        self._job(job_id)
        return _page(self._events.get(job_id, [])[::-1], after, limit)

    async def add_checkpoint(self, job_id: str, checkpoint: Mapping[str, Any]) -> None:
        self._job(job_id)
        stored = new_checkpoint(job_id, checkpoint, int(self._clock()))
        kept = [c for c in self._checkpoints.get(job_id, []) if c["id"] != stored["id"]]
        self._checkpoints[job_id] = [*kept, stored]

    async def list_checkpoints(
        self, job_id: str, *, after: str | None, limit: int
    ) -> tuple[list[dict[str, Any]], bool]:
        self._job(job_id)
        return _page(self._checkpoints.get(job_id, [])[::-1], after, limit)

    async def publish_policy(self, version: Mapping[str, Any], *, make_current: bool) -> None:
        stored = {"created": int(self._clock()), "parent": None, "job_id": None, **version}
        known = self._policies.get(stored["id"])
        if known is None:
            self._policies[stored["id"]] = stored
        else:
            refuse_other_policy(known, stored)
        if make_current:
            await self.set_current_policy(stored["id"])

    async def list_policies(self) -> list[dict[str, Any]]:
        return [dict(version) for version in reversed(self._policies.values())]

    async def current_policy(self) -> tuple[str, int]:
        if self._current is None:
            raise no_current_policy()
        return self._current

    async def set_current_policy(self, version_id: str) -> int:
        if version_id not in self._policies:
            raise no_such("policy", version_id, "model", "policy_not_found")
        known, epoch = self._current or ("", 0)
        if known != version_id:
            self._current = (version_id, epoch + 1)
            return epoch + 1
        return epoch

    def _job(self, job_id: str) -> dict[str, Any]:
        if job_id not in self._jobs:
            raise no_such(
                "fine-tuning job", job_id, "fine_tuning_job_id", "fine_tuning_job_not_found"
            )
        return self._jobs[job_id]


class MemoryMetrics:
    """Exposition texts by replica, in a dictionary; see :class:`mora_serve.store.MetricsBoard`."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._texts: dict[str, tuple[str, float]] = {}

    async def publish(self, replica: str, text: str, ttl_s: float) -> None:
        self._texts[replica] = (text, self._clock() + ttl_s)

    async def collect(self) -> dict[str, str]:
        now = self._clock()
        return {name: text for name, (text, until) in self._texts.items() if until > now}


def new_job(job: Mapping[str, Any], now: int) -> dict[str, Any]:
    """OpenAI's FineTuningJob with every field present; given fields win."""
    return {
        "id": new_id("ftjob"),
        "object": "fine_tuning.job",
        "created_at": now,
        "error": None,
        "estimated_finish": None,
        "fine_tuned_model": None,
        "finished_at": None,
        "hyperparameters": {},
        "integrations": [],
        "metadata": None,
        "method": None,
        "model": None,
        "organization_id": "mora",
        "result_files": [],
        "seed": 0,
        "status": "queued",
        "suffix": None,
        "trained_tokens": None,
        "training_file": None,
        "validation_file": None,
        **job,
    }


def new_event(event: Mapping[str, Any], now: int) -> dict[str, Any]:
    """OpenAI's FineTuningJobEvent with every field present; given fields win."""
    return {
        "id": new_id("ftevent"),
        "object": "fine_tuning.job.event",
        "created_at": now,
        "level": "info",
        "message": "",
        "type": "message",
        "data": None,
        **event,
    }


def new_checkpoint(job_id: str, checkpoint: Mapping[str, Any], now: int) -> dict[str, Any]:
    """OpenAI's FineTuningJobCheckpoint with every field present; given fields win."""
    return {
        "id": new_id("ftckpt"),
        "object": "fine_tuning.job.checkpoint",
        "created_at": now,
        "fine_tuned_model_checkpoint": None,
        "fine_tuning_job_id": job_id,
        "metrics": {},
        "step_number": 0,
        **checkpoint,
    }


def allowed_changes(status: str, fields: Mapping[str, Any], now: int) -> dict[str, Any]:
    """``fields`` without a status change that would leave a terminal status.

    Entering a terminal status also stamps ``finished_at``.
    """
    changes = dict(fields)
    if status in JOB_TERMINAL:
        changes.pop("status", None)
        changes.pop("finished_at", None)
    elif changes.get("status") in JOB_TERMINAL:
        changes.setdefault("finished_at", now)
    return changes


def refuse_other_policy(known: Mapping[str, Any], version: Mapping[str, Any]) -> None:
    """A published version never changes; publishing it again is harmless."""
    if known["uri"] != version.get("uri") or known["kind"] != version.get("kind"):
        raise ConflictError(
            f"policy {known['id']} must keep its uri once published; choose another id", "id"
        )


def no_current_policy() -> NotFoundError:
    """The error before any policy version was made current."""
    return NotFoundError("no policy version is current; publish one first", "model")


def _page(
    items: list[dict[str, Any]], after: str | None, limit: int
) -> tuple[list[dict[str, Any]], bool]:
    start = 0
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise bad_cursor(after)
        start = ids.index(after) + 1
    return [dict(item) for item in items[start : start + limit]], len(items) > start + limit
