"""Publishing a finished run, over in-process stores."""

from __future__ import annotations

import csv
import io
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mora_serve.config import TrainerSettings
from mora_serve.store import Stores
from trainer.job import TrainingJob, read_job
from trainer.publish import checkpoint_id, metrics_csv, policy_files, publish
from trainer.run_state import RunState
from trainer.source import Position

STORED = {"id": "ftjob-77", "model": "base", "training_file": "batch_1", "status": "running"}


@pytest.fixture
def job() -> TrainingJob:
    return read_job(STORED, TrainerSettings())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    for name in (
        "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "mora_state.json",
        "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin", "README.md",
    ):  # fmt: skip
        (folder / name).write_bytes(name.encode())
    RunState(Position(), 123, step=3).save(folder)
    return folder


async def published(stores: Stores, job: TrainingJob, checkpoint: Path) -> dict[str, Any]:
    await stores.jobs.create_job(STORED)
    for step, loss in ((1, 0.7), (2, 0.6), (2, 0.5)):
        event = {"type": "metrics", "data": {"step": step, "train_loss": loss}}
        await stores.jobs.add_event(job.id, event)
    return await publish(stores, job, checkpoint, data_dir=checkpoint.parent / "data")


async def blob(stores: Stores, file_id: str) -> bytes:
    _, key = await stores.batches.get_file(file_id)
    return b"".join([chunk async for chunk in stores.blobs.open_read(key)])


async def test_published_job_names_its_policy_files_and_tokens(
    job: TrainingJob, checkpoint: Path
) -> None:
    done = await published(Stores.memory(), job, checkpoint)
    assert done["status"] == "succeeded"
    assert done["fine_tuned_model"] == "policy-77"
    assert done["trained_tokens"] == 123
    assert done["finished_at"] is not None
    assert len(done["result_files"]) == 2


async def test_published_version_is_current_and_readable_as_a_directory(
    job: TrainingJob, checkpoint: Path
) -> None:
    stores = Stores.memory()
    await published(stores, job, checkpoint)
    (version,) = await stores.jobs.list_policies()
    assert (version["id"], version["kind"], version["parent"]) == ("policy-77", "lora", "base")
    assert (await stores.jobs.current_policy())[0] == "policy-77"
    if stores.blobs.local_path("policies/policy-77") is None:
        names = {path.name for path in Path(version["uri"]).iterdir()}
        assert names == {"adapter_config.json", "adapter_model.safetensors"}


async def test_the_last_checkpoint_gets_the_versions_name_and_keeps_its_metrics(
    job: TrainingJob, checkpoint: Path
) -> None:
    stores = Stores.memory()
    await stores.jobs.create_job(STORED)
    for step in (2, 3):
        record = {"id": checkpoint_id(job.id, step), "step_number": step, "metrics": {"step": step}}
        await stores.jobs.add_checkpoint(job.id, record)
    await publish(stores, job, checkpoint, data_dir=checkpoint.parent / "data")
    found, _ = await stores.jobs.list_checkpoints(job.id, after=None, limit=9)
    assert [
        (item["step_number"], item["metrics"], item["fine_tuned_model_checkpoint"])
        for item in found
    ] == [(3, {"step": 3}, "policy-77"), (2, {"step": 2}, None)]


async def test_a_version_can_be_published_without_becoming_current(checkpoint: Path) -> None:
    stores = Stores.memory()
    await stores.jobs.publish_policy({"id": "base", "kind": "base", "uri": None}, make_current=True)
    job = read_job({**STORED, "mora": {"make_current": False}}, TrainerSettings())
    await published(stores, job, checkpoint)
    assert (await stores.jobs.current_policy())[0] == "base"


class CancelledUnderWay:
    """A blob store under whose first write the job is cancelled."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stores.blobs, name)

    async def put(self, key: str, data: bytes) -> None:
        await self._stores.jobs.cancel_job("ftjob-77")
        await self._stores.blobs.put(key, data)


async def test_a_job_that_is_cancelled_while_its_files_are_stored_publishes_nothing(
    job: TrainingJob, checkpoint: Path
) -> None:
    stores = Stores.memory()
    await stores.jobs.publish_policy({"id": "base", "kind": "base", "uri": None}, make_current=True)
    watched: Any = CancelledUnderWay(stores)
    done = await published(replace(stores, blobs=watched), job, checkpoint)
    assert (done["status"], done["fine_tuned_model"], done["result_files"]) == (
        "cancelled",
        None,
        [],
    )
    assert [version["id"] for version in await stores.jobs.list_policies()] == ["base"]
    assert (await stores.jobs.current_policy())[0] == "base"


async def test_a_restart_after_publishing_leaves_a_version_rolled_back(
    job: TrainingJob, checkpoint: Path
) -> None:
    stores = Stores.memory()
    await stores.jobs.publish_policy({"id": "base", "kind": "base", "uri": None}, make_current=True)
    await published(stores, job, checkpoint)
    assert (await stores.jobs.current_policy())[0] == job.policy_id
    await stores.jobs.set_current_policy("base")
    await stores.jobs.update_job(job.id, status="running")
    await publish(stores, job, checkpoint, data_dir=checkpoint.parent / "data")
    assert (await stores.jobs.current_policy())[0] == "base"


async def test_publishing_again_changes_nothing(job: TrainingJob, checkpoint: Path) -> None:
    stores = Stores.memory()
    first = await published(stores, job, checkpoint)
    again = await publish(stores, job, checkpoint, data_dir=checkpoint.parent / "data")
    assert again["result_files"] == first["result_files"]
    assert len(await stores.jobs.list_policies()) == 1


async def test_result_files_hold_metrics_and_adapter(job: TrainingJob, checkpoint: Path) -> None:
    stores = Stores.memory()
    metrics_id, adapter_id = (await published(stores, job, checkpoint))["result_files"]
    rows = list(csv.DictReader(io.StringIO((await blob(stores, metrics_id)).decode())))
    assert [(row["step"], row["train_loss"]) for row in rows] == [("1", "0.7"), ("2", "0.5")]
    with zipfile.ZipFile(io.BytesIO(await blob(stores, adapter_id))) as archive:
        assert sorted(archive.namelist()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_full_policy_leaves_the_trainers_state_behind(checkpoint: Path) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (checkpoint / name).write_bytes(b"x")
    names = {path.name for path in policy_files(checkpoint, lora=False)}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
    assert not names & {"optimizer.pt", "mora_state.json", "trainer_state.json", "README.md"}


def test_metrics_without_steps_are_a_header() -> None:
    assert metrics_csv([]).startswith(b"step,train_loss,")


def test_margins_of_dimensions_are_columns_of_their_own() -> None:
    events = [{"type": "metrics", "data": {"step": 1, "margins/helpful": 0.5, "margins/kind": 1}}]
    rows = list(csv.DictReader(io.StringIO(metrics_csv(events).decode())))
    assert (rows[0]["margins/helpful"], rows[0]["margins/kind"]) == ("0.5", "1")
