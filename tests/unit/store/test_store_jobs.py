"""Jobs, their claims and histories, policy versions, and the metrics board."""

from __future__ import annotations

import pytest

from mora_serve.errors import ConflictError, NotFoundError
from mora_serve.store import Stores

JOB_FIELDS = {
    "id", "object", "created_at", "error", "estimated_finish", "fine_tuned_model", "finished_at",
    "hyperparameters", "integrations", "metadata", "method", "model", "organization_id",
    "result_files", "seed", "status", "suffix", "trained_tokens", "training_file",
    "validation_file",
}  # fmt: skip


async def test_a_job_keeps_what_it_was_given_and_has_every_field(stores: Stores) -> None:
    given = {
        "model": "m",
        "training_file": "batch_x",
        "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}},
        "result_files": [],
        "seed": 7,
        "metadata": {},
    }
    job = await stores.jobs.create_job(given)
    assert set(job) == JOB_FIELDS
    assert job["status"] == "queued"
    assert await stores.jobs.get_job(job["id"]) == job
    assert {name: job[name] for name in given} == given


async def test_a_job_is_claimed_by_one_launcher_until_its_claim_lapses(stores: Stores) -> None:
    job = await stores.jobs.create_job({"model": "m"})
    claimed = await stores.jobs.claim_job("a", 100.0)
    assert claimed is not None
    assert claimed["id"] == job["id"]
    assert await stores.jobs.claim_job("b", 100.0) is None
    assert not await stores.jobs.heartbeat_job(job["id"], "b", 100.0)
    assert await stores.jobs.heartbeat_job(job["id"], "a", 100.0)


async def test_a_running_job_whose_launcher_died_is_claimed_again(stores: Stores) -> None:
    job = await stores.jobs.create_job({"model": "m"})
    await stores.jobs.claim_job("a", 100.0)
    await stores.jobs.update_job(job["id"], status="running")
    await stores.jobs.heartbeat_job(job["id"], "a", 0.001)
    again = None
    while again is None:
        again = await stores.jobs.claim_job("b", 100.0)
    assert again["status"] == "running"
    assert not await stores.jobs.heartbeat_job(job["id"], "a", 100.0)


async def test_a_finished_job_is_stamped_and_never_claimed(stores: Stores) -> None:
    job = await stores.jobs.create_job({"model": "m"})
    done = await stores.jobs.update_job(job["id"], status="succeeded", fine_tuned_model="policy-x")
    assert done["finished_at"] >= done["created_at"]
    assert await stores.jobs.claim_job("a", 1.0) is None
    assert not await stores.jobs.heartbeat_job(job["id"], "a", 1.0)


async def test_a_cancelled_job_stays_cancelled(stores: Stores) -> None:
    job = await stores.jobs.create_job({"model": "m"})
    cancelled = await stores.jobs.cancel_job(job["id"])
    assert cancelled["status"] == "cancelled"
    late = await stores.jobs.update_job(job["id"], status="succeeded", trained_tokens=5)
    assert late["status"] == "cancelled"
    assert late["finished_at"] == cancelled["finished_at"]
    assert late["trained_tokens"] == 5


async def test_a_finished_job_is_not_cancelled(stores: Stores) -> None:
    job = await stores.jobs.create_job({"model": "m"})
    await stores.jobs.update_job(job["id"], status="failed", error={"code": "x", "message": "y"})
    assert (await stores.jobs.cancel_job(job["id"]))["status"] == "failed"


async def test_jobs_events_and_checkpoints_are_paged_newest_first(stores: Stores) -> None:
    ids = [(await stores.jobs.create_job({"model": "m"}))["id"] for _ in range(3)]
    page, more = await stores.jobs.list_jobs(after=ids[2], limit=1)
    assert [job["id"] for job in page] == [ids[1]]
    assert more
    for number in range(3):
        await stores.jobs.add_event(ids[0], {"message": f"step {number}"})
        await stores.jobs.add_checkpoint(ids[0], {"step_number": number})
    events, more = await stores.jobs.list_events(ids[0], after=None, limit=2)
    assert [event["message"] for event in events] == ["step 2", "step 1"]
    assert more
    rest, more = await stores.jobs.list_events(ids[0], after=events[-1]["id"], limit=2)
    assert [event["message"] for event in rest] == ["step 0"]
    assert not more
    checkpoints, _ = await stores.jobs.list_checkpoints(ids[0], after=None, limit=9)
    assert [checkpoint["step_number"] for checkpoint in checkpoints] == [2, 1, 0]
    assert checkpoints[0]["fine_tuning_job_id"] == ids[0]
    assert await stores.jobs.list_events(ids[1], after=None, limit=2) == ([], False)


async def test_an_event_reported_twice_is_kept_once(stores: Stores) -> None:
    job = await stores.jobs.create_job({"model": "m"})
    for _ in range(2):
        await stores.jobs.add_event(job["id"], {"id": "ftevent_1", "message": "step"})
        await stores.jobs.add_checkpoint(job["id"], {"id": "ftckpt_1"})
    assert len((await stores.jobs.list_events(job["id"], after=None, limit=9))[0]) == 1
    assert len((await stores.jobs.list_checkpoints(job["id"], after=None, limit=9))[0]) == 1


async def test_unknown_jobs_are_not_found(stores: Stores) -> None:
    for call in (
        stores.jobs.get_job("ftjob_x"),
        stores.jobs.update_job("ftjob_x", status="running"),
        stores.jobs.cancel_job("ftjob_x"),
        stores.jobs.heartbeat_job("ftjob_x", "a", 1.0),
        stores.jobs.add_event("ftjob_x", {}),
        stores.jobs.list_events("ftjob_x", after=None, limit=1),
    ):
        with pytest.raises(NotFoundError):
            await call
    assert await stores.jobs.list_jobs(after=None, limit=5) == ([], False)


async def test_every_change_of_the_current_policy_raises_the_epoch_by_one(stores: Stores) -> None:
    with pytest.raises(NotFoundError):
        await stores.jobs.current_policy()
    base = {"id": "base", "kind": "base", "uri": "/m"}
    await stores.jobs.publish_policy(base, make_current=True)
    await stores.jobs.publish_policy(base, make_current=True)
    assert await stores.jobs.current_policy() == ("base", 1)
    await stores.jobs.publish_policy({"id": "p1", "kind": "lora", "uri": "/a"}, make_current=False)
    assert await stores.jobs.current_policy() == ("base", 1)
    assert await stores.jobs.set_current_policy("p1") == 2
    assert await stores.jobs.set_current_policy("base") == 3
    assert [version["id"] for version in await stores.jobs.list_policies()] == ["p1", "base"]
    with pytest.raises(NotFoundError):
        await stores.jobs.set_current_policy("absent")


async def test_a_published_policy_never_changes(stores: Stores) -> None:
    await stores.jobs.publish_policy({"id": "p", "kind": "lora", "uri": "/a"}, make_current=False)
    with pytest.raises(ConflictError):
        await stores.jobs.publish_policy(
            {"id": "p", "kind": "lora", "uri": "/b"}, make_current=True
        )


async def test_metrics_show_the_latest_text_of_live_replicas(stores: Stores) -> None:
    assert await stores.metrics.collect() == {}
    await stores.metrics.publish("a", "old 1\n", 100.0)
    await stores.metrics.publish("a", "new 1\n", 100.0)
    await stores.metrics.publish("b", "gone 1\n", 0.001)
    while set(await stores.metrics.collect()) != {"a"}:
        pass
    assert await stores.metrics.collect() == {"a": "new 1\n"}
