"""What a finished run leaves behind: policy files, result files, a policy version.

Every step may be repeated: names derive from the job's id, blobs are replaced by equal ones, and
publishing a version twice is harmless. So a trainer that dies here is simply started again.
"""

from __future__ import annotations

import asyncio
import csv
import io
import shutil
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mora_serve.store import Stores
from trainer.job import TERMINAL, TrainingJob
from trainer.run_state import RunState

METRIC_COLUMNS = (
    "step",
    "train_loss",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/chosen",
    "rewards/rejected",
    "learning_rate",
    "grad_norm",
    "wait_for_data_seconds",
)
MARGINS = "margins/"
"""Columns per dimension: what the step's pairs teach, beside the policy's ``rewards/margins``."""
LORA_FILES = ("adapter_config.json", "adapter_model.safetensors")
_TRAINER_STATE = ("optimizer", "scheduler", "rng_state", "trainer_state", "training_args", "mora_")
_PAGE = 100


def policy_files(checkpoint: Path, *, lora: bool) -> list[Path]:
    """The files of a checkpoint that make up the policy, without the trainer's own state."""
    if lora:
        return [checkpoint / name for name in LORA_FILES]
    return sorted(
        path
        for path in checkpoint.iterdir()
        if path.is_file() and not path.name.startswith(_TRAINER_STATE) and path.suffix != ".md"
    )


async def publish(
    stores: Stores, job: TrainingJob, checkpoint: Path, *, data_dir: Path
) -> dict[str, Any]:
    """Publish the version of a job that is one run, and end the job; returns the job."""
    state = RunState.load(checkpoint)
    if not await publish_version(stores, job, checkpoint, step=state.step, data_dir=data_dir):
        return await stores.jobs.get_job(job.id)
    return await finish(stores, job, trained_tokens=state.trained_tokens)


async def publish_version(
    stores: Stores, job: TrainingJob, checkpoint: Path, *, step: int, data_dir: Path
) -> bool:
    """Store the policy's files and make them a version; returns whether there is one.

    The version's ``uri`` is a directory: the blob store's own when that is local, otherwise one
    under ``data_dir`` (absolute), which generators must be able to read. ``step`` is the last one
    of the run: its checkpoint gets the version's name. A job that was cancelled while the files
    were stored gets no version.
    """
    files = policy_files(checkpoint, lora=job.lora)
    prefix = f"policies/{job.policy_id}"
    for path in files:
        await stores.blobs.put(f"{prefix}/{path.name}", await asyncio.to_thread(path.read_bytes))
    uri = stores.blobs.local_path(prefix)
    if uri is None:
        uri = str(await asyncio.to_thread(_copy, files, data_dir / prefix))
    version = {
        "id": job.policy_id,
        "created": int(time.time()),
        "kind": "lora" if job.lora else "merged",
        "uri": uri,
        "parent": job.model,
        "job_id": job.id,
    }
    known = {policy["id"]: policy for policy in await stores.jobs.list_policies()}
    version["created"] = known.get(job.policy_id, version)["created"]
    if (await stores.jobs.get_job(job.id))["status"] in TERMINAL:
        return False
    checkpoint_name = checkpoint_id(job.id, job.first_step + step)
    known_checkpoint = await _checkpoint(stores, job, checkpoint_name)
    # One that was published before a restart may have been rolled back since.
    is_new = known_checkpoint.get("fine_tuned_model_checkpoint") != job.policy_id
    await stores.jobs.publish_policy(version, make_current=job.make_current and is_new)
    named = {
        "step_number": job.first_step + step,
        **known_checkpoint,
        "fine_tuned_model_checkpoint": job.policy_id,
    }
    await stores.jobs.add_checkpoint(job.id, named)
    message = f"Published policy version {job.policy_id}"
    event = {"id": f"ftevent-{job.run_name}-published", "message": message}
    await stores.jobs.add_event(job.id, event)
    return True


async def finish(stores: Stores, job: TrainingJob, *, trained_tokens: int) -> dict[str, Any]:
    """Store the result files of a published job and make it ``succeeded``; returns the job."""
    versions = {policy["id"]: policy for policy in await stores.jobs.list_policies()}
    folder = Path(versions[job.policy_id]["uri"])
    files = await asyncio.to_thread(policy_files, folder, lora=job.lora)
    events = await all_events(stores, job.id)
    archive = await asyncio.to_thread(_zip, files)
    results = [
        await _put_result(stores, job, "metrics", "csv", metrics_csv(events)),
        await _put_result(stores, job, "adapter" if job.lora else "policy", "zip", archive),
    ]
    return await stores.jobs.update_job(
        job.id,
        status="succeeded",
        fine_tuned_model=job.policy_id,
        result_files=results,
        trained_tokens=trained_tokens,
        finished_at=int(time.time()),
    )


def checkpoint_id(job_id: str, step: int) -> str:
    """Id of a job's checkpoint, the same however often the step is taken."""
    return f"ftckpt-{job_id.removeprefix('ftjob-')}-{step}"


async def _checkpoint(stores: Stores, job: TrainingJob, name: str) -> dict[str, Any]:
    """One of a job's newest checkpoints; its id alone where it is not stored."""
    newest, _ = await stores.jobs.list_checkpoints(job.id, after=None, limit=_PAGE)
    return next((item for item in newest if item["id"] == name), {"id": name})


async def all_events(stores: Stores, job_id: str) -> list[dict[str, Any]]:
    """Every event of a job, oldest first."""
    found: list[dict[str, Any]] = []
    after: str | None = None
    while True:
        page, has_more = await stores.jobs.list_events(job_id, after=after, limit=_PAGE)
        found += page
        if not has_more:
            return found[::-1]
        after = page[-1]["id"]


def metrics_csv(events: Sequence[Mapping[str, Any]]) -> bytes:
    """One line a step; of a step that was trained twice, after a restart, the later one."""
    by_step = {
        int(event["data"]["step"]): event["data"]
        for event in events
        if event.get("type") == "metrics" and event.get("data")
    }
    text = io.StringIO()
    names = {name for step in by_step.values() for name in step}
    columns = (*METRIC_COLUMNS, *sorted(name for name in names if name.startswith(MARGINS)))
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(by_step[step] for step in sorted(by_step))
    return text.getvalue().encode()


async def _put_result(stores: Stores, job: TrainingJob, name: str, suffix: str, data: bytes) -> str:
    file_id = f"file-{job.id.removeprefix('ftjob-')}-{name}"
    key = f"files/{file_id}"
    await stores.blobs.put(key, data)
    record = {
        "id": file_id,
        "object": "file",
        "bytes": len(data),
        "created_at": int(time.time()),
        "filename": f"{job.policy_id}-{name}.{suffix}",
        "purpose": "fine-tune-results",
        "status": "processed",
        "expires_at": None,
        "status_details": None,
    }
    await stores.batches.put_file(record, key)
    return file_id


def _zip(files: Sequence[Path]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            archive.write(path, path.name)
    return buffer.getvalue()


def _copy(files: Sequence[Path], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        shutil.copyfile(path, folder / path.name)
    return folder
