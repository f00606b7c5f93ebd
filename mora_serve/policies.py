"""Policy versions and the stages of sequential jobs, as several processes change them.

What is current is stored once; whoever samples follows it. Nothing here loads weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from mora_serve.errors import NotFoundError
from mora_serve.ports import BatchStore, JobStore

RUNNING, SUCCEEDED, LEFT_OUT = "running", "succeeded", "left_out"
"""States of a stage, see :func:`running_stages`."""


async def activate(jobs: JobStore, version_id: str, base: str) -> dict[str, Any]:
    """Make a version current and return it; harmless when it is current already.

    ``base`` is the model that is served without ever having been published. Raises
    :class:`~mora_serve.errors.NotFoundError` for a version that is not known.
    """
    known = {version["id"]: version for version in await jobs.list_policies()}
    if version_id not in known and version_id == base:
        known[base] = {"id": base, "kind": "base", "uri": None}
        await jobs.publish_policy(known[base], make_current=False)
    await jobs.set_current_policy(version_id)
    return known[version_id]


def running_stages(job: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Stages of a sequential job whose batch may still be at work.

    A stage is ``{"dimension", "model", "batch_id", "version", "steps", "status"}``: pairs are
    sampled from ``model`` by the batch, and training on them makes ``version``.
    """
    return [stage for stage in job.get("stages") or [] if stage["status"] == RUNNING]


async def cancel_stage_batches(batches: BatchStore, job: Mapping[str, Any]) -> None:
    """Cancel what a job that is over had started to sample its pairs."""
    for stage in running_stages(job):
        with suppress(NotFoundError):
            await batches.cancel_batch(stage["batch_id"])
