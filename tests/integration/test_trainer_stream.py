"""A whole job on Ray Train, fed by a batch that still runs: killed, resumed, published.

The rewards of pair ``seq`` differ by ``2 ** seq``, so that the mean margin that a step reports says
which pairs went into it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from actors.fake_engine import FakeEngine
from actors.generator import GeneratorReplica
from mora_serve.config import Settings
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
from trainer.dpo import load_policy, load_tokenizer, run_dpo
from trainer.job import read_job
from trainer.publish import LORA_FILES
from trainer.source import ListFeed, PairSource, Position, ResumableRows
from trainer.tiny_model import ensure_tiny_model

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


def trained_pairs(step: Mapping[str, Any]) -> list[int]:
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


def stored_job(model: str, batch_id: str) -> dict[str, Any]:
    return {
        "id": "ftjob-9", "model": model, "training_file": batch_id, "seed": 7,
        "mora": {"max_steps": NUM_STEPS, "checkpoint_steps": 2},
    }  # fmt: skip


async def create(stores: Stores, model: str, batch_id: str) -> str:
    return str((await stores.jobs.create_job(stored_job(model, batch_id)))["id"])


class Unbroken:
    """The same job in this process, on the same pairs from memory; hooks that keep all it says."""

    def __init__(self, config: Settings, folder: Path) -> None:
        self.steps: dict[int, Mapping[str, float]] = {}
        self.weights: dict[str, Any] = {}
        model = str(ensure_tiny_model(folder / "tiny"))
        job = read_job(stored_job(config.policy.model, "batch_1"), config.trainer)
        pairs = [json.loads(pair(seq)) for seq in range(NUM_STEPS * PAIRS_PER_ROW)]
        state = run_dpo(
            job, ResumableRows(PairSource(ListFeed(pairs)), Position()),
            load_policy(model, lora=True, use_gpu=False), load_tokenizer(model), self,
            output_dir=folder / "out", dimensions=config.dimensions,
        )  # fmt: skip
        assert state is not None
        self.trained_tokens = state.trained_tokens

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps[step] = metrics

    def checkpoint(self, folder: Path, step: int, metrics: Mapping[str, float]) -> None:
        self.weights = load_file(folder / "adapter_model.safetensors")

    def should_stop(self) -> bool:
        return False


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
    unbroken = Unbroken(config, tmp_path / "unbroken")
    expected = unbroken.steps
    async with opened(config) as stores, launcher(stores, config, ray_address):
        job, found = await killed_run(stores, config.policy.model, tmp_path)

        assert [trained_pairs(expected[step]) for step in sorted(expected)] == [
            [2 * step, 2 * step + 1] for step in range(NUM_STEPS)
        ]
        assert expected[NUM_STEPS]["loss"] < 0.5 * expected[1]["loss"]
        assert {data["step"] for data in found} == set(expected)
        for data in found:
            # Steps behind the last checkpoint are taken again: the same ones on the same pairs.
            assert trained_pairs(data) == trained_pairs(expected[data["step"]])
            for name in COMPARED:
                assert data[name] == pytest.approx(expected[data["step"]][name], rel=1e-4), name
        assert job["restarts"] == 2
        assert job["trained_tokens"] == unbroken.trained_tokens
        await check_version(stores, config, unbroken.weights)


async def test_two_workers_share_a_stream_and_go_on_together_when_one_is_killed(
    tmp_path: Path, redis_url: str, ray_address: str
) -> None:
    dies_after = 3
    config = settings(tmp_path, redis_url, num_workers=2, batch_size=1)
    async with opened(config) as stores, launcher(stores, config, ray_address):
        live = await Stream.open(stores)
        job_id = await create(stores, config.policy.model, live.batch_id)

        async def reported() -> bool:
            return any(data["step"] == dies_after for data in await metrics(stores, job_id))

        async def checkpoint_kept() -> bool:
            """Whether Ray Train would find it again: it notes a checkpoint some time later."""
            notes = tmp_path.glob("train/*/checkpoint_manager_snapshot.json")
            return any('"checkpoint_' in note.read_text() for note in notes)

        for line in range(dies_after):
            await live.commit(line)
        await eventually(reported, log_of(tmp_path, job_id))
        await eventually(checkpoint_kept, log_of(tmp_path, job_id))
        kill_worker(num_workers=2)
        for line in range(dies_after, NUM_STEPS):
            await live.commit(line)
        job = await ended(stores, job_id, tmp_path)
        found = await metrics(stores, job_id)
        assert job["restarts"] == 1
        assert {data["step"] for data in found} == set(range(1, NUM_STEPS + 1))
        for data in found:
            step = data["step"]
            assert trained_pairs(data) == [2 * step - 2, 2 * step - 1]
        assert [data["step"] for data in found] == [1, 2, 3, *range(3, NUM_STEPS + 1)]
        (version,) = await stores.jobs.list_policies()
        assert (await stores.jobs.current_policy())[0] == version["id"]
        folder = Path(version["uri"])
        assert sorted(path.name for path in folder.iterdir()) == sorted(LORA_FILES)


async def killed_run(
    stores: Stores, model: str, data_dir: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Job and metrics of a run on a stream that grows, whose worker and driver are each killed."""
    worker_dies_after, driver_dies_after = random.Random(SEED).sample(range(1, NUM_STEPS), 2)
    live = await Stream.open(stores)
    job_id = await create(stores, model, live.batch_id)

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


async def check_version(stores: Stores, config: Settings, weights: dict[str, Any]) -> None:
    """The version has the unbroken run's weights, and a generator that never polls serves it."""
    (version,) = await stores.jobs.list_policies()
    assert (await stores.jobs.current_policy())[0] == version["id"] == "policy-9"
    published = load_file(Path(version["uri"]) / "adapter_model.safetensors")
    assert any(abs(value).max() > 0 for name, value in published.items() if "lora_B" in name)
    for name, value in weights.items():
        assert published[name] == pytest.approx(value, rel=1e-3, abs=1e-5)
    generator = GeneratorReplica(
        FakeEngine(config.policy), stores.jobs, config.policy.model, poll_interval_s=3600
    )
    await generator.start()
    asked = GenerationRequest((Message("user", "Hi"),), Sampling(), "policy-9")
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
        job_id = await create(stores, config.policy.model, batch["id"])

        async def failed() -> dict[str, Any] | None:
            current = await stores.jobs.get_job(job_id)
            return current if current["status"] == "failed" else None

        job = await eventually(failed, log_of(tmp_path, job_id))
        assert job["error"]["code"] == "no_pairs"
