"""A version and the batch that it was trained on: which one is over first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mora_serve.config import load_settings
from mora_serve.store import Stores
from tests.unit.trainer.test_stages import JOB, complete, stores
from trainer import __main__ as command
from trainer.feeds import StoreSession
from trainer.publish import LORA_FILES
from trainer.run_batch import await_batch
from trainer.run_state import RunState
from trainer.source import Position

__all__ = ["stores"]


@pytest.mark.parametrize("end", ["batch", "job"])
def test_a_version_waits_until_its_batch_is_over_or_the_job_is(stores: Stores, end: str) -> None:
    """Rows that name a version could not go on once an engine of one version holds another."""
    waited: list[float] = []

    async def stream() -> str:
        batch = {"endpoint": "/v1/rewrites", "input_file_id": "file-prompts"}
        return str((await stores.batches.create_batch(batch, {}, None, "hash"))["id"])

    with StoreSession(stores) as session:
        job = replace(JOB, training_file=session.call(stream()))

        def wait(seconds: float) -> None:
            waited.append(seconds)
            if len(waited) < 3:
                return
            if end == "job":
                session.call(stores.jobs.update_job(JOB.id, status="cancelled"))
            else:
                session.call(complete(stores, job.training_file))

        await_batch(session, job, wait)
        assert len(waited) == 3
        told, _ = session.call(stores.jobs.list_events(JOB.id, after=None, limit=9))
        assert [event["message"].split(";")[0] for event in told] == ["Trained"]
        await_batch(session, job, wait)
        assert len(waited) == 3


@pytest.mark.parametrize(("make_current", "num_waits"), [(True, 1), (False, 0)])
def test_only_what_becomes_current_waits_and_before_it_is_published(
    stores: Stores,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_current: bool,
    num_waits: int,
) -> None:
    published = list[int]()
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for name in LORA_FILES:
        (checkpoint / name).write_text("weights")
    RunState(Position(0, 11), 100, step=4, done=True).save(checkpoint)

    def wait(session: StoreSession, _job: object) -> None:
        published.append(len(session.call(stores.jobs.list_policies())))

    monkeypatch.setattr(command, "fit", lambda *_: checkpoint)
    monkeypatch.setattr(command, "await_batch", wait)
    overrides = {
        "policy": {"model": "base"}, "trainer": {"test_model": "m"}, "data_dir": str(tmp_path),
    }  # fmt: skip
    settings = load_settings("fake", environ={}, overrides=overrides)
    with StoreSession(stores) as session:
        batch = {"endpoint": "/v1/rewrites", "input_file_id": "file-prompts"}
        made = session.call(stores.batches.create_batch(batch, {}, None, "hash"))
        job = replace(
            JOB, training_file=made["id"], resample=False, stages=(), make_current=make_current
        )
        command.train_and_publish(session, settings, job)
        assert published == [0] * num_waits
        assert len(session.call(stores.jobs.list_policies())) == 1
