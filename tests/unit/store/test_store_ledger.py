"""The ledger's contract, in memory and on Redis: every row once, whatever happens in between."""

from __future__ import annotations

import asyncio
import json

import pytest

from mora_serve.errors import (
    ConflictError,
    LeaseLostError,
    NotFoundError,
    OverloadedError,
    StorageError,
)
from mora_serve.store import Stores, backlog
from mora_serve.store.batches import LedgerBatches
from mora_serve.store.redis_store import RedisLedger
from mora_serve.store.steps import LedgerSteps
from tests.unit.store.ledger_driver import (
    all_pairs,
    content,
    drain,
    expire,
    lease,
    new_batch,
    open_batch,
    row,
    work,
)

BATCH_FIELDS = {
    "id", "object", "endpoint", "errors", "input_file_id", "completion_window", "status",
    "output_file_id", "error_file_id", "created_at", "in_progress_at", "expires_at",
    "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at",
    "request_counts", "metadata", "usage", "model",
}  # fmt: skip


async def test_a_new_batch_has_every_field_of_openais_object(stores: Stores) -> None:
    batch = await stores.batches.get_batch(await new_batch(stores, defaults={"n": 4}))
    assert set(batch) == BATCH_FIELDS
    assert batch["status"] == "validating"
    assert batch["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
    assert batch["expires_at"] - batch["created_at"] == 86_400
    assert (await stores.batches.batch_options(batch["id"]))["defaults"] == {"n": 4}


async def test_the_same_idempotency_key_returns_the_first_batch(stores: Stores) -> None:
    body = {"endpoint": "/v1/scores", "input_file_id": "file-in"}
    first = await stores.batches.create_batch(body, {}, "key", "hash")
    again = await stores.batches.create_batch(body, {}, "key", "hash")
    assert again["id"] == first["id"]
    assert len((await stores.batches.list_batches(after=None, limit=10))[0]) == 1
    with pytest.raises(ConflictError):
        await stores.batches.create_batch(body, {}, "key", "another hash")


async def test_unknown_ids_are_not_found(stores: Stores) -> None:
    for call in (
        stores.batches.get_batch("batch_x"),
        stores.batches.cancel_batch("batch_x"),
        stores.batches.progress("batch_x"),
        stores.batches.get_file("file-x"),
        stores.batches.delete_file("file-x"),
        stores.pairs.read("batch_x"),
        stores.pairs.is_finished("batch_x"),
    ):
        with pytest.raises(NotFoundError):
            await call


async def test_lists_are_newest_first_and_paged_by_cursor(stores: Stores) -> None:
    ids = [await new_batch(stores) for _ in range(5)]
    page, more = await stores.batches.list_batches(after=None, limit=2)
    assert [batch["id"] for batch in page] == ids[:2:-1]
    assert more
    page, more = await stores.batches.list_batches(after=ids[1], limit=2)
    assert [batch["id"] for batch in page] == [ids[0]]
    assert not more
    with pytest.raises(NotFoundError):
        await stores.batches.list_batches(after="batch_x", limit=2)


async def test_files_are_listed_by_purpose_in_both_orders(stores: Stores) -> None:
    for number in range(6):
        purpose = "batch" if number % 2 else "batch_output"
        file = {"id": f"file-{number}", "purpose": purpose, "created_at": 1}
        await stores.batches.put_file(file, f"files/{number}")
    page, more = await stores.batches.list_files(after=None, limit=2, purpose="batch")
    assert [file["id"] for file in page] == ["file-5", "file-3"]
    assert more
    page, more = await stores.batches.list_files(
        after="file-1", limit=2, purpose="batch", order="asc"
    )
    assert [file["id"] for file in page] == ["file-3", "file-5"]
    assert not more


async def test_a_deleted_file_is_gone_with_its_bytes(stores: Stores) -> None:
    await stores.blobs.put("files/a", b"data")
    await stores.batches.put_file({"id": "file-a", "purpose": "batch"}, "files/a")
    await stores.batches.delete_file("file-a")
    assert not await stores.blobs.exists("files/a")
    assert await stores.batches.list_files(after=None, limit=5, purpose=None) == ([], False)


async def test_the_input_of_an_unfinished_batch_cannot_be_deleted(stores: Stores) -> None:
    await stores.blobs.put("files/in", b"data")
    await stores.batches.put_file({"id": "file-in", "purpose": "batch", "bytes": 4}, "files/in")
    await open_batch(stores, [1])
    with pytest.raises(ConflictError):
        await stores.batches.delete_file("file-in")
    await drain(stores)
    await stores.batches.delete_file("file-in")


async def test_validation_is_claimed_by_one_runner_until_its_claim_lapses(stores: Stores) -> None:
    batch_id = await new_batch(stores)
    claimed = await stores.batches.claim_validation("a", 100.0)
    assert claimed is not None
    assert (claimed.batch["id"], claimed.number, claimed.tries) == (batch_id, 1, 1)
    assert await stores.batches.claim_validation("b", 100.0) is None
    assert await stores.batches.renew_validation(batch_id, 1, 0.0)
    again = await stores.batches.claim_validation("b", 0.0)
    assert again is not None
    assert (again.number, again.tries) == (2, 2)
    assert not await stores.batches.renew_validation(batch_id, 1, 100.0)
    assert await stores.batches.postpone_validation(batch_id, 1) == 0
    assert await stores.batches.postpone_validation(batch_id, 2) >= 0
    third = await stores.batches.claim_validation("a", 100.0)
    assert third is not None
    assert (third.number, third.tries) == (3, 2)
    await stores.batches.cancel_batch(batch_id)
    assert not await stores.batches.renew_validation(batch_id, 3, 100.0)


async def test_a_failed_batch_names_the_line(stores: Stores) -> None:
    batch_id = await new_batch(stores)
    await stores.batches.fail_batch(batch_id, "invalid_encoding", "must be UTF-8", 3)
    batch = await stores.batches.get_batch(batch_id)
    assert batch["status"] == "failed"
    assert batch["failed_at"] is not None
    assert batch["errors"]["data"] == [
        {"code": "invalid_encoding", "message": "must be UTF-8", "param": None, "line": 3}
    ]
    assert await stores.pairs.is_finished(batch_id)
    assert await stores.batches.claim_validation("a", 1.0) is None


async def test_a_batch_runs_to_its_files_in_input_order(stores: Stores) -> None:
    batch_id = await open_batch(stores, [2, 3, 1])
    shards = [await lease(stores) for _ in range(3)]
    for held in reversed(shards):
        for line in reversed(range(held.first_line, held.first_line + held.num_rows)):
            await stores.batches.commit_row(held, row(line, failed=line == 3))
        await stores.batches.seal_shard(held)
    assert await stores.batches.finalize_ready("w", 100.0) == [batch_id]
    batch = await stores.batches.get_batch(batch_id)
    assert batch["status"] == "completed"
    assert batch["in_progress_at"] <= batch["finalizing_at"] <= batch["completed_at"]
    assert batch["request_counts"] == {"total": 6, "completed": 5, "failed": 1}
    assert batch["usage"]["output_tokens"] == batch["usage"]["total_tokens"] == 12
    output = await content(stores, batch["output_file_id"])
    assert [item["line"] for item in output] == [0, 1, 2, 4, 5]
    assert await content(stores, batch["error_file_id"]) == [{"line": 3}]
    file, _ = await stores.batches.get_file(batch["output_file_id"])
    assert file["purpose"] == "batch_output"
    assert file["bytes"] == sum(len(json.dumps(item)) + 1 for item in output)
    assert await stores.batches.finalize_ready("w", 100.0) == []


async def test_a_row_is_committed_once_and_counted_once(stores: Stores) -> None:
    batch_id = await open_batch(stores, [2])
    held = await lease(stores)
    assert await stores.batches.commit_row(held, row(0, 2))
    assert not await stores.batches.commit_row(held, row(0, 2))
    progress = await stores.batches.progress(batch_id)
    assert progress["request_counts"]["completed"] == 1
    assert progress["pairs"] == 2
    assert progress["classes"] == {"multi": 1}
    assert progress["usage"]["output_tokens"] == 2


async def test_an_expired_lease_is_taken_over_with_a_larger_token(stores: Stores) -> None:
    batch_id = await open_batch(stores, [2])
    old = await lease(stores, "old")
    await stores.batches.commit_row(old, row(0))
    assert await stores.batches.lease_shard("new", 100.0) is None
    await expire(stores, old)
    new = await lease(stores, "new")
    assert new.token > old.token
    assert new.done == {0}
    with pytest.raises(LeaseLostError):
        await stores.batches.commit_row(old, row(1))
    with pytest.raises(LeaseLostError):
        await stores.batches.heartbeat(old, 100.0)
    with pytest.raises(LeaseLostError):
        await stores.batches.seal_shard(old)
    await stores.batches.release(old)
    assert await stores.batches.lease_shard("third", 100.0) is None
    await work(stores, new)
    await drain(stores)
    assert (await stores.batches.get_batch(batch_id))["request_counts"]["completed"] == 2


async def test_a_heartbeat_keeps_a_lease_that_nobody_took(stores: Stores) -> None:
    await open_batch(stores, [1])
    held = await lease(stores)
    await expire(stores, held)
    assert await stores.batches.heartbeat(held, 100.0)
    assert await stores.batches.lease_shard("other", 100.0) is None


async def test_a_released_shard_is_open_at_once_and_keeps_its_rows(stores: Stores) -> None:
    await open_batch(stores, [2])
    held = await lease(stores)
    await stores.batches.commit_row(held, row(1))
    await stores.batches.release(held)
    again = await lease(stores, "other")
    assert again.done == {1}
    assert again.token > held.token


async def test_an_incomplete_shard_cannot_be_sealed(stores: Stores) -> None:
    await open_batch(stores, [2])
    held = await lease(stores)
    await stores.batches.commit_row(held, row(0))
    with pytest.raises(StorageError):
        await stores.batches.seal_shard(held)
    assert await stores.batches.commit_row(held, row(1))
    await stores.batches.seal_shard(held)


async def test_leases_go_to_the_batch_with_the_fewest(stores: Stores) -> None:
    first = await open_batch(stores, [1] * 4)
    second = await open_batch(stores, [1] * 4)
    owners = [(await lease(stores)).batch_id for _ in range(6)]
    assert owners.count(first) == owners.count(second) == 3
    assert (await lease(stores)).batch_id != (await lease(stores)).batch_id


async def test_handing_back_leases_makes_a_batch_first_in_line(stores: Stores) -> None:
    await open_batch(stores, [1] * 4)
    second = await open_batch(stores, [1] * 4)
    held = [await lease(stores) for _ in range(4)]
    for found in held:
        if found.batch_id == second:
            await stores.batches.release(found)
    assert [(await lease(stores)).batch_id for _ in range(2)] == [second, second]


async def test_excluded_batches_are_passed_over(stores: Stores) -> None:
    first = await open_batch(stores, [1, 1])
    assert await stores.batches.lease_shard("w", 100.0, exclude=(first,)) is None
    second = await open_batch(stores, [1])
    found = await stores.batches.lease_shard("w", 100.0, exclude=(first,))
    assert found is not None
    assert found.batch_id == second


async def test_backlog_counts_rows_and_batches_that_wait_for_a_runner(stores: Stores) -> None:
    assert await stores.batches.backlog_rows() == 0
    await new_batch(stores)
    assert await stores.batches.backlog_rows() == 1
    await open_batch(stores, [3])
    assert await stores.batches.backlog_rows() == 4
    held = await lease(stores)
    for line in range(3):
        await stores.batches.commit_row(held, row(line))
    assert await stores.batches.backlog_rows() == 2


async def test_cancelling_keeps_what_is_done(stores: Stores) -> None:
    batch_id = await open_batch(stores, [2, 2])
    held = await lease(stores)
    await stores.batches.commit_row(held, row(0))
    assert (await stores.batches.cancel_batch(batch_id))["status"] == "cancelling"
    assert await stores.batches.lease_shard("other", 100.0) is None
    assert not await stores.batches.heartbeat(held, 100.0)
    assert await stores.batches.finalize_ready("w", 100.0) == []
    assert await stores.batches.commit_row(held, row(1))
    await stores.batches.release(held)
    assert await stores.batches.finalize_ready("w", 100.0) == [batch_id]
    batch = await stores.batches.get_batch(batch_id)
    assert batch["status"] == "cancelled"
    assert batch["cancelling_at"] <= batch["cancelled_at"]
    assert batch["request_counts"] == {"total": 4, "completed": 2, "failed": 0}
    assert len(await content(stores, batch["output_file_id"])) == 2
    assert len(await all_pairs(stores, batch_id)) == 2
    assert await stores.batches.cancel_batch(batch_id) == batch


async def test_a_cancelled_batch_takes_no_late_row(stores: Stores) -> None:
    batch_id = await open_batch(stores, [2])
    held = await lease(stores)
    await stores.batches.cancel_batch(batch_id)
    await expire(stores, held)
    assert await stores.batches.finalize_ready("w", 100.0) == [batch_id]
    with pytest.raises(LeaseLostError):
        await stores.batches.commit_row(held, row(0))
    assert (await stores.batches.get_batch(batch_id))["output_file_id"] is None


async def test_a_closed_batch_takes_no_row_even_before_it_is_assembled(stores: Stores) -> None:
    batch_id = await open_batch(stores, [2])
    held = await lease(stores)
    await stores.batches.cancel_batch(batch_id)
    await expire(stores, held)
    assert await steps_of(stores).claim_finalize("w", 100.0) == batch_id
    assert await stores.pairs.is_finished(batch_id)
    with pytest.raises(LeaseLostError):
        await stores.batches.commit_row(held, row(0))


async def test_a_batch_cancelled_before_validation_ends_cancelled(stores: Stores) -> None:
    batch_id = await new_batch(stores)
    await stores.batches.claim_validation("v", 100.0)
    await stores.batches.cancel_batch(batch_id)
    await stores.batches.open_batch(batch_id, [(0, 1, 0, 10)], 1)
    assert await stores.batches.finalize_ready("w", 100.0) == [batch_id]
    assert (await stores.batches.get_batch(batch_id))["status"] == "cancelled"


async def test_a_batch_past_its_window_expires_with_what_is_done(stores: Stores) -> None:
    batch_id = await open_batch(stores, [2], completion_window_s=0.25)
    held = await lease(stores)
    await stores.batches.commit_row(held, row(0))
    async with asyncio.timeout(10):
        while await stores.batches.finalize_ready("w", 100.0) == []:
            await asyncio.sleep(0.05)
    batch = await stores.batches.get_batch(batch_id)
    assert batch["status"] == "expired"
    assert batch["expired_at"] is not None
    assert batch["request_counts"]["completed"] == 1
    assert len(await content(stores, batch["output_file_id"])) == 1
    with pytest.raises(LeaseLostError):
        await stores.batches.commit_row(held, row(1))


async def test_runners_that_race_for_everything_commit_each_row_once(stores: Stores) -> None:
    batch_id = await open_batch(stores, [3] * 8)

    async def runner(name: str) -> None:
        while (held := await stores.batches.lease_shard(name, 100.0)) is not None:
            for line in range(held.first_line, held.first_line + held.num_rows):
                await stores.batches.commit_row(held, row(line, 2))
            await stores.batches.seal_shard(held)
            await stores.batches.finalize_ready(name, 100.0)

    await asyncio.gather(*(runner(f"w{i}") for i in range(4)))
    await stores.batches.finalize_ready("last", 100.0)
    batch = await stores.batches.get_batch(batch_id)
    assert batch["status"] == "completed"
    lines = [item["line"] for item in await content(stores, batch["output_file_id"])]
    assert lines == list(range(24))
    assert [pair["seq"] for pair in await all_pairs(stores, batch_id)] == list(range(48))


async def test_two_runners_may_finish_the_same_batch(stores: Stores) -> None:
    batch_id = await open_batch(stores, [2])
    await work(stores, await lease(stores))
    await asyncio.gather(*(stores.batches.finalize_ready(f"w{i}", 0.0) for i in range(2)))
    batch = await stores.batches.get_batch(batch_id)
    assert batch["status"] == "completed"
    assert len(await content(stores, batch["output_file_id"])) == 2


async def test_a_commit_must_be_an_output_or_an_error(stores: Stores) -> None:
    await open_batch(stores, [1])
    held = await lease(stores)
    both = row(0)
    object.__setattr__(both, "error", b"{}")
    with pytest.raises(ValueError, match="exactly one"):
        await stores.batches.commit_row(held, both)


async def test_a_try_is_counted_once_per_lease_and_forgotten_by_whoever_counted_it(
    stores: Stores,
) -> None:
    await open_batch(stores, [4])
    first = await lease(stores)
    assert await stores.batches.count_try(first, 2) == 1
    assert await stores.batches.count_try(first, 2) == 1
    await expire(stores, first)
    second = await lease(stores, "other")
    assert second.tries == {2: 1}
    assert await stores.batches.count_try(second, 2) == 2
    assert await stores.batches.count_try(first, 2) == 0
    # Two runners at most know of a row: the one that lost it, and the one that has it.
    await stores.batches.forget_try(second, 2)
    await stores.batches.forget_try(second, 2)
    await expire(stores, second)
    third = await lease(stores)
    assert third.tries == {2: 1}
    assert await stores.batches.count_try(third, 2) == 2
    await expire(stores, third)
    await stores.batches.forget_try(third, 2)
    assert (await lease(stores)).tries == {2: 1}


async def test_one_claim_at_a_time_has_the_quarantine(stores: Stores) -> None:
    batches = stores.batches
    assert await batches.report_runner("a", 100.0, None) is None
    assert await batches.report_runner("b", 100.0, None) is None
    assert await batches.claim_quarantine("a/1", 100.0)
    assert await batches.claim_quarantine("a/1", 100.0)
    assert not await batches.claim_quarantine("b/1", 100.0)
    assert await batches.num_unquiet("a", "a/1") == 1
    assert await batches.report_runner("b", 100.0, "a/1") == "a/1"
    assert await batches.num_unquiet("a", "a/1") == 0
    assert await batches.num_unquiet("a", "a/2") == 1
    await batches.leave_quarantine("b/1")
    assert not await batches.claim_quarantine("b/1", 100.0)
    await batches.leave_quarantine("a/1")
    assert await batches.claim_quarantine("b/1", 100.0)
    assert await batches.num_unquiet("b", "b/1") == 1
    await batches.report_runner("a", 0.0, None)
    assert await batches.num_unquiet("b", "b/1") == 0


def steps_of(stores: Stores) -> LedgerSteps:
    assert isinstance(stores.batches, LedgerBatches)
    return stores.batches._steps


async def put_input(stores: Stores, num_bytes: int, filename: str = "in.jsonl") -> None:
    await stores.blobs.put("files/in", b"data")
    file = {"id": "file-in", "purpose": "batch", "bytes": num_bytes, "filename": filename}
    await stores.batches.put_file(file, "files/in")


@pytest.mark.redis
@pytest.mark.parametrize("stores", ["redis"], indirect=True)
async def test_a_finished_batch_leaves_a_stated_set_of_keys(stores: Stores) -> None:
    steps = steps_of(stores)
    assert isinstance(steps, RedisLedger)
    await put_input(stores, 4)
    batch_id = await new_batch(stores)
    claim = await stores.batches.claim_validation("w", 100.0)
    assert claim is not None
    await stores.batches.postpone_validation(batch_id, claim.number)
    await stores.batches.open_batch(batch_id, [(0, 2, 0, 20), (2, 2, 20, 20)], 4)
    tried = await lease(stores)
    await stores.batches.count_try(tried, tried.first_line)
    await stores.pairs.register_reader(batch_id, "before", 0)
    await work(stores, tried)
    await drain(stores)
    await stores.pairs.register_reader(batch_id, "after", 0)

    pattern = f"{steps._prefix}:*"
    found = {key.decode() for key in await steps._client.command("KEYS", pattern)}
    own = f"{steps._prefix}:batch:{batch_id}"
    assert found == {
        *(f"{steps._prefix}:{name}" for name in ("batches", "counter", "litter", "outputs")),
        *(f"{steps._prefix}:files:{name}" for name in ("docs", "index")),
        *(f"{own}{suffix}" for suffix in ("", ":tail", ":parts", ":readers")),
    }
    for suffix in ("tail", "readers"):
        assert 0 < await steps._client.command("TTL", f"{own}:{suffix}") <= 3600
    assert await steps._client.command("TTL", own) == -1
    fields = await steps._client.command("HKEYS", own)
    assert {name.decode() for name in fields if b":" not in name} == {
        "doc", "options", "status", "closed", "created", "expires", "version", "total",
        "completed", "pairs", "pairs_sealed", "failed", "output_file_id",
    }  # fmt: skip


@pytest.mark.parametrize("reads", ["nobody", "a reader", "a job"])
async def test_pairs_live_as_long_as_the_output_file_or_whoever_reads_them(
    stores: Stores, reads: str
) -> None:
    batch_id = await open_batch(stores, [3])
    await drain(stores)
    job = None
    if reads == "a reader":
        await stores.pairs.register_reader(batch_id, "reader", -1)
    elif reads == "a job":
        job = await stores.jobs.create_job({"model": "m", "training_file": batch_id})
    output = (await stores.batches.get_batch(batch_id))["output_file_id"]
    await stores.batches.delete_file(output)
    if reads != "nobody":
        assert len(await all_pairs(stores, batch_id)) == 3
        await stores.pairs.unregister_reader(batch_id, "reader")
        if job is not None:
            await stores.jobs.cancel_job(job["id"])
        await stores.batches.sweep()
    assert await stores.blobs.list_keys(f"batches/{batch_id}/") == []
    with pytest.raises(NotFoundError) as gone:
        await stores.pairs.read(batch_id)
    assert gone.value.code == "pairs_removed"
    assert (await stores.batches.get_batch(batch_id))["status"] == "completed"


async def test_pairs_go_when_the_output_file_expires(stores: Stores) -> None:
    batch_id = await open_batch(stores, [3])
    await drain(stores)
    output = (await stores.batches.get_batch(batch_id))["output_file_id"]
    file, blob = await stores.batches.get_file(output)
    await stores.batches.put_file({**file, "expires_at": 1}, blob)
    await stores.batches.sweep()
    await stores.batches.sweep()
    assert await stores.blobs.list_keys(f"batches/{batch_id}/") == []


async def test_the_step_that_deletes_a_file_sees_who_reads_it(stores: Stores) -> None:
    await put_input(stores, 4)
    batch_id = await new_batch(stores)
    with pytest.raises(ConflictError, match=batch_id):
        await steps_of(stores).delete_file("file-in")
    assert await stores.blobs.exists("files/in")


@pytest.mark.parametrize(("filename", "rows"), [("in.jsonl", 100), ("in.parquet", 400)])
async def test_a_batch_counts_by_its_bytes_until_it_is_validated(
    stores: Stores, filename: str, rows: int
) -> None:
    await put_input(stores, 100 * backlog.TYPICAL_ROW_BYTES, filename)
    batch_id = await new_batch(stores)
    assert await stores.batches.backlog_rows() == rows
    await stores.batches.open_batch(batch_id, [(0, 7, 0, 70)], 7)
    assert await stores.batches.backlog_rows() == 7


async def test_batches_that_are_not_validated_fill_the_backlog(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores.batches, "_limits", backlog.BacklogLimits(max_rows=150))
    await put_input(stores, 100 * backlog.TYPICAL_ROW_BYTES)
    await new_batch(stores)
    await new_batch(stores)
    with pytest.raises(OverloadedError):
        await new_batch(stores)


async def test_backlog_bytes_go_down_with_the_rows_that_are_left(stores: Stores) -> None:
    await put_input(stores, 400)
    await open_batch(stores, [4])
    steps = steps_of(stores)
    assert (await steps.backlog()).num_bytes == 400
    await stores.batches.commit_row(await lease(stores), row(0))
    assert (await steps.backlog()).num_bytes == 300


async def test_batches_with_as_many_leases_take_turns(stores: Stores) -> None:
    ids = [await open_batch(stores, [1]) for _ in range(3)]
    turns = []
    for _ in range(6):
        held = await lease(stores)
        turns.append(held.batch_id)
        await stores.batches.release(held)
    assert turns == ids + ids


async def test_a_shard_whose_lease_ran_out_goes_before_one_that_was_never_leased(
    stores: Stores,
) -> None:
    await open_batch(stores, [1, 1, 1])
    first = await lease(stores)
    await expire(stores, first)
    assert (await lease(stores)).shard == first.shard


async def test_a_batch_is_measured_from_when_its_work_began(stores: Stores) -> None:
    batch_id = await open_batch(stores, [2, 2])
    await lease(stores)
    steps = steps_of(stores)
    found = await steps.progress(batch_id)
    assert found is not None
    began = found[1].working_since
    now = began
    while now <= began:
        found = await steps.progress(batch_id)
        assert found is not None
        now = found[0].now
    assert found[1].working_since == began
    await lease(stores)
    found = await steps.progress(batch_id)
    assert found is not None
    assert found[1].working_since == began


async def test_parts_of_a_refused_seal_are_deleted(stores: Stores) -> None:
    batch_id = await open_batch(stores, [1])
    held = await lease(stores)
    await stores.batches.commit_row(held, row(0))
    await expire(stores, held)
    await lease(stores, "other")
    with pytest.raises(LeaseLostError):
        await stores.batches.seal_shard(held)
    assert await stores.blobs.list_keys(f"batches/{batch_id}/rows/") == []


async def test_a_batch_whose_files_cannot_be_written_is_not_said_to_be_finished(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = await open_batch(stores, [1])
    await work(stores, await lease(stores))

    async def fails(*_: object) -> int:
        raise StorageError("full")

    with monkeypatch.context() as patch:
        patch.setattr(stores.blobs, "concat", fails)
        with pytest.raises(StorageError, match="full"):
            await stores.batches.finalize_ready("w", 0.0)
    assert (await stores.batches.get_batch(batch_id))["status"] == "finalizing"
