"""Sequential jobs that sample each stage: order, pinned versions, ends, kills between any steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from mora_serve.config import TrainerSettings, load_settings
from mora_serve.errors import InvalidRequestError
from mora_serve.policies import activate, cancel_stage_batches
from mora_serve.ports import RowCommit
from mora_serve.store import Stores
from trainer.feeds import StoreSession
from trainer.job import TrainingJob, read_job
from trainer.publish import finish
from trainer.run_state import RunState
from trainer.source import Position
from trainer.stages import StagedRun

STAGES = ("harmless", "helpful", "truthful")
STORED = {
    "id": "ftjob-9", "model": "base", "training_file": "file-prompts", "seed": 3,
    "mora": {"mode": "sequential", "dimensions": list(STAGES)},
}  # fmt: skip
JOB = read_job(STORED, TrainerSettings())


class Killed(BaseException):
    """Stands for the end of the process."""


@dataclass
class Life:
    """How many more effects a process has before it is killed; ``None`` lives for ever."""

    left: int | None = None

    def spend(self) -> None:
        if self.left == 0:
            raise Killed
        if self.left is not None:
            self.left -= 1


class Mortal:
    """A port whose every call may be the one before which the process is killed."""

    def __init__(self, port: Any, life: Life) -> None:
        self._port, self._life = port, life

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._port, name)
        if name == "aclose" or not inspect.iscoroutinefunction(method):
            return method

        async def call(*args: Any, **options: Any) -> Any:
            self._life.spend()
            return await method(*args, **options)

        return call


@dataclass
class Trainer:
    """DPO runs that take no time; what they were asked for is in ``runs``."""

    stores: Stores
    folder: Path
    life: Life = field(default_factory=Life)
    without_pairs: tuple[str, ...] = ()
    on_stage: Callable[[TrainingJob], Any] | None = None
    runs: list[TrainingJob] = field(default_factory=list)

    async def _look(self, run: TrainingJob) -> None:
        """What a generator that serves one version at a time needs is true when a run begins."""
        # A run that is looked at again may have published its own version already.
        assert (await self.stores.jobs.current_policy())[0] in (run.model, run.policy_id)
        options = await self.stores.batches.batch_options(run.training_file)
        assert options["fixed"]["model"] == run.model
        steps: Any = vars(self.stores.pairs)["_steps"]
        assert {
            name: at for name, (at, _) in steps._batches[run.training_file].readers.items()
        } == {run.id: -1}
        if run.stages[0] in self.without_pairs:
            await complete(self.stores, run.training_file)

    def __call__(self, run: TrainingJob) -> Path | None:
        with StoreSession(self.stores) as session:
            if self.on_stage is not None:
                session.call(self.on_stage(run))
            session.call(self._look(run))
        self.life.spend()
        self.runs.append(run)
        if run.stages[0] in self.without_pairs:
            return None
        checkpoint = self.folder / run.run_name
        checkpoint.mkdir(exist_ok=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (checkpoint / name).write_text(run.run_name)
        RunState(Position(0, 11), 100, step=4, done=True).save(checkpoint)
        return checkpoint


async def complete(stores: Stores, batch_id: str) -> None:
    """End a batch of one row without a pair."""
    if await stores.batches.open_batch(batch_id, [(0, 1, 0, 10)], 1):
        held = await stores.batches.lease_shard("worker", 600.0)
        assert held is not None
        await stores.batches.commit_row(held, RowCommit(0, b"{}", None))
        await stores.batches.seal_shard(held)
        await stores.batches.finalize_ready("worker", 60.0)


async def prepare(stores: Stores, **fields: Any) -> None:
    await stores.blobs.put("files/prompts", b"{}\n")
    file = {"id": "file-prompts", "purpose": "batch", "bytes": 3, "filename": "prompts.jsonl"}
    await stores.batches.put_file(file, "files/prompts")
    await stores.jobs.create_job({**STORED, **fields})


@pytest.fixture
def stores() -> Stores:
    found = Stores.memory()
    with StoreSession(found) as session:
        session.call(prepare(found))
    return found


def run(stores: Stores, trainer: Trainer, job: TrainingJob = JOB) -> dict[str, Any]:
    """One trainer process, until it ends or is killed; returns the job."""
    mortal = replace(
        stores,
        jobs=Mortal(stores.jobs, trainer.life),  # type: ignore[arg-type]
        batches=Mortal(stores.batches, trainer.life),  # type: ignore[arg-type]
        blobs=Mortal(stores.blobs, trainer.life),  # type: ignore[arg-type]
    )
    with StoreSession(mortal) as session:
        overrides = {"policy": {"model": "base"}, "data_dir": str(trainer.folder / "data")}
        settings = load_settings("fake", environ={}, overrides=overrides)
        staged = StagedRun(session, job, settings, trainer)
        last, tokens = staged.run()
        if not staged.is_over():
            session.call(finish(mortal, last, trained_tokens=tokens))
    ended: dict[str, Any] = everything(stores)["job"]
    return ended


def everything(stores: Stores) -> dict[str, Any]:
    """What a job leaves behind, without ids and times that differ from run to run."""

    async def read() -> dict[str, Any]:
        batches, _ = await stores.batches.list_batches(after=None, limit=100)
        names = {batch["id"]: f"batch-{place}" for place, batch in enumerate(batches[::-1], 1)}
        job = await stores.jobs.get_job(JOB.id)
        begun = job.get("stages") or []
        job["stages"] = [{**s, "batch_id": names[s["batch_id"]]} for s in begun]
        events, _ = await stores.jobs.list_events(JOB.id, after=None, limit=100)
        checkpoints, _ = await stores.jobs.list_checkpoints(JOB.id, after=None, limit=100)
        return {
            "job": {k: v for k, v in job.items() if not k.endswith("_at")},
            "batches": [(names[b["id"]], b["status"], b["model"]) for b in batches],
            "current": await stores.jobs.current_policy(),
            "versions": [(v["id"], v["parent"]) for v in await stores.jobs.list_policies()],
            "events": [e["message"].replace(k, v) for e in events for k, v in names.items()
                       if k in e["message"] or not any(n in e["message"] for n in names)],
            "checkpoints": [(c["step_number"], c["fine_tuned_model_checkpoint"])
                            for c in checkpoints],
        }  # fmt: skip

    with StoreSession(stores) as session:
        return session.call(read())


def test_each_stage_trains_the_last_version_on_pairs_that_were_sampled_from_it(
    stores: Stores, tmp_path: Path
) -> None:
    trainer = Trainer(stores, tmp_path)
    job = run(stores, trainer)
    assert [(r.stages, r.model, r.first_step) for r in trainer.runs] == [
        (("harmless",), "base", 0),
        (("helpful",), "policy-9-stage-1", 4),
        (("truthful",), "policy-9-stage-2", 8),
    ]
    assert [(s["model"], s["version"], s["status"]) for s in job["stages"]] == [
        ("base", "policy-9-stage-1", "succeeded"),
        ("policy-9-stage-1", "policy-9-stage-2", "succeeded"),
        ("policy-9-stage-2", "policy-9-stage-3", "succeeded"),
    ]
    assert (job["status"], job["fine_tuned_model"]) == ("succeeded", "policy-9-stage-3")
    assert job["trained_tokens"] == 300
    left = everything(stores)
    assert left["checkpoints"][0] == (12, "policy-9-stage-3")
    # A stage that is trained needs no more pairs.
    assert {status for _, status, _ in left["batches"]} == {"cancelling"}


def test_a_stages_batch_fixes_version_mode_and_order_over_the_sources_defaults(
    tmp_path: Path,
) -> None:
    stores = Stores.memory()

    async def source() -> str:
        await prepare(stores)
        batch = await stores.batches.create_batch(
            {"endpoint": "/v1/rewrites", "input_file_id": "file-prompts"},
            {"defaults": {"n": 5, "mode": "simultaneous"}}, None, "hash",
        )  # fmt: skip
        await stores.jobs.update_job(JOB.id, training_file=batch["id"])
        return str(batch["id"])

    with StoreSession(stores) as session:
        job = replace(JOB, training_file=session.call(source()))
    trainer = Trainer(stores, tmp_path)
    run(stores, trainer, job)
    with StoreSession(stores) as session:
        options = session.call(stores.batches.batch_options(trainer.runs[1].training_file))
    assert options["defaults"] == {"n": 5, "mode": "simultaneous"}
    assert options["fixed"] == {
        "model": "policy-9-stage-1", "mode": "sequential", "dimensions": list(STAGES),
    }  # fmt: skip


def test_a_stages_batch_is_diagnosed_on_every_dimension_those_of_the_stages_first(
    stores: Stores, tmp_path: Path
) -> None:
    trainer = Trainer(stores, tmp_path)
    run(stores, trainer, replace(JOB, stages=("truthful",)))
    with StoreSession(stores) as session:
        options = session.call(stores.batches.batch_options(trainer.runs[0].training_file))
    assert options["fixed"]["dimensions"] == ["truthful", "helpful", "harmless"]


def lives() -> Iterator[int]:
    """Every number of effects after which an unbroken run could have been killed."""
    yield from range(120)


def test_a_job_that_is_killed_between_any_two_steps_ends_like_an_unbroken_one(
    tmp_path: Path,
) -> None:
    def fresh() -> tuple[Stores, Trainer]:
        found = Stores.memory()
        with StoreSession(found) as session:
            session.call(prepare(found))
        return found, Trainer(found, tmp_path)

    stores, trainer = fresh()
    run(stores, trainer)
    expected = everything(stores)
    for left in lives():
        stores, trainer = fresh()
        trainer.life.left = left
        try:
            run(stores, trainer)
        except Killed:
            trainer.life.left = None
            run(stores, trainer)
        else:
            assert left > 60, "an unbroken run has more steps than were tried"
            return
        assert everything(stores) == expected, f"killed after {left} effects"
    raise AssertionError("the run has more steps than were tried")


def test_a_stage_without_a_pair_is_left_out_and_the_next_one_goes_on(
    stores: Stores, tmp_path: Path
) -> None:
    trainer = Trainer(stores, tmp_path, without_pairs=("helpful",))
    job = run(stores, trainer)
    assert [stage["status"] for stage in job["stages"]] == ["succeeded", "left_out", "succeeded"]
    assert trainer.runs[2].model == "policy-9-stage-1"
    assert trainer.runs[2].first_step == 4
    assert job["fine_tuned_model"] == "policy-9-stage-3"


def test_the_last_version_stands_when_the_last_stage_is_left_out(
    stores: Stores, tmp_path: Path
) -> None:
    job = run(stores, Trainer(stores, tmp_path, without_pairs=("helpful", "truthful")))
    assert job["fine_tuned_model"] == "policy-9-stage-1"
    assert job["trained_tokens"] == 100


def test_a_job_without_any_pair_has_no_version(stores: Stores, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        run(stores, Trainer(stores, tmp_path, without_pairs=STAGES))
    assert caught.value.code == "no_pairs"


def test_a_stage_whose_batch_fails_fails_the_job(stores: Stores, tmp_path: Path) -> None:
    async def fail(asked: TrainingJob) -> None:
        await stores.batches.fail_batch(asked.training_file, "empty_file", "no rows")

    trainer = Trainer(stores, tmp_path, on_stage=fail)
    trainer.without_pairs = ("harmless",)
    with pytest.raises(InvalidRequestError, match="ended as failed") as caught:
        run(stores, trainer)
    assert caught.value.code == "stage_failed"


def test_a_cancelled_job_begins_no_further_stage(stores: Stores, tmp_path: Path) -> None:
    async def cancel(asked: TrainingJob) -> None:
        if asked.stage == 2:
            await stores.jobs.cancel_job(JOB.id)

    trainer = Trainer(stores, tmp_path, on_stage=cancel)
    job = run(stores, trainer)
    assert len(trainer.runs) == 2
    assert job["status"] == "cancelled"
    assert [stage["status"] for stage in job["stages"]] == ["succeeded", "running"]
    assert everything(stores)["current"][0] == "policy-9-stage-1"


class Cancelling(Life):
    """Cancels the job, as the gateway does, before the effect at which a life would end."""

    def __init__(self, left: int, stores: Stores) -> None:
        super().__init__(left)
        self._stores = stores

    def spend(self) -> None:
        if self.left == 0:
            with StoreSession(self._stores) as session:
                job = session.call(self._stores.jobs.cancel_job(JOB.id))
                session.call(cancel_stage_batches(self._stores.batches, job))
            self.left = None
        super().spend()


def test_a_job_that_is_cancelled_between_any_two_steps_leaves_no_batch_at_work(
    tmp_path: Path,
) -> None:
    for left in lives():
        found = Stores.memory()
        with StoreSession(found) as session:
            session.call(prepare(found))
            session.call(activate(found.jobs, "base", "base"))
        trainer = Trainer(found, tmp_path, life=Cancelling(left, found))
        job = run(found, trainer)
        if job["status"] == "succeeded":
            assert left > 60, "an unbroken run has more steps than were tried"
            return
        left_behind = everything(found)
        working = [batch for batch in left_behind["batches"] if batch[1] != "cancelling"]
        assert not working, f"cancelled after {left} effects"
        assert len(left_behind["batches"]) <= len(trainer.runs) + 1
    raise AssertionError("the run has more steps than were tried")
