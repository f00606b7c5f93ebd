"""A whole job on Ray Train, fed by a batch that still runs: killed, resumed, published.

The rewards of pair ``seq`` differ by ``2 ** seq``, so that the mean margin that a step reports says
which pairs went into it.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from actors.fake_engine import FakeEngine
from actors.generator import GeneratorReplica
from mora_serve.ports import Lease, RowCommit
from mora_serve.store import Stores
from mora_serve.types import Generation, GenerationRequest, Message, Sampling
from tests.integration.training import (
    eventually,
    kill_driver,
    kill_worker,
    launcher,
    metrics,
    opened,
    ray_address,
    settings,
)
from tests.redis_fixtures import redis_server, redis_url

__all__ = ["ray_address", "redis_server", "redis_url"]
pytestmark = [pytest.mark.ray, pytest.mark.redis, pytest.mark.slow]

SHARDS, ROWS = 2, 4
NUM_STEPS = SHARDS * ROWS
PAIRS_PER_ROW = 2
"""As many as a step takes, so that every committed row is one step."""
SEED = 5
COMPARED = ("loss", "margins/helpful", "rewards/margins", "rewards/accuracies", "learning_rate",
            "grad_norm")  # fmt: skip


def pair(seq: int) -> bytes:
    def turn(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    return json.dumps(
        {
            "prompt": turn("user", f"question {seq}"),
            "chosen": turn("assistant", "yes, gladly"),
            "rejected": turn("assistant", "no, never"),
            "stage": None,
            "chosen_scores": {"helpful": {"value": 2.0**seq, "raw": 0.0}},
            "rejected_scores": {"helpful": {"value": 0.0, "raw": 0.0}},
        }
    ).encode()


def trained_pairs(step: dict[str, Any]) -> list[int]:
    """The pairs of a step, by its mean margin."""
    total = round(step["margins/helpful"] * PAIRS_PER_ROW)
    return [seq for seq in range(NUM_STEPS * PAIRS_PER_ROW) if total >> seq & 1]


class Stream:
    """A batch whose rows are committed one at a time; each is the data of one step."""

    def __init__(self, stores: Stores, batch_id: str) -> None:
        self._stores = stores
        self._held: Lease | None = None
        self.batch_id = batch_id

    @classmethod
    async def open(cls, stores: Stores) -> Stream:
        batch = await stores.batches.create_batch(
            {"endpoint": "/v1/rewrites", "input_file_id": "file-in"}, {}, None, "hash"
        )
        bounds = [(first * ROWS, ROWS, first * 10, 10) for first in range(SHARDS)]
        await stores.batches.open_batch(batch["id"], bounds, NUM_STEPS)
        return cls(stores, str(batch["id"]))

    async def commit(self, line: int) -> None:
        """Row ``line``; a full shard is sealed and the last one ends the batch."""
        if self._held is None:
            self._held = await self._stores.batches.lease_shard("worker", 600.0)
        assert self._held is not None
        pairs = tuple(pair(PAIRS_PER_ROW * line + place) for place in range(PAIRS_PER_ROW))
        await self._stores.batches.commit_row(self._held, RowCommit(line, b"{}", None, pairs))
        if line % ROWS == ROWS - 1:
            await self._stores.batches.seal_shard(self._held)
            self._held = None
        if line == NUM_STEPS - 1:
            await self._stores.batches.finalize_ready("worker", 60.0)


async def create(stores: Stores, model: str, batch_id: str, name: str) -> str:
    job = await stores.jobs.create_job(
        {
            "id": f"ftjob-{name}", "model": model, "training_file": batch_id, "seed": 7,
            "mora": {"max_steps": NUM_STEPS, "checkpoint_steps": 2},
        }
    )  # fmt: skip
    return str(job["id"])


def log_of(data_dir: Path, job_id: str) -> Path:
    return data_dir / "logs" / f"train-{job_id}.log"


async def ended(stores: Stores, job_id: str, data_dir: Path) -> dict[str, Any]:
    async def look() -> dict[str, Any] | None:
        current = await stores.jobs.get_job(job_id)
        return current if current["status"] in ("succeeded", "failed") else None

    log = log_of(data_dir, job_id)
    job: dict[str, Any] = await eventually(look, log)
    assert job["status"] == "succeeded", log.read_text()[-4000:]
    return job


async def test_killed_workers_and_drivers_leave_no_trace_in_what_is_trained(
    tmp_path: Path, redis_url: str, ray_address: str
) -> None:
    config = settings(tmp_path, redis_url)
    model = config.policy.model
    async with opened(config) as stores, launcher(stores, config, ray_address):
        await stores.jobs.publish_policy(
            {"id": model, "kind": "base", "uri": None}, make_current=True
        )
        whole = await Stream.open(stores)
        for line in range(NUM_STEPS):
            await whole.commit(line)
        unbroken = await create(stores, model, whole.batch_id, "unbroken")
        expected_job = await ended(stores, unbroken, tmp_path)
        expected = await metrics(stores, unbroken)
        job, found = await killed_run(stores, model, tmp_path)

        assert [trained_pairs(data) for data in expected] == [
            [2 * step, 2 * step + 1] for step in range(NUM_STEPS)
        ]
        assert expected[-1]["loss"] < 0.5 * expected[0]["loss"]
        by_step = {data["step"]: data for data in expected}
        assert {data["step"] for data in found} == set(by_step)
        for data in found:
            # Steps behind the last checkpoint are taken again: the same ones on the same pairs.
            assert trained_pairs(data) == trained_pairs(by_step[data["step"]])
            for name in COMPARED:
                assert data[name] == pytest.approx(by_step[data["step"]][name], rel=1e-4), name
        assert job["restarts"] == 2
        assert job["trained_tokens"] == expected_job["trained_tokens"]
        assert found[-1]["wait_for_data_seconds"] > 0
        await check_versions(stores, model)


async def killed_run(
    stores: Stores, model: str, data_dir: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Job and metrics of a run on a stream that grows, whose worker and driver are each killed."""
    worker_dies_after, driver_dies_after = random.Random(SEED).sample(range(1, NUM_STEPS), 2)
    live = await Stream.open(stores)
    job_id = await create(stores, model, live.batch_id, "broken")

    async def reported() -> bool:
        return any(data["step"] == step for data in await metrics(stores, job_id))

    for step in range(1, NUM_STEPS + 1):
        await live.commit(step - 1)
        await eventually(reported, log_of(data_dir, job_id))
        if step == worker_dies_after:
            kill_worker()
        elif step == driver_dies_after:
            kill_driver(job_id)
    return await ended(stores, job_id, data_dir), await metrics(stores, job_id)


async def check_versions(stores: Stores, model: str) -> None:
    """Both runs published the same weights, and a generator that never polls serves them."""
    versions = {version["id"]: version for version in await stores.jobs.list_policies()}
    unbroken, broken = (
        load_file(Path(versions[name]["uri"]) / "adapter_model.safetensors")
        for name in ("policy-unbroken", "policy-broken")
    )
    assert any(abs(value).max() > 0 for name, value in broken.items() if "lora_B" in name)
    for name, value in unbroken.items():
        assert value == pytest.approx(broken[name], rel=1e-3, abs=1e-6)
    assert (await stores.jobs.current_policy())[0] == "policy-broken"
    policy = settings(Path(), "redis://unused").policy
    generator = GeneratorReplica(FakeEngine(policy), stores.jobs, model, poll_interval_s=3600)
    await generator.start()
    asked = GenerationRequest((Message("user", "Hi"),), Sampling(), "policy-unbroken")
    assert isinstance((await generator.generate([asked]))[0], Generation)
    await generator.stop()


async def test_a_batch_without_pairs_fails_its_job_with_the_reason(
    tmp_path: Path, redis_url: str, ray_address: str
) -> None:
    config = settings(tmp_path, redis_url)
    async with opened(config) as stores, launcher(stores, config, ray_address):
        batch = await stores.batches.create_batch(
            {"endpoint": "/v1/rewrites", "input_file_id": "file-in"}, {}, None, "hash"
        )
        await stores.batches.open_batch(batch["id"], [(0, 1, 0, 10)], 1)
        held = await stores.batches.lease_shard("worker", 600.0)
        assert held is not None
        await stores.batches.commit_row(held, RowCommit(0, b"{}", None))
        await stores.batches.seal_shard(held)
        await stores.batches.finalize_ready("worker", 60.0)
        job_id = await create(stores, config.policy.model, batch["id"], "empty")

        async def failed() -> dict[str, Any] | None:
            current = await stores.jobs.get_job(job_id)
            return current if current["status"] == "failed" else None

        job = await eventually(failed, log_of(tmp_path, job_id))
        assert job["error"]["code"] == "no_pairs"
